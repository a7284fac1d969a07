"""Rate-distortion: bits of prefixes, and what plain codecs make of an image in as many."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..spectral import dct2, idct2, square_frequency


def prefix_bits(num_tokens: int, codebook_size: int) -> list[float]:
    """Bits of the first k tokens, k = 1..N, at log2 K a token (no entropy coding)."""
    return [k * math.log2(codebook_size) for k in range(1, num_tokens + 1)]


def dct_truncation(image: Tensor, bits: float) -> Tensor | None:
    """A plain DCT code of an image (C, H, H) within `bits`: a square of coefficients, b bits each.

    Coefficient (u, v) is quantised uniformly on +-H / (1 + max(u, v)), a fixed range that falls as 1/f, so that
    nothing but the coefficients needs to be sent. For each depth b of 2 to 8 bits the largest square that fits is
    tried, and the one with the smallest error taken; None if not even the mean of the image fits.
    """
    channels, size = image.shape[0], image.shape[-1]
    spectrum = dct2(image.float())
    frequency = square_frequency(size, image.device)
    bound = size / (1.0 + frequency.float())
    best, best_error = None, math.inf
    for depth in range(2, 9):
        side = min(size, math.isqrt(int(bits // (channels * depth))))
        if side < 1:
            break
        # Mid-tread: zero is a level, or every empty coefficient would cost half a step of error.
        step = 2 * bound / 2**depth
        level = (spectrum / step).round().clamp(-(2 ** (depth - 1)), 2 ** (depth - 1) - 1)
        coded = torch.where(frequency < side, level * step, torch.zeros_like(spectrum))
        error = float((coded - spectrum).square().sum())
        if error < best_error:
            best, best_error = coded, error
    return None if best is None else idct2(best)


def file_codec(image: Tensor, bits: Sequence[float], file_format: str) -> list[Tensor | None]:
    """The best JPEG or WebP of an image (C, H, W) whose whole file fits in each budget; None where none does.

    The file's headers count: that is what a file of so many bits can hold.
    """
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    options = {"optimize": True} if file_format == "JPEG" else {"method": 4}

    @cache
    def encode(quality: int) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, file_format, quality=quality, **options)
        return buffer.getvalue()

    def best(budget: float) -> Tensor | None:
        low, high = 0, 95  # above 95 files grow, not pictures' likeness
        if 8 * len(encode(low)) > budget:
            return None
        while low < high:  # size grows with quality, nearly: a binary search finds a good one that fits
            quality = (low + high + 1) // 2
            low, high = (quality, high) if 8 * len(encode(quality)) <= budget else (low, quality - 1)
        decoded = np.asarray(Image.open(io.BytesIO(encode(low))).convert(picture.mode), dtype=np.float32)
        planes = decoded[None] if decoded.ndim == 2 else np.moveaxis(decoded, -1, 0)
        return torch.from_numpy(planes / 127.5 - 1)

    return [best(budget) for budget in bits]


BASELINES: dict[str, Callable[[Tensor, Sequence[float]], list[Tensor | None]]] = {
    "DCT truncation": lambda image, bits: [dct_truncation(image, budget) for budget in bits],
    "JPEG": lambda image, bits: file_codec(image, bits, "JPEG"),
    "WebP": lambda image, bits: file_codec(image, bits, "WEBP"),
}


def baselines(image: Tensor, bits: Sequence[float]) -> dict[str, list[Tensor | None]]:
    """What plain codecs make of one image (C, H, H) in each budget, as of `prefix_bits`; None: cannot go this low."""
    image = image.float().cpu()
    return {name: codec(image, bits) for name, codec in BASELINES.items()}
