"""Images for training: decoded once, kept as uint8, in an order that depends on the step alone.

data = load_images(config.data, "train")                                # ImageSet
chosen = data.step_indices(batch_size=64, seed=0, step=17)              # (64,), equal on every process
batch = to_float(augment(data.images[chosen], ["shift"], generator))    # (64, C, H, H) in [-1, 1]
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from ..configs.config import CHOICES, DataConfig
from .decoding import LazyImages, Pack, decode_in_chunks, make_pack, on_main, pack_folder, read_pack
from .folders import describe
from .listing import Listing, quoted
from .order import balanced_order, check_batch, evenly, step_indices
from .sources import list_images, source_version
from .streams import StreamedImages, list_stream

logger = logging.getLogger(__name__)

CROP_SCALE = (0.8, 1.0)  # side of a random crop / side of the image
SCALE = (0.92, 1.08)  # size of what is in an image, after / before
GAMMA, GAMMA_OF_CHANNEL = 0.2, 0.1  # largest logarithm of a random exponent: of all channels, and of one besides
UNEVEN = 10  # images of the largest class / of the smallest, from which on balancing is worth a word


@dataclass
class ImageSet:
    """One split."""

    images: torch.Tensor | LazyImages  # (n, C, H, H) uint8; read-only where they are mapped from a pack
    labels: torch.Tensor  # (n,) int64, in 0..len(class_names)-1
    class_names: list[str]  # the same for every split of a source
    num_broken: int  # images that could not be read and are not in here
    class_balance: str = "none"  # how its classes are drawn, see `train.order.CLASS_POWERS`

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def epoch_order(self) -> Callable[[int, int], torch.Tensor] | None:
        """As in `train.order.step_indices`; None: any permutation is as good."""
        if isinstance(self.images, StreamedImages):
            return self.images.epoch_order
        return balanced_order(self.labels, self.class_balance)

    def step_indices(self, batch_size: int, seed: int, step: int) -> torch.Tensor:
        """Which images a step takes, over all processes, (batch_size,) int64."""
        return step_indices(len(self), batch_size, seed, step, self.epoch_order)

    def evenly(self, count: int) -> torch.Tensor:
        """min(n, count) positions spread evenly: of a data set sorted by class, some of every class."""
        return self.images.evenly(count) if isinstance(self.images, StreamedImages) else evenly(len(self), count)

    def expect(self, batch_size: int, seed: int, step: int) -> None:
        """Says which step comes: a stream has its images read, and some that come after."""
        if isinstance(self.images, StreamedImages):
            self.images.expect(batch_size, seed, step)

    def gather(self, chosen: torch.Tensor, pin: bool = False) -> torch.Tensor:
        """The images at the positions `chosen` (b,): (b, C, H, H) uint8, a copy, page-locked if `pin`.

        For threads: unlike indexing a tensor it starts no team of OpenMP threads of its own beside the training's.
        """
        if not isinstance(self.images, torch.Tensor):
            images = self.images[chosen]
            return images.pin_memory() if pin else images
        images = torch.empty(len(chosen), *self.images.shape[1:], dtype=torch.uint8, pin_memory=pin)
        # Without "clip" numpy would copy twice.
        np.take(self.images.numpy(), chosen.numpy(), axis=0, out=images.numpy(), mode="clip")
        return images


class Prefetch:
    """Calls `load` for the steps of a run, each in a thread while the step before it is trained.

    `load` is a function of the step alone, so a run that is interrupted loses nothing.
    """

    def __init__(self, load: Callable[[int], Any]) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(1)
        self._futures: dict[int, Future] = {}

    def __call__(self, step: int) -> Any:
        """load(step); more than one call for a step gives the same object."""
        self._futures = {s: self._futures.get(s) or self._thread.submit(self._load, s) for s in (step, step + 1)}
        return self._futures[step].result()


class Found(NamedTuple):
    """Images of a split that were found, but not decoded yet."""

    count: int
    load: Callable[[], ImageSet]


def load_images(cfg: DataConfig, split: str) -> ImageSet:
    """The images of a split: decoded once and kept on the disk for later runs, decoded at each use, or read then too.

    Args:
        cfg: where they are and what they become.
        split: "train" or "eval"; `cfg.train_split` and `cfg.eval_split` say what the source calls it. Where
            the two are equal, or the source has no splits, a fixed tenth of each class is kept for "eval".

    Raises:
        FileNotFoundError, ValueError: the source is missing or unfit; one sentence, and what would be right.
            A broken image raises nothing: it is counted, reported once at the end and left out.
    """
    return find_images(cfg, split).load()


def load_splits(cfg: DataConfig, batch_size: int = 1) -> tuple[ImageSet, ImageSet]:
    """Both splits, "train" and "eval". What is wrong with one of them is said before any image is decoded.

    Raises:
        FileNotFoundError, ValueError: as `load_images`; or there are fewer images to train on than `batch_size`.
    """
    train, heldout = find_images(cfg, "train"), find_images(cfg, "eval")
    check_batch(train.count, batch_size)
    return train.load(), heldout.load()


def find_images(cfg: DataConfig, split: str) -> Found:
    """The first part of `load_images`: all that goes before images are decoded."""
    if split not in ("train", "eval"):
        raise ValueError(f"split is 'train' or 'eval', not {split!r}.")
    folder = None if cfg.decode == "stream" else pack_folder(cfg, split, source_version(cfg))
    pack = folder and read_pack(folder)
    if pack:
        return Found(len(pack.labels), lambda: _image_set(pack, cfg))
    listing = _listing(cfg, split)
    return Found(len(listing.keys), lambda: _image_set(_pack(listing, cfg, folder), cfg))


def _pack(listing: Listing, cfg: DataConfig, folder: Path | None) -> Pack:
    """The images of a listing, decoded or to be decoded, as `cfg.decode` says."""
    images = None
    if folder is None:
        images = StreamedImages(listing, cfg)
    elif listing.pixels is not None and listing.pixels.shape[1:] == (cfg.image_size, cfg.image_size):
        images = torch.from_numpy(listing.pixels)[:, None].repeat(1, cfg.channels, 1, 1)  # (n, C, H, H)
    elif cfg.decode == "on-the-fly":
        images = LazyImages(listing, cfg)
    if images is None:
        return _decoded(listing, cfg, folder)
    return Pack(images, torch.from_numpy(listing.labels), listing.class_names, [], listing.left_out)


def _image_set(pack: Pack, cfg: DataConfig) -> ImageSet:
    """What training gets of a pack; what is not in it is reported."""
    if pack.left_out and on_main():
        logger.warning("%s: left out are %s.", cfg.source, describe(pack.left_out))
    if pack.broken and on_main():
        logger.warning(
            "%s: %d of %d images are broken and left out: %s",
            cfg.source,
            len(pack.broken),
            len(pack.broken) + len(pack.labels),
            quoted(pack.broken, 3),
        )
    names = _readable(pack.class_names, cfg.class_names)
    return ImageSet(pack.images, pack.labels, names, len(pack.broken), cfg.class_balance)


def describe_classes(labels: torch.Tensor, class_names: list[str], balance: str = "none") -> str:
    """How many images (n,) there are of the classes, and how these are drawn: a sentence or two for the start."""
    sizes = labels.bincount(minlength=len(class_names))
    there = sizes[sizes > 0]
    few, many = int(there.min()), int(there.max())
    if len(there) == 1:
        text = f"{len(labels)} images of one class."
    elif few == many:
        text = f"{len(labels)} images, {few} in each of {len(there)} classes."
    else:
        least, most = (class_names[int((sizes == count).nonzero()[0])] for count in (few, many))
        text = f"{len(labels)} images of {len(there)} classes, from {few} ({least!r}) to {many} ({most!r}) a class."
    if len(there) < len(class_names):
        text += f" None of {quoted([class_names[i] for i in (sizes == 0).nonzero().flatten()], 3)}."
    if balance != "none":
        return f"{text} Classes are drawn " + {"sqrt": "by the square root of these.", "even": "evenly."}[balance]
    if many >= UNEVEN * few:
        text += " data.class_balance=sqrt draws small classes more often, data.class_balance=even all equally often."
    return text


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1.0


def augment(
    images: torch.Tensor, names: list[str], generator: torch.Generator, rank: int = 0, world: int = 1
) -> torch.Tensor:
    """Random variants of uint8 images (B, C, H, W): the same shape, on the same device.

    Numbers are drawn for the whole step, world * B images, and this process uses those of its slice: with
    equal generators, what happens to an image does not depend on the number of processes.

    Args:
        names: applied in this order. "flip": mirrored left to right, half of the time; "shift": by -1, 0 or 1
            pixels down and across, edges repeated; "crop": a square of 0.8 to 1 of the side, resized back; "scale":
            what is in it 0.92 to 1.08 times as large about the centre, edges repeated; "color": each channel x of
            [0, 1] to a power of 0.74 to 1.35, much the same for all channels: white and black stay as they are.
        generator: its device need not be that of the images.
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
        elif name == "scale":
            images = _scale(images, SCALE[0] + (SCALE[1] - SCALE[0]) * uniform(1)[:, 0])
        elif name == "color":
            images = _color(images, 2 * uniform(1 + images.shape[1]) - 1)
        else:
            raise ValueError(f"Unknown augmentation {name!r}: take {', '.join(map(repr, CHOICES['augment']))}.")
    return images


