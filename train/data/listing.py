"""`Listing`, what every kind of source becomes: images not yet decoded. And what the kinds share: splits, classes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..configs.config import DataConfig

HELD_OUT = 0.1  # share of each class kept for measuring, where a source has no split for that
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}  # and hardly classes


@dataclass
class Listing:
    """One split of a source, nothing decoded yet."""

    open_image: Callable[[int], Image.Image]  # any exception, now or when it decodes, means a broken image
    keys: list[str]  # (n,) names the images in reports
    labels: np.ndarray  # (n,) int64, in 0..len(class_names)-1
    class_names: list[str]  # the same for every split of a source
    pixels: np.ndarray | None = None  # (n, h, w) uint8, if the source has them as they are, grey
    left_out: dict[str, list[str]] = field(default_factory=dict)  # what does not count, by the reason
    shared: bool = False  # by training and evaluation, which had no splits of their own

    def select(self, chosen: np.ndarray) -> Listing:
        """The images at the positions `chosen`, (m,) int64, in that order."""
        return replace(
            self,
            open_image=lambda i: self.open_image(chosen[i]),
            keys=[self.keys[i] for i in chosen],
            labels=self.labels[chosen],
            pixels=None if self.pixels is None else self.pixels[chosen],
        )


def quoted(names: list[str], most: int = 8) -> str:
    """'a', 'b' and 5 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def reason(error: Exception) -> str:
    """What kind of error, and the first line of what it says: for those of libraries, whose texts may be long."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(".")


def is_hub_id(source: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) is not None


def own_split(cfg: DataConfig, split: str) -> str:
    return cfg.train_split if split == "train" else cfg.eval_split


def take_part(listing: Listing, split: str) -> Listing:
    """Of images that training and evaluation have to share: a tenth of each class, one at least, for "eval".

    Chosen by a hash of the key, so that adding images to a folder changes the place of few others.
    """
    digests = np.array([hashlib.sha1(key.encode()).digest()[:8] for key in listing.keys], "S8").view(">u8")
    held_out = np.zeros(len(digests), bool)
    for label in np.unique(listing.labels):
        members = np.flatnonzero(listing.labels == label)
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        held_out[members[np.argsort(digests[members], kind="stable")[:count]]] = True
    return replace(listing.select(np.flatnonzero(held_out == (split == "eval"))), shared=True)


def files_by_split(cfg: DataConfig, files: list[str], folder: str | Path | None) -> dict[str, list[str]] | None:
    """Parquet files named like their split (train-00000-of-00005.parquet, train/0.parquet); None: all are one pool.

    folder: what the files are in, none of whose own name counts.
    """
    if not files:
        raise FileNotFoundError(f"data.source={cfg.source!r}: there is no such Parquet file.")
    by_split: dict[str, list[str]] = {}
    for file in files:
        place = Path(file).relative_to(folder) if folder else Path(Path(file).name)
        for name in {place.parent.name, re.split(r"[-_.]", place.name)[0]} - {""}:
            by_split.setdefault(name, []).append(file)
    if not by_split.keys() & (SPLIT_NAMES | {cfg.train_split, cfg.eval_split}):
        return None
    check_splits(cfg, by_split)
    return by_split


def check_splits(cfg: DataConfig, by_split: dict[str, list[str]]) -> None:
    """Raises a `ValueError` if files of a split that is asked for are missing."""
    for key, name in (("train_split", cfg.train_split), ("eval_split", cfg.eval_split)):
        if name not in by_split:
            have = quoted(sorted(by_split))
            raise ValueError(
                f"{cfg.source} has no Parquet files of data.{key}={name!r} but of {have}: if data.eval_split "
                "is the same as data.train_split, a tenth is held out."
            )


def check_columns(cfg: DataConfig, names: list[str]) -> None:
    """Raises a `ValueError` if the columns of a table lack that of the images or that of the classes."""
    for key, column in (("image_column", cfg.image_column), ("label_column", cfg.label_column)):
        if column not in names:
            raise ValueError(f"{cfg.source} has no column {column!r} but {quoted(names)}: set data.{key}.")


def classes_of(
    cfg: DataConfig, feature: Any, values: list, load_train: Callable[[], list]
) -> tuple[np.ndarray, list[str]]:
    """Labels (n,) int64 and class names, out of the values of the label column.

    Args:
        feature: what `datasets` takes the column for.
        load_train: gives the values of the training split, which alone decides which classes there are.
    """
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        class_names = feature.names
        labels = [-1 if value is None else value for value in values]
    elif isinstance(feature, datasets.Value):
        classes = sorted(set(load_train()) - {None})
        class_names = [str(value) for value in classes]
        position = {value: i for i, value in enumerate(classes)}
        labels = [position.get(value, -1) for value in values]
    else:
        raise ValueError(
            f"The column {cfg.label_column!r} of {cfg.source} holds not one class an image but {feature}: "
            "set data.label_column."
        )
    labels = np.array(labels, np.int64)
    if (labels < 0).any():
        raise ValueError(
            f"{(labels < 0).sum()} of {len(labels)} images of {cfg.source} have no class that the training "
            "split knows: choose another data.eval_split or data.label_column."
        )
    return labels, class_names
