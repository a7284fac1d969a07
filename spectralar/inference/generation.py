"""The engine of generation: codes token by token, with guidance and a KV cache. Of images only `feedback` knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import filled_up
from ..sampling import guidance_at, guide, sample_tokens
from ..transformer import Conditioning, SamplingCache, SpectralARTransformer, sums_in_order
from .feedback import DecoderFeedback


class TokenGenerator:
    """Fills `codes` from left to right.

    With guidance, B conditional and B unconditional rows run as one batch; at scale 1 only the conditional ones.

    Args:
        transformer: the model.
        class_labels: (B,) int64 in 0..num_classes-1.
        codes: (B, n) int64, n <= N, written in place. May begin with given tokens.
        uniforms: (B, N) in [0, 1), the random number of each token.
        guidance_schedule, temperature, top_k, top_p: see `sampling`.
        codebook_sizes: entries that each position may use, of a tokenizer with nested codebooks. None: all.
        feedback: for a transformer with decoder feedback, that of B images.
    """

    def __init__(
        self,
        transformer: SpectralARTransformer,
        class_labels: Tensor,
        codes: Tensor,
        uniforms: Tensor,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        codebook_sizes: Sequence[int] | None = None,
        feedback: DecoderFeedback | None = None,
    ) -> None:
        self.transformer = transformer
        self.class_labels = class_labels
        self.codes = codes
        self.uniforms = uniforms
        self.guidance_schedule = guidance_schedule
        self.filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.codebook_sizes = codebook_sizes
        self.feedback = feedback
        # What the decoder expects of the next token.
        width = transformer.config.codebook_dim
        self._expected, self._heard = None, 0  # (B, d), and of which token
        if feedback is not None:
            self._expected = uniforms.new_zeros(len(codes), width, dtype=logits_dtype(transformer))
        # Guidance scale of each token: on the device, as all that a step reads, and as it was set last.
        self._scales = torch.ones(transformer.config.num_tokens, dtype=logits_dtype(transformer), device=codes.device)
        self._scales_set = [1.0] * transformer.config.num_tokens
        self._finite = torch.ones((), dtype=torch.bool, device=codes.device)  # whether all logits so far were
        self._guided = False
        self._image_of: Tensor | None = None  # (R,) int64, the image of each row of the transformer
        self._conditioning: Conditioning | None = None
        self._cache: SamplingCache | None = None

    def restart(self) -> None:
        """To be called when tokens have been changed that earlier ones were sampled from."""
        self._cache = None
        if self.feedback is not None:
            self.feedback.restart()
            self._heard = 0

    @torch.inference_mode()
    def listen(self, index: int) -> None:
        """What the decoder expects of token `index`. `sample` asks for it, if nobody has before: offloading does."""
        if self.feedback is not None and index and self._heard != index:
            batch = self.feedback.batch_size
            self._expected[:batch] = self.feedback.after(self.codes[:batch, :index])
            self._heard = index

    @torch.inference_mode()  # a tenth faster than no_grad; nothing that is made in here is handed out
    def sample(self, index: int, guidance_scale: float) -> None:
        """Samples token `index`, the first after those that are there; the scale may differ from token to token."""
        with torch.autocast(self.codes.device.type, enabled=False):  # in the weights' type, whoever is around it
            self._sample(index, guidance_scale)

    def _sample(self, index: int, guidance_scale: float) -> None:
        guided = guidance_scale != 1
        w = guidance_at(index, self.transformer.config.num_tokens, guidance_scale, self.guidance_schedule)
        if w != self._scales_set[index]:
            self._scales[index] = self._scales_set[index] = w
        self.listen(index)
        if self._cache is None or (guided and not self._guided):
            # The first token, or one after a change from outside: all tokens so far run before it.
            self._begin(guided)
            if index:
                given = self.codes[:, :index].index_select(0, self._image_of)  # (R, index)
                self._pick(index, after_given(self.transformer, given, self._conditioning, self._cache))
                return
        self._step(index)

    def _begin(self, guided: bool) -> None:
        """Conditioning and an empty cache for B rows, or 2B with the unconditional ones, and spare ones."""
        labels = self.class_labels
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.null_label)])  # (2B,)
        self._guided = guided
        labels = F.pad(labels, (0, rows_to_run(self.transformer, len(labels)) - len(labels)))  # (R,)
        self._image_of = torch.arange(len(labels), dtype=torch.int64, device=labels.device) % len(self.class_labels)
        self._conditioning = self.transformer.condition(labels)
        self._cache = self._empty_cache(labels.shape[0])

    def _empty_cache(self, rows: int) -> SamplingCache:
        return self.transformer.make_cache(rows)

    def _step(self, index: int) -> None:
        """Token `index` from the one before it and the cache.

        Reads and writes tensors at fixed addresses only and asks the device nothing: it can be captured once and
        replayed. Python numbers in it are `index` and the filters.
        """
        before = self.codes[:, index - 1 : index].index_select(0, self._image_of) if index else None  # (R, 1)
        self._pick(index, self.transformer.step(before, index, self._conditioning, self._cache))

    def _pick(self, index: int, logits: Tensor) -> None:
        """Guidance, filters, and the choice of token `index`."""
        batch = self.codes.shape[0]
        if self._expected is not None and index:
            expected = self._expected.index_select(0, self._image_of)
            logits = self.transformer.add_expected(logits, expected, index, self._cache)
        uncond = logits[batch : 2 * batch] if self._guided else None
        self._finite.logical_and_(logits[: 2 * batch if self._guided else batch].isfinite().all())
        size = None if self.codebook_sizes is None else self.codebook_sizes[index]
        self.codes[:, index] = choose(
            logits[:batch], uncond, self._scales[index], self.uniforms[:, index], size, **self.filters
        )

    def check(self) -> None:
        """To be called before the codes are used, as sampling itself never waits for the device.

        Raises:
            ValueError: if logits were not finite: there is nothing to sample from then.
        """
        if not bool(self._finite):
            raise no_next_token(self.transformer)

    def close(self) -> None:
        """To be called when no more tokens are wanted."""


def after_given(
    transformer: SpectralARTransformer, given: Tensor, conditioning: Conditioning, cache: SamplingCache
) -> Tensor:
    """Logits (R, K) behind given tokens (R, k), k >= 1, which an empty cache takes in.

    In half precision a pass over several tokens rounds otherwise than the steps by which they were sampled, and other
    tokens would come of it: they go step by step.
    """
    if transformer.dtype.itemsize >= 4:
        return transformer.step(given, 0, conditioning, cache)
    logits = transformer.step(None, 0, conditioning, cache)
    for position, tokens in enumerate(given.split(1, dim=1), start=1):
        logits = transformer.step(tokens, position, conditioning, cache)
    return logits


def no_next_token(transformer: SpectralARTransformer) -> ValueError:
    return ValueError(
        "the logits are not finite, so there is no next token: the transformer's weights hold NaN or infinity, or are "
        f"too large for {transformer.dtype}."
    )


def choose(
    cond: Tensor, uncond: Tensor | None, scale: Tensor, uniforms: Tensor, codebook_size: int | Tensor | None,
    **filters: Any,
) -> Tensor:  # fmt: skip
    """From logits to tokens: guidance, then what the position may use of the codebook, filters, and the choice.

    Args:
        cond, uncond: (B, K); no `uncond`, no guidance. `cond` may be written to.
        scale: of guidance, () or (B, 1).
        uniforms: (B,) in [0, 1).
        codebook_size: entries that may be used, of a tokenizer with nested codebooks, (B, 1) if not the same for
            all. None: all K.
        filters: temperature, top_k, top_p, see `sampling`.

    Returns:
        (B,) int64.
    """
    logits = cond if uncond is None else guide(cond, uncond, scale)
    if isinstance(codebook_size, Tensor):
        entries = torch.arange(logits.shape[1], dtype=torch.int64, device=logits.device)
        logits = logits.masked_fill(entries >= codebook_size, -torch.inf)
    elif codebook_size is not None:
        logits[:, codebook_size:] = -torch.inf
    return sample_tokens(logits, uniforms, **filters)


def rows_to_run(transformer: SpectralARTransformer, rows: int) -> int:
    """Rows to run for so many: with spare ones up to a multiple of four where `sums_in_order`.

    An image's logits are then the same to the bit whatever it is sampled with, also by an `Engine`, in float32 and
    with torch on one thread. With decoder feedback that holds for the images that are decoded side by side.
    """
    return filled_up(rows) if sums_in_order(transformer) else rows


def logits_dtype(transformer: SpectralARTransformer) -> torch.dtype:
    return torch.promote_types(transformer.dtype, torch.float32)
