"""Images for training: decoded once, kept in memory as uint8, drawn in an order that depends on the step alone.

    images = load_images(config.data, "train")                          # ImageSet
    chosen = step_indices(len(images), 64, seed=0, step=17)             # (64,), the same on every process
    batch = to_float(augment(images.images[chosen], ["shift"], generator))   # (64, C, H, H) in [-1, 1]

A source is Fashion-MNIST, a folder of class folders, Parquet files or a Hub id. It becomes a list of encoded images with
labels (`_Listing`), which is then split, limited and decoded in the same way for all.
"""

import functools
import gzip
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from .config import DataConfig

logger = logging.getLogger(__name__)

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # where the Debian package puts it
FASHION_MNIST_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                         "Ankle boot"]
FASHION_MNIST_PREFIX = {"train": "train", "test": "t10k"}  # split -> start of the file names
HELD_OUT = 0.1  # share of each class kept for measuring, where a source has no split of its own for that
CROP_SCALE = (0.8, 1.0)  # side of a random crop / side of the image


@dataclass
class ImageSet:
    """One split in memory."""

    images: torch.Tensor  # (n, C, H, H) uint8
    labels: torch.Tensor  # (n,) int64, in 0..len(class_names)-1
    class_names: list[str]  # the same for every split of a source
    num_broken: int  # images that could not be read and are not in here

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class _Listing:
    """A source before decoding."""

    read: Callable[[int], Image.Image]  # opens image i; any exception means that it is broken
    keys: list[str]  # (n,) what identifies each image, for reports and for the held-out choice
    labels: np.ndarray  # (n,) int64
    class_names: list[str]
    one_pool: bool  # True: training and evaluation share these images, so a part has to be held out


def load_images(cfg: DataConfig, split: str) -> ImageSet:
    """Read all images of a split.

    Args:
        cfg: where they are and what they become.
        split: "train" or "eval"; `cfg.train_split` and `cfg.eval_split` say how the source calls it. Where both names are
            equal, or the source knows no splits, a fixed tenth of each class is held out for "eval".

    Raises:
        FileNotFoundError, ValueError: the source is missing or unfit, in one sentence that says what would be right.
            A broken image raises nothing: it is counted, reported once at the end and left out.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split is 'train' or 'eval', not {split!r}.")
    listing = _list_source(cfg, split)
    chosen = np.arange(len(listing.labels))
    if listing.one_pool:
        chosen = np.flatnonzero(_held_out(listing.keys, listing.labels) == (split == "eval"))
    if cfg.limit and cfg.limit < len(chosen):
        # A fixed random sample: many sources are sorted by class, and their first n images would all be of one.
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0)).numpy()
        chosen = chosen[np.sort(order[:cfg.limit])]
    if not len(chosen):
        raise ValueError(f"{cfg.source} has no images for {split!r}.")
    images, good = _decode(listing, chosen, cfg)
    labels = torch.from_numpy(listing.labels[chosen[good]]).long()
    names = _readable(listing.class_names, cfg.class_names)
    return ImageSet(torch.from_numpy(images), labels, names, int((~good).sum()))


def preprocess_image(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any PIL image as uint8 (channels, size, size): upright, flattened on white, centre-cropped, Lanczos-resized."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = np.asarray(image)  # (H, W) or (H, W, C)
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1.0


def step_indices(n: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Images of one optimiser step, over all processes: a pure function, so a resumed run sees what it would have seen.

    Each epoch is a permutation of 0..n-1 of its own; what does not fill a last batch is left out of that epoch.

    Returns:
        (batch_size,) int64.
    """
    steps_per_epoch = n // batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"There are {n} training images, fewer than one batch of {batch_size}: lower batch_size.")
    epoch, position = divmod(step, steps_per_epoch)
    return _permutation(n, seed, epoch)[position * batch_size:(position + 1) * batch_size].clone()


