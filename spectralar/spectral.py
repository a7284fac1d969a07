"""The spectral ground floor: DCT, cutoff schedule, nested square masks, band limiting, radial spectra.

Conventions (all functions): an image is x in [-1, 1]^(..., C, H, H); its spectrum is the orthonormal DCT-II
X = D x D^T over the last two axes, so Parseval holds with factor one: ||x||² = ||X||². Coefficient (u, v) belongs
to a prefix with cutoff r when max(u, v) < r. Half-precision input is computed in float32 and cast back, also
under autocast: bfloat16 keeps 8 bits, far too few for the small coefficients at high frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def _dct_matrix_cpu(size: int) -> Tensor:
    n = torch.arange(size, dtype=torch.float64, device="cpu")  # even where another device is the default
    matrix = torch.cos(math.pi / size * (n[None, :] + 0.5) * n[:, None]) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix


@lru_cache(maxsize=64)
def _dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Cached outside inference mode: a tensor made inside it could never be saved for backward later.
    with torch.inference_mode(False):
        return _dct_matrix_cpu(size).to(device=device, dtype=dtype)


def dct_matrix(size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal DCT-II matrix D (H, H): D @ D.T = 1, row u is the cosine of frequency u. Shared: do not write."""
    return _dct_matrix(size, dtype, torch.device(device))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the type they have: autocast would make it bfloat16."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a, b)


