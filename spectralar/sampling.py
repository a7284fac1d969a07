"""From logits to tokens: guidance, temperature, top-k, top-p, inverse CDF. Pure functions; no model, no host sync.

The random numbers come in from outside, one uniform a token, drawn before the loop (`draw_uniforms`): an image then
depends on its own row only, never on its batch mates, and a sampling step is a pure function of tensors that can be
captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import integer, one_of, real, shown

GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")
# Far outside of what gives other pictures, and far inside of what float16 and float32 hold.
MAX_GUIDANCE = 1000.0
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3


# ------------------------------------------------------------------------------------------------ guidance


def guidance_at(index: int, num_tokens: int, guidance_scale: float, schedule: str = "constant") -> float:
    """Guidance scale w_t for token `index` in 0..N-1.

    "constant": w everywhere. "linear" and "cosine": from 1 at the first token to w at the last one, in a straight
    line or along half a cosine. (A sequence of one token gets w.)

    Raises:
        ValueError: for an unknown schedule.
    """
    one_of(schedule, "guidance_schedule", GUIDANCE_SCHEDULES)
    progress = index / (num_tokens - 1) if num_tokens > 1 else 1.0
    if schedule == "constant":
        progress = 1.0
    elif schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    # Written as a mean of 1 and w, so that both ends are met exactly.
    return (1 - progress) + progress * guidance_scale


def guidance_curve(num_tokens: int, guidance_scale: float, schedule: str = "constant") -> list[float]:
    """`guidance_at` for all N tokens."""
    return [guidance_at(index, num_tokens, guidance_scale, schedule) for index in range(num_tokens)]


def guide(cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance on logits: l_u + w (l_c - l_u) (Ho & Salimans, 2022); exactly l_c at 1, l_u at 0."""
    return torch.lerp(uncond, cond, guidance_scale)


# ------------------------------------------------------------------------------------------------ logits to tokens


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sets the logits of tokens outside top-k, then outside top-p, to -inf: (B, K) -> (B, K).

    Args:
        logits: (B, K), already divided by the temperature.
        top_k: keeps exactly this many of the most likely tokens; 0 or K keeps all.
        top_p: of these, renormalised, keeps the smallest set of most likely tokens whose probability reaches top_p,
            at least one (nucleus sampling, Holtzman et al., 2020); 1 keeps all.
    """
    some = 0 < top_k < logits.shape[-1]
    if not some and top_p >= 1:
        return logits
    values, indices = logits.topk(top_k) if some else logits.sort(descending=True, stable=True)  # (B, k), descending
    if top_p < 1:
        p = values.softmax(dim=-1)
        before = p.cumsum(dim=-1) - p  # probability of all more likely tokens; exactly 0 for the first
        outside = before >= top_p
        outside[:, 0] = False  # also where top_p is 0 in the logits' type
        values = values.masked_fill(outside, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def sample_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Picks one token a row by inverse CDF over the codebook's order.

    Args:
        logits: (B, K).
        uniforms: (B,) in [0, 1), one random number a row.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k, top_p: see `filter_logits`.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    p = filter_logits(logits, top_k, top_p).softmax(dim=-1)
    return inverse_cdf(p, uniforms, summed_in_order=p.device.type == "cpu")


def inverse_cdf(p: Tensor, uniforms: Tensor, summed_in_order: bool) -> Tensor:
    """The first token up to which the probabilities add up to more than u; never one of probability 0.

    Args:
        p: (B, K), of sum 1.
        uniforms: (B,) in [0, 1).
        summed_in_order: whether `cumsum` adds from left to right, as it does on a CPU. A parallel one is neither
            monotone nor flat over zeros to the last bit; then tokens of probability 0 are excluded by name.

    Returns:
        (B,) int64.
    """
    cdf = p.cumsum(dim=-1)  # (B, K)
    if not summed_in_order:
        cdf = cdf.masked_fill(p == 0, 0.0)
    total = cdf[:, -1:] if summed_in_order else cdf.amax(dim=-1, keepdim=True)  # (B, 1), 1 up to rounding
    # Below the largest value also after rounding, or nothing would be above.
    threshold = total * uniforms[:, None].to(cdf).clamp(max=1 - torch.finfo(cdf.dtype).eps)
    if summed_in_order:  # by bisection, in a fifth of the time
        return torch.searchsorted(cdf, threshold, right=True).squeeze(1).clamp_(max=p.shape[-1] - 1)  # also of NaN
    return (cdf > threshold).to(torch.uint8).argmax(dim=-1)


# ------------------------------------------------------------------------------------------------ random numbers


def draw_uniforms(
    batch: int,
    num_tokens: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform numbers in [0, 1), one for each token of each image: (B, N) float32 on `device`.

    Args:
        generator: one generator for all, drawn image after image, so that image b is the same whatever the batch
            size; or one generator an image; or None, the global CPU generator. Each draws on its own device.

    Raises:
        ValueError: if it is none of these, or a list of generators has another length than the batch.
    """
    if generator is None or isinstance(generator, torch.Generator):
        generators = [generator] * batch
    else:
        generators = list(generator) if isinstance(generator, Sequence) else [generator]
        if wrong := [each for each in generators if not isinstance(each, torch.Generator)]:
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {shown(wrong[0])}.")
        if len(generators) != batch:
            raise ValueError(
                f"generator must be a single one or one an image: got {len(generators)} generators for {batch} images."
            )
    # Row by row: on CUDA the layout of one (B, N) draw depends on its size.
    uniforms = torch.empty(batch, num_tokens, dtype=torch.float32, device=device)
    for row, g in zip(uniforms, generators, strict=True):
        row.copy_(torch.rand(num_tokens, generator=g, dtype=torch.float32, device=g.device if g else "cpu"))
    return uniforms


# ------------------------------------------------------------------------------------------------ arguments


def check_sampling_arguments(
    codebook_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance_scale: float = 1.0,
    guidance_schedule: str = "constant",
) -> dict[str, Any]:
    """The sampling arguments by name, as plain Python numbers.

    Raises:
        ValueError: one sentence about the first that is none, or out of range.
    """
    temperature = real(temperature, "temperature")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number >= 0 (0 is greedy), got {temperature}.")
    if temperature and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        limits = f"{MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}"
        raise ValueError(f"temperature must be 0 (greedy) or between {limits}, got {temperature}.")
    top_p = real(top_p, "top_p")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (off), got {top_p}.")
    return {
        "guidance_scale": check_guidance_scale(guidance_scale),
        "guidance_schedule": one_of(guidance_schedule, "guidance_schedule", GUIDANCE_SCHEDULES),
        "temperature": temperature,
        "top_k": integer(top_k, "top_k", 0, codebook_size, f"from 0 (off) to the codebook size {codebook_size}"),
        "top_p": top_p,
    }


def check_guidance_scale(guidance_scale: float) -> float:
    """The guidance scale as a float; a ValueError of one sentence if it is none, or out of range."""
    guidance_scale = real(guidance_scale, "guidance_scale")
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale must be a finite number >= 0 (1 is off), got {guidance_scale}.")
    if guidance_scale > MAX_GUIDANCE:
        raise ValueError(f"guidance_scale must be at most {MAX_GUIDANCE:g}, got {guidance_scale}.")
    return guidance_scale
