"""The sampling step as torch.compile takes it: all shapes fixed, so that one function does for all positions.

On a CPU the some 160 calls of a step take a small model longer than its arithmetic. Compiled they are a few dozen
loops in C++, and the products.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import StepParameters, linear

logger = logging.getLogger(__name__)


def block_at(
    x: Tensor, p: StepParameters, modulation: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> Tensor:
    """`layers.adaln_step` with the position in a tensor: attention spans the whole cache, behind a mask.

    Args:
        x: (B, D), a single token.
        p: parameters of the block.
        modulation: (B, 6, D).
        keys, values: (B, heads, N, head_dim), written in place.
        position: (1,) int64 in 0..N-1, of the token in the cache.

    Returns:
        (B, D).
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
    heads, length, head_dim = keys.shape[1:]
    hidden = torch.addcmul(shift1, F.layer_norm(x, x.shape[1:], eps=1e-6), scale1)
    q, k, v = linear(hidden, p.qkv_weight, p.qkv_bias).view(-1, 3, heads, head_dim).unbind(1)
    q = F.layer_norm(q, (head_dim,), p.norm_q, eps=1e-6)
    keys.index_copy_(2, position, F.layer_norm(k, (head_dim,), p.norm_k, eps=1e-6).unsqueeze(2))
    values.index_copy_(2, position, v.unsqueeze(2))
    scores = (q.unsqueeze(2) * keys).sum(-1) * head_dim**-0.5  # (B, heads, N)
    filled = torch.arange(length, dtype=torch.int64, device=x.device) <= position
    attention = scores.masked_fill(~filled, -torch.inf).softmax(-1)
    mixed = (attention.unsqueeze(-1) * values).sum(2).flatten(1)  # (B, D)
    x = torch.addcmul(x, gate1, linear(mixed, p.out_weight, p.out_bias))
    hidden = torch.addcmul(shift2, F.layer_norm(x, x.shape[1:], eps=1e-6), scale2)
    hidden = F.gelu(linear(hidden, p.up_weight, p.up_bias))
    return torch.addcmul(x, gate2, linear(hidden, p.down_weight, p.down_bias))


def step_at(
    model: Any, token: Tensor, position: Tensor, conditioning: tuple[Tensor, ...],
    parameters: Sequence[StepParameters], head: Tensor, entries: Tensor | None, keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """`SpectralARTransformer.step` for one token behind others.

    Args:
        model: the `SpectralARTransformer`; what is not among the following is taken from it.
        token: (B,) int64 in 0..K-1.
        position: (1,) int64 in 1..N-1, inputs in the cache.
        conditioning: a `Conditioning` of B rows.
        parameters, keys, values: of each layer, as in `block_at`.
        head, entries: as `StepWeights` has them.

    Returns:
        (B, K), logits of the token after this one.
    """
    _, blocks, final = conditioning
    x = F.embedding(token, model.token_embed.weight) + model.position.index_select(0, position)  # (B, D)
    if model.entry_maps is not None:
        x = x + model.entry_maps.embed_at(token, (position - 1).expand(len(token)))
    for layer, p in enumerate(parameters):
        x = block_at(x, p, blocks[:, layer], keys[layer], values[layer], position)
    shift, scale = final.unbind(1)
    x = torch.addcmul(shift, F.layer_norm(x, x.shape[1:], eps=1e-6), scale)
    logits = linear(x, head, model.head.bias)
    if model.entry_maps is not None:
        logits = logits + model.entry_maps.logits_at(x, position.expand(len(token)), entries)
    return logits


def has_compiler() -> bool:
    """Whether there is a C++ compiler where torch.compile looks for one: $CXX, g++ or, on macOS, clang++."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


class CompiledStep:
    """`step_at`, compiled at the first call of a size: ten seconds or so on an idle machine, kept on disk."""

    def __init__(self) -> None:
        # Without Python between the loops: a tenth faster.
        self._step: Callable[..., Tensor] | None = torch.compile(step_at, options={"cpp_wrapper": True})

    def __reduce__(self) -> tuple[type, tuple]:
        return CompiledStep, ()  # a copy of the model compiles anew

    def __call__(self, *args: Any) -> Tensor | None:
        """Arguments and logits (B, K) as of `step_at`; None if there is no compiler, or it failed."""
        step = self._step  # another thread may drop it
        if step is None:
            return None
        try:
            return step(*args)
        except Exception as error:  # whatever a compiler may raise: sampling goes on without
            self._step = None
            reason = f"{type(error).__name__}: {error}".splitlines()[0]  # compilers fill pages
            logger.warning("sampling without torch.compile: %s", reason)
            return None
