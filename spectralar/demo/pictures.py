"""Tensors as pixels: errors, differences and spectra that can be looked at."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from torch import Tensor

from ..spectral import dct2
from .model import to_pixels

ERROR_GAIN = 4
SPECTRUM_DECADES = 4  # magnitudes this many powers of ten below the largest one are black
MAGMA = (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)  # (256, 3)


def colour_map(x: Tensor) -> np.ndarray:
    """(..., H, H) in [0, 1] -> (..., H, H, 3) uint8, dark to light."""
    return MAGMA[(x.clamp(0, 1) * 255).round().long().numpy()]


def error_map(difference: Tensor) -> np.ndarray:
    """Absolute differences (..., C, H, H) of images in [-1, 1], mean over channels, times 4, colour-mapped."""
    return colour_map(difference.abs().mean(dim=-3) / 2 * ERROR_GAIN)


def log_spectrum(x: Tensor, peak: float) -> np.ndarray:
    """Log magnitude of the DCT of (..., C, H, H), mean over channels, `SPECTRUM_DECADES` below `peak` to `peak`."""
    magnitude = dct2(x).abs().mean(dim=-3).clamp(min=1e-12)
    return colour_map(1 + (magnitude / peak).log10() / SPECTRUM_DECADES)


def own_gains(*parts: Tensor) -> Tensor:
    """What brings the largest value of each item of all `parts` (N, C, H, H) close to 1: (N, 1, 1, 1)."""
    largest = torch.stack([part.abs().amax(dim=(1, 2, 3), keepdim=True) for part in parts]).amax(dim=0)
    return 0.95 / largest.clamp(min=1e-3)


def signed_map(x: Tensor, gain: float | Tensor) -> np.ndarray:
    """Differences (..., C, H, H) around mid-grey, times `gain`, as pixels."""
    return to_pixels((0.5 + x / 2 * gain).clamp(0, 1))
