"""Decoded images: kept on the disk, decoded once and never again, or decoded anew at each use.

    pack = make_pack(listing, cfg, folder)    # pack.images (n, C, H, H) uint8, mapped from the disk
    images = LazyImages(listing, cfg)         # the same to those who index it; decodes then, and keeps nothing

A pack is a folder of images.bin (n images as they are in memory), labels.npy and index.json. It is filled under
another name and renamed, by one process while others wait; what a kill leaves behind is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from spectralar.interface.image import preprocess_pil

from ..configs.config import DataConfig
from .listing import Listing

PREPROCESSING = 2  # to be raised when `preprocess_pil` or the layout of a pack changes: older packs are made anew
# Settings that make no difference to a pack. What the source holds is told by its version, not by where it is.
IRRELEVANT = ("source", "root", "class_balance", "augment", "class_names", "cache", "decode", "window", "mix")
MAX_THREADS = 16  # decoding; more only wait for Python's lock
BLOCK = 8  # images a thread takes at once
CHUNK_BYTES = 64 * 2**20  # decoded images between two records of progress


class ReadError(OSError):
    """The source itself failed, not an image of it: nothing may take that image's place."""


@dataclass
class Pack:
    """Images of one split, decoded."""

    images: Tensor | LazyImages  # (n, C, H, H) uint8; those of a pack are mapped and read-only
    labels: Tensor  # (n,) int64
    class_names: list[str]  # as the source has them
    broken: list[str]  # names of the images that could not be read and are not in here
    left_out: dict[str, list[str]] = field(default_factory=dict)  # what the source has beside images, by the reason


# ------------------------------------------------------------------------------------------------ decoding


