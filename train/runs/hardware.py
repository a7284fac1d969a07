"""What the device at hand computes fast."""

from __future__ import annotations

import ctypes

import torch

# Of mallopt(3), in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16; without them they are fifty times slower."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one on ARM


def fast_dtype(device: torch.device) -> torch.dtype:
    """The type of the fastest products on a device that need not be exact: bfloat16, or float32 on most CPUs."""
    return torch.bfloat16 if device.type != "cpu" or cpu_has_bfloat16() else torch.float32


def keep_freed_memory() -> None:
    """Has the C library keep what is freed for what comes next, until the program ends.

    It would give large tensors back to the system, and every one made anew would cost a page fault for each 4 KiB: a
    tenth of a small model's training step on a CPU. With another C library than glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never
