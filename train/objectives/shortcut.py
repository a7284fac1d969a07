"""Fits a tokenizer's spectral shortcut and its codebook to images, in closed form and by k-means: no gradients.

Token by token, on the residuals that the tokens before leave of a few thousand images (`spectralar.shortcut`):

1. B_k: the principal components of the residuals in the band, by subspace iteration; s_k: their root mean square.
2. The codebook, shared by all tokens: spherical k-means of latents, again whenever the tokens have doubled, on a pool
   of latents of some tokens before.
3. G_k, g_k: least squares from entries back to the residuals' components. What remains is the next token's residual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from spectralar.shortcut import SpectralShortcut
from spectralar.spectral import dct2
from spectralar.tokenizer import SpectralTokenizer

from ..data.images import to_float

NUMBERS = 1 << 28  # pixels times channels of the images that are fitted to, 1 GiB in float32
SUBSPACE_IMAGES, SUBSPACE_ROUNDS, OVERSAMPLING = 6000, 5, 4
POOLED, POOLS, KMEANS_ROUNDS = 20_000, 4, 8  # latents of a token, tokens of a pool, rounds over it
ROWS = 8192  # latents looked up at once


def images_to_fit(image_size: int, channels: int) -> int:
    """How many images `fit` takes at most, so that their spectra fit into memory."""
    return min(20_000, NUMBERS // (channels * image_size**2))


@torch.no_grad()
def fit(tokenizer: SpectralTokenizer, images: Tensor, seed: int = 0, show: bool = True) -> None:
    """Fits `tokenizer.shortcut` and the codebook to images (n, C, H, H) uint8, a fair sample of what is trained on.

    A function of the images and the seed. Takes some minutes on a CPU for 20,000 images of 64x64.

    Raises:
        ValueError: if there are fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"a spectral shortcut is fitted to at least two images, there are {len(images)}.")
    shortcut, codebook = tokenizer.shortcut, tokenizer.quantizer.codebook
    generator = torch.Generator("cpu").manual_seed(seed)
    residual = torch.cat([dct2(to_float(some).to(codebook.device)) for some in images.split(512)])  # (n, C, H, H)
    shortcut.mean.copy_(residual.mean(dim=0))
    residual -= shortcut.mean
    nothing = torch.zeros_like(residual[:1])  # the residual is what is analysed, with nothing taken off
    pools: list[Tensor] = []
    for k in tqdm(range(len(shortcut.cutoffs)), desc="fitting the spectral shortcut", unit="token", disable=not show):
        _fit_subspace(shortcut, residual, k, generator)
        latents = torch.cat([shortcut.analyse(some, nothing, k) for some in residual.split(ROWS)])  # (n, d)
        if k & (k - 1) == 0:  # 0, 1, 2, 4, 8, ..
            chosen = torch.randperm(len(latents), generator=generator)[:POOLED].to(latents.device)
            pools = [*pools, F.normalize(latents[chosen], dim=-1)][-POOLS:]
            _kmeans(codebook, torch.cat(pools), k == 0, generator)
        entries = torch.cat([tokenizer.quantizer.lookup(_nearest(some, codebook)) for some in latents.split(ROWS)])
        _fit_gain(shortcut, latents, entries, k)
        r = shortcut.cutoffs[k]
        for some, entry in zip(residual.split(ROWS), entries.split(ROWS), strict=True):
            some[:, :, :r, :r] -= shortcut.synthesise(entry, k)
    for fitted in (*shortcut.buffers(), codebook):
        fitted.copy_(fitted.half())  # as it will ship: codes are then the same before and after


def _fit_subspace(shortcut: SpectralShortcut, residual: Tensor, k: int, generator: torch.Generator) -> None:
    """B_k and s_k, from residuals (n, C, H, H)."""
    r, rank = shortcut.cutoffs[k], shortcut.basis.shape[1]
    chosen = torch.randperm(len(residual), generator=generator)[:SUBSPACE_IMAGES].to(residual.device)
    x = residual[:, :, :r, :r][chosen].flatten(1)  # (n', C r r)
    width = min(rank + OVERSAMPLING, x.shape[1])
    q = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
    for _ in range(SUBSPACE_ROUNDS):
        q = torch.linalg.qr(x.T @ (x @ q))[0]
    projected = (x @ q).double()  # squares of next to nothing are too small for float32, and some LAPACKs give up
    _, vectors = torch.linalg.eigh(projected.T @ projected)  # ascending
    q = (q @ vectors.flip(1).to(q.dtype))[:, :rank]  # (C r r, min(rank, C r r))
    part = shortcut.part(k)
    part.zero_()
    part[:, : q.shape[1]] = q  # a band of fewer coefficients than components: the others stay empty
    shortcut.scale[k] = (x @ part).square().mean().sqrt().clamp(min=1e-6)


def _fit_gain(shortcut: SpectralShortcut, latents: Tensor, entries: Tensor, k: int) -> None:
    """G_k and g_k: least squares from entries (n, d) to the components of the residuals, s_k times latents (n, d)."""
    inputs = F.pad(entries.double(), (0, 1), value=1.0)  # (n, d + 1)
    outputs = (latents[:, :-1] * shortcut.scale[k]).double()  # (n, d - 1)
    gram = inputs.T @ inputs
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    shortcut.gain[k] = torch.linalg.solve(gram + ridge, inputs.T @ outputs)


def _nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Indices (n,) of the entries nearest in angle to latents (n, d)."""
    return (latents @ codebook.T).argmax(dim=1)


def _kmeans(codebook: Tensor, latents: Tensor, fresh: bool, generator: torch.Generator) -> None:
    """Moves entries (K, d) to the directions of their part of unit latents (n, d); unused ones onto some latent."""

    def drawn(count: int) -> Tensor:
        """So many latents, each once as long as there are enough; a little moved, so that none are equal."""
        rounds = range(count // len(latents) + 1)
        order = torch.cat([torch.randperm(len(latents), generator=generator) for _ in rounds])
        noise = 0.01 * torch.randn(count, latents.shape[1], generator=generator)
        return F.normalize(latents[order[:count].to(latents.device)] + noise.to(latents.device), dim=-1)

    if fresh:
        codebook.copy_(drawn(len(codebook)))
    for _ in range(KMEANS_ROUNDS):
        sums = torch.zeros_like(codebook)
        for some in latents.split(ROWS):
            sums.index_add_(0, _nearest(some, codebook), some)
        dead = (sums.abs().sum(dim=1) == 0).nonzero().flatten()
        sums[dead] = drawn(len(dead)) if len(dead) else sums[dead]
        codebook.copy_(F.normalize(sums, dim=-1))
