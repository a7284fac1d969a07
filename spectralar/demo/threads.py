"""As many threads as there is CPU time for: in a container torch counts the cores of the whole machine.

And no more memory than they use: the C library keeps what is freed, each thread's apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..transformer import SpectralARTransformer, sums_in_order

_M_ARENA_MAX = -8  # of malloc.h


def limit_threads(*models: SpectralARTransformer) -> None:
    """Lowers torch's number of threads to `usable_cpus`; what OMP_NUM_THREADS asks for stays if it is less.

    To one where all models are small: they are no faster on two, which other visitors then have, and what a visitor
    gets does not depend on the others to the bit.
    """
    small = models and all(sums_in_order(model) for model in models)
    torch.set_num_threads(1 if small else min(torch.get_num_threads(), usable_cpus()))


def share_memory_pools(pools: int = 2) -> None:
    """Has all threads take memory from a few pools, where the C library is glibc; to be called before there are many.

    By itself it gives every thread a pool, and what is free in one is not used by the others: with fifty visitors the
    page grew for as long as it ran.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(_M_ARENA_MAX, pools)


def give_back_memory(seconds: float = 60.0) -> None:
    """Has what is free within the pools go back to the system now and then, where the C library is glibc.

    By itself it gives back what lies behind the last block in use alone, and a block of a visitor's session lies there
    for long.
    """
    trim = _of_glibc("malloc_trim")

    def go_round() -> None:
        while True:
            time.sleep(seconds)
            trim(0)  # some milliseconds, in which Python goes on

    if trim:
        threading.Thread(target=go_round, name="give back memory", daemon=True).start()


def _of_glibc(function: str) -> Callable | None:
    with contextlib.suppress(OSError, AttributeError):
        return getattr(ctypes.CDLL("libc.so.6"), function)
    return None


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup"), environment: Mapping[str, str] = os.environ) -> int:
    """CPUs that this process may use, at least 1: by its affinity, the quota of its cgroup (v2 or v1), and on a
    Hugging Face Space what $CPU_CORES says."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    limits = [len(affinity(0)) if affinity else os.cpu_count() or 1]
    quota, period = (_read(cgroup / "cpu.max") or "max 100000").split()
    if quota == "max":
        quota, period = (_read(cgroup / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    limits += [_number(quota) / (_number(period) or math.inf), _number(environment.get("CPU_CORES"))]
    return max(1, math.ceil(min(limit for limit in limits if limit > 0)))


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _number(text: str | None) -> float:
    """0 where there is none; a quota of -1 is none."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
