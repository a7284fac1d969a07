"""Folders: what in them counts, one rule for what is listed and for telling whether anything has changed.

- Files and folders that are hidden (`.name`), or that systems put there (`__MACOSX`), do not count.
- Links are followed, unless they lead back to a folder that they are in.
- An image is a file whose ending stands for a format that PIL opens.
- A class is a folder of ROOT/SPLIT, or of ROOT, with an image in it or in its sub-folders.
- Parquet files are what a folder holds if they have the columns of images and classes, or if there are no images.

What is left out is named with the reason, each time the images are loaded.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..configs.config import DataConfig
from .listing import SPLIT_NAMES, Listing, own_split, quoted, take_part

OF_SYSTEMS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
HIDDEN, NOWHERE, CIRCLE = "hidden or of the system", "links to nowhere", "links to a folder that they are in"
NO_FILE, CLOSED = "neither files nor folders", "folders that may not be read"
NO_FORMAT, LOOSE, EMPTY = "in no format that is read here", "in no class folder", "folders without images"


@dataclass(frozen=True)
class Entry:
    """A file below a folder, or something left out."""

    parts: tuple[str, ...]  # of its path below the folder
    size: int = 0  # bytes
    time: int = 0  # of the last change, nanoseconds
    left_out: str = ""  # the reason; "" = it counts

    @property
    def name(self) -> str:
        """Its path below the folder, as it can be shown and written: bytes that are no UTF-8 as \\xff."""
        return os.fsencode("/".join(self.parts)).decode("utf-8", "backslashreplace")

    @functools.cached_property
    def is_image(self) -> bool:
        return not self.left_out and os.path.splitext(self.parts[-1])[1].lower() in image_suffixes()


@functools.cache
def image_suffixes() -> set[str]:
    """Of formats that PIL opens; some it only writes."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def walk(folder: Path) -> list[Entry]:
    """All files below a folder, sorted by their places, and what is left out of them."""
    return sorted(_below(os.fspath(folder), (), ()), key=lambda entry: entry.parts)


