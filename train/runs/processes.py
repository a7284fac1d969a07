"""Work on many images shared by the processes of `accelerate launch`: the same results as of one, on every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")


class Team:
    """The processes of an evaluation. All methods are called by all of them, in the same order."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process

    def map(self, function: Callable[..., T], batch: int, description: str, *tensors: Tensor) -> list[T]:
        """function(*slices) of `batch` rows of equally long tensors, every process some of the slices; all, in order.

        What a slice gives does not depend on how many processes there are, since no slice is cut up.
        Results should be on the CPU: they are pickled from process to process.
        """
        starts = range(0, len(tensors[0]), batch)
        mine = []
        with tqdm(
            total=len(tensors[0]), desc=description, unit="img", leave=False, disable=not self.is_main, delay=0.5
        ) as bar:
            for start in starts[self.rank :: self.size]:
                slices = [t[start : start + batch] for t in tensors]
                mine.append(function(*slices))
                bar.update(min(batch * self.size, bar.total - bar.n))
        if self.size == 1:
            return mine
        everyone = gather_object([mine])  # one list a process
        return [everyone[i % self.size][i // self.size] for i in range(len(starts))]

    def broadcast(self, value: T) -> T:
        """The main process's value, on all."""
        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()
