"""Where images come from: each kind of source as one `Listing`, a list of images not yet decoded.

Fashion-MNIST's idx files, folders of class folders, Parquet files, and what `datasets` loads from the Hub.
"""

import errno
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..configs.config import DataConfig
from .folders import class_folders, parquet_files, walk
from .listing import (
    Listing,
    check_columns,
    classes_of,
    files_by_split,
    is_hub_id,
    own_split,
    quoted,
    reason,
    take_part,
)

if TYPE_CHECKING:
    import datasets

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
FASHION_MNIST_FILES = {"train": "train", "test": "t10k"}  # split: how its file names start
FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
CLASS_FOLDERS = 2  # to be raised when `folders` changes what counts: packs made before are made anew
FASHION_MNIST_SIZE = 32  # 28 pixels and a black margin: unlike 28, patches of 8 or 16 pixels tile it


def list_images(cfg: DataConfig, split: str) -> Listing:
    """The images of split "train" or "eval".

    Raises:
        FileNotFoundError, ValueError: the source is missing or unfit; one sentence, and what would be right.
    """
    if cfg.source == "fashion-mnist":
        return _fashion_mnist(cfg, split)
    if "://" in cfg.source:
        raise ValueError(
            f"data.source={cfg.source!r} is an address, which can only be streamed: set data.decode=stream."
        )
    path = Path(os.path.expanduser(cfg.source))
    if path.is_dir():
        entries = walk(path)
        files = parquet_files(cfg, path, entries)
        return _parquet(cfg, files, path, split) if files else class_folders(cfg, path, entries, split)
    if path.suffix == ".parquet" or "*" in cfg.source:
        return _parquet(cfg, _matching(path), None, split)
    if path.exists() or not is_hub_id(cfg.source):
        what = "is a file, but not Parquet" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"data.source={cfg.source!r} {what}: give 'fashion-mnist', a folder of class folders, a Parquet "
            "file, glob or folder, or a Hub id such as 'owner/name'."
        )
    return _split_of(cfg, split, lambda name: _load(cfg.source, split=name))


def source_version(cfg: DataConfig) -> str:
    """A digest of what a source holds now: names, sizes and times of its files; of a Hub id, its revision.

    Raises:
        ValueError: the Hub has no such data set.
    """
    path = Path(os.path.expanduser(cfg.source))
    if cfg.source == "fashion-mnist":
        path = _fashion_mnist_root(cfg)
    if path.is_dir():
        entries = walk(path)
        found = [("/".join(entry.parts), entry.size, entry.time) for entry in entries if not entry.left_out]
        if cfg.source != "fashion-mnist" and not parquet_files(cfg, path, entries):
            found.append(("class folders", CLASS_FOLDERS, 0))
        return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()
    if path.exists() or not is_hub_id(cfg.source):
        files = [(name, os.stat(name)) for name in _matching(path)]
    else:
        rows = [_load(cfg.source, split=name) for name in (cfg.train_split, cfg.eval_split)]
        return " ".join(part._fingerprint for part in rows)
    found = sorted((os.path.relpath(name, path), stat.st_size, stat.st_mtime_ns) for name, stat in files)
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _matching(path: Path) -> list[str]:
    """The file of that name, or those that match it as a pattern."""
    return [str(path)] if path.is_file() else sorted(glob(str(path), recursive=True))


# Fashion-MNIST --------------------------------------------------------------------------------------------


def _fashion_mnist_root(cfg: DataConfig) -> Path:
    return Path(os.path.expanduser(cfg.root or os.environ.get("FASHION_MNIST_DIR") or FASHION_MNIST_DIR))


