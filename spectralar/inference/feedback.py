"""Decoder feedback: what the tokenizer's decoder expects of the next token, for the autoregressive model to know.

A prefix is a picture, and a picture says much of what is still missing: where it is white it will stay white, and an
edge that is blurred will become sharp. The tokenizer's decoder has learnt that, as its image D_k of the first k tokens
is nearer to x than what the tokens say of themselves, the shortcut's X_k. On held-out product photos it foretells two
thirds of the next latent's energy (docs/ablations.md). So the transformer is told the latent that the next token would
have if D_k were the image, as the direction of

    z_{k+1} = [B_{k+1}^T M_{k+1} (DCT(D_k) - X_k) / s_{k+1}, lift],

in the terms of `shortcut.SpectralShortcut`. Before the first token there is no picture, and u_1 = 0. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizer import at_least_float32
from ..spectral import dct2
from ..tokenizer import SpectralTokenizer
from ..transformer import SpectralARTransformer
from .frames import PrefixDecoder

FRAMES_AT_ONCE = 1024  # of whole sequences: more take memory and save nothing


class DecoderFeedback:
    """What is expected of the token behind a growing prefix, with the prefix's image on the way.

    Args:
        tokenizer: one with a spectral shortcut.
        batch_size: B images side by side.
    """

    def __init__(self, tokenizer: SpectralTokenizer, batch_size: int) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.restart()

    def restart(self) -> None:
        """To be called when tokens have been changed that were taken in."""
        # Made at the first token: under offloading the tokenizer is on its device only then.
        self._decoder: PrefixDecoder | None = None
        self._image: Tensor | None = None

    @torch.inference_mode()  # as sampling, which asks for it: what is kept here can then be written to in it alone
    def image(self, codes: Tensor) -> Tensor:
        """D_k (B, C, H, H), not clamped, of codes (B, k), k >= 1: those of the last call and none or more behind them.

        Tokens are taken in one by one, so that what is expected does not depend on how many were known before.

        Raises:
            ValueError: if there are fewer codes than have been taken in.
        """
        self._decoder = self._decoder or PrefixDecoder(self.tokenizer, self.batch_size)
        if codes.shape[1] < self._decoder.length:
            raise ValueError(f"{self._decoder.length} tokens have been taken in, got {codes.shape[1]}: restart first.")
        with torch.autocast(codes.device.type, enabled=False):  # in the weights' type, whoever is around it
            for i in range(self._decoder.length, codes.shape[1]):
                self._decoder.append(codes[:, i : i + 1])
                self._image = None
            if self._image is None:
                self._image = self._decoder.frame()
        return self._image

    @torch.inference_mode()
    def after(self, codes: Tensor) -> Tensor:
        """Expected latents (B, d), unit vectors, of the token behind codes (B, k) as `image` takes them, k < N."""
        k = codes.shape[1]
        return _expected(self.tokenizer, self.image(codes), self._decoder.spectra([k])[:, 0], k)


def feedback_for(
    transformer: SpectralARTransformer, tokenizer: SpectralTokenizer | None, batch_size: int
) -> DecoderFeedback | None:
    """What a transformer needs for sampling so many images: None if it listens to no decoder.

    Raises:
        ValueError: if it does, and there is none that it understands.
    """
    if not transformer.config.decoder_feedback:
        return None
    if tokenizer is None or tokenizer.shortcut is None:
        what = "there is no tokenizer" if tokenizer is None else "the tokenizer has no spectral shortcut"
        raise ValueError(
            "this transformer predicts each token from the decoder's image of those before it, and " + what + "."
        )
    return DecoderFeedback(tokenizer, batch_size)


def all_logits(
    transformer: SpectralARTransformer, tokenizer: SpectralTokenizer | None, codes: Tensor, class_labels: Tensor
) -> Tensor:
    """Logits (B, N, K) of every token of codes (B, N) given those before it, with what the decoder expects of them."""
    expected = None
    if transformer.config.decoder_feedback:
        expected = expected_latents(tokenizer, codes, range(codes.shape[1]))
    return transformer(codes[:, :-1], class_labels, expected)


@torch.no_grad()
def expected_latents(tokenizer: SpectralTokenizer, codes: Tensor, positions: Sequence[int]) -> Tensor:
    """What is expected of the tokens at S positions, in 0..N-1, of whole sequences of codes (B, N): (B, S, d)."""
    at_once = max(1, FRAMES_AT_ONCE // len(positions))
    if len(codes) > at_once:
        return torch.cat([expected_latents(tokenizer, part, positions) for part in codes.split(at_once)])
    lengths = [k for k in positions if k]  # position k comes behind k tokens
    found = {}
    if lengths:
        images, spectra = tokenizer.decode_with_spectra(codes[:, : max(lengths)], lengths)
        for k, image, spectrum in zip(lengths, images.unbind(1), spectra.unbind(1), strict=True):
            found[k] = _expected(tokenizer, image, spectrum, k)
    dtype = at_least_float32(tokenizer.token_position).dtype
    nothing = codes.new_zeros(len(codes), tokenizer.config.codebook_dim, dtype=dtype)
    return torch.stack([found.get(k, nothing) for k in positions], dim=1)


def _expected(tokenizer: SpectralTokenizer, images: Tensor, so_far: Tensor, k: int) -> Tensor:
    """From images D_k and spectra X_k, each (B, C, H, H)."""
    with torch.autocast(images.device.type, enabled=False):
        return F.normalize(tokenizer.shortcut.analyse(dct2(at_least_float32(images)), so_far, k), dim=-1)
