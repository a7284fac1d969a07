"""Images of prefixes while their tokens arrive, of one decoder or of several in a single pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import check_lengths
from ..layers import KVCache
from ..shortcut import RunningSpectrum
from ..tokenizer import LayerKV, SpectralTokenizer


class PrefixDecoder:
    """Incremental decode: append codes as they arrive, ask for images of any prefix of those so far at any time.

    Each spectral token passes through the decoder once; only mask tokens are run for a frame.

    Args:
        tokenizer: the tokenizer whose decoder runs.
        batch_size: images decoded side by side.
    """

    def __init__(self, tokenizer: SpectralTokenizer, batch_size: int) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        config = tokenizer.config
        self.length = 0
        self._kv: LayerKV = []
        self._quantized = tokenizer.token_position.new_empty(batch_size, 0, config.codebook_dim)
        self._running = None if tokenizer.shortcut is None else RunningSpectrum(tokenizer.shortcut)
        self._cache = KVCache(
            config.decoder_layers, batch_size, config.num_heads, config.num_tokens,
            config.hidden_size // config.num_heads, like=tokenizer.token_position,
        )  # fmt: skip

    @torch.no_grad()
    def append(self, codes: Tensor) -> None:
        """Adds codes (B, T), int64, behind the ones so far; B is the decoder's batch size, and no more than N in all.

        Their range is not checked: that would wait for the device at every token.
        """
        batch, limit = self.batch_size, self.tokenizer.config.num_tokens
        if codes.ndim != 2 or codes.shape[0] != batch or not 1 <= codes.shape[1] <= limit - self.length:
            raise ValueError(
                f"codes must have shape ({batch}, T), T >= 1, and be no more than {limit} with the {self.length} "
                f"before them; got {tuple(codes.shape)}."
            )
        quantized = self.tokenizer.quantizer.lookup(codes)
        self._quantized = torch.cat([self._quantized, quantized], dim=1)
        tokens = self.tokenizer._embed_latents(quantized, self.length)
        self._kv = self.tokenizer._token_kv(tokens, self._cache, self.length)
        self.length += codes.shape[1]

    @torch.no_grad()
    def frames(self, lengths: Sequence[int]) -> Tensor:
        """Images (B, S, C, H, H) of S prefixes; several in one call take less time than one by one.

        Raises:
            ValueError: if a length is not in 1..`self.length`.
        """
        if not self.length:
            raise ValueError("append at least one code before asking for a frame.")
        lengths = check_lengths(lengths, self.length)
        return self.tokenizer._decode_prefixes(self._quantized, lengths, self._kv, self._running)

    def spectra(self, lengths: Sequence[int]) -> Tensor:
        """What a spectral shortcut makes of S prefixes: (B, S, C, H, H)."""
        return self._running.at(self._quantized, lengths)

    def frame(self) -> Tensor:
        """The image (B, C, H, H) of the prefix so far."""
        return self.frames([self.length])[:, 0]


@torch.no_grad()
def frames_of_several(wanted: Sequence[tuple[PrefixDecoder, Sequence[int]]]) -> list[Tensor]:
    """`PrefixDecoder.frames` of several decoders of one tokenizer in a single pass, with S lengths for each.

    Returns:
        Images (B, S, C, H, H) for each decoder, which may differ in B and S.
    """
    if len(wanted) == 1:
        return [decoder.frames(lengths) for decoder, lengths in wanted]
    tokenizer, longest = wanted[0][0].tokenizer, max(max(lengths) for _, lengths in wanted)
    of_frames = [length for decoder, lengths in wanted for length in list(lengths) * decoder.batch_size]

    def joined(pick: Callable[[KVCache], Sequence[Tensor]], layer: int) -> Tensor:
        parts = [
            pick(decoder._cache)[layer][:, :, :longest].repeat_interleave(len(lengths), dim=0)
            for decoder, lengths in wanted
        ]
        return torch.cat(parts)  # (F, heads, longest, head_dim)

    layers = range(len(tokenizer.decoder))
    kv = [(joined(lambda cache: cache.keys, i), joined(lambda cache: cache.values, i)) for i in layers]
    ends = torch.tensor(of_frames, dtype=torch.int64, device=kv[0][0].device).unsqueeze(1)  # (F, 1)
    visible = torch.arange(longest, dtype=torch.int64, device=ends.device) < ends.unsqueeze(2)  # (F, 1, longest)
    base = None
    if tokenizer.shortcut is not None:
        base = torch.cat([decoder.spectra(lengths).flatten(0, 1) for decoder, lengths in wanted]).unsqueeze(1)
    images = tokenizer._render(kv, tokenizer._cutoff_tensor(ends, ends.device), visible, base)  # (F, 1, C, H, H)
    parts = images[:, 0].split([decoder.batch_size * len(lengths) for decoder, lengths in wanted])
    return [part.unflatten(0, (decoder.batch_size, -1)) for part, (decoder, _) in zip(parts, wanted, strict=True)]
