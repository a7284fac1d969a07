"""What each spectral token contributes, as numbers; `plots` draws them.

Images are in [-1, 1] as in `spectral`; PSNR and SSIM are taken on [0, 1], clamped (DESIGN section 2).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .spectral import dct2, idct2, low_pass, radial_frequency, square_frequency
from .tokenizer import SpectralTokenizer

# ---------------------------------------------------------------------------------------------------- quality


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (..., C, H, W) in [-1, 1] -> (...). 100 dB at most."""
    error = ((images.clamp(-1, 1) - reference.clamp(-1, 1)) / 2).square().mean(dim=(-3, -2, -1))
    return -10 * error.clamp(min=1e-10).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al., 2004): (..., C, H, W) in [-1, 1] -> (...).

    The published settings: Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, mean over the
    positions where the window lies inside the image, and over channels.
    """
    lead, channels = images.shape[:-3], images.shape[-3]
    window = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5).square() / (2 * 1.5**2))
    window = (window / window.sum()).to(images)

    def blur(x: Tensor) -> Tensor:
        x = x.reshape(-1, 1, *x.shape[-2:])
        return F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    a, b = ((x.expand_as(images).clamp(-1, 1) + 1) / 2 for x in (images, reference))
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    values = values / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return values.mean(dim=(1, 2, 3)).view(*lead, channels).mean(dim=-1)


# --------------------------------------------------------------------------------------- what a token changes


class Contributions(NamedTuple):
    """delta_k = D_k - D_(k-1) in its two parts, D_0 = 0 (DESIGN section 2)."""

    frames: Tensor  # (B, N, C, H, H), the decoded prefixes D_k
    refinement: Tensor  # (B, N, C, H, H), M_(k-1) * delta_k: in bands that were already open
    opening: Tensor  # (B, N, C, H, H), (M_k - M_(k-1)) * D_k: in the band that token k opens


def token_contributions(frames: Tensor, cutoffs: tuple[int, ...]) -> Contributions:
    """Splits the step from each decoded prefix to the next: frames (B, N, C, H, H), unclamped."""
    before = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], dim=1)
    open_cutoffs = torch.tensor((0, *cutoffs[: frames.shape[1] - 1]), device=frames.device)
    kept = low_pass(frames, open_cutoffs[None])  # M_(k-1) * D_k
    return Contributions(frames, kept - before, frames - kept)


def energy(x: Tensor) -> Tensor:
    """Sum of squares of each image: (..., C, H, W) -> (...). By Parseval the same in coefficients."""
    return x.square().sum(dim=(-3, -2, -1))


def _radial_sum(spectral_energy: Tensor) -> Tensor:
    """Energy (..., H, H) of coefficients summed over rings of radial frequency -> (..., F)."""
    ring = radial_frequency(spectral_energy.shape[-1], spectral_energy.device).flatten()
    out = spectral_energy.new_zeros(*spectral_energy.shape[:-2], int(ring.max()) + 1)
    return out.index_add_(-1, ring, spectral_energy.flatten(-2))


def code_marginals(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code stands at each position: codes (n, N) -> probabilities (N, K)."""
    one_hot = torch.zeros(codes.shape[1], codebook_size, dtype=torch.float64)
    one_hot.scatter_add_(1, codes.T.cpu().long(), torch.ones(codes.T.shape, dtype=torch.float64))
    return one_hot / codes.shape[0]


@torch.no_grad()
def influence_steps(
    tokenizer: SpectralTokenizer, codes: Tensor, marginals: Tensor, draws: int = 4, seed: int = 0
) -> Iterator[Tensor]:
    """Rows of the influence matrix, one token at a time, so that a caller can show progress or stop.

    Row k is the mean energy, by radial frequency, of D_k with the true code minus D_k with a code drawn from the
    marginal distribution of position k (the counterfactual of DESIGN section 2): what the token carries.

    Args:
        tokenizer: the tokenizer.
        codes: (B, N) of the images to average over.
        marginals: (N, K) from `code_marginals`.
        draws: counterfactual codes for each image and position.
        seed: of the draws.

    Yields:
        (F,) float32 for k = 1..N; frequency f in half-cycles an image.
    """
    generator = torch.Generator().manual_seed(seed)
    for k in range(1, codes.shape[1] + 1):
        prefix = codes[:, :k]
        true = tokenizer.decode(prefix, k).float()
        drawn = torch.multinomial(marginals[k - 1].float(), draws * len(codes), True, generator=generator)
        other = prefix.repeat(draws, 1)
        other[:, -1] = drawn.to(codes)
        changed = tokenizer.decode(other, k).float()
        difference = dct2(changed - true.repeat(draws, 1, 1, 1)).square().sum(dim=1)  # (draws B, H, H)
        yield _radial_sum(difference.mean(dim=0)).cpu()