def _listing(cfg: DataConfig, split: str) -> Listing:
    listing = list_stream(cfg, split) if cfg.decode == "stream" else list_images(cfg, split)
    if not listing.keys:
        raise ValueError(_no_images(cfg, split, listing))
    if 0 < cfg.limit < len(listing.keys):
        # Not the first ones: many sources are sorted by class.
        order = torch.randperm(len(listing.keys), generator=torch.Generator().manual_seed(0))
        listing = listing.select(order[: cfg.limit].sort().values.numpy())
    return listing


def _no_images(cfg: DataConfig, split: str, listing: Listing) -> str:
    text = f"data.source={cfg.source!r} has no images for {split!r}"
    if listing.left_out:
        text += f" (left out are {describe(listing.left_out)})"
    if split == "train":
        return f"{text}."
    if listing.shared:
        return (
            f"{text}: a tenth of each class is held out, which takes two images. Add images, or name a split to "
            "measure on with data.eval_split."
        )
    return f"{text}: set data.eval_split to the same as data.train_split to hold out a tenth."


def _decoded(listing: Listing, cfg: DataConfig, folder: Path) -> Pack:
    """All images of a listing, decoded: on the disk, or in memory if the disk does not take them."""
    try:
        return make_pack(listing, cfg, folder)
    except OSError as error:
        if on_main():
            logger.warning(
                "Decoded images cannot be kept in %s (%s), so each run decodes them anew: set data.cache "
                "to another folder.",
                folder.parent,
                error,
            )
    images, good = _in_memory(listing, cfg)
    broken = [listing.keys[i] for i in np.flatnonzero(~good)]
    labels = torch.from_numpy(listing.labels[good])
    return Pack(torch.from_numpy(images), labels, listing.class_names, broken, listing.left_out)