def _fashion_mnist(cfg: DataConfig, split: str) -> Listing:
    root = _fashion_mnist_root(cfg)
    name = own_split(cfg, split)
    if name not in FASHION_MNIST_FILES:
        raise ValueError(f"Fashion-MNIST has the splits 'train' and 'test', not {name!r}.")
    pixels = _read_idx(root, f"{FASHION_MNIST_FILES[name]}-images-idx3-ubyte", 3)  # (n, 28, 28)
    labels = _read_idx(root, f"{FASHION_MNIST_FILES[name]}-labels-idx1-ubyte", 1)  # (n,)
    if len(pixels) != len(labels):
        raise ValueError(f"{root} holds {len(pixels)} images but {len(labels)} labels of split {name!r}.")
    if labels.max(initial=0) >= len(FASHION_MNIST_CLASSES):
        raise ValueError(f"{root} holds labels up to {labels.max()}, not Fashion-MNIST's 0 to 9.")
    if cfg.image_size != pixels.shape[-1]:
        margin = max(0, FASHION_MNIST_SIZE - pixels.shape[-1])
        sides = (margin // 2, margin - margin // 2)
        pixels = np.pad(pixels, ((0, 0), sides, sides))  # (n, 32, 32)
    keys = [f"{name} {i}" for i in range(len(labels))]
    labels = labels.astype(np.int64)
    listing = Listing(lambda i: Image.fromarray(pixels[i]), keys, labels, FASHION_MNIST_CLASSES, pixels)
    return take_part(listing, split) if cfg.train_split == cfg.eval_split else listing


def _read_idx(root: Path, name: str, dimensions: int) -> np.ndarray:
    """A uint8 array out of an idx file, plain or gzipped."""
    path = next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {root}, which has no {name}(.gz): `apt-get install "
            "dataset-fashion-mnist`, or set data.root to the folder of the four idx files."
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again.") from error
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start].ljust(4 * dimensions, b"\0"), ">u4").astype(np.int64)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + shape.prod():
        raise ValueError(f"{path} is not a whole idx file of {dimensions} dimensions: fetch it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# Parquet and the Hub --------------------------------------------------------------------------------------


def _parquet(cfg: DataConfig, files: list[str], folder: Path | None, split: str) -> Listing:
    by_split = files_by_split(cfg, files, folder)
    if by_split is None:
        rows = _load("parquet", files=files, split="train")
        return take_part(_rows(cfg, rows, lambda: rows), split)

    def load(name: str) -> "datasets.Dataset":
        # "train" is what the Parquet builder calls whatever it is given.
        return _load("parquet", files=by_split[name], split="train")

    return _split_of(cfg, split, load)


def _split_of(cfg: DataConfig, split: str, load: Callable[[str], "datasets.Dataset"]) -> Listing:
    own = load(own_split(cfg, split))
    listing = _rows(cfg, own, lambda: own if split == "train" else load(cfg.train_split))
    return take_part(listing, split) if cfg.train_split == cfg.eval_split else listing


def _load(source: str, split: str, files: list[str] | None = None) -> "datasets.Dataset":
    import datasets  # takes seconds, and Fashion-MNIST and folders do without

    try:
        # Names of files would be taken for patterns.
        more = {"data_files": [escape(name) for name in files]} if files else {}
        return datasets.load_dataset(source, split=split, **more)
    except Exception as error:  # each builder and each layer of the network raises kinds of its own
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(
                f"`datasets` may not write where it keeps what it has read ({reason(error)}): set the environment "
                "variable HF_DATASETS_CACHE to a folder that may be written."
            ) from error
        what = quoted(files, 3) if files else f"{source!r} (no folder here, so taken for a Hub id)"
        raise ValueError(
            f"`datasets` cannot load split {split!r} of {what}, {reason(error)}: check data.source, "
            "data.train_split and data.eval_split."
        ) from error


def _rows(cfg: DataConfig, rows: "datasets.Dataset", load_train: Callable[[], "datasets.Dataset"]) -> Listing:
    """Rows with an image (bytes or a path) and a class (ClassLabel, number or string)."""
    import datasets

    check_columns(cfg, rows.column_names)
    try:
        encoded = rows.cast_column(cfg.image_column, datasets.Image(decode=False)).data[cfg.image_column]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"The column {cfg.image_column!r} of {cfg.source} holds no images but "
            f"{rows.features[cfg.image_column]}: set data.image_column."
        ) from error
    feature, values = rows.features[cfg.label_column], rows[cfg.label_column][:]
    labels, class_names = classes_of(cfg, feature, values, lambda: load_train()[cfg.label_column][:])

    def open_image(i: int) -> Image.Image:
        item = encoded[int(i)].as_py()  # straight from Arrow: a fifth of the time that rows[i] takes
        return Image.open(io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"])

    return Listing(open_image, [f"row {i}" for i in range(len(labels))], labels, class_names)