def augment(images: torch.Tensor, names: list[str], generator: torch.Generator, rank: int = 0, world: int = 1
            ) -> torch.Tensor:
    """Random variants of uint8 images (B, C, H, W), same shape, on their device.

    Numbers are drawn for the whole step, world * B images, and this process uses those of its slice: with equal generators,
    what happens to an image does not depend on the number of processes.

    Args:
        names: applied in this order. "flip": mirrored left to right, half of the time; "shift": by -1, 0 or 1 pixels down
            and across, edges repeated; "crop": a square of 0.8 to 1 of the side anywhere, resized back.
        generator: on the CPU or the images' device.
        rank, world: `images` are the rank-th of `world` equal, consecutive slices of the step.
    """
    mine = slice(rank * len(images), (rank + 1) * len(images))

    def uniform(columns: int) -> torch.Tensor:
        drawn = torch.rand(world * len(images), columns, generator=generator, device=generator.device)
        return drawn[mine].to(images.device)  # (B, columns) in [0, 1)

    for name in names:
        if name == "flip":
            images = torch.where(uniform(1)[:, :, None, None] < 0.5, images.flip(-1), images)
        elif name == "shift":
            images = _shift(images, (uniform(2) * 3).long() - 1)
        elif name == "crop":
            images = _crop(images, uniform(3))
        else:
            raise ValueError(f"Unknown augmentation {name!r}: take 'flip', 'shift' or 'crop'.")
    return images


# ---------------------------------------------------------------------------------------------------------------- sources


def _list_source(cfg: DataConfig, split: str) -> _Listing:
    if cfg.source == "fashion-mnist":
        return _list_fashion_mnist(cfg, split)
    path = Path(cfg.source).expanduser()
    if path.is_dir() and not next(path.rglob("*.parquet"), None):
        return _list_class_folders(cfg, path, split)
    if path.is_dir() or path.suffix == ".parquet" or "*" in cfg.source:
        return _list_parquet(cfg, path, split)
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", cfg.source) or cfg.source.startswith("."):
        raise FileNotFoundError(f"data.source={cfg.source!r} is not a folder or Parquet file that exists here, nor can it be "
                                "a Hub id; give 'fashion-mnist', a folder of class folders, Parquet or a Hub id.")
    return _list_hub(cfg, split)


def _list_fashion_mnist(cfg: DataConfig, split: str) -> _Listing:
    root = Path(cfg.root or os.environ.get("FASHION_MNIST_DIR") or FASHION_MNIST_DIR).expanduser()
    name = cfg.train_split if split == "train" else cfg.eval_split
    if name not in FASHION_MNIST_PREFIX:
        raise ValueError(f"Fashion-MNIST has the splits 'train' and 'test', not {name!r}.")
    pixels = _read_idx(root, f"{FASHION_MNIST_PREFIX[name]}-images-idx3-ubyte", 3)  # (n, 28, 28)
    labels = _read_idx(root, f"{FASHION_MNIST_PREFIX[name]}-labels-idx1-ubyte", 1)  # (n,)
    if len(pixels) != len(labels):
        raise ValueError(f"{root} holds {len(pixels)} images and {len(labels)} labels of split {name!r}.")
    if cfg.image_size != pixels.shape[-1]:
        # Black all round costs nothing and keeps pixels as they are, up to 32, which powers of two divide.
        margin = max(0, 32 - pixels.shape[-1])
        before, after = margin // 2, margin - margin // 2
        pixels = np.pad(pixels, ((0, 0), (before, after), (before, after)))
    keys = [f"{name} {i}" for i in range(len(labels))]
    return _Listing(lambda i: Image.fromarray(pixels[i]), keys, labels.astype(np.int64), FASHION_MNIST_CLASSES,
                    cfg.train_split == cfg.eval_split)


