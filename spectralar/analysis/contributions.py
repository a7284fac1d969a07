"""What each spectral token contributes, as numbers; `plots` draws them.

Images are in [-1, 1] as in `spectral`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..spectral import dct2, low_pass, radial_frequency
from ..tokenizer import SpectralTokenizer


class Contributions(NamedTuple):
    """delta_k = D_k - D_(k-1) in its two parts, D_0 = 0 (docs/design.md#contributions)."""

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
    open_cutoffs = torch.tensor((0, *cutoffs[: frames.shape[1] - 1]), dtype=torch.int64, device=frames.device)
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


def influence_steps(
    tokenizer: SpectralTokenizer, codes: Tensor, marginals: Tensor, draws: int = 4, seed: int = 0
) -> Iterator[Tensor]:
    """Rows of the influence matrix, one token at a time, so that a caller can show progress or stop.

    Row k is the mean energy, by radial frequency, of D_k with the true code minus D_k with a code drawn from the
    marginal distribution of position k (the counterfactual of docs/design.md#influence): what the token carries.

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
