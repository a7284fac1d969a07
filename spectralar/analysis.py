"""What each spectral token contributes, as numbers; `plots` draws them.

Images are in [-1, 1] as in `spectral`; PSNR and SSIM are taken on [0, 1], clamped (DESIGN section 2).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .spectral import dct2, idct2, low_pass, radial_frequency, square_frequency
from .tokenizer import SpectralTokenizer
from .transformer import SpectralARTransformer

STATISTICS_FILE = "statistics.safetensors"
SSIM_WINDOW = 11

# ---------------------------------------------------------------------------------------------------- quality


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
    window = torch.exp(-(torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2).square() / (2 * 1.5**2))
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


# --------------------------------------------------------------------------------------- what a token changes


class Contributions(NamedTuple):
    """delta_k = D_k - D_(k-1) in its two parts, D_0 = 0 (DESIGN section 2)."""

    frames: Tensor  # (B, N, C, H, H), the decoded prefixes D_k
    refinement: Tensor  # (B, N, C, H, H), M_(k-1) * delta_k: in bands that were already open
    opening: Tensor  # (B, N, C, H, H), (M_k - M_(k-1)) * D_k: in the band that token k opens


def token_contributions(frames: Tensor, cutoffs: tuple[int, ...]) -> Contributions:
    """Splits the step from each decoded prefix to the next.

    Args:
        frames: (B, n, C, H, H), the prefixes 1..n as `SpectralTokenizer.decode(codes, [1, .., n])` returns them.
        cutoffs: the schedule (r_1, ..., r_N), n <= N.
    """
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


def influence_steps(
    tokenizer: SpectralTokenizer, codes: Tensor, marginals: Tensor, draws: int = 4, seed: int = 0
) -> Iterator[Tensor]:
    """Rows of the influence matrix, one token at a time, so that a caller can show progress or stop.

    Row k is the mean energy, by radial frequency, of D_k with the true code minus D_k with a code drawn from the
    marginal distribution of position k (the counterfactual of DESIGN section 2): what the token carries.

    Args:
        tokenizer: the tokenizer.
        codes: (B, n) of the images to average over, n <= N.
        marginals: (n, K) from `code_marginals`; counts do as well.
        draws: counterfactual codes for each image and position.
        seed: of the draws.

    Yields:
        (F,) float32 for k = 1..n; frequency f in half-cycles an image.

    Raises:
        ValueError: if the marginals have another shape, or none of the codes of a position has any weight.
    """
    expected = (codes.shape[1], tokenizer.config.codebook_size)
    if tuple(marginals.shape) != expected or not (marginals.sum(dim=1) > 0).all():
        raise ValueError(f"marginals must be weights of shape {expected}, with a positive sum in every row.")
    return _influence_steps(tokenizer, codes, marginals, draws, seed)


@torch.no_grad()
def _influence_steps(
    tokenizer: SpectralTokenizer, codes: Tensor, marginals: Tensor, draws: int, seed: int
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for k in range(1, codes.shape[1] + 1):
        prefix = codes[:, :k]
        true = tokenizer.decode(prefix, k).float()
        drawn = torch.multinomial(marginals[k - 1].cpu().float(), draws * len(codes), True, generator=generator)
        other = prefix.repeat(draws, 1)
        other[:, -1] = drawn.to(codes)
        changed = tokenizer.decode(other, k).float()
        difference = dct2(changed - true.repeat(draws, 1, 1, 1)).square().sum(dim=1)  # (draws B, H, H)
        yield _radial_sum(difference.mean(dim=0)).cpu()


def influence_matrix(
    tokenizer: SpectralTokenizer, codes: Tensor, marginals: Tensor, draws: int = 4, seed: int = 0
) -> Tensor:
    """Token x radial frequency influence (n, F), see `influence_steps`."""
    return torch.stack(list(influence_steps(tokenizer, codes, marginals, draws, seed)))


# -------------------------------------------------------------------------------------- what a model's codes are like


@torch.no_grad()
def next_token_entropy(
    transformer: SpectralARTransformer,
    codes: Tensor,
    class_labels: Tensor,
    codebook_sizes: Sequence[int] | None = None,
    batch_size: int = 256,
) -> Tensor:
    """How open the next token is: entropy of p(q_t | q_1..q_(t-1), class) in nats, averaged over images.

    Args:
        transformer: the model.
        codes: (n, N) of images.
        class_labels: (n,) int64, their classes.
        codebook_sizes: entries that each position may use, of a tokenizer with nested codebooks. None: all.
        batch_size: images at a time.

    Returns:
        (N,) float32, on the CPU: 0 where the token is certain, log K where all are equally likely.
    """
    total = torch.zeros(codes.shape[1], dtype=torch.float64)
    for part, labels in zip(codes.split(batch_size), class_labels.split(batch_size), strict=True):
        logits = transformer(part[:, :-1], labels)  # (b, N, K)
        for t, size in enumerate(codebook_sizes or ()):
            logits[:, t, size:] = -torch.inf
        total += torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).sum(dim=0).cpu()
    return (total / len(codes)).float()


class CodeUse(NamedTuple):
    """How much of the codebook each position uses."""

    used: Tensor  # (N,) int64, entries seen at least once: never more than there were images
    perplexity: Tensor  # (N,) float64, exp of the entropy of the code frequencies: as many equally likely entries


def code_use(weights: Tensor) -> CodeUse:
    """Use of the codebook by position, from counts or marginals (N, K)."""
    weights = weights.double()
    p = weights / weights.sum(dim=1, keepdim=True)
    return CodeUse((weights > 0).sum(dim=1), torch.special.entr(p).sum(dim=1).exp())


class Statistics(NamedTuple):
    """What is known of a model's codes on held-out images, kept beside its weights."""

    code_counts: Tensor  # (N, K) int32: how often each code stood at each position
    next_token_entropy: Tensor  # (N,) float32, nats


