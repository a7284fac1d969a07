"""SpectralShortcut: the straight way from spectrum to tokens and back, fitted to data instead of trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from .quantizer import at_least_float32
from .spectral import dct2


class SpectralShortcut(nn.Module):
    r"""Residual quantization of the spectrum, one band-limited subspace a token.

    X is the DCT of the image, M_k the mask of cutoff r_k, e_k the codebook entry of token k. Token k describes what
    the tokens before it have left over, in the band opened so far:

        R_k = M_k (X - X_{k-1})                     what is missing, X_0 = the mean of the data
        z_k = [B_k^T R_k / s_k, lift] + h_k         the latent, whose nearest entry by angle is e_k
        X_k = X_{k-1} + B_k (G_k e_k + g_k)         the spectrum so far, within cutoff r_k

    The d - 1 columns of B_k are orthonormal and span where the residuals of a data set are largest (its principal
    components), s_k is their root mean square, and G_k, g_k is the least-squares way back. The constant `lift` is
    there because entries are found by angle: a small residual points to it, a large one away from it. h_k is what
    the encoder's network adds, if the tokenizer has one.

    Nothing in here takes a gradient. `train.objectives.shortcut` fits it in minutes, after which any prefix already
    decodes to near the Gaussian rate-distortion bound of the data; what is learned then starts from there. Not in the
    paper: see docs/design.md#spectral-shortcut.

    Args:
        cutoffs: r_1..r_N.
        image_size: H.
        channels: C.
        codebook_dim: d, at least 2.
    """

    def __init__(self, cutoffs: Sequence[int], image_size: int, channels: int, codebook_dim: int) -> None:
        super().__init__()
        if codebook_dim < 2:
            raise ValueError(f"a spectral shortcut needs codebook_dim of at least 2, got {codebook_dim}.")
        self.cutoffs, self.image_size, self.channels = tuple(cutoffs), image_size, channels
        tokens, rank = len(self.cutoffs), codebook_dim - 1
        self.lift = math.sqrt(rank)  # as long as z_k's other part on average
        rows = [channels * r * r for r in self.cutoffs]
        self._starts = [0, *accumulate(rows)]
        self.register_buffer("mean", torch.zeros(channels, image_size, image_size))  # X_0
        self.register_buffer("basis", torch.zeros(sum(rows), rank))  # all B_k, one below the other
        self.register_buffer("scale", torch.ones(tokens))  # s_k
        self.register_buffer("gain", torch.zeros(tokens, codebook_dim + 1, rank))  # [G_k, g_k] transposed
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """What there is without data: B_k spans random directions of the band, each G_k undoes the scale."""
        generator = torch.Generator("cpu").manual_seed(0)
        for k, cutoff in enumerate(self.cutoffs):
            rows, rank = self.channels * cutoff**2, self.basis.shape[1]
            drawn = torch.randn(rows, rank, generator=generator, dtype=torch.float32, device="cpu")
            self.part(k).copy_(torch.linalg.qr(drawn)[0] if rows >= rank else nn.functional.normalize(drawn, dim=0))
            self.gain[k, :rank] = torch.eye(rank, dtype=self.gain.dtype, device=self.gain.device)

    def part(self, k: int) -> Tensor:
        """B_(k+1), (C r r, d - 1): a view to read and to write."""
        return self.basis[self._starts[k] : self._starts[k + 1]]

    def begin(self, batch: int) -> Tensor:
        """X_0 of so many images: (B, C, H, H) float32 or better, to be written on."""
        return at_least_float32(self.mean).repeat(batch, 1, 1, 1)

    def analyse(self, spectrum: Tensor, so_far: Tensor, k: int) -> Tensor:
        """z_(k+1) without h: spectra X and X_k (B, C, H, H), of which only the band is read -> (B, d)."""
        r = self.cutoffs[k]
        residual = (spectrum[:, :, :r, :r] - so_far[:, :, :r, :r]).flatten(1)  # (B, C r r)
        z = residual @ self.part(k).to(residual.dtype) / self.scale[k]  # (B, d - 1)
        return torch.cat([z, z.new_full((len(z), 1), self.lift)], dim=1)

    def synthesise(self, entries: Tensor, k: int) -> Tensor:
        """What token k + 1 adds to the band, B_(k+1) (G e + g): entries (B, d) -> (B, C, r, r)."""
        r, gain = self.cutoffs[k], at_least_float32(self.gain[k])
        weights = entries.to(gain.dtype) @ gain[:-1] + gain[-1]  # (B, d - 1)
        return (weights @ self.part(k).to(gain.dtype).T).view(-1, self.channels, r, r)

    def add(self, spectrum: Tensor, entries: Tensor, k: int) -> None:
        """X_k becomes X_(k+1), in place: spectra (B, C, H, H), entries (B, d)."""
        r = self.cutoffs[k]
        spectrum[:, :, :r, :r] += self.synthesise(entries, k)

    @torch.no_grad()
    def latents(self, images: Tensor, extra: Tensor | None, count: int, nearest: Callable[[Tensor], Tensor]) -> Tensor:
        """Latents z (B, n, d), without a gradient, of the first n = `count` tokens of images (B, C, H, H).

        extra: h (B, n, d) if there is one. nearest: latents (B, 1, d) -> their entries.
        """
        spectrum, so_far = dct2(at_least_float32(images)), self.begin(len(images))
        latents = []
        for k in range(count):
            z = self.analyse(spectrum, so_far, k)
            latents.append(z if extra is None else z + extra[:, k].to(z.dtype))
            if k + 1 < count:
                self.add(so_far, nearest(latents[-1].unsqueeze(1))[:, 0], k)
        return torch.stack(latents, dim=1)

    def prefixes(self, entries: Tensor, visible: Tensor) -> Tensor:
        """Spectra of prefixes: entries (B, n, d), visible (B, S, n) True for a prefix's tokens -> (B, S, C, H, H).

        Differentiable in the entries.
        """
        spectra = at_least_float32(self.mean).repeat(*visible.shape[:2], 1, 1, 1)
        for k, r in enumerate(self.cutoffs[: entries.shape[1]]):
            added = self.synthesise(entries[:, k], k).unsqueeze(1)  # (B, 1, C, r, r)
            spectra[..., :r, :r] += added * visible[:, :, k, None, None, None]
        return spectra


class RunningSpectrum:
    """Spectra of growing prefixes: each token is added once while lengths asked for do not shrink."""

    def __init__(self, shortcut: SpectralShortcut) -> None:
        self._shortcut = shortcut
        self._length, self._spectrum = 0, None

    @torch.no_grad()
    def at(self, entries: Tensor, lengths: Sequence[int]) -> Tensor:
        """Spectra (B, S, C, H, H) of S prefix lengths of entries (B, n, d), the same ones at every call, or more."""
        found: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):
            if self._spectrum is None or length < self._length:
                self._length, self._spectrum = 0, self._shortcut.begin(len(entries))
            with torch.autocast(entries.device.type, enabled=False):  # sums of many tokens
                for k in range(self._length, length):
                    self._shortcut.add(self._spectrum, entries[:, k], k)
            self._length = length
            found[length] = self._spectrum.clone()
        return torch.stack([found[length] for length in lengths], dim=1)