def _below(folder: str, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    """above: (device, inode) of the folders that this one is in."""
    try:
        entries = list(os.scandir(folder))
        own = os.stat(folder)
    except PermissionError:
        yield Entry(parts, left_out=CLOSED)
        return
    above = (*above, (own.st_dev, own.st_ino))
    for entry in entries:
        place = (*parts, entry.name)
        if entry.name.startswith(".") or entry.name in OF_SYSTEMS:
            yield Entry(place, left_out=HIDDEN)
            continue
        try:
            found = entry.stat()
        except OSError:  # also a link to itself
            yield Entry(place, left_out=NOWHERE)
            continue
        if stat.S_ISREG(found.st_mode):
            yield Entry(place, found.st_size, found.st_mtime_ns)
        elif not stat.S_ISDIR(found.st_mode):
            yield Entry(place, left_out=NO_FILE)
        elif (found.st_dev, found.st_ino) in above:
            yield Entry(place, left_out=CIRCLE)
        else:
            yield from _below(entry.path, place, above)


def parquet_files(cfg: DataConfig, root: Path, entries: list[Entry]) -> list[str]:
    """Paths of the Parquet files that are what a folder holds; [] if they lie beside the images that are."""
    found = [str(root.joinpath(*e.parts)) for e in entries if not e.left_out and e.parts[-1].endswith(".parquet")]
    in_folders = any(entry.is_image and len(entry.parts) > 1 for entry in entries)
    return [] if in_folders and not any(_holds_images(cfg, path) for path in found) else sorted(found)


def _holds_images(cfg: DataConfig, path: str) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        kind = schema.field(cfg.image_column).type
        return cfg.label_column in schema.names and (pa.types.is_struct(kind) or pa.types.is_binary(kind))
    except (OSError, KeyError, pa.ArrowException):
        return False


def class_folders(cfg: DataConfig, root: Path, entries: list[Entry], split: str) -> Listing:
    """The images of a split of ROOT/SPLIT/CLASS/**/image, or ROOT/CLASS/**/image.

    Args:
        entries: of `walk(root)`.
    """
    places = [entry.parts for entry in entries if entry.is_image]
    has_splits = _is_split(root, cfg.train_split, places)
    train, own = ((cfg.train_split,), (own_split(cfg, split),)) if has_splits else ((), ())
    own_root = root.joinpath(*own)
    if not own_root.is_dir():
        raise FileNotFoundError(
            f"{root} has no folder {own[0]!r} but {quoted(_folders(root))}: set data.eval_split to one of these, or "
            "to the same as data.train_split to hold out a tenth. If "
            f"{cfg.train_split!r} is a class and no split, rename it."
        )
    class_names = _classes(places, train)  # the training split alone decides which classes there are
    left_out = _left_out(own_root, [entry for entry in entries if entry.parts[: len(own)] == own], len(own))
    if not class_names:
        raise ValueError(
            f"{root.joinpath(*train)} has no class folders with images: put the images of each class in a folder of "
            f"its own.{' Left out: ' + describe(left_out) + '.' if left_out else ''}"
        )
    splits = [name for name in class_names if name.lower() in SPLIT_NAMES and _is_split(root, name, places)]
    if not has_splits and splits:
        raise ValueError(
            f"{root} has folders named like splits, {quoted(splits)}, but not data.train_split={cfg.train_split!r}: "
            "set data.train_split and data.eval_split to their names."
        )
    unknown = sorted(set(_classes(places, own)) - set(class_names))
    if unknown:
        raise ValueError(f"{own_root} has classes that {root.joinpath(*train)} has not: {quoted(unknown)}.")
    number = {name: label for label, name in enumerate(class_names)}
    images = [
        entry for entry in entries
        if entry.is_image and entry.parts[: len(own)] == own and len(entry.parts) > len(own) + 1
    ]  # fmt: skip
    paths = [os.path.join(root, *entry.parts) for entry in images]
    listing = Listing(
        lambda i: Image.open(paths[i]),
        [Entry(entry.parts[len(own) :]).name for entry in images],
        np.array([number[entry.parts[len(own)]] for entry in images], np.int64),
        [Entry((name,)).name for name in class_names],
        left_out=left_out,
    )
    shared = not has_splits or cfg.train_split == cfg.eval_split
    return take_part(listing, split) if shared else listing


def describe(left_out: dict[str, list[str]]) -> str:
    """What is left out, as part of a sentence: of each reason a count and the first three."""
    return "; ".join(f"{len(names)} {why} ({quoted(names, 3)})" for why, names in left_out.items())


def _is_split(root: Path, name: str, places: list[tuple[str, ...]]) -> bool:
    """Whether a folder is one of class folders, not itself a class: most of its images lie in sub-folders."""
    depths = [len(parts) > 2 for parts in places if parts[0] == name]
    return (root / name).is_dir() and 2 * sum(depths) >= len(depths)


def _classes(places: list[tuple[str, ...]], above: tuple[str, ...]) -> list[str]:
    depth = len(above)
    return sorted({parts[depth] for parts in places if parts[:depth] == above and len(parts) > depth + 1})


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _left_out(root: Path, entries: list[Entry], depth: int) -> dict[str, list[str]]:
    """By reason, the names below `root` of what does not count; of hidden files, only those that look like images."""
    found: dict[str, list[str]] = {}
    full = set()
    for entry in entries:
        why = entry.left_out
        shown = Entry(entry.parts[depth:]).name or "."
        if entry.is_image:
            full.add(entry.parts[depth])
            why = "" if len(entry.parts) > depth + 1 else LOOSE
        elif not why:
            why = NO_FORMAT
        elif why == HIDDEN and not root.joinpath(*entry.parts[depth:]).is_dir() and not Entry(entry.parts).is_image:
            why = ""
        if why:
            found.setdefault(why, []).append(shown)
    empty = [Entry((name,)).name for name in _folders(root) if name not in full and name not in OF_SYSTEMS]
    return found | ({EMPTY: empty} if empty else {})
