"""The arguments of a generation: checked, on the device, with the random numbers that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ..sampling import check_sampling_arguments, draw_uniforms
from ..tokenizer import SpectralTokenizer
from ..transformer import SpectralARTransformer
from .labels import LabelNames
from .outputs import OUTPUT_TYPES
from .run_state import RunState


@dataclass
class GenerationArguments:
    """The arguments of one generation, checked and on the device."""

    class_labels: Tensor  # (B,) int64
    codes: Tensor  # (B, n) int64, filled from the left; starts with the given prefix
    prefix_length: int
    uniforms: Tensor  # (B, N) in [0, 1)
    state: RunState  # guidance scale, steps, interruption
    sampling: dict[str, Any]  # guidance_schedule, temperature, top_k, top_p
    output_type: str
    callback: Callable | None
    callback_tensor_inputs: list[str]


def prepare(
    tokenizer: SpectralTokenizer, transformer: SpectralARTransformer, names: LabelNames, device: torch.device,
    callback_may_have: Sequence[str],
    class_labels, num_images_per_prompt, guidance_scale, guidance_schedule, num_tokens, temperature, top_k, top_p,
    prefix_codes, generator, output_type, callback, callback_tensor_inputs,
) -> GenerationArguments:  # fmt: skip
    """Checks the arguments of `SpectralARPipeline.__call__` and draws the random numbers.

    Raises:
        ValueError: if one is out of range; the message says what would be right.
    """
    limit = transformer.config.num_tokens
    num_tokens = limit if num_tokens is None else num_tokens
    if not isinstance(num_tokens, Integral) or not 1 <= num_tokens <= limit:
        raise ValueError(f"num_tokens must be an integer between 1 and {limit}, got {num_tokens}.")
    if not isinstance(num_images_per_prompt, Integral) or num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be an integer of at least 1, got {num_images_per_prompt}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
    codebook_size = transformer.config.codebook_size
    check_sampling_arguments(codebook_size, temperature, top_k, top_p, guidance_scale, guidance_schedule)
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        callback_tensor_inputs = callback.tensor_inputs
    if unknown := set(callback_tensor_inputs) - set(callback_may_have):
        raise ValueError(f"callback_on_step_end_tensor_inputs may name {callback_may_have}, not {sorted(unknown)}.")
    ids = names.ids(class_labels)
    if not ids:
        raise ValueError("at least one class label is needed.")
    labels = torch.tensor(ids, dtype=torch.int64, device=device).repeat_interleave(num_images_per_prompt)  # (B,)
    codes = torch.zeros(len(labels), num_tokens, dtype=torch.int64, device=device)
    prefix_length = 0
    if prefix_codes is not None:
        prefix = as_codes(prefix_codes, "prefix_codes", device)
        prefix = _as_prefix(tokenizer, prefix, len(ids), num_images_per_prompt, num_tokens)  # (B, k)
        prefix_length = prefix.shape[1]
        codes[:, :prefix_length] = prefix
    # All N numbers, however many are used: an image is a prefix of the one with more tokens.
    uniforms = draw_uniforms(len(labels), limit, generator, device)
    sampling = {
        "guidance_schedule": guidance_schedule, "temperature": temperature, "top_k": top_k, "top_p": top_p
    }  # fmt: skip
    return GenerationArguments(
        labels, codes, prefix_length, uniforms, RunState(guidance_scale, num_tokens - prefix_length), sampling,
        output_type, callback, list(callback_tensor_inputs),
    )  # fmt: skip


def _as_prefix(
    tokenizer: SpectralTokenizer, prefix: Tensor, num_labels: int, num_images_per_prompt: int, num_tokens: int
) -> Tensor:
    """Prefix codes with a row for each image: (R, k) -> (B, k)."""
    batch = num_labels * num_images_per_prompt
    if prefix.ndim != 2 or prefix.shape[0] not in (1, num_labels, batch) or prefix.shape[1] > num_tokens:
        rows = ", ".join(map(str, sorted({1, num_labels, batch})))
        raise ValueError(
            f"prefix_codes must have shape (R, k) with R of {rows} and k of at most {num_tokens} tokens, "
            f"got {tuple(prefix.shape)}."
        )
    if prefix.shape[1]:
        prefix = tokenizer._check_codes(prefix)
    return prefix.repeat_interleave(batch // prefix.shape[0], dim=0)


def as_codes(codes: Tensor | Sequence[Sequence[int]], name: str, device: torch.device) -> Tensor:
    """Codes from a tensor, an array or nested lists (JSON), on the device."""
    try:
        return torch.as_tensor(codes, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a rectangular array of integers: {error}.") from error
