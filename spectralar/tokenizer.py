"""SpectralTokenizer: image -> N spectral tokens, any prefix of them -> band-limited image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .checks import check_codes, check_lengths, check_pixels, integer, odd_kind, scalar
from .layers import Block, KVCache, LayerwiseCasting, attend, encoder_mask, init_weights
from .quantizer import FiniteScalarQuantizer, QuantizerOutput, VectorQuantizer, nested_codebook_sizes
from .shortcut import RunningSpectrum, SpectralShortcut
from .spectral import check_cutoffs, cutoff_schedule, idct2, low_pass

# One key/value pair (B, heads, k, head_dim) for each decoder layer.
LayerKV = list[tuple[Tensor, Tensor]]

# Mask tokens that run through the decoder at once: on a CPU as many as its cache holds the activations of, on others
# as many as keep them busy. More would only take more memory.
ROWS_AT_ONCE = {"cpu": 2048}
ROWS_AT_ONCE_ELSEWHERE = 32768


def _below(lengths: Tensor, n: int) -> Tensor:
    """Which of n tokens a prefix has: (...,) int64 -> (..., n)."""
    return torch.arange(n, dtype=torch.int64, device=lengths.device) < lengths[..., None]


def _join(of_masks: Tensor, of_tokens: Tensor, frames: int) -> Tensor:
    """Keys or values of mask tokens (B S or 1, heads, P, head_dim), then of their image's tokens (B, heads, n, ..)."""
    batch = of_tokens.shape[0]
    of_masks = of_masks.expand(batch * frames, -1, -1, -1).unflatten(0, (batch, frames))  # (B, S, heads, P, head_dim)
    of_tokens = of_tokens.unsqueeze(1).expand(-1, frames, -1, -1, -1)  # (B, S, heads, n, head_dim)
    return torch.cat([of_masks, of_tokens], dim=3).flatten(0, 1)