def write_statistics(folder: str | os.PathLike, codes: Tensor, codebook_size: int, next_token_entropy: Tensor) -> Path:
    """Stores the statistics of a model in its folder, in statistics.safetensors.

    Args:
        folder: of the saved pipeline.
        codes: (n, N) of held-out images, in 0..K-1.
        codebook_size: K.
        next_token_entropy: (N,) in nats, as the function of this name returns it.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the shapes do not fit or a code is out of range.
    """
    entropy = torch.as_tensor(next_token_entropy, dtype=torch.float32).cpu()
    if codes.ndim != 2 or entropy.shape != codes.shape[1:]:
        raise ValueError(
            f"codes must be (n, N) and next_token_entropy (N,), got {tuple(codes.shape)} and {tuple(entropy.shape)}."
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise ValueError(f"codes must be between 0 and {codebook_size - 1}.")
    codes = codes.cpu().long()
    counts = torch.stack([torch.bincount(column, minlength=codebook_size) for column in codes.T])  # (N, K)
    path = Path(folder) / STATISTICS_FILE
    save_file({"code_counts": counts.int(), "next_token_entropy": entropy.contiguous()}, path)
    return path


def read_statistics(folder: str | os.PathLike) -> Statistics | None:
    """The statistics stored in a model's folder; None where there are none.

    Raises:
        ValueError: if the file holds something else.
    """
    path = Path(folder) / STATISTICS_FILE
    if not path.is_file():
        return None
    try:
        statistics = Statistics(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} holds no statistics of a model's codes: {error}.") from error
    if statistics.code_counts.ndim != 2 or statistics.next_token_entropy.shape != statistics.code_counts.shape[:1]:
        raise ValueError(f"{path} must hold code_counts (N, K) and next_token_entropy (N,).")
    return statistics


# --------------------------------------------------------------------------------------------- rate-distortion


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
    bound = size / (1.0 + frequency)
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
