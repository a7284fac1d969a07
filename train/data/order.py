"""Which images come when: pure functions of the seed and the step, so that a run resumes exactly in any number of
processes."""

import functools
from collections.abc import Callable

import torch

# `data.class_balance`: a class is drawn in proportion to this power of its size.
CLASS_POWERS = {"none": 1.0, "sqrt": 0.5, "even": 0.0}


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The random numbers that order an epoch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def evenly(n: int, count: int) -> torch.Tensor:
    """min(n, count) indices spread evenly over 0..n-1: of a data set sorted by class, some of every class."""
    count = min(n, count)
    return torch.arange(count) * n // count


def in_proportion(counts: torch.Tensor, n: int) -> torch.Tensor:
    """Labels (n,) int64 of classes in proportion to `counts` (C,), in every stretch; with equal counts, i mod C."""
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    of_class = torch.cat([torch.arange(count) for count in counts.tolist()])
    # The j-th of a class of m stands at (j + 0.5) / m of a round.
    order = ((of_class + 0.5) / counts[labels].double()).argsort(stable=True)
    return labels[order].repeat(n // len(labels) + 1)[:n]


def of_classes(labels: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Indices of images with labels (n,): of each class as many as there are in `wanted` (m,), or all there are."""
    chosen = [(labels == c).nonzero()[: int(count), 0] for c, count in enumerate(wanted.bincount())]
    return torch.cat(chosen).sort().values


def check_batch(n: int, batch_size: int) -> None:
    """Raises a `ValueError` if n images do not make up one batch."""
    if n < batch_size:
        raise ValueError(f"There are {n} images, fewer than one batch of {batch_size}: lower batch_size.")


def step_indices(
    n: int, batch_size: int, seed: int, step: int, epoch_order: Callable[[int, int], torch.Tensor] | None = None
) -> torch.Tensor:
    """Which images one optimiser step takes, over all processes.

    A pure function: a resumed run sees what it would have seen. Each epoch is an order of its own; what does not
    fill a last batch is left out of that epoch.

    Args:
        epoch_order: (seed, epoch) -> (n,) out of 0..n-1, what an epoch shows; None = a uniform permutation.

    Returns:
        (batch_size,) int64.

    Raises:
        ValueError: if the images do not make up one batch.
    """
    check_batch(n, batch_size)
    epoch, position = divmod(step, n // batch_size)
    order = epoch_order(seed, epoch) if epoch_order else _permutation(n, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size].clone()


@functools.lru_cache(maxsize=8)  # two epochs at their border, of each of a few sources
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=epoch_generator(seed, epoch))


class BalancedDraw:
    """Draws classes in proportion to a power of their size: an epoch of n images shows some twice and some not.

    Within a class it is fair: over the epochs, no image comes again before all others have come as often.

    Args:
        labels: (n,) int64, the class of each image.
        balance: "sqrt" = by the square root of a class's size, "even" = all classes equally often.
    """

    def __init__(self, labels: torch.Tensor, balance: str) -> None:
        self._labels, counts = labels.unique(return_counts=True)
        self._members = labels.argsort(stable=True).split(counts.tolist())
        shares = (counts.double() ** CLASS_POWERS[balance]).cumsum(0)
        # At least one image a class, as no power below 1 makes a share smaller than one in n.
        ends = (len(labels) * shares / shares[-1] + 0.5).floor().long()
        self._quotas = ends.diff(prepend=ends.new_zeros(1)).tolist()  # images of each class an epoch
        # (seed, epoch) -> (n,) int64: what an epoch shows, in its order.
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def chosen(self, seed: int, epoch: int) -> torch.Tensor:
        """(n,) int64: what an epoch shows, by class and not yet in its order."""
        return torch.cat([
            self._of_class(label, members, epoch * quota, (epoch + 1) * quota, seed)
            for label, members, quota in zip(self._labels.tolist(), self._members, self._quotas, strict=True)
        ])  # fmt: skip

    def _order(self, seed: int, epoch: int) -> torch.Tensor:
        chosen = self.chosen(seed, epoch)
        return chosen[torch.randperm(len(chosen), generator=epoch_generator(seed, epoch))]

    @staticmethod
    def _of_class(label: int, members: torch.Tensor, start: int, stop: int, seed: int) -> torch.Tensor:
        """Draws start..stop-1 of the endless row of draws of a class: one permutation of it after the other."""
        size = len(members)

        def permutation(number: int) -> torch.Tensor:
            generator = epoch_generator(seed * 1_000_003 + label, number)
            return members[torch.randperm(size, generator=generator)]

        first, last = start // size, stop // size
        if first == last:
            return permutation(first)[start % size : stop % size]
        return torch.cat([
            permutation(first)[start % size :], members.repeat(last - first - 1), permutation(last)[: stop % size]
        ])  # fmt: skip


def balanced_order(labels: torch.Tensor, balance: str) -> Callable[[int, int], torch.Tensor] | None:
    """What `step_indices` takes, of images with `labels` (n,) by a rule of `CLASS_POWERS`."""
    return None if balance == "none" else BalancedDraw(labels, balance).order