class Decoder:
    """Decodes images of a listing in threads: PIL lets others run while it decodes."""

    def __init__(self, listing: Listing, cfg: DataConfig) -> None:
        self.listing = listing
        self.shape = (cfg.channels, cfg.image_size, cfg.image_size)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._pool = ThreadPoolExecutor(min(share, MAX_THREADS))

    def decode(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (m, C, H, H) uint8 at the positions `chosen` (m,), and which of them are whole, (m,) bool."""
        images = np.zeros((len(chosen), *self.shape), np.uint8)
        good = np.zeros(len(chosen), bool)
        channels, size, _ = self.shape

        def decode_block(start: int) -> None:
            for place in range(start, min(start + BLOCK, len(chosen))):
                try:
                    with self.listing.open_image(int(chosen[place])) as image:
                        # JPEG can decode at 1/2, 1/4 or 1/8; twice the wanted size leaves the filter enough to do.
                        image.draft(None, (2 * size, 2 * size))
                        images[place] = preprocess_pil(image, size, channels)
                    good[place] = True
                except (MemoryError, ReadError):
                    raise
                except Exception:  # broken files make decoders raise OSError, SyntaxError, ValueError, struct.error
                    pass

        list(self._pool.map(decode_block, range(0, len(chosen), BLOCK)))
        return images, good


def decode_in_chunks(listing: Listing, cfg: DataConfig, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`Decoder.decode` of all images from `start` on, some megabytes at a time, with a progress bar."""
    decoder, n = Decoder(listing, cfg), len(listing.keys)
    size = max(1, CHUNK_BYTES // math.prod(decoder.shape))
    with tqdm(total=n, initial=start, desc="decoding", unit=" images", delay=2, leave=False) as bar:
        for first in range(start, n, size):
            chosen = np.arange(first, min(n, first + size))
            yield decoder.decode(chosen)
            bar.update(len(chosen))


class LazyImages:
    """Stands for the tensor (n, C, H, H) of a listing's images and decodes those that are indexed.

    A broken image's place is taken by the next whole one of its class: its label stays right, and the same one
    comes each time.
    """

    def __init__(self, listing: Listing, cfg: DataConfig) -> None:
        self._decoder = Decoder(listing, cfg)
        self._source = cfg.source
        self.shape = torch.Size((len(listing.keys), *self._decoder.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        positions = np.arange(len(self))[chosen] if isinstance(chosen, slice) else chosen.numpy()
        return torch.from_numpy(self._decode(positions))

    def split(self, size: int) -> Iterator[Tensor]:
        """Batches of `size` images in order."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def _decode(self, positions: np.ndarray) -> np.ndarray:
        images, good = self._decoder.decode(positions)
        for place in np.flatnonzero(~good):
            images[place] = self._substitute(int(positions[place]))
        return images

    def _substitute(self, position: int) -> np.ndarray:
        listing = self._decoder.listing
        members = np.flatnonzero(listing.labels == listing.labels[position])
        others = np.roll(members, -1 - int(np.searchsorted(members, position)))[:-1]  # from the next one on, around
        for other in others:
            images, good = self._decoder.decode(other[None])
            if good[0]:
                return images[0]
        name = listing.class_names[listing.labels[position]]
        raise OSError(f"None of the {len(members)} images of class {name!r} of {self._source} can be read.")


# ------------------------------------------------------------------------------------------------ packs


def pack_folder(cfg: DataConfig, split: str, version: str) -> Path:
    """Where the decoded images of a split belong; another folder for another source or other settings."""
    root = cfg.cache or os.environ.get("SPECTRALAR_CACHE")
    root = os.path.expanduser(root or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spectralar")
    if root.startswith("~"):  # whoever runs this has no home
        root = Path(tempfile.gettempdir()) / f"spectralar-{os.getuid()}"
    settings = {name: value for name, value in asdict(cfg).items() if name not in IRRELEVANT}
    identity = json.dumps([PREPROCESSING, version, split, settings], sort_keys=True)
    name = re.sub(r"\W+", "-", Path(cfg.source).name).strip("-")[-40:]
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Path(root) / f"{name}-{split}-{cfg.image_size}-{digest}"


def read_pack(folder: Path) -> Pack | None:
    """The pack in a folder; None if there is none, or not a whole one."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        labels = np.load(folder / "labels.npy")
        shape = (len(labels), *index["shape"])
        path = folder / "images.bin"
        if path.stat().st_size != math.prod(shape):
            return None
        images = np.memmap(path, np.uint8, "r", shape=shape)
    except (OSError, ValueError, KeyError):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(images)  # not written to: a private mapping would count as memory in use
    return Pack(tensor, torch.from_numpy(labels), index["class_names"], index["broken"], index.get("left_out", {}))


def make_pack(listing: Listing, cfg: DataConfig, folder: Path) -> Pack:
    """Decodes all images of a listing into `folder`, unless another process has meanwhile.

    Raises:
        OSError: the disk does not take it; what is there of it is gone on with another time.
        ValueError: no image can be read.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock"), cfg):
        pack = read_pack(folder)
        if pack is None:
            _fill(listing, cfg, folder)
            pack = read_pack(folder)
    if pack is None:
        raise OSError(f"{folder} cannot be read back")
    return pack


def _fill(listing: Listing, cfg: DataConfig, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    row = cfg.channels * cfg.image_size**2
    done, broken = _read_progress(partial, row)
    needed, free = (len(listing.keys) - done) * row, shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(f"{needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} free")
    with open(partial / "images.bin", "ab") as file:
        file.truncate((done - len(broken)) * row)
        for images, good in decode_in_chunks(listing, cfg, done):
            file.write(images[good].data)
            file.flush()
            os.fsync(file.fileno())
            broken += (done + np.flatnonzero(~good)).tolist()
            done += len(good)
            _write(partial / "progress.json", {"done": done, "broken": broken})
    kept = np.delete(np.arange(done), broken)
    if not len(kept):
        shutil.rmtree(partial)
        raise ValueError(f"None of the {done} images of {cfg.source} can be read.")
    np.save(partial / "labels.npy", listing.labels[kept])
    index = {"source": cfg.source, "shape": [cfg.channels, cfg.image_size, cfg.image_size],
             "class_names": listing.class_names, "broken": [listing.keys[i] for i in broken],
             "left_out": listing.left_out}  # fmt: skip
    _write(partial / "index.json", index)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, or it would have been read
    os.replace(partial, folder)
    print(f"{len(kept)} decoded images are in {folder} ({len(kept) * row / 2**20:.1f} MiB), for later runs too.")


def _read_progress(partial: Path, row: int) -> tuple[int, list[int]]:
    """How many images an interrupted process has looked at, and which of them are broken."""
    try:
        progress = json.loads((partial / "progress.json").read_text())
        done, broken = progress["done"], progress["broken"]
        if (partial / "images.bin").stat().st_size >= (done - len(broken)) * row:
            return done, broken
    except (OSError, ValueError, KeyError):
        pass
    return 0, []


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.new")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)


def on_main() -> bool:
    """Whether this is the one that reports, of the processes of a machine that read the same."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def _locked(path: Path, cfg: DataConfig) -> Iterator[None]:
    """Keeps other processes out while one decodes; a lock goes with its process, killed or not."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)
    except Timeout:
        if on_main():
            print(f"Another process decodes the images of {cfg.source}: waiting for it.")
        lock.acquire()
    except NotImplementedError as error:
        raise OSError(f"there are no file locks in {path.parent}") from error
    try:
        yield
    finally:
        lock.release()
