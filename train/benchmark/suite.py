"""What every figure gets: device, models, the machine's rates, time to spend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..runs.hardware import fast_dtype
from .measure import Machine, Result, interleave, not_measured
from .models import Models, Shape, d16, embedded


@dataclass
class Suite:
    """One device's run.

    Args:
        device: where the models run; float32 on a CPU, bfloat16 on CUDA.
        quick: smaller models and fewer repeats; figures that take minutes are left out.
        small: the embedded model.
        large: a model too large for the cache.
        colour: a model of 64x64 colour images that a CPU can train.
        budget_s: seconds to spend on the repeats of one figure.
        clock: what times are read from, of `measure.CLOCKS`.
    """

    device: torch.device
    quick: bool = False
    small: Shape | None = None
    large: Shape | None = None
    budget_s: float = 20.0
    clock: str = "wall"
    colour: Shape | None = None
    models: Models = field(init=False)
    machine: Machine = field(init=False)

    def __post_init__(self) -> None:
        on_cpu = self.device.type == "cpu"
        self.small = self.small or embedded()
        self.large = self.large or (d16(num_layers=2) if self.quick and on_cpu else d16())
        self.colour = self.colour or embedded("products-64")
        self.models = Models(self.device, torch.float32 if on_cpu else torch.bfloat16)
        self.machine = Machine(self.device, self.models.dtype, self.clock)

    def time(self, functions: dict[str, Callable[[], object]], part: float = 1.0) -> dict[str, list[float]]:
        """Seconds of every call, the functions taking turns, in a part of the figure's budget."""
        return interleave(functions, part * self.budget_s, self.device, self.clock)

    @property
    def fast_bfloat16(self) -> bool:
        """Whether bfloat16 can pay: many CPUs have no instructions for it."""
        return fast_dtype(self.device) == torch.bfloat16


@dataclass(frozen=True)
class Figure:
    """One figure of the table: what is measured, in which setting, and the function that does it."""

    name: str
    setting: str
    measure: Callable[[], Result]
    skip: str = ""  # a reason not to measure it in this run

    def run(self) -> Result:
        if self.skip:
            return not_measured(self.skip)
        print(f"  {self.name} ({self.setting})", file=sys.stderr, flush=True)
        return self.measure()
