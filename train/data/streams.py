"""Parquet files streamed: read while they are trained on, a row group at a time, from a disk or over the network.

    listing = list_stream(cfg, "train")           # reads what the files hold and the classes, no images
    images = StreamedImages(listing, cfg)
    images.expect(batch_size, seed, step)         # has what the step needs read, and what comes after it
    batch = images[images.epoch_order(seed, 0)[:batch_size]]

For each epoch the row groups are permuted and cut into windows of about `DataConfig.window` images, and the images of
each window are permuted; with `DataConfig.class_balance`, those of them that the epoch draws. That is a function of
the seed and the epoch alone, so a run that is interrupted goes on exactly, reading no more than its window again, and
any number of processes sees the same batches. Each of them reads all of a window.
"""

from __future__ import annotations

import functools
import io
import math
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..configs.config import DataConfig
from .decoding import LazyImages, ReadError
from .folders import parquet_files, walk
from .listing import (
    Listing,
    check_columns,
    check_splits,
    classes_of,
    files_by_split,
    is_hub_id,
    own_split,
    quoted,
    reason,
    take_part,
)
from .order import BalancedDraw, epoch_generator, evenly

READERS = 4  # row groups read at once
LISTERS = 16  # files looked into at once: that is many small requests, each mostly waiting
PAUSES = (1, 4, 16)  # seconds before another attempt at what could not be read
FEW = 64  # row groups that images to measure on are taken from: of a large stream, not all of it
Found = tuple[Any, dict[str | None, list[str]], Any]


# ------------------------------------------------------------------------------------------------ files


class RowGroups:
    """The row groups of Parquet files, numbered in order: sizes and labels at once, images when `read`.

    Args:
        files: the paths in the fsspec file system `fs`.
        cfg: names the columns.
    """

    def __init__(self, fs: Any, files: list[str], cfg: DataConfig) -> None:
        self._fs, self._cfg = fs, cfg
        self._places, self.values, sizes = [], [], []
        bar = {"total": len(files), "desc": "listing", "unit": " files", "delay": 2, "leave": False}
        with ThreadPoolExecutor(LISTERS) as pool:
            for file, (metadata, values) in zip(files, tqdm(pool.map(self._look_into, files), **bar), strict=True):
                groups = range(metadata.num_row_groups)
                self._places += [(file, metadata, group) for group in groups]
                sizes += [metadata.row_group(group).num_rows for group in groups]
                self.values += values  # of the label column
        self.bounds = np.cumsum([0, *sizes])  # (groups + 1,): which rows a group has
        self.schema = self._places[0][1].schema.to_arrow_schema() if self._places else None

    def _look_into(self, file: str) -> tuple[Any, list]:
        import pyarrow.parquet as pq

        with self._fs.open(file, cache_type="none") as opened:
            parquet = pq.ParquetFile(opened, pre_buffer=True)
            check_columns(self._cfg, parquet.schema_arrow.names)
            labels = parquet.read([self._cfg.label_column], use_threads=False)
            return parquet.metadata, labels.column(0).to_pylist()

    def read(self, group: int, rows: np.ndarray) -> Any:
        """Some rows (m,) of a row group, counted within it: their image column as an Arrow array of chunks.

        Raises:
            ReadError: it cannot be read, not even after some pauses.
        """
        import pyarrow.parquet as pq

        file, metadata, number = self._places[group]
        for pause in (*PAUSES, None):
            try:
                with self._fs.open(file, cache_type="none") as opened:
                    parquet = pq.ParquetFile(opened, metadata=metadata, pre_buffer=True)
                    table = parquet.read_row_group(number, [self._cfg.image_column], use_threads=False)
                return table.column(0) if len(rows) == len(table) else table.column(0).take(rows)
            except Exception as error:  # each file system raises kinds of its own
                if pause is None or isinstance(error, FileNotFoundError):
                    raise ReadError(f"{file}, row group {number}, cannot be read: {reason(error)}") from error
                time.sleep(pause)


@dataclass(kw_only=True)
class StreamedListing(Listing):
    """Images that are read while they are used."""

    stream: RowGroups
    rows: np.ndarray  # (n,) int64, their places in the stream, ascending

    def select(self, chosen: np.ndarray) -> StreamedListing:
        return replace(super().select(chosen), rows=self.rows[chosen])


