"""What the device at hand computes fast."""

from __future__ import annotations

import torch


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16; without them they are fifty times slower."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one on ARM


def fast_dtype(device: torch.device) -> torch.dtype:
    """The type of the fastest products on a device that need not be exact: bfloat16, or float32 on most CPUs."""
    return torch.bfloat16 if device.type != "cpu" or cpu_has_bfloat16() else torch.float32