def _in_memory(listing: Listing, cfg: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (m, C, H, H) uint8 of the images that are whole, and which those are, (n,) bool."""
    shape = (len(listing.keys), cfg.channels, cfg.image_size, cfg.image_size)
    needed, free = math.prod(shape), psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{shape[0]} images need {needed / 2**30:.1f} GiB and there are {free / 2**30:.1f} GiB of memory: set "
            "data.cache to a folder on a larger disk, data.decode=on-the-fly, data.limit or a lower data.image_size."
        )
    images, good, done = np.empty(shape, np.uint8), [], 0
    for chunk, whole in decode_in_chunks(listing, cfg):
        good.append(whole)
        images[done : done + whole.sum()] = chunk[whole]
        done += whole.sum()
    if not done:
        raise ValueError(f"None of the {shape[0]} images of {cfg.source} can be read.")
    return images[:done], np.concatenate(good)


def _readable(names: list[str], mapping_file: str) -> list[str]:
    """Class names through the JSON file of `DataConfig.class_names`: all of a class, with commas between.

    Where the first ones of two classes are equal, the raw name goes behind them.
    """
    if not mapping_file:
        return list(names)
    try:
        mapping = json.loads(Path(os.path.expanduser(mapping_file)).read_text(encoding="utf-8"))
        values = [mapping.get(name, name) for name in names]  # "goldfish, Carassius auratus" or a list
        parts = [value.split(",") if isinstance(value, str) else value for value in values]
        parts = [[part.strip() for part in value] for value in parts]
        firsts = [value[0] for value in parts]
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(
            f"data.class_names={mapping_file!r} is not a JSON file of raw and readable names ({error})."
        ) from error
    shown = [
        first if firsts.count(first) == 1 else f"{first} ({name})" for name, first in zip(names, firsts, strict=True)
    ]
    return [", ".join([first, *others]) for first, (_, *others) in zip(shown, parts, strict=True)]


def _shift(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Moves (B, C, H, W) images down and right by integers `offsets` (B, 2), repeating the edge."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)  # (B, W)
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    return images.gather(3, columns[:, None, None, :].expand_as(images))


def _crop(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Square crops of (B, C, H, W) images resized back; `uniform` (B, 3) in [0, 1) gives side, x and y."""
    low, high = CROP_SCALE
    side = low + (high - low) * uniform[:, 0]  # (B,)
    shift = (2 * uniform[:, 1:] - 1) * (1 - side)[:, None]  # (B, 2), where the image spans -1..1
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cropped.round().clamp(0, 255).to(torch.uint8)


def _scale(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """(B, C, H, H) images with what is in them `factors` (B,) times as large, repeating the edge.

    Bicubic (Keys, 1981, a = -0.5) with the kernel as wide as the image shrinks: bilinear weights would blur each one.
    """
    size = images.shape[-1]
    middle, least = (size - 1) / 2, float(factors.min().clamp(max=1))
    past = math.ceil(middle * (1 / least - 1) + 2 / least)  # pixels past the edge that are looked at
    places = torch.arange(-past, size + past, device=images.device, dtype=torch.float32)  # (H + 2 past,)
    centres = middle + (places[past:-past] - middle) / factors[:, None]  # (B, H), where each pixel looks
    x = (centres[:, :, None] - places).abs() * factors[:, None, None].clamp(max=1)  # (B, H, H + 2 past)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, inner, torch.where(x < 2, outer, 0))
    weights /= weights.sum(dim=2, keepdim=True)
    matrix = weights[:, :, past:-past].clone()  # (B, H, H)
    matrix[:, :, 0] += weights[:, :, :past].sum(dim=2)  # what lies past an edge is the edge's pixel
    matrix[:, :, -1] += weights[:, :, -past:].sum(dim=2)
    matrix = matrix.unsqueeze(1)  # (B, 1, H, H)
    return (matrix @ images.float() @ matrix.mT).round().clamp(0, 255).to(torch.uint8)


def _color(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Powers of the channels of (B, C, H, W) images on [0, 1]; `draws` (B, 1 + C) in [-1, 1] give the exponents."""
    exponents = (GAMMA * draws[:, :1] + GAMMA_OF_CHANNEL * draws[:, 1:]).exp()  # (B, C)
    levels = torch.linspace(0, 1, 256, device=images.device)
    table = (255 * levels ** exponents[:, :, None]).round().to(torch.uint8)  # (B, C, 256)
    return table.gather(2, images.flatten(2).long()).view_as(images)