def _separable(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ x @ right over the last two axes."""
    return _matmul(_matmul(left, x), right)


def _compute_dtype(x: Tensor) -> torch.dtype:
    if not x.is_floating_point():
        raise TypeError(f"images and spectra must be floating-point tensors, images in [-1, 1]; got {x.dtype}.")
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32


def _square_side(x: Tensor) -> int:
    if x.ndim < 3 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"images must be square, of shape (..., C, H, H), got {tuple(x.shape)}.")
    return x.shape[-1]


def dct2(x: Tensor) -> Tensor:
    """Orthonormal 2D DCT-II over the last two axes: (..., H, W) -> (..., H, W)."""
    dtype = _compute_dtype(x)
    rows, columns = (dct_matrix(n, dtype, x.device) for n in x.shape[-2:])
    return _separable(x.to(dtype), rows, columns.mT).to(x.dtype)


def idct2(spectrum: Tensor) -> Tensor:
    """Inverse of `dct2`: (..., H, W) -> (..., H, W)."""
    dtype = _compute_dtype(spectrum)
    rows, columns = (dct_matrix(n, dtype, spectrum.device) for n in spectrum.shape[-2:])
    return _separable(spectrum.to(dtype), rows.mT, columns).to(spectrum.dtype)


def cutoff_schedule(image_size: int, num_tokens: int, alpha: float = 1.5) -> tuple[int, ...]:
    """Cutoffs (r_1, ..., r_N) of the N prefixes, docs/design.md#cutoffs.

    r_k = min(H, max(1, round(H * (k / N) ** alpha))). alpha > 1 spends more tokens on the low frequencies (the
    paper's non-uniform token-frequency mapping); alpha = 0.5 opens about equally many coefficients a token;
    alpha = 0 opens all with the first, which makes nested dropout without spectral targets, a baseline.
    Non-decreasing, ties allowed, r_N = H.

    Raises:
        ValueError: if a size is not positive or alpha is negative or not finite.
    """
    if image_size < 1 or num_tokens < 1:
        raise ValueError(f"image_size and num_tokens must be at least 1, got {image_size} and {num_tokens}.")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be 0 or a positive number, got {alpha}.")
    return tuple(
        min(image_size, max(1, round(image_size * (k / num_tokens) ** alpha))) for k in range(1, num_tokens + 1)
    )


def check_cutoffs(cutoffs: Sequence[int], image_size: int, num_tokens: int) -> tuple[int, ...]:
    """Cutoffs (r_1, ..., r_N) that somebody gives, as they are.

    Raises:
        ValueError: if there are not N of them, from 1 to H, each at least the one before, and the last one H.
    """
    if len(cutoffs) != num_tokens:
        raise ValueError(f"cutoffs needs one number for each of the {num_tokens} tokens, got {len(cutoffs)}.")
    whole = all(isinstance(r, int) and 1 <= r <= image_size for r in cutoffs)
    if not whole or list(cutoffs) != sorted(cutoffs) or cutoffs[-1] != image_size:
        raise ValueError(
            f"cutoffs must be whole numbers from 1 to {image_size}, none below the one before it and the last one "
            f"{image_size}, got {list(cutoffs)}."
        )
    return tuple(cutoffs)


def water_levels(variances: Tensor, bits: Sequence[float]) -> Tensor:
    """Reverse water-filling: the levels D (S,) at which independent Gaussians spend each number of bits.

    A coefficient of variance v is worth max(0, log2(v / D) / 2) bits and keeps an error of min(v, D): the least mean
    squared error that any code of so many bits can reach (Cover & Thomas, section 10.3.3).

    Args:
        variances: of any shape, at least 0.
        bits: S numbers, each at least 0.

    Raises:
        ValueError: if all variances are 0: nothing is worth a bit then.
    """
    ordered = variances.double().flatten().sort(descending=True).values.log2()
    ordered = ordered[ordered > -math.inf]
    if not len(ordered):
        raise ValueError("all variances are 0: there is nothing to spend bits on.")
    # With the n largest in use, sum_n log2(v) - n log2(D) = 2 bits; as many are in use as lie above the level.
    count = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device=ordered.device)
    spent = 2 * torch.tensor(bits, dtype=torch.float64, device=ordered.device)[:, None]
    levels = (ordered.cumsum(0) - spent) / count  # (S, n), of log2 D
    used = (ordered >= levels).sum(dim=1).clamp(min=1)
    return levels.gather(1, used[:, None] - 1)[:, 0].exp2()


def gaussian_psnr(variances: Tensor, bits: Sequence[float], cutoffs: Sequence[int] | None = None) -> Tensor:
    """PSNR in dB (S,) of the mean squared error that Gaussian images of these variances keep at each number of bits.

    Args:
        variances: of the coefficients of images in [-1, 1], (C, H, H); where colours go together, along the axes in
            which they do not.
        bits: S numbers.
        cutoffs: S of them, if bits can only be spent on coefficients below these.
    """
    cutoffs = cutoffs or [variances.shape[-1]] * len(bits)
    inside = square_mask(variances.shape[-1], torch.tensor(cutoffs, dtype=torch.int64, device=variances.device))
    errors = []
    for budget, mask in zip(bits, inside, strict=True):  # (H, H)
        spent_on = variances.double() * mask
        level = float(water_levels(spent_on, [budget]))
        errors.append((spent_on.clamp(max=level) + variances * ~mask).mean())
    return -10 * (torch.stack(errors) / 4).log10()  # on [0, 1]


def data_cutoffs(variances: Tensor, bits: Sequence[float]) -> tuple[int, ...]:
    """Cutoffs by reverse water-filling: r_k is 1 + the largest max(u, v) that is worth a bit at those of k tokens.

    Args:
        variances: as in `gaussian_psnr`.
        bits: of each prefix length, N numbers; k log2 K where all tokens have one codebook.

    Returns:
        (r_1, ..., r_N), non-decreasing, r_N = H.
    """
    size = variances.shape[-1]
    largest = variances.double().flatten(0, -3).amax(dim=0)  # (H, H), over colours
    frequency = square_frequency(size)
    cutoffs = [1 + int((frequency * (largest > level)).max()) for level in water_levels(variances, bits)]
    return (*cutoffs[:-1], size)


def bands(cutoffs: tuple[int, ...] | list[int]) -> list[tuple[int, int]]:
    """Band (r_(k-1), r_k) opened by each token, as half-open ranges of max(u, v); empty where cutoffs tie."""
    return list(zip((0, *cutoffs[:-1]), cutoffs, strict=True))


def square_frequency(size: int, device: torch.device | str = "cpu") -> Tensor:
    """max(u, v) of every coefficient: (H, H) int64."""
    n = torch.arange(size, dtype=torch.int64, device=device)
    return torch.maximum(n[:, None], n[None, :])


def square_mask(size: int, cutoff: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """M_k: True where max(u, v) < cutoff. An int gives (H, H); a tensor of shape S gives (*S, H, H)."""
    if not isinstance(cutoff, Tensor):
        return square_frequency(size, device or "cpu") < cutoff
    return square_frequency(size, cutoff.device) < cutoff[..., None, None]


def low_pass(x: Tensor, cutoff: int | Tensor) -> Tensor:
    """Ideal low-pass IDCT(M * DCT(x)) with a square mask.

    Args:
        x: images (..., C, H, H).
        cutoff: an int, or integers whose shape broadcasts against x's leading axes (..., without C, H, H).

    Raises:
        ValueError: if x is not of shape (..., C, H, H).
        TypeError: if x is not floating-point.
    """
    # D^T diag(u < r) D is applied once a side: the square mask is a product of two one-dimensional ones.
    size, dtype = _square_side(x), _compute_dtype(x)
    matrix = dct_matrix(size, dtype, x.device)
    if isinstance(cutoff, Tensor):
        keep = torch.arange(size, dtype=torch.int64, device=x.device) < cutoff.to(x.device)[..., None]  # (..., H)
        projector = _matmul(matrix.mT * keep[..., None, :].to(dtype), matrix)  # (..., H, H)
        projector = projector.unsqueeze(-3)  # (..., 1, H, H), over channels
    else:
        kept = matrix[: max(0, int(cutoff))]
        projector = _matmul(kept.mT, kept)  # (H, H)
    return _separable(x.to(dtype), projector, projector).to(x.dtype)


def nested_targets(x: Tensor, cutoffs: tuple[int, ...] | list[int] | Tensor) -> Tensor:
    """The ideal low-passes x_k of each image: (B, C, H, H) and S cutoffs -> (B, S, C, H, H)."""
    cutoffs = torch.as_tensor(cutoffs, device=x.device)
    return low_pass(x.unsqueeze(1), cutoffs[None])


def band_pass(x: Tensor, low: int, high: int) -> Tensor:
    """The part of x with low <= max(u, v) < high: (..., H, H) -> (..., H, H)."""
    return low_pass(x, high) - low_pass(x, low)


def radial_frequency(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Radial bin round(sqrt(u² + v²)) of every coefficient: (H, H) int64, 0 .. round(sqrt(2) (H - 1))."""
    n = torch.arange(size, device=device, dtype=torch.float32)
    return torch.sqrt(n[:, None] ** 2 + n[None, :] ** 2).round().long()


def radial_power_spectrum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean DCT power in each ring of radial frequency, averaged over channels.

    Args:
        x: images (..., C, H, H).

    Returns:
        frequency (F,) int64 in half-cycles per image, and power (..., F), F = round(sqrt(2) (H - 1)) + 1.

    Raises:
        ValueError: if x is not of shape (..., C, H, H).
    """
    ring = radial_frequency(_square_side(x), x.device).flatten()
    count = torch.bincount(ring).clamp(min=1)
    energy = dct2(x.to(_compute_dtype(x))).square().mean(dim=-3).flatten(-2)  # (..., H*H)
    power = torch.zeros(*energy.shape[:-1], count.numel(), dtype=energy.dtype, device=x.device)
    power.index_add_(-1, ring, energy)
    return torch.arange(count.numel(), dtype=torch.int64, device=x.device), power / count


def band_energy(x: Tensor, cutoffs: tuple[int, ...] | list[int]) -> Tensor:
    """Energy ||.||² in the band each token opens, summed over channels: (..., C, H, H) -> (..., N).

    Raises:
        ValueError: if x is not of shape (..., C, H, H).
    """
    frequency = square_frequency(_square_side(x), x.device).flatten()
    energy = dct2(x.to(_compute_dtype(x))).square().sum(dim=-3).flatten(-2)  # (..., H*H)
    edges = torch.as_tensor(cutoffs, device=x.device)
    # First k with r_k > frequency: empty bands (ties) are passed over and keep zero energy.
    band = torch.searchsorted(edges, frequency, right=True)
    inside = band < len(cutoffs)
    out = torch.zeros(*energy.shape[:-1], len(cutoffs), dtype=energy.dtype, device=x.device)
    return out.index_add_(-1, band[inside], energy[..., inside])