def list_stream(cfg: DataConfig, split: str) -> StreamedListing:
    """The images of split "train" or "eval" of a stream.

    Raises:
        FileNotFoundError, ValueError: the source is missing or unfit; one sentence, and what would be right.
    """
    import datasets

    fs, by_split, features = _find(cfg)
    shared = cfg.train_split == cfg.eval_split or None in by_split
    with _clear(cfg):
        own = RowGroups(fs, by_split[None if None in by_split else own_split(cfg, split)], cfg)
        if own.schema is None:
            raise ValueError(f"{cfg.source} has no rows for {split!r}.")
        column = own.schema.field(cfg.image_column)
        if not _may_be_images(column.type):
            raise ValueError(
                f"The column {cfg.image_column!r} of {cfg.source} holds no images but {column.type}: "
                "set data.image_column."
            )
        features = features or datasets.Features.from_arrow_schema(own.schema)

        def load_train() -> list:
            return own.values if shared or split == "train" else RowGroups(fs, by_split[cfg.train_split], cfg).values

        labels, class_names = classes_of(cfg, features[cfg.label_column], own.values, load_train)
    keys = [f"row {i}" for i in range(len(labels))]
    rows = np.arange(len(labels))
    listing = StreamedListing(_not_by_itself, keys, labels, class_names, stream=own, rows=rows)
    return take_part(listing, split) if shared else listing


def _find(cfg: DataConfig) -> Found:
    """A file system, Parquet files in it by split (None: one pool), and what the Hub says of their columns."""
    import fsspec

    not_parquet = ValueError(
        f"data.source={cfg.source!r} is not Parquet, which alone can be streamed: set data.decode=on-the-fly, "
        "which keeps no decoded images on the disk either."
    )
    if cfg.source == "fashion-mnist":
        raise not_parquet
    local = Path(os.path.expanduser(cfg.source))
    if "://" not in cfg.source and not local.exists() and is_hub_id(cfg.source):
        return _find_on_hub(cfg)
    with _clear(cfg):
        fs, path = fsspec.core.url_to_fs(cfg.source if "://" in cfg.source else str(local))
        folder = path if fs.isdir(path) else None
        if "://" not in cfg.source and folder:
            found = walk(local)
            files = parquet_files(cfg, local, found)
        else:
            found = [path] if fs.isfile(path) else sorted(fs.find(path) if folder else fs.glob(path))
            files = [file for file in found if file.endswith(".parquet")]
    if found and not files:
        raise not_parquet
    by_split = files_by_split(cfg, files, folder)
    return fs, {None: files} if by_split is None else by_split, None


def _find_on_hub(cfg: DataConfig) -> Found:
    import datasets
    import fsspec

    with _clear(cfg):
        builder = datasets.load_dataset_builder(cfg.source)
        by_split = {str(name): list(map(str, files)) for name, files in (builder.config.data_files or {}).items()}
        others = [file for files in by_split.values() for file in files if not file.endswith(".parquet")]
        if others or not by_split:
            raise ValueError(
                f"The Hub's {cfg.source} is not Parquet ({quoted(others, 1) or 'no data files'}), which alone can be "
                "streamed: set data.decode=on-the-fly, which downloads it."
            )
        check_splits(cfg, by_split)
        fs, _ = fsspec.core.url_to_fs(by_split[cfg.train_split][0])
    return fs, by_split, builder.info.features


@contextmanager
def _clear(cfg: DataConfig) -> Iterator[None]:
    """What goes wrong with files and networks, as one sentence."""
    try:
        yield
    except Exception as error:  # each file system raises kinds of its own
        if type(error) is ValueError and cfg.source in str(error):  # a sentence already
            raise
        raise ValueError(
            f"{cfg.source} cannot be streamed, {reason(error)}: check data.source, data.train_split and "
            "data.eval_split."
        ) from error


def _may_be_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool({"bytes", "path"} & {kind.field(i).name for i in range(kind.num_fields)})
    return any(test(kind) for test in (
        pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string
    ))  # fmt: skip


def _not_by_itself(i: int) -> Image.Image:
    raise NotImplementedError("Images of a stream are opened by StreamedImages, which reads them.")


# ------------------------------------------------------------------------------------------------ images


@dataclass
class EpochOrder:
    """The order of the images in an epoch."""

    images: Tensor  # (n,) int64
    windows: list[np.ndarray]  # which row groups each has
    bounds: np.ndarray  # (windows + 1,), of their images in the order


