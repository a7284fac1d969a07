"""Which images come when: pure functions of the seed and the step, so that a run resumes exactly in any number of
processes."""

import functools
from collections.abc import Callable

import torch


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The random numbers that order an epoch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def evenly(n: int, count: int) -> torch.Tensor:
    """min(n, count) indices spread evenly over 0..n-1: of a data set sorted by class, some of every class."""
    count = min(n, count)
    return torch.arange(count) * n // count


def step_indices(
    n: int, batch_size: int, seed: int, step: int, permutation: Callable[[int, int], torch.Tensor] | None = None
) -> torch.Tensor:
    """Which images one optimiser step takes, over all processes.

    A pure function: a resumed run sees what it would have seen. Each epoch is a permutation of 0..n-1 of its
    own; what does not fill a last batch is left out of that epoch.

    Args:
        permutation: (seed, epoch) -> (n,), the order in an epoch; None = a uniform one.

    Returns:
        (batch_size,) int64.

    Raises:
        ValueError: if the images do not make up one batch.
    """
    steps_per_epoch = n // batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"There are {n} images, fewer than one batch of {batch_size}: lower batch_size.")
    epoch, position = divmod(step, steps_per_epoch)
    order = permutation(seed, epoch) if permutation else _permutation(n, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size].clone()


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=epoch_generator(seed, epoch))
