"""Transformer parts shared by the tokenizer and the autoregressive model: attention, MLP, blocks, KV cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE_WEIGHT = 1 << 18  # numbers in a weight from which on blocks pay
BLOCKS = 4  # of outputs
BLOCK_WIDTH = 512  # of inputs
ROWS_TOGETHER = 4  # of products whose sums are to come in one order


def by_columns(weight: Tensor) -> Tensor:
    """A copy of a weight (D', D) whose columns lie one after another: `linear` then has sums come in one order."""
    return weight.t().contiguous().t()


def filled_up(rows: int) -> int:
    """The next multiple of `ROWS_TOGETHER`."""
    return -(-rows // ROWS_TOGETHER) * ROWS_TOGETHER


def block_inputs(weight: Tensor, rows: int) -> Tensor:
    """A weight (D', D) as `linear` reads it fastest for so many rows: with many inputs, a copy (D / 512, D', 512).

    In the other cases the weight itself.
    """
    inputs = weight.shape[1]
    if _in_blocks(weight) and rows <= 4 and inputs >= 4 * BLOCK_WIDTH and inputs % BLOCK_WIDTH == 0:
        return weight.unflatten(1, (-1, BLOCK_WIDTH)).transpose(0, 1).contiguous()
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of a few rows x (B, D) -> (B, D'); weight (D', D), or what `by_columns` or `block_inputs` makes of it.

    BLAS sums a row in another order beside more rows or fewer, on every CPU in its own way. With a weight by columns
    each four rows are a product of their own, and a row's sums are the same wherever it is and whatever is beside it.

    BLAS takes one to three rows for a thin matrix product, and reads a large weight at a half to a fifth of the
    memory's rate, on one thread if it is one row. As a batch of products with blocks of W it reads at up to its full
    rate, on all threads. More rows are slower this way, and for small weights the calls cost more than it gains.
    """
    rows = x.shape[0]
    if rows % ROWS_TOGETHER == 0 and _lies_by_columns(weight):
        fours = x.view(-1, ROWS_TOGETHER, x.shape[1])
        columns = weight.t().expand(len(fours), -1, -1)
        out = torch.bmm(fours, columns) if bias is None else torch.baddbmm(bias, fours, columns)
        return out.view(rows, -1)
    if weight.ndim == 3:
        columns = x.view(rows, -1, BLOCK_WIDTH).permute(1, 2, 0)  # (blocks, 512, B)
        out = torch.bmm(weight, columns).sum(0)  # (D', B)
    elif _in_blocks(weight) and rows <= 3 and weight.shape[0] % BLOCKS == 0:
        columns = x.t().expand(BLOCKS, -1, -1)  # (4, D, B)
        out = torch.bmm(weight.view(BLOCKS, -1, x.shape[1]), columns).view(-1, rows)  # (D', B)
    else:
        return F.linear(x, weight, bias)
    if bias is None:
        return out.t().contiguous()
    return torch.add(out.t(), bias, out=x.new_empty(rows, len(bias)))  # contiguous, in one call


def _lies_by_columns(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.stride(0) == 1 != weight.stride(1)


def _in_blocks(weight: Tensor) -> bool:
    return weight.numel() >= LARGE_WEIGHT and weight.device.type == "cpu" and weight.dtype == torch.float32


class LayerwiseCasting:
    """For models: diffusers' weights stored in one type and computed with in another, cast at each use."""

    casts_weights = False  # at each use of a layer, for the time of it: one run at a time may then use the model

    def enable_layerwise_casting(self, storage_dtype: torch.dtype, compute_dtype: torch.dtype | None = None, **kwargs):
        """As `ModelMixin.enable_layerwise_casting`; what it leaves as it is, is in `compute_dtype` afterwards."""
        compute_dtype = compute_dtype or self.dtype
        super().enable_layerwise_casting(storage_dtype, compute_dtype, **kwargs)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point() and tensor.dtype != storage_dtype:
                tensor.data = tensor.data.to(compute_dtype)
        self.casts_weights = True


class KVSlot(NamedTuple):
    """What one layer needs of the cache to run one token of each sequence."""

    keys: Tensor  # (B, heads, max_len, head_dim)
    values: Tensor
    places: Tensor  # (B heads,) int64, where the tokens' keys and values go, counted in (B heads max_len)
    length: int  # places that are looked at, the first ones
    mask: Tensor | None  # (B heads, 1, length), 0 up to each token and -inf behind it; None if nothing is behind


class KVCache:
    """Static key/value buffers of a whole stack: one pair (B, heads, max_len, head_dim) a layer.

    Allocated once before the token loop, written in place: no allocation a token, and fixed addresses, so that
    a step can be captured as a CUDA graph.
    """

    def __init__(self, num_layers: int, batch: int, num_heads: int, max_len: int, head_dim: int, like: Tensor) -> None:
        self.dtype = like.dtype
        shape = (num_layers, 2, batch, num_heads, max_len, head_dim)
        self._use(torch.zeros(shape, dtype=like.dtype, device=like.device))
        seen = torch.ones(max_len, max_len, dtype=torch.bool, device=like.device).tril()
        self._masks = torch.zeros(max_len, max_len, dtype=like.dtype, device=like.device)
        self._masks.masked_fill_(~seen, -torch.inf)

    def _use(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self.keys, self.values = buffer[:, 0].unbind(0), buffer[:, 1].unbind(0)
        batch, heads, max_len = buffer.shape[2:5]
        self._first = max_len * torch.arange(batch * heads, dtype=torch.int64, device=buffer.device)  # of each head

    def narrow(self, batch: int) -> Self:
        """The same memory, of the first `batch` sequences alone."""
        part = copy.copy(self)
        part._use(self._buffer[:, :, :batch])
        return part

    def take(self, rows: Tensor, other: KVCache) -> None:
        """Sequences `rows` (R,) get what the first R of another cache hold."""
        self._buffer[:, :, rows] = other._buffer[:, :, : len(rows)]

    def write(self, layer: int, position: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores key, value (B, heads, T, head_dim) from `position` on; returns all that is filled so far."""
        end = position + key.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, position:end] = key
        values[:, :, position:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def slots(self, position: int | Tensor) -> list[KVSlot]:
        """All layers' parts for a token at `position`: of all sequences, or (B,) of each.

        On a CPU they span the whole cache, with a mask: sums of numbers of another count come in another order, and
        a sequence's would depend on who else is there.
        """
        batch, heads, length, _ = self.keys[0].shape
        if isinstance(position, Tensor):
            position = position.unsqueeze(1).expand(-1, heads).flatten()  # (B heads,)
            mask = self._masks.index_select(0, position).unsqueeze(1)
        elif self._masks.is_cpu:
            mask = self._masks[position].expand(batch * heads, 1, -1)
        else:
            length, mask = position + 1, None
        places = self._first + position
        return [KVSlot(*pair, places, length, mask) for pair in zip(self.keys, self.values, strict=True)]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Softmax attention of queries (B, heads, T, d) to keys and values (B, heads, S, d) -> (B, heads, T, d).

    `mask`, broadcast to (B, heads, T, S), is True where to attend. On a CPU what is learnt from in bfloat16 is
    computed in float32: torch's backward pass takes four times as long in bfloat16, with the instructions for it.
    """
    if q.is_cpu and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, is_causal).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


class Attention(nn.Module):
    """Multi-head attention in three separable steps, so that callers can share or cache keys and values.

    `qkv` projects, `attend` mixes, `out` projects back. With `qk_norm`, queries and keys are normalised per head
    (layer norm with a learned gain), which keeps the logits bounded in low precision (Dehghani et al., 2023). Not the
    RMS norm: torch has no fused one on CPUs, where it takes longer.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}.")
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.to_out = nn.Linear(hidden_size, hidden_size)
        self.norm_q = nn.LayerNorm(self.head_dim, eps=1e-6, bias=False) if qk_norm else None
        self.norm_k = nn.LayerNorm(self.head_dim, eps=1e-6, bias=False) if qk_norm else None

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries, keys, values, each (B, heads, T, head_dim)."""
        batch, length, _ = x.shape
        qkv = self.to_qkv(x).view(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.norm_q is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return q, k, v

    def out(self, mixed: Tensor) -> Tensor:
        """(B, heads, T, head_dim) -> (B, T, D)."""
        return self.to_out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Self-attention over x (B, T, D); `mask`, broadcast to (B, heads, T, T), is True where to attend."""
        q, k, v = self.qkv(x)
        return self.out(attend(q, k, v, mask, is_causal))


class MLP(nn.Module):
    """Linear, GELU, linear. The exact GELU: on CPUs it is twice as fast as the tanh form, forward and backward."""

    def __init__(self, hidden_size: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.up = nn.Linear(hidden_size, inner)
        self.down = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm ViT block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = MLP(hidden_size, mlp_ratio)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(nn.Module):
    """Pre-norm block modulated by the class (adaLN-zero of DiT, Peebles & Xie 2023):

        x + g1 * attn(s1 * norm(x) + b1), then the same with (b2, s2, g2) around the MLP.

    The six vectors (shift b, scale s, gate g, twice) come in from outside: they are constant for a class, so the
    caller computes them once a sample instead of once a token. s is the whole factor, where DiT writes 1 + s.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(hidden_size, mlp_ratio)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, modulation: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """The first T tokens x (B, T, D), causal, modulation (B, 6, D). A cache keeps their keys and values."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(2).unbind(1)  # each (B, 1, D)
        q, k, v = self.attn.qkv(torch.addcmul(shift1, self.norm1(x), scale1))
        if cache is not None:
            cache.write(layer, 0, k, v)
        mixed = attend(q, k, v, is_causal=True)
        dropout = self.dropout if cache is None else nn.Identity()  # sampling drops nothing, also while in training
        x = torch.addcmul(x, gate1, dropout(self.attn.out(mixed)))
        hidden = self.mlp(torch.addcmul(shift2, self.norm2(x), scale2))
        return torch.addcmul(x, gate2, dropout(hidden))

    def step_parameters(self, rows: int, dtype: torch.dtype | None = None, in_order: bool = False) -> StepParameters:
        """The parameters as `adaln_step` takes them, in the type to compute in, for so many sequences."""
        attn, up, down = self.attn, self.mlp.up, self.mlp.down
        dtype = dtype or attn.to_qkv.weight.dtype
        parameters = (
            attn.to_qkv.weight, attn.to_qkv.bias, attn.norm_q.weight, attn.norm_k.weight, attn.to_out.weight,
            attn.to_out.bias, up.weight, up.bias, down.weight, down.bias,
        )  # fmt: skip
        made = StepParameters(*(p.to(dtype) for p in parameters))
        if in_order:
            return StepParameters(*(by_columns(p) if p.ndim == 2 else p for p in made))
        return made._replace(down_weight=block_inputs(made.down_weight, rows))


class StepParameters(NamedTuple):
    """Parameters of an `AdaLNBlock`, looked up once a sample: for each token it would take as long as a product."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    norm_q: Tensor
    norm_k: Tensor
    out_weight: Tensor
    out_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


def adaln_step(x: Tensor, p: StepParameters, modulation: Sequence[Tensor], slot: KVSlot) -> Tensor:
    """`AdaLNBlock` in eval mode for a single token x (B, D) behind those in the cache; modulation: six times (B, D).

    The same formula in as few calls as it takes, and none through a module: for a small model on a CPU the calls
    are most of the time.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    width, (heads, _, head_dim) = x.shape[1:], slot.keys.shape[1:]
    hidden = torch.addcmul(shift1, torch.layer_norm(x, width, eps=1e-6), scale1)
    qkv = linear(hidden, p.qkv_weight, p.qkv_bias).view(-1, 3, heads, head_dim)
    # Values are normalised too, for nothing: one call is cheaper than two.
    q, k, _ = torch.layer_norm(qkv, (head_dim,), eps=1e-6).unbind(1)  # each (B, heads, head_dim)
    mixed = attend_one(q * p.norm_q, k * p.norm_k, qkv[:, 2], slot)
    x = torch.addcmul(x, gate1, linear(mixed.view(x.shape), p.out_weight, p.out_bias))
    hidden = torch.addcmul(shift2, torch.layer_norm(x, width, eps=1e-6), scale2)
    hidden = F.gelu(linear(hidden, p.up_weight, p.up_bias))
    return torch.addcmul(x, gate2, linear(hidden, p.down_weight, p.down_bias))


def attend_one(q: Tensor, k: Tensor, v: Tensor, slot: KVSlot) -> Tensor:
    """Attention of one token a sequence, each (B, heads, head_dim), to itself and those in the cache, which it joins.

    In float32 on a CPU as two products: the sums of a sequence are then the same beside any others, which those of
    torch's fused kernel are on one thread only, and for many sequences it takes half the time.
    """
    heads, head_dim = q.shape[1:]
    for buffer, new in ((slot.keys, k), (slot.values, v)):
        buffer.view(-1, head_dim).index_copy_(0, slot.places, new.reshape(-1, head_dim))
    if slot.mask is not None and q.is_cpu and q.dtype in (torch.float32, torch.float64):
        keys, values = slot.keys.flatten(0, 1), slot.values.flatten(0, 1)  # (B heads, max_len, head_dim)
        scores = torch.baddbmm(slot.mask, q.view(-1, 1, head_dim), keys.transpose(1, 2), alpha=head_dim**-0.5)
        return torch.bmm(scores.softmax(-1), values)  # (B heads, 1, head_dim)
    keys, values = slot.keys[:, :, : slot.length], slot.values[:, :, : slot.length]
    mask = None if slot.mask is None else slot.mask.unflatten(0, (-1, heads))
    return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear weights, zero biases, embeddings of 0.02, as in DiT.

    The customary normal 0.02 for everything is made for widths of 768 and more; at width 128 the tokenizer is
    7 % further down its loss after 300 steps with this one.
    """
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight, std=0.02)


@lru_cache(maxsize=32)
def encoder_mask(num_patches: int, num_tokens: int, device: torch.device) -> Tensor:
    """(P + n, P + n), True where the row may look: patches at patches, token i at patches and tokens j <= i."""
    size = num_patches + num_tokens
    with torch.inference_mode(False):
        mask = torch.ones(size, size, dtype=torch.bool, device=device)
        mask[:, num_patches:] = False
        mask[num_patches:, num_patches:] = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
        return mask