def influence_matrix(
    tokenizer: SpectralTokenizer, codes: Tensor, marginals: Tensor, draws: int = 4, seed: int = 0
) -> Tensor:
    """Token x radial frequency influence (N, F), see `influence_steps`."""
    return torch.stack(list(influence_steps(tokenizer, codes, marginals, draws, seed)))


# --------------------------------------------------------------------------------------------- rate-distortion


def prefix_bits(num_tokens: int, codebook_size: int) -> list[float]:
    """Bits of the first k tokens, k = 1..N, at log2 K a token (no entropy coding)."""
    return [k * math.log2(codebook_size) for k in range(1, num_tokens + 1)]


def dct_truncation(image: Tensor, bits: float) -> Tensor | None:
    """The best plain DCT code of an image (C, H, H) within `bits`: a square of coefficients, b bits each.

    Coefficient (u, v) is quantised uniformly on +-H / (1 + max(u, v)), a fixed range that falls as 1/f, so that
    nothing but the coefficients needs to be sent. All squares and depths that fit are tried; None if none fits.
    """
    channels, size = image.shape[0], image.shape[-1]
    spectrum = dct2(image.float())
    frequency = square_frequency(size, image.device)
    bound = size / (1.0 + frequency)
    best, best_error = None, math.inf
    for depth in range(2, 9):
        side = min(size, math.isqrt(int(bits // (channels * depth))))
        if side < 1:
            break
        step = 2 * bound / 2**depth
        # Mid-tread: zero is a level, or every empty coefficient would cost half a step of error.
        level = (spectrum / step).round().clamp(-(2 ** (depth - 1)), 2 ** (depth - 1) - 1)
        coded = torch.where(frequency < side, level * step, torch.zeros_like(spectrum))
        error = float((coded - spectrum).square().sum())
        if error < best_error:
            best, best_error = coded, error
    return None if best is None else idct2(best)


def file_codec(image: Tensor, bits: float, file_format: str) -> Tensor | None:
    """The best JPEG or WebP of an image (C, H, W) whose whole file fits in `bits`; None where none does.

    The file's headers count: that is what a file of so many bits can hold.
    """
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    low, high, best = 1, 95, None
    if 8 * _encoded_size(picture, file_format, low)[0] > bits:
        return None
    while low <= high:  # size grows with quality, nearly: a binary search finds a good one
        quality = (low + high) // 2
        size, data = _encoded_size(picture, file_format, quality)
        if 8 * size <= bits:
            best, low = data, quality + 1
        else:
            high = quality - 1
    if best is None:
        return None
    decoded = np.asarray(Image.open(io.BytesIO(best)).convert(picture.mode), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(decoded[None] if decoded.ndim == 2 else np.moveaxis(decoded, -1, 0).copy())


def _encoded_size(picture: Image.Image, file_format: str, quality: int) -> tuple[int, bytes]:
    buffer = io.BytesIO()
    options = {"optimize": True} if file_format == "JPEG" else {"method": 4}
    picture.save(buffer, file_format, quality=quality, **options)
    return buffer.tell(), buffer.getvalue()


BASELINES: dict[str, Callable[[Tensor, float], Tensor | None]] = {
    "DCT truncation": dct_truncation,
    "JPEG": lambda image, bits: file_codec(image, bits, "JPEG"),
    "WebP": lambda image, bits: file_codec(image, bits, "WEBP"),
}


def baseline_psnr(image: Tensor, bits: list[float]) -> dict[str, list[float | None]]:
    """PSNR in dB of plain codecs at each budget in bits, for one image (C, H, H); None: cannot go this low."""
    result: dict[str, list[float | None]] = {}
    for name, codec in BASELINES.items():
        coded = [codec(image, budget) for budget in bits]
        result[name] = [None if x is None else float(psnr(x.to(image), image)) for x in coded]
    return result