class SpectralTokenizer(LayerwiseCasting, ModelMixin, ConfigMixin):
    r"""Nested spectral tokenizer (SpectralAR, arXiv 2506.10962; docs/design.md#tokenizer).

    The encoder is a ViT over [P patches | n learned queries], the quantizer a cosine codebook, the decoder a ViT
    over [P mask tokens | k spectral tokens]. Spectral tokens are causal in both, so token k depends on no later
    one, and the keys and values of decoder tokens are computed once and serve every prefix length.

    Args:
        image_size: side H of the square images, a multiple of `patch_size`.
        in_channels: C, 1 (grey) or 3 (RGB).
        patch_size: side of a patch.
        num_tokens: N spectral tokens an image.
        alpha: exponent of the cutoff schedule, see `spectral.cutoff_schedule`.
        codebook_size: K entries.
        codebook_dim: dimension d of an entry.
        codebook_sizes: nested codebooks, K_t for each position, or K_1 alone: from it they grow in equal ratios to K.
            None or empty: all K everywhere.
        fsq_levels: finite scalar quantization in place of the codebook, L_i values for each of the d dimensions, K in
            all. None or empty: a cosine codebook.
        cutoffs: r_1, ..., r_N in place of alpha's law, non-decreasing, from 1 to r_N = H, such as
            `spectral.data_cutoffs` gives. None or empty: alpha's law.
        hidden_size, num_heads, encoder_layers, decoder_layers, mlp_ratio: size of the two ViTs. With a shortcut the
            encoder may have no layers: it is then the shortcut alone.
        spectral_shortcut: tokens describe what earlier ones left over of the spectrum, in subspaces fitted to data,
            and the two ViTs learn what to add to that, see `shortcut.SpectralShortcut`. Needs the cosine codebook.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # its hooks sit on `forward`, and inference runs without it

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 1,
        patch_size: int = 8,
        num_tokens: int = 32,
        alpha: float = 1.5,
        codebook_size: int = 1024,
        codebook_dim: int = 12,
        codebook_sizes: list[int] | None = None,
        hidden_size: int = 144,
        num_heads: int = 4,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        mlp_ratio: float = 4.0,
        fsq_levels: list[int] | None = None,
        cutoffs: list[int] | None = None,
        spectral_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # see `enable_gradient_checkpointing`
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} must be a multiple of patch_size {patch_size}.")
        codebook_sizes, fsq_levels, cutoffs = codebook_sizes or None, fsq_levels or None, cutoffs or None
        if codebook_sizes is not None and len(codebook_sizes) == 1 < num_tokens:
            codebook_sizes = nested_codebook_sizes(codebook_sizes[0], codebook_size, num_tokens)
        if codebook_sizes is not None and len(codebook_sizes) != num_tokens:
            raise ValueError(f"codebook_sizes needs one size for each of the {num_tokens} tokens, or the first alone.")
        # As they came out.
        self.register_to_config(codebook_sizes=codebook_sizes, fsq_levels=fsq_levels, cutoffs=cutoffs)
        by_alpha = cutoff_schedule(image_size, num_tokens, alpha)
        self.cutoffs = check_cutoffs(cutoffs, image_size, num_tokens) if cutoffs else by_alpha
        self._grid = image_size // patch_size
        self.num_patches = self._grid**2
        patch_dim = in_channels * patch_size**2

        self.shortcut = None
        if spectral_shortcut:
            if codebook_sizes or fsq_levels:
                raise ValueError("spectral_shortcut needs a plain codebook: set no codebook_sizes and no fsq_levels.")
            self.shortcut = SpectralShortcut(self.cutoffs, image_size, in_channels, codebook_dim)
            self.base_embed = nn.Linear(patch_dim, hidden_size)
        elif encoder_layers < 1:
            raise ValueError("encoder_layers must be at least 1 without spectral_shortcut.")
        if encoder_layers:
            self.patch_embed = nn.Linear(patch_dim, hidden_size)
            self.patch_position = nn.Parameter(torch.empty(self.num_patches, hidden_size))
            self.queries = nn.Parameter(torch.empty(num_tokens, hidden_size))
            self.encoder = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(encoder_layers))
            self.encoder_norm = nn.LayerNorm(hidden_size, eps=1e-6)
            self.to_latent = nn.Linear(hidden_size, codebook_dim)

        self.quantizer: VectorQuantizer | FiniteScalarQuantizer
        if fsq_levels is None:
            self.quantizer = VectorQuantizer(codebook_size, codebook_dim, codebook_sizes)
        else:
            if codebook_sizes is not None:
                raise ValueError("codebook_sizes nests a codebook, and fsq_levels puts a grid in its place: set one.")
            self.quantizer = FiniteScalarQuantizer(fsq_levels)
            size, dim = self.quantizer.codebook.shape
            if (size, dim) != (codebook_size, codebook_dim):
                raise ValueError(f"fsq_levels {fsq_levels} need codebook_size {size} and codebook_dim {dim}.")

        self.from_latent = nn.Linear(codebook_dim, hidden_size)
        self.token_position = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.mask_tokens = nn.Parameter(torch.empty(self.num_patches, hidden_size))
        self.decoder = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.to_pixels = nn.Linear(hidden_size, patch_dim)
        # Removes the seams between patches: a 3x3 residual pair, an identity at the start.
        self.seam_conv = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, in_channels, 3, padding=1)
        )
        self._init_parameters()

    def _init_parameters(self) -> None:
        init_weights(self)
        # As large as what is added to them. With the usual 0.02 the first attention output drowns them: queries and
        # mask tokens are then all alike, and telling them apart again took three times as many steps.
        added = [self.token_position, self.mask_tokens]
        for parameter in [self.patch_position, self.queries, *added] if self.config.encoder_layers else added:
            nn.init.normal_(parameter, std=0.5)
        nn.init.normal_(self.from_latent.weight, std=0.5)  # entries are unit vectors
        nn.init.zeros_(self.seam_conv[-1].weight)
        nn.init.zeros_(self.seam_conv[-1].bias)
        if self.shortcut is not None:  # the networks start as nothing beside it
            for layer in (self.to_latent, self.to_pixels) if self.config.encoder_layers else (self.to_pixels,):
                nn.init.zeros_(layer.weight)

    @property
    def prefix_bits(self) -> list[float]:
        """Bits that the codes of each prefix can hold: the sum of log2 K_t over its k positions, k = 1..N."""
        sizes = self.config.codebook_sizes or [self.config.codebook_size] * self.config.num_tokens
        return list(accumulate(map(math.log2, sizes)))

    # ------------------------------------------------------------------------------------------------ encode

    def latents(self, images: Tensor, num_tokens: int | None = None) -> Tensor:
        """Continuous latents before quantization: images (B, C, H, H) in [-1, 1] -> (B, n, d)."""
        n = self._prefix_length(num_tokens)
        learned = self._learned_latents(images, n) if self.config.encoder_layers else None
        if self.shortcut is None:
            return learned
        with torch.autocast(images.device.type, enabled=False):
            nearest = lambda z: self.quantizer.lookup(self.quantizer.encode(z))  # noqa: E731
            latents = self.shortcut.latents(images, learned, n, nearest)
        return latents if learned is None else latents + (learned - learned.detach())

    def _patches(self, images: Tensor, embed: nn.Linear) -> Tensor:
        """Embedded patches: (B, C, H, H) -> (B, P, D)."""
        batch, patch, grid = images.shape[0], self.config.patch_size, self._grid
        x = images.reshape(batch, self.config.in_channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch, self.num_patches, embed.in_features)  # (B, P, C p p)
        return embed(x.to(self.token_position.dtype))  # (B, P, D)

    def _learned_latents(self, images: Tensor, n: int) -> Tensor:
        """What the encoder's ViT makes of images (B, C, H, H): (B, n, d)."""
        batch = images.shape[0]
        x = self._patches(images, self.patch_embed) + self.patch_position
        x = torch.cat([x, self.queries[:n].expand(batch, -1, -1).to(x.dtype)], dim=1)  # (B, P + n, D)
        mask = encoder_mask(self.num_patches, n, x.device)
        for block in self.encoder:
            x = self._checkpointed(block, x, mask)
        return self.to_latent(self.encoder_norm(x[:, self.num_patches :]))  # (B, n, d)

    def encode(self, images: Tensor, num_tokens: int | None = None) -> Tensor:
        """Codes (B, n) int64 of images (B, C, H, H) in [-1, 1], n = `num_tokens` (default N).

        Raises:
            ValueError: if the images have another shape than the model's, are not floats or not finite, or n is not in
            1..N.
        """
        check_pixels(images, (self.config.in_channels, self.config.image_size, self.config.image_size))
        latents = self.latents(images, num_tokens)
        # The nearest entry to NaN would be the first, and one that is NaN the nearest to all.
        if not bool(latents.isfinite().all() & self.quantizer.codebook.isfinite().all()):
            raise ValueError("images must be finite, and the encoder's weights too: there is NaN or infinity in them.")
        return self.quantizer.encode(latents)

    # ------------------------------------------------------------------------------------------------ decode

    def decode(self, codes: Tensor, num_tokens: int | Tensor | Sequence[int] | None = None) -> Tensor:
        """Images of a prefix of the codes, band-limited to the prefix's cutoff.

        Args:
            codes: (B, n) of any integer type, in 0..K-1, n <= N.
            num_tokens: prefix length k. An int (default n): one length for all images. A tensor (B,): one length
                an image. A list of S ints: every image at each of these lengths, tokens computed once for all.

        Returns:
            (B, C, H, H), or (B, S, C, H, H) for a list; not clamped.

        Raises:
            ValueError: if codes or prefix lengths are out of range.
        """
        codes = self._check_codes(codes)
        available = codes.shape[1]
        num_tokens = scalar(num_tokens)
        if num_tokens is None or not isinstance(num_tokens, Tensor | Sequence):
            k = self._prefix_length(available if num_tokens is None else num_tokens, available)
            return self._decode_prefixes(self.quantizer.lookup(codes[:, :k]), [k])[:, 0]
        if isinstance(num_tokens, Tensor):
            if odd_kind(num_tokens) or num_tokens.shape != (codes.shape[0],) or not len(codes):
                raise ValueError(f"num_tokens as a tensor must have shape ({codes.shape[0]},), one length an image.")
            largest = max(check_lengths(num_tokens.tolist(), available))
            lengths = num_tokens.to(codes.device, torch.int64).unsqueeze(1)  # (B, 1)
            return self.decode_latents(self.quantizer.lookup(codes[:, :largest]), lengths)[:, 0]
        lengths = check_lengths(num_tokens, available)
        return self._decode_prefixes(self.quantizer.lookup(codes[:, : max(lengths)]), lengths)

    def _decode_prefixes(
        self,
        quantized: Tensor,
        lengths: Sequence[int],
        kv: LayerKV | None = None,
        running: RunningSpectrum | None = None,
    ) -> Tensor:
        """Images (B, S, C, H, H) at S prefix lengths of quantized latents (B, n, d), some at a time.

        kv: keys and values of those tokens, and running: what is known of their spectra, if they were met before.
        """
        kv = self._token_kv(self._embed_latents(quantized)) if kv is None else kv
        running = RunningSpectrum(self.shortcut) if running is None and self.shortcut is not None else running
        batch, device = quantized.shape[0], quantized.device
        rows = ROWS_AT_ONCE.get(device.type, ROWS_AT_ONCE_ELSEWHERE)
        count = max(1, rows // max(1, batch * self.num_patches))
        frames = []
        for some in (lengths[i : i + count] for i in range(0, len(lengths), count)):
            longest = max(some)
            seen = [(k[:, :, :longest], v[:, :, :longest]) for k, v in kv]
            visible = None
            if len(some) > 1:
                visible = _below(torch.tensor(some, dtype=torch.int64, device=device), longest)  # (s, n)
            base = None if running is None else running.at(quantized, some)
            frames.append(self._render(seen, self._cutoff_tensor(some, device), visible, base))
        return torch.cat(frames, dim=1)

    def decode_with_spectra(self, codes: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images D_k and the shortcut's spectra X_k, each (B, S, C, H, H), of S prefixes of codes (B, n)."""
        quantized, device = self.quantizer.lookup(codes), codes.device
        spectra = RunningSpectrum(self.shortcut).at(quantized, lengths)
        visible = _below(torch.tensor(list(lengths), dtype=torch.int64, device=device), codes.shape[1])  # (S, n)
        kv = self._token_kv(self._embed_latents(quantized))
        return self._render(kv, self._cutoff_tensor(lengths, device), visible, spectra), spectra

    def decode_latents(self, quantized: Tensor, lengths: Tensor) -> Tensor:
        """Differentiable decode of quantized latents (B, n, d) at lengths (S,) or (B, S) -> (B, S, C, H, H)."""
        kv = self._token_kv(self._embed_latents(quantized))
        visible = _below(lengths.to(quantized.device), quantized.shape[1])  # (..., S, n)
        base = None
        if self.shortcut is not None:
            with torch.autocast(quantized.device.type, enabled=False):
                base = self.shortcut.prefixes(quantized, visible.expand(len(quantized), -1, -1))
        return self._render(kv, self._cutoff_tensor(lengths, quantized.device), visible, base)

    def forward(
        self, images: Tensor, lengths: Tensor, quantize: bool = True
    ) -> tuple[Tensor, QuantizerOutput, Tensor]:
        """Training pass: reconstructions (B, S, C, H, H) at lengths (S,) or (B, S), quantizer output, latents.

        Without `quantize` the decoder sees the latents as they are, within the codes' bounds: a plain autoencoder.
        """
        latents = self.latents(images)
        quantized = self.quantizer(latents)
        seen = quantized.quantized if quantize else self.quantizer.continuous(latents)
        return self.decode_latents(seen, lengths), quantized, latents

    def _embed_latents(self, quantized: Tensor, position: int = 0) -> Tensor:
        end = position + quantized.shape[1]
        return self.from_latent(quantized.to(self.token_position.dtype)) + self.token_position[position:end]

    def _token_kv(self, x: Tensor, cache: KVCache | None = None, position: int = 0) -> LayerKV:
        """Runs spectral tokens x (B, n, D) through the decoder; their keys and values in every layer.

        With a cache, x holds the tokens from `position` on and the pairs returned hold all tokens so far.
        """
        pairs: LayerKV = []
        for layer in range(len(self.decoder)):
            x, *pair = self._checkpointed(self._token_layer, layer, x, cache, position)
            pairs.append(tuple(pair))
        return pairs

    def _token_layer(self, layer: int, x: Tensor, cache: KVCache | None, position: int) -> tuple[Tensor, ...]:
        """A decoder layer on spectral tokens (B, n, D): its output, and the keys and values in it."""
        block = self.decoder[layer]
        q, k, v = block.attn.qkv(block.norm1(x))
        if cache is not None:
            k, v = cache.write(layer, position, k, v)
        if layer + 1 == len(self.decoder):
            return x, k, v  # nobody reads what the last layer would make of the spectral tokens
        mask = None
        if position > 0 and q.shape[2] > 1:  # several new tokens behind old ones: causal, shifted
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(position)
        causal = mask is None and q.shape[2] > 1
        x = x + block.attn.out(attend(q, k, v, mask, causal))
        return x + block.mlp(block.norm2(x)), k, v

    def _render(
        self, kv: LayerKV, cutoffs: Tensor, visible: Tensor | None = None, base: Tensor | None = None
    ) -> Tensor:
        """Mask tokens look at spectral keys and values; cutoffs (), (S,) or (B, S) -> images (B, S, C, H, H).

        visible: (S, n) or (B, S, n), True for the spectral tokens a frame may see; None for all of them.
        base: the shortcut's spectra (B, S, C, H, H), if there is one. Mask tokens then start from their patch of it.
        """
        batch, frames = kv[0][0].shape[0], (1 if visible is None else visible.shape[-2])
        mask = None
        if visible is not None:
            visible = visible.expand(batch, frames, -1).flatten(0, 1)[:, None, None]  # (B S, 1, 1, n)
            mask = F.pad(visible, (self.num_patches, 0), value=True)  # (B S, 1, 1, P + n): masks see masks
        # Without a shortcut the first layer gets the same from all images: it is computed once, for a batch of 1.
        x = self.mask_tokens.unsqueeze(0)  # (1, P, D)
        if base is not None:
            base = idct2(base).flatten(0, 1)  # (B S, C, H, H)
            x = x + self._patches(base, self.base_embed)
        for block, (token_k, token_v) in zip(self.decoder, kv, strict=True):
            x = self._checkpointed(self._mask_token_layer, block, x, token_k, token_v, frames, mask)
        return low_pass(self._to_images(x, base).unflatten(0, (batch, frames)), cutoffs)  # (B, S, C, H, H)

    @staticmethod
    def _mask_token_layer(
        block: Block, x: Tensor, token_k: Tensor, token_v: Tensor, frames: int, mask: Tensor | None
    ) -> Tensor:
        """A decoder layer on mask tokens x (B S, P, D), which also see keys and values (B, heads, n, head_dim).

        x may be (1, P, D), the same for all frames: they are told apart by what they see.
        """
        q, k, v = block.attn.qkv(block.norm1(x))
        k, v = _join(k, token_k, frames), _join(v, token_v, frames)  # (B S, heads, P + n, head_dim)
        q = q.expand(k.shape[0], -1, -1, -1)
        x = x + block.attn.out(attend(q, k, v, mask))
        return x + block.mlp(block.norm2(x))

    def _to_images(self, x: Tensor, base: Tensor | None = None) -> Tensor:
        """Mask tokens behind the last layer (B, P, D), and what they add to -> (B, C, H, H), not yet band-limited."""
        x = self.to_pixels(self.decoder_norm(x))  # (B, P, C p p)
        grid, patch, channels = self._grid, self.config.patch_size, self.config.in_channels
        x = x.view(x.shape[0], grid, grid, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(x.shape[0], channels, grid * patch, grid * patch)  # (B, C, H, H)
        x = x if base is None else x + base.to(x.dtype)
        # Its few channels side by side: CPUs take up to half the time.
        return x + self.seam_conv(x.contiguous(memory_format=torch.channels_last))

    def _checkpointed(self, function: Callable, *args: Any) -> Any:
        """function(*args); with gradient checkpointing, what it computes on the way is computed again, not kept."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *args)
        return function(*args)

    # ------------------------------------------------------------------------------------------------ checks

    def _cutoff_tensor(self, lengths: Tensor | list[int], device: torch.device) -> Tensor:
        cutoffs = torch.tensor(self.cutoffs, dtype=torch.int64, device=device)
        return cutoffs[torch.as_tensor(lengths, device=device) - 1]

    def _prefix_length(self, k: int | None, available: int | None = None) -> int:
        limit = available or self.config.num_tokens
        return limit if k is None else integer(k, "num_tokens", 1, limit)

    def _check_codes(self, codes: Tensor, name: str = "codes") -> Tensor:
        return check_codes(codes, name, self.config.num_tokens, self.config.codebook_size)
