"""Several sources of images in one training run, each with a fixed share of every step.

    data = load_mixed(config, "train")                                   # {"": ImageSet, "photos": ImageSet}
    mixed = MixedImages(list(data.values()), config.data.images_a_step)
    batch = mixed.gather(mixed.step_indices(batch_size=32, seed=0, step=17))     # (32, C, H, H)

Each source goes through epochs of its own, of which a step takes so many images further: which images a step takes
depends on seed and step alone, as with one source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..configs.config import DataConfig
from .images import Found, ImageSet, find_images
from .order import check_batch


def load_mixed(cfg: DataConfig, split: str) -> dict[str, ImageSet]:
    """A split of `cfg.source`, under the name "", and of each source of `cfg.mix`.

    Raises:
        FileNotFoundError, ValueError: as `load_images`; which source it is, if not the first, stands in front.
    """
    return {name: found.load() for name, found in _find_mixed(cfg, split).items()}


def load_mixed_splits(cfg: DataConfig, batch_size: int = 1) -> tuple[dict[str, ImageSet], dict[str, ImageSet]]:
    """As `images.load_splits`, of all sources: what is wrong with one of them is said before any image is decoded."""
    train, heldout = _find_mixed(cfg, "train"), _find_mixed(cfg, "eval")
    for (name, found), count in zip(train.items(), cfg.images_a_step(batch_size), strict=True):
        with _named(name):
            check_batch(found.count, count)
    return tuple({name: found.load() for name, found in split.items()} for split in (train, heldout))


def _find_mixed(cfg: DataConfig, split: str) -> dict[str, Found]:
    found = {}
    for name, own in {"": cfg, **cfg.mixed()}.items():
        with _named(name):
            found[name] = find_images(own, split)
    return found


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts in front of an error which source it is, if not the first."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not name:
            raise
        raise ValueError(f"data.mix.{name}: {error}") from error


class MixedImages:
    """The training images of several sources, as one data set to `Run`.

    Args:
        sources: of one shape.
        counts: batch size -> how many images of a step come from each source.
    """

    def __init__(self, sources: list[ImageSet], counts: Callable[[int], list[int]]) -> None:
        self._sources, self._counts = sources, counts
        self._starts = np.cumsum([0, *map(len, sources)])  # (sources + 1,); an index tells its source

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _parts(self, batch_size: int) -> Iterator[tuple[int, ImageSet, int]]:
        """Of each source: its first index, its images, how many of them a step takes."""
        yield from zip(self._starts[:-1].tolist(), self._sources, self._counts(batch_size), strict=True)

    def step_indices(self, batch_size: int, seed: int, step: int) -> Tensor:
        """Which images a step takes, over all processes, (batch_size,) int64; every slice of it has all sources."""
        parts = list(self._parts(batch_size))
        chosen = torch.cat([start + data.step_indices(count, seed, step) for start, data, count in parts])
        # The j-th of n images stands at (j + 0.5) / n of the batch.
        places = torch.cat([(torch.arange(count) + 0.5) / count for _, _, count in parts])
        return chosen[places.argsort(stable=True)]

    def expect(self, batch_size: int, seed: int, step: int) -> None:
        """As `ImageSet.expect`."""
        for _, data, count in self._parts(batch_size):
            data.expect(count, seed, step)

    def gather(self, chosen: Tensor, pin: bool = False) -> Tensor:
        """As `ImageSet.gather`: (b, C, H, H) uint8."""
        shape = self._sources[0].images.shape[1:]
        images = torch.empty(len(chosen), *shape, dtype=torch.uint8, pin_memory=pin)
        numbers = np.searchsorted(self._starts, chosen.numpy(), side="right") - 1  # (b,)
        for number in np.unique(numbers):
            mine = numbers == number
            own = torch.from_numpy(chosen.numpy()[mine] - self._starts[number])
            images.numpy()[mine] = self._sources[number].gather(own).numpy()
        return images
