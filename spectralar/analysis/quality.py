"""How near an image is to another: PSNR and SSIM, taken on [0, 1], clamped.

Images are in [-1, 1] as in `spectral`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SSIM_WINDOW = 11


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (..., C, H, W) in [-1, 1] -> (...). 100 dB at most.

    The reference has the same shape, or one that broadcasts to it.
    """
    error = ((images.clamp(-1, 1) - reference.clamp(-1, 1)) / 2).square().mean(dim=(-3, -2, -1))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al., 2004): (..., C, H, W) in [-1, 1] -> (...).

    The published settings: Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, mean over the
    positions where the window lies inside the image, and over channels. The reference broadcasts as in `psnr`.

    Raises:
        ValueError: if the images are smaller than the window.
    """
    if min(images.shape[-2:]) < SSIM_WINDOW:
        size = f"{images.shape[-1]} x {images.shape[-2]}"
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {size}.")
    distance = torch.arange(SSIM_WINDOW, dtype=torch.float64, device="cpu") - SSIM_WINDOW // 2
    window = torch.exp(-distance.square() / (2 * 1.5**2))
    window = (window / window.sum()).to(images)

    def sliding(size: int) -> Tensor:
        """(size - 10, size): row i is the window at position i."""
        matrix = images.new_zeros(size - SSIM_WINDOW + 1, size)
        for row, values in enumerate(matrix):
            values[row : row + SSIM_WINDOW] = window
        return matrix

    # Two products with small matrices: many times faster than convolving single channels on a CPU.
    rows, columns = (sliding(size) for size in images.shape[-2:])

    def blur(x: Tensor) -> Tensor:
        return rows @ x @ columns.mT

    a, b = ((x.expand_as(images).clamp(-1, 1) + 1) / 2 for x in (images, reference))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    values = values / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return values.mean(dim=(-2, -1)).mean(dim=-1)