def _read_idx(root: Path, name: str, dimensions: int) -> np.ndarray:
    """A uint8 array out of an idx file, plain or gzipped."""
    path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"Fashion-MNIST is not in {root}, which has no {name}(.gz): `apt-get install "
                                "dataset-fashion-mnist`, or set data.root to the folder of the four idx files.")
    try:
        content = (gzip.open if path.suffix == ".gz" else open)(path).read()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again.") from error
    start = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(content[4:start].ljust(4 * dimensions, b"\0"), ">u4"))
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + np.prod(shape):
        raise ValueError(f"{path} is not a whole idx file of unsigned bytes in {dimensions} dimensions: fetch it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _list_class_folders(cfg: DataConfig, root: Path, split: str) -> _Listing:
    """ROOT/SPLIT/CLASS/**/image, or ROOT/CLASS/**/image."""
    has_splits = (root / cfg.train_split).is_dir()
    train_root = root / cfg.train_split if has_splits else root
    own_root = root / (cfg.train_split if split == "train" else cfg.eval_split) if has_splits else root
    if not own_root.is_dir():
        raise FileNotFoundError(f"{root} has the folders {_names(_folders(root))} but no {own_root.name!r}: set "
                                "data.eval_split to one of them (to hold out a tenth: the same as data.train_split).")
    classes = _folders(train_root)  # the training split alone decides which classes there are
    if not classes:
        raise ValueError(f"{train_root} has no class folders: images of one kind belong together in a folder named like it.")
    unknown = sorted(set(_folders(own_root)) - set(classes))
    if unknown:
        raise ValueError(f"{own_root} has classes that {train_root} has not: {_names(unknown)}.")
    suffixes = set(Image.registered_extensions())
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = [p for p in sorted((own_root / name).rglob("*"))
                 if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()]
        paths += found
        labels += [label] * len(found)
    keys = [p.relative_to(own_root).as_posix() for p in paths]
    return _Listing(lambda i: Image.open(paths[i]), keys, np.array(labels, np.int64), classes,
                    not has_splits or cfg.train_split == cfg.eval_split)


def _list_parquet(cfg: DataConfig, path: Path, split: str) -> _Listing:
    """Files named like their split (train-00000-of-00005.parquet, train/0.parquet), or of one pool."""
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else [Path(p) for p in sorted(glob(str(path), recursive=True))]
    if not found:
        raise FileNotFoundError(f"No Parquet file matches data.source={cfg.source!r}.")

    def of_split(name: str) -> list[str]:
        return [str(p) for p in found if p.parent.name == name or re.split(r"[-_.]", p.name)[0] == name]

    train, own = of_split(cfg.train_split), of_split(cfg.train_split if split == "train" else cfg.eval_split)
    one_pool = cfg.train_split == cfg.eval_split
    if not train and not of_split(cfg.eval_split):
        train = own = [str(p) for p in found]
        one_pool = True
    if not train or not own:
        raise ValueError(f"{cfg.source} has no Parquet file of split {cfg.eval_split if train else cfg.train_split!r}, only "
                         f"of {_names(sorted({re.split(r'[-_.]', p.name)[0] for p in found}))}: set data.train_split and "
                         "data.eval_split (both the same: a tenth is held out).")
    return _list_dataset(cfg, lambda files: _load_dataset("parquet", data_files=files, split="train"), train, own, one_pool)


def _list_hub(cfg: DataConfig, split: str) -> _Listing:
    own = cfg.train_split if split == "train" else cfg.eval_split
    return _list_dataset(cfg, lambda name: _load_dataset(cfg.source, split=name), cfg.train_split, own,
                         cfg.train_split == cfg.eval_split)


def _load_dataset(source: str, **arguments):
    import datasets  # slow to import, and Fashion-MNIST and folders do without

    try:
        return datasets.load_dataset(source, **arguments)
    except Exception as error:  # every builder and every network layer raises its own kinds
        what = arguments.get("data_files") or source
        raise ValueError(f"`datasets` cannot load {what} ({type(error).__name__}: {str(error).splitlines()[0][:200]}): "
                         "check data.source and the splits.") from error


def _list_dataset(cfg: DataConfig, load: Callable, train_part, own_part, one_pool: bool) -> _Listing:
    import datasets

    rows = load(own_part)
    for key, column in (("image_column", cfg.image_column), ("label_column", cfg.label_column)):
        if column not in rows.column_names:
            raise ValueError(f"{cfg.source} has no column {column!r} but {_names(rows.column_names)}: set data.{key}.")
    feature = rows.features[cfg.label_column]
    values = rows[cfg.label_column][:]
    if isinstance(feature, datasets.ClassLabel):
        names, labels = feature.names, values
    else:  # numbers or strings: the training split alone decides which classes there are
        kinds = sorted(set(values if own_part == train_part else load(train_part)[cfg.label_column][:]))
        index = {kind: i for i, kind in enumerate(kinds)}
        names, labels = [str(kind) for kind in kinds], [index.get(value, -1) for value in values]
    labels = np.array([-1 if label is None else label for label in labels], np.int64)
    if (labels < 0).any():
        raise ValueError(f"{cfg.source} has {(labels < 0).sum()} images of {own_part} without a class known from training.")
    encoded = rows.cast_column(cfg.image_column, datasets.Image(decode=False)).select_columns([cfg.image_column])

    def read(i: int) -> Image.Image:
        item = encoded[i][cfg.image_column]
        return Image.open(io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"])

    return _Listing(read, [f"row {i}" for i in range(len(labels))], labels, names, one_pool)


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _names(names: list[str], most: int = 8) -> str:
    return ", ".join(repr(name) for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ------------------------------------------------------------------------------------------------------ split and decoding


def _held_out(keys: list[str], labels: np.ndarray) -> np.ndarray:
    """(n,) bool: a tenth of each class, at least one image, by a hash of the key, so that new images move few old ones."""
    digest = np.array([int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "big") for key in keys], np.uint64)
    held = np.zeros(len(keys), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        held[members[np.argsort(digest[members], kind="stable")[:count]]] = True
    return held


def _decode(listing: _Listing, chosen: np.ndarray, cfg: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (m, C, H, H) uint8 of the chosen images that are whole, and which those are, (n,) bool."""
    images = np.empty((len(chosen), cfg.channels, cfg.image_size, cfg.image_size), np.uint8)
    good = np.zeros(len(chosen), bool)

    def work(position: int) -> None:
        try:
            with listing.read(int(chosen[position])) as image:
                # JPEG decodes at 1/2, 1/4 or 1/8 at once; twice the wanted size leaves the resizing filter enough to do.
                image.draft(None, (2 * cfg.image_size, 2 * cfg.image_size))
                images[position] = preprocess_image(image, cfg.image_size, cfg.channels)
            good[position] = True
        except MemoryError:
            raise
        except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more on broken files
            pass

    main = int(os.environ.get("LOCAL_RANK", 0)) == 0
    with ThreadPool(len(os.sched_getaffinity(0))) as pool:  # PIL lets other threads run while it decodes
        done = pool.imap_unordered(work, range(len(chosen)), chunksize=64)
        for _ in tqdm(done, "reading images", len(chosen), unit=" images", delay=2, leave=False, disable=not main):
            pass
    if not good.any():
        raise ValueError(f"None of the {len(chosen)} images of {cfg.source} can be read.")
    if not good.all():
        broken = [listing.keys[i] for i in chosen[~good]]
        logger.warning("%d of %d images of %s are broken and left out: %s", len(broken), len(chosen), cfg.source,
                       _names(broken, 3))
        images = images[good]
    return images, good


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as "L". PIL itself would clip instead of scaling."""
    pixels = np.asarray(image).astype(np.float32)
    top = pixels.max(initial=0)
    if image.mode == "F":
        scale = 255.0 if top <= 1 else 1.0
    else:  # mode "I" is wide, but holds whatever the file had
        scale = 1 / 257 if image.mode != "I" or top > 255 else 1.0
    return Image.fromarray((pixels * scale).round().clip(0, 255).astype(np.uint8))


def _readable(names: list[str], mapping_file: str) -> list[str]:
    """Class names through the JSON file of `DataConfig.class_names`; a readable name of several classes keeps its raw one."""
    if not mapping_file:
        return list(names)
    try:
        mapping = json.loads(Path(mapping_file).expanduser().read_text(encoding="utf-8"))
        if not isinstance(mapping, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise ValueError(f"data.class_names={mapping_file!r} is not a JSON file of raw to readable names ({error}).") from error
    firsts = []
    for name in names:
        value = mapping.get(name, name)
        firsts.append((value.split(",")[0] if isinstance(value, str) else str(value[0])).strip())
    return [first if firsts.count(first) == 1 else f"{first} ({raw})" for raw, first in zip(names, firsts, strict=True)]


# ------------------------------------------------------------------------------------------------------------------ steps


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)


def _shift(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Moves (B, C, H, W) images down and right by integer `offsets` (B, 2); what comes in repeats the edge."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)  # (B, W)
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))


def _crop(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Square crops of (B, C, H, W) images resized back; `uniform` (B, 3) in [0, 1) gives side, x and y."""
    low, high = CROP_SCALE
    side = low + (high - low) * uniform[:, 0]  # (B,)
    shift = (2 * uniform[:, 1:] - 1) * (1 - side)[:, None]  # (B, 2), in grid_sample's units: the image spans -1..1
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cropped.round().clamp(0, 255).to(torch.uint8)
