"""How the suite measures: interleaved timings, the machine's own rates, counted floating-point operations."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MIN_REPEATS, MAX_REPEATS = 3, 25

# What times are read from, in seconds.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# ------------------------------------------------------------------------------------------------ results


@dataclass
class Comparison:
    """A value against a baseline of the same unit, measured in the same run.

    kind: "faster" is how many times less time the value takes, baseline / value; "share" is value / baseline, of two
    times, and "rate" the same of two rates, where more is better.
    """

    baseline: str
    baseline_value: float
    ratio: float
    kind: str
    target: float | None = None  # at most this for "share", at least this for the others
    met: bool | None = None  # None: no target


def faster(value: float, baseline: str, baseline_value: float, target: float | None = None) -> Comparison:
    """How many times faster `value` is than the baseline, both times; a target is a lower bound."""
    ratio = baseline_value / value
    return Comparison(baseline, baseline_value, ratio, "faster", target, None if target is None else ratio >= target)


def share(value: float, baseline: str, baseline_value: float, target: float | None = None) -> Comparison:
    """The time `value` as a part of the baseline's; a target is an upper bound."""
    ratio = value / baseline_value
    return Comparison(baseline, baseline_value, ratio, "share", target, None if target is None else ratio <= target)


def rate(value: float, baseline: str, baseline_value: float, target: float | None = None) -> Comparison:
    """The rate `value` as a part of the baseline's; a target is a lower bound."""
    ratio = value / baseline_value
    return Comparison(baseline, baseline_value, ratio, "rate", target, None if target is None else ratio >= target)


@dataclass
class Result:
    """What one figure came to. `floor` is the time, in the value's unit, that the machine's rates leave."""

    value: float | None
    unit: str
    comparisons: list[Comparison] = field(default_factory=list)
    floor: float | None = None
    note: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)  # every timing, seconds

    @property
    def over_floor(self) -> float | None:
        return self.value / self.floor if self.value is not None and self.floor else None

    def as_dict(self) -> dict:
        return asdict(self) | {"over_floor": self.over_floor}


def not_measured(reason: str) -> Result:
    return Result(None, "", note=f"not measured: {reason}")


# ------------------------------------------------------------------------------------------------ time


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    functions: dict[str, Callable[[], object]], budget_s: float, device: torch.device, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns, so that a machine that slows down slows all of them.

    One call each to warm up, then rounds until `budget_s` is used up, at least 3 and at most 25. Each round starts
    with another function, as the first may find caches cold that it leaves warm.
    """
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        functions[name]()
    synchronise(device)
    gc.collect()
    started, rounds = time.perf_counter(), 0
    while rounds < MIN_REPEATS or rounds < MAX_REPEATS and time.perf_counter() - started < budget_s:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            start = CLOCKS[clock]()
            functions[name]()
            synchronise(device)
            samples[name].append(CLOCKS[clock]() - start)
        rounds += 1
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


# ------------------------------------------------------------------------------------------------ operations

_aten = torch.ops.aten
# The attention kernels of CPUs, which torch's counter leaves out.
_CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in one call, 2 an addition of
    a product."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ------------------------------------------------------------------------------------------------ the machine


class Machine:
    """The device's measured rates, the best of several kernels and tries: what a floor divides by.

    Rates are measured once for each size, when first asked for.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, clock: str = "wall") -> None:
        self.device, self.dtype, self.clock = device, dtype, clock
        self.read_rate = cache(self._read_rate)
        self.matmul_rate = cache(self._matmul_rate)

    def _best(self, function: Callable[[], object], tries: int = 5) -> float:
        return min(interleave({"": function}, 0.05 * tries, self.device, self.clock)[""])

    def _read_rate(self, size: int) -> float:
        """Bytes a second read from a buffer of `size` bytes: the cache's rate for small ones, else the memory's."""
        columns = 1024
        x = torch.rand(max(1, size // (columns * self.dtype.itemsize)), columns, device=self.device).to(self.dtype)
        vector = torch.rand(columns, device=self.device).to(self.dtype)
        kernels = [lambda: x.sum(), lambda: x.amax(), lambda: x @ vector]
        rates = [nbytes(x) / self._best(kernel) for kernel in kernels]
        target = torch.empty_like(x)
        return max(*rates, 2 * nbytes(x) / self._best(lambda: target.copy_(x)))

    def _matmul_rate(self) -> float:
        """Floating-point operations a second of square matrix products, the best of a few sizes."""
        rates = []
        for n in (512, 1024) if self.device.type == "cpu" else (4096, 8192):
            a, b = (torch.rand(n, n, device=self.device).to(self.dtype) for _ in range(2))
            rates.append(2 * n**3 / self._best(lambda a=a, b=b: a @ b))
        return max(rates)

    def floor(self, flops: float, size: int, traffic: float) -> float:
        """Seconds that nothing on this machine can beat: operations over the matrix rate, or `traffic` bytes over
        the read rate of a buffer of `size` bytes, whichever takes longer."""
        return max(flops / self.matmul_rate(), traffic / self.read_rate(size))

    def describe(self) -> dict:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        return {
            "device": self.device.type,
            "name": name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "memory_bytes_per_s": self.read_rate(256 << 20 if self.device.type == "cpu" else 4 << 30),
            "matmul_flops_per_s": self.matmul_rate(),
        }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_run() -> dict:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
