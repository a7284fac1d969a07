"""SpectralARTransformer: class label and the spectral tokens so far -> logits of the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .entries import EntryMaps
from .inference.compiled import CompiledStep
from .layers import (
    AdaLNBlock,
    KVCache,
    LayerwiseCasting,
    StepParameters,
    adaln_step,
    by_columns,
    init_weights,
    linear,
)

WIDEST_IN_ORDER = 256
# The paper's model (310M parameters, 64 tokens, ImageNet-1K); the size is VAR-d16's (Tian et al., 2024).
PRESETS = {
    "d16": {
        "num_classes": 1000,
        "codebook_size": 4096,
        "num_tokens": 64,
        "hidden_size": 1024,
        "num_layers": 16,
        "num_heads": 16,
    },
}


class Conditioning(NamedTuple):
    """All that a class label sets in the network: constant over the tokens, so computed once a sample."""

    start: Tensor  # (B, D), input of the start position
    blocks: Tensor  # (B, L, 6, D), (shift, scale, gate) of attention, then of the MLP
    final: Tensor  # (B, 2, D), shift and scale before the head


class SamplingCache(KVCache):
    """Keys and values of the sequences that are being sampled, and the weights as a step reads them."""

    def __init__(self, model: SpectralARTransformer, batch: int) -> None:
        config = model.config
        head_dim = config.hidden_size // config.num_heads
        super().__init__(config.num_layers, batch, config.num_heads, config.num_tokens, head_dim, like=model.position)
        self.weights = StepWeights(model, batch, self.dtype)
        self.positions = torch.arange(config.num_tokens, dtype=torch.int64, device=model.device)


def sums_in_order(model: SpectralARTransformer) -> bool:
    """Whether an image's logits are to be the same to the bit whatever it is sampled with.

    So on a CPU, for a model of width 256 or less: few rows are filled up to `layers.ROWS_TOGETHER`, see
    `layers.linear`. A wider one's weights are what takes the time. Few rows stay as they are, and their logits are
    the same as among others up to rounding.
    """
    return model.device.type == "cpu" and model.config.hidden_size <= WIDEST_IN_ORDER


class StepWeights:
    """What `step` reads for so many sequences: looked up, and laid out for it, once, at the first step.

    A prefix alone needs none of it. Weights that are stored in fewer bits are cast anew at each use, block by block.
    """

    def __init__(self, model: SpectralARTransformer, rows: int, dtype: torch.dtype) -> None:
        self._model, self._rows, self._dtype = model, rows, dtype
        self._in_order = sums_in_order(model) and dtype.itemsize >= 4
        self._kept: dict[object, Any] = {}

    def block(self, layer: int) -> StepParameters:
        """Parameters of a block."""
        block, how = self._model.blocks[layer], (self._rows, self._dtype, self._in_order)
        return self._get(layer, lambda: block.step_parameters(*how))

    @property
    def blocks(self) -> list[StepParameters]:
        """Those of all blocks."""
        return [self.block(layer) for layer in range(len(self._model.blocks))]

    @property
    def head(self) -> Tensor:
        """Weight of the head, (K, D)."""
        return self._get("head", lambda: self._laid_out(self._model.head.weight))

    @property
    def entries(self) -> Tensor | None:
        """Entries of the codebook, (K, d), if the model knows them."""
        maps = self._model.entry_maps
        return None if maps is None else self._get("entries", lambda: self._laid_out(maps.entries))

    def _laid_out(self, weight: Tensor) -> Tensor:
        weight = weight.to(self._dtype)
        return by_columns(weight) if self._in_order else weight

    def _get(self, name: object, make: Callable[[], Any]) -> Any:
        if self._model.casts_weights:
            return make()
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


class SpectralARTransformer(LayerwiseCasting, ModelMixin, ConfigMixin):
    r"""Class-conditional autoregressive transformer over spectral tokens (SpectralAR, arXiv 2506.10962).

    A decoder-only transformer with adaLN-zero (DiT; Peebles & Xie, 2023) and normalised queries and keys. The input
    sequence is [class embedding, q_1, .., q_(N-1)], position t predicts q_(t+1). Label `null_label` (the index
    `num_classes`) is the null class of classifier-free guidance. The head starts at zero: step 0 has loss log K.

    Args:
        num_classes: number of classes without the null class.
        codebook_size: K.
        num_tokens: N spectral tokens an image.
        hidden_size, num_layers, num_heads, mlp_ratio: size of the network.
        dropout: on the input embeddings and on both residual branches of every block, in training only.
        codebook_dim: d of the tokenizer's codebook entries, which inputs and outputs then know besides the numbers
            of codes, see `entries.EntryMaps`; 0: they do not.
        decoder_feedback: each token is also predicted from what the tokenizer's decoder has made of the tokens before
            it, see `inference.feedback`. Needs `codebook_dim`, and a tokenizer with a spectral shortcut.
        shared_adaln: one adaLN projection for all blocks, each with a learned offset of its own (PixArt-alpha; Chen
            et al., 2023): a third fewer parameters.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # its hooks sit on `forward`, and inference runs without it
    _no_split_modules = ["AdaLNBlock"]

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        codebook_size: int = 1024,
        num_tokens: int = 32,
        hidden_size: int = 192,
        num_layers: int = 6,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        shared_adaln: bool = False,
        codebook_dim: int = 0,
        decoder_feedback: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # see `enable_gradient_checkpointing`
        self._compiled_step: CompiledStep | None = None  # see `compile`
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.token_embed = nn.Embedding(codebook_size, hidden_size)
        self.position = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.embed_dropout = nn.Dropout(dropout)
        # adaLN of all blocks as one product; the table (L, 6, D) is its bias, one row a block also where the
        # projection is shared.
        rows = 1 if shared_adaln else num_layers
        self.adaln = nn.Linear(hidden_size, rows * 6 * hidden_size, bias=False)
        self.adaln_table = nn.Parameter(torch.empty(num_layers, 6, hidden_size))
        self.blocks = nn.ModuleList(AdaLNBlock(hidden_size, num_heads, mlp_ratio, dropout) for _ in range(num_layers))
        self.final_adaln = nn.Linear(hidden_size, 2 * hidden_size)
        self.final_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.head = nn.Linear(hidden_size, codebook_size)
        self.entry_maps = None
        if codebook_dim:
            self.entry_maps = EntryMaps(codebook_size, codebook_dim, num_tokens, hidden_size, decoder_feedback)
        elif decoder_feedback:
            raise ValueError("decoder_feedback needs codebook_dim: what the decoder expects is a codebook entry.")
        self._init_parameters()

    def _init_parameters(self) -> None:
        init_weights(self)
        # As large as what the blocks add: at 0.02 positions drown in it, and the class hardly moves adaLN at first.
        for parameter in (self.class_embed.weight, self.token_embed.weight, self.position):
            nn.init.normal_(parameter, std=0.5)
        # adaLN-zero: every block starts as the identity. A zero head: uniform predictions at step 0.
        for parameter in (self.adaln.weight, self.adaln_table, self.final_adaln.weight, self.head.weight):
            nn.init.zeros_(parameter)
        # DiT scales by 1 + s. Here the biases hold the 1, so that nothing is left to add for each token.
        with torch.no_grad():
            if self.entry_maps is not None:
                self.entry_maps.init_parameters()
                self.token_embed.weight.mul_(0.2)  # beside what they know
            self.adaln_table[:, 1::3] = 1
            self.final_adaln.bias.view(2, -1)[1] = 1

    @property
    def null_label(self) -> int:
        """The label of the null class, for unconditional rows."""
        return self.config.num_classes

    def condition(self, class_labels: Tensor) -> Conditioning:
        """Everything that depends on the class only: labels (B,) int64 in 0..num_classes -> `Conditioning`."""
        start = self.class_embed(class_labels)  # (B, D)
        hidden = F.silu(start)
        blocks = self.adaln(hidden).unflatten(1, (-1, 6, start.shape[1]))  # (B, L or 1, 6, D)
        final = self.final_adaln(hidden).unflatten(1, (2, -1))  # (B, 2, D)
        return Conditioning(start, blocks + self.adaln_table, final)

    def forward(
        self, codes: Tensor, class_labels: Tensor, expected: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits for every position at once, for training and scoring.

        Args:
            codes: (B, t) int64 in 0..K-1 with 0 <= t <= N-1: the tokens so far (in training `codes[:, :-1]`).
            class_labels: (B,) int64 in 0..num_classes.
            expected: with `decoder_feedback`, what the decoder expects at each of the positions, (B, S, d).
            positions: (S,) int64 in 0..t, those whose logits are wanted. Default: all t + 1.

        Returns:
            (B, S, K) float32; those of position i are the logits of token i given the tokens before it.

        Raises:
            ValueError: if the shapes do not fit, or `expected` is given without `decoder_feedback` or missing with it.
        """
        longest = self.config.num_tokens - 1
        if codes.ndim != 2 or codes.shape[1] > longest:
            raise ValueError(f"codes must have shape (B, t) with t <= {longest}, got {tuple(codes.shape)}.")
        if class_labels.shape != codes.shape[:1]:
            raise ValueError(f"class_labels must have shape ({codes.shape[0]},), got {tuple(class_labels.shape)}.")
        conditioning = self.condition(class_labels)
        feedback = self.config.decoder_feedback
        if (expected is not None) != feedback:
            raise ValueError(f"decoder_feedback is {feedback}: expected must be {'given' if feedback else 'None'}.")
        x = self._run(self.embed_dropout(self._embed(codes, 0, conditioning)), conditioning)
        at = slice(0, x.shape[1]) if positions is None else positions
        return self._logits(x[:, at], conditioning, at, expected)

    def add_expected(self, logits: Tensor, expected: Tensor, position: int | Tensor, cache: SamplingCache) -> Tensor:
        """With `decoder_feedback`, what is still to be added to the logits of `step` or of guidance.

        Args:
            logits: (B, K) of the token at `position`.
            expected: (B, d), what the decoder expects of it.
            position: in 0..N-1, one for all or (B,) int64.
            cache: that of `step`.

        Returns:
            (B, K) in the logits' type.
        """
        heard = self.entry_maps.expected_logits_at(expected, position, cache.weights.entries)
        return logits + heard.to(logits.dtype)

    # ------------------------------------------------------------------------------------------------ inference

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of `forward`, as any module's, and of the sampling step on a CPU.

        A small model then samples 1.5 times as fast or more; the first sample compiles, for some ten seconds.
        Without a C++ compiler sampling goes on as before, after one log line.
        """
        super().compile(*args, **kwargs)
        self._compiled_step = CompiledStep()

    def make_cache(self, batch: int) -> SamplingCache:
        """An empty key/value cache for `batch` sequences of N tokens, in the model's dtype and on its device."""
        return SamplingCache(self, batch)

    @torch.no_grad()
    def step(
        self, tokens: Tensor | None, position: int | Tensor, conditioning: Conditioning, cache: SamplingCache
    ) -> Tensor:
        """Logits of the next token, from the new tokens only; earlier ones are in the cache.

        Two uses: `position` 0 with the k >= 0 tokens of a given prefix (None for k = 0), which runs the start
        position and the prefix at once; then, for the p-th token, `position` p with tokens (B, 1). Where sequences
        are at different positions, these are (B,) int64; at 0 the start position is run, and the token there ignored.

        Args:
            tokens: (B, T) int64 in 0..K-1.
            position: number of inputs in the cache: 0, or 1 (start) + the number of tokens run before.
            conditioning: from `condition`, B rows.
            cache: from `make_cache(B)`; written in place.

        Returns:
            (B, K) float32: logits of the token after the last one given.
        """
        of_each = isinstance(position, Tensor)
        if not of_each and position == 0 and tokens is not None:
            x = self._run(self._embed(tokens, 0, conditioning), conditioning, cache)  # (B, 1 + T, D)
            return self._logits(x[:, -1:], conditioning, slice(x.shape[1] - 1, x.shape[1]))[:, 0]
        compiles = self._compiled_step is not None and not self.casts_weights
        if compiles and not of_each and tokens is not None and tokens.is_cpu:
            here = cache.positions[position : position + 1]
            w = cache.weights
            compiled = self._compiled_step(
                self, tokens[:, 0], here, tuple(conditioning), w.blocks, w.head, w.entries, cache.keys, cache.values
            )
            if compiled is not None:
                return _at_least_float32(compiled)
        # A single input. All of it in as few calls as it takes, as `adaln_step`.
        x = conditioning.start if tokens is None else self.token_embed(tokens[:, 0])  # (B, D)
        if self.entry_maps is not None and tokens is not None:
            x = x + self.entry_maps.embed_at(tokens[:, 0], self._places(position, cache, len(x), before=1))
        if of_each:
            x = torch.where((position == 0).unsqueeze(1), conditioning.start, x)
        x = x + self.position[position]
        modulation = conditioning.blocks.flatten(1, 2).unbind(1)  # 6 L times (B, D)
        for layer, slot in enumerate(cache.slots(position)):
            x = adaln_step(x, cache.weights.block(layer), modulation[6 * layer : 6 * layer + 6], slot)
        shift, scale = conditioning.final.unbind(1)  # each (B, D)
        x = torch.addcmul(shift, torch.layer_norm(x, x.shape[1:], eps=1e-6), scale)
        logits = linear(x, cache.weights.head, self.head.bias.to(x.dtype))
        if self.entry_maps is not None:
            places = self._places(position, cache, len(x))
            logits = logits + self.entry_maps.logits_at(x, places, cache.weights.entries)
        return _at_least_float32(logits)

    # ------------------------------------------------------------------------------------------------ parts

    @staticmethod
    def _places(position: int | Tensor, cache: SamplingCache, batch: int, before: int = 0) -> Tensor:
        """Position of each of `batch` sequences, or of the token `before` it, if there is one: (B,) int64."""
        if isinstance(position, Tensor):
            return (position - before).clamp(min=0)
        return cache.positions[position - before].expand(batch)

    def _embed(self, tokens: Tensor | None, position: int, conditioning: Conditioning) -> Tensor:
        """Inputs (B, T, D) from `position` on; at position 0 the start position comes first."""
        parts = [] if position else [conditioning.start.unsqueeze(1)]
        if tokens is not None:
            embedded = self.token_embed(tokens)
            parts.append(embedded if self.entry_maps is None else embedded + self.entry_maps.embed(tokens))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return x + self.position[position : position + x.shape[1]]

    def _run(self, x: Tensor, conditioning: Conditioning, cache: KVCache | None = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            modulation = conditioning.blocks[:, layer]  # (B, 6, D)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, modulation)
            else:
                x = block(x, modulation, cache, layer)
        return x

    def _logits(
        self, x: Tensor, conditioning: Conditioning, positions: slice | Tensor, expected: Tensor | None = None
    ) -> Tensor:
        """(B, T, D), for the tokens at T `positions` -> (B, T, K), never below float32."""
        shift, scale = conditioning.final.unsqueeze(2).unbind(1)  # each (B, 1, D)
        hidden = torch.addcmul(shift, self.final_norm(x), scale)
        logits = self.head(hidden)
        if self.entry_maps is not None:
            logits = logits + self.entry_maps.logits(hidden, positions)
        if expected is not None:
            logits = logits + self.entry_maps.expected_logits(expected, positions)
        return _at_least_float32(logits)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