class StreamedImages(LazyImages):
    """Stands for the tensor (n, C, H, H) of a stream's images: reads row groups, decodes those that are indexed.

    What `expect` had read is at hand. Slices in order are read ahead of, each row group once; other images are
    looked up a few row groups at a time.
    """

    def __init__(self, listing: StreamedListing, cfg: DataConfig) -> None:
        super().__init__(replace(listing, open_image=self._open), cfg)
        self._stream, self._rows = listing.stream, listing.rows
        numbers = np.searchsorted(self._stream.bounds, self._rows, side="right") - 1  # (n,)
        # From here on a group is one that has images in here, by position.
        self._numbers, starts, self._groups = np.unique(numbers, return_index=True, return_inverse=True)
        self._bounds = np.append(starts, len(numbers))  # (groups + 1,)
        self._count = min(len(starts), math.ceil(len(numbers) / cfg.window))  # windows an epoch
        self._readers = ThreadPoolExecutor(READERS)
        self._held: dict[int, Future] = {}
        balance = cfg.class_balance
        self._draw = None if balance == "none" else BalancedDraw(torch.from_numpy(listing.labels), balance)
        self._order = functools.lru_cache(maxsize=3)(self._make_order)  # an epoch's end is read ahead of

    def epoch_order(self, seed: int, epoch: int) -> Tensor:
        """The images of an epoch in their order, (n,) int64."""
        return self._order(seed, epoch).images

    def expect(self, batch_size: int, seed: int, step: int) -> None:
        """Has the window of a step read and the next one on its way, and lets go of all others."""
        epoch, position = divmod(step, len(self) // batch_size)
        start = position * batch_size
        order = self._order(seed, epoch)
        first, last = np.searchsorted(order.bounds, [start, start + batch_size - 1], side="right") - 1
        needed = np.concatenate(order.windows[first : last + 1])
        is_last = first + 1 == len(order.windows)
        following = self._order(seed, epoch + 1).windows[0] if is_last else order.windows[first + 1]
        # In step with the training, twice as fast: who reads all at once has to read on when it is to stop.
        share = (start - order.bounds[first]) / (order.bounds[first + 1] - order.bounds[first])
        self._hold([*needed, *following[: READERS + math.ceil(2 * share * len(following))]])

    def evenly(self, count: int) -> Tensor:
        """min(n, count) positions, spread evenly, but over a few row groups of a stream that has many: (m,) int64."""
        groups = evenly(len(self._numbers), FEW).numpy()
        places = np.flatnonzero(np.isin(self._groups, groups))
        return torch.from_numpy(places)[evenly(len(places), count)]

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        in_order = isinstance(chosen, slice)
        positions = np.arange(len(self))[chosen] if in_order else chosen.numpy()
        groups = self._groups[positions]
        wanted, kept = np.unique(groups), self._held
        if not in_order and kept.keys() >= set(wanted.tolist()):
            return torch.from_numpy(self._decode(positions))
        images = np.empty((len(positions), *self.shape[1:]), np.uint8)
        for start in range(0, len(wanted), READERS):
            now, then = wanted[start : start + READERS], wanted[start + READERS : start + 2 * READERS]
            if in_order:
                then = np.arange(now[-1] + 1, min(now[-1] + 1 + READERS, len(self._numbers)))
            self._hold([*(() if in_order else kept), *now, *then])
            mine = np.isin(groups, now)
            images[mine] = self._decode(positions[mine])
        if not in_order:
            self._held = kept
        return torch.from_numpy(images)

    def _hold(self, groups: Iterable[int]) -> None:
        self._held = {int(g): self._held.get(g) or self._readers.submit(self._read, int(g)) for g in groups}

    def _read(self, group: int) -> Any:
        """Of a row group, the column of those images that are in here."""
        number = self._numbers[group]
        rows = self._rows[self._bounds[group] : self._bounds[group + 1]] - self._stream.bounds[number]
        return self._stream.read(number, rows)

    def _open(self, position: int) -> Image.Image:
        group = int(self._groups[position])
        future = self._held.get(group)
        column = future.result() if future else self._read(group)  # for a broken one, another is looked for anywhere
        item = column[position - self._bounds[group]].as_py()
        if isinstance(item, dict):
            item = item["bytes"] if item.get("bytes") is not None else item["path"]
        return Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)

    def _make_order(self, seed: int, epoch: int) -> EpochOrder:
        generator = epoch_generator(seed, epoch)
        windows = np.array_split(torch.randperm(len(self._numbers), generator=generator).numpy(), self._count)
        drawn = self._draw and self._draw.chosen(seed, epoch).bincount(minlength=len(self)).numpy()  # times
        parts = []
        for window in windows:
            places = np.concatenate([np.arange(*self._bounds[group : group + 2]) for group in window])
            if self._draw:
                places = places.repeat(drawn[places])
            parts.append(places[torch.randperm(len(places), generator=generator).numpy()])
        bounds = np.cumsum([0, *map(len, parts)])
        return EpochOrder(torch.from_numpy(np.concatenate(parts)), windows, bounds)
