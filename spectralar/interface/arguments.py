"""The arguments of a generation: checked, on the device, with the random numbers that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from ..checks import as_codes, check_codes, integer, one_of, shown
from ..sampling import check_sampling_arguments, draw_uniforms
from ..tokenizer import SpectralTokenizer
from ..transformer import SpectralARTransformer
from .labels import LabelNames
from .outputs import OUTPUT_TYPES
from .run_state import RunState


@dataclass
class GenerationArguments:
    """The arguments of one generation, checked and on the device, and the models that it began with."""

    tokenizer: SpectralTokenizer | None
    transformer: SpectralARTransformer
    class_labels: Tensor  # (B,) int64
    codes: Tensor  # (B, n) int64, filled from the left; starts with the given prefix
    prefix_length: int
    uniforms: Tensor  # (B, N) in [0, 1)
    state: RunState  # guidance scale, steps, interruption
    sampling: dict[str, Any]  # guidance_schedule, temperature, top_k, top_p
    output_type: str
    callback: Callable | None
    callback_tensor_inputs: list[str]
    feedback: Any = None  # what a transformer with decoder feedback listens to


def prepare(
    tokenizer: SpectralTokenizer | None, transformer: SpectralARTransformer | None, names: LabelNames,
    device: torch.device, callback_may_have: Sequence[str],
    class_labels, num_images_per_prompt, guidance_scale, guidance_schedule, num_tokens, temperature, top_k, top_p,
    prefix_codes, generator, output_type, callback, callback_tensor_inputs,
) -> GenerationArguments:  # fmt: skip
    """Checks the arguments of `SpectralARPipeline.__call__` and draws the random numbers.

    Raises:
        ValueError: if one is out of range, or there is no model for it; the message says what would be right.
    """
    if transformer is None:
        raise ValueError("this pipeline has no transformer: it encodes and decodes, and cannot generate.")
    output_type = one_of(output_type, "output_type", OUTPUT_TYPES)
    if tokenizer is None and output_type != "latent":
        raise ValueError(f"this pipeline has no tokenizer, so output_type can only be 'latent', got {output_type!r}.")
    check_usable("tokenizer", "transformer", tokenizer=tokenizer, transformer=transformer)
    limit, codebook_size = transformer.config.num_tokens, transformer.config.codebook_size
    num_tokens = limit if num_tokens is None else integer(num_tokens, "num_tokens", 1, limit)
    per_label = integer(num_images_per_prompt, "num_images_per_prompt", 1)
    sampling = check_sampling_arguments(codebook_size, temperature, top_k, top_p, guidance_scale, guidance_schedule)
    tensor_inputs = _check_callback(callback, callback_tensor_inputs, callback_may_have)
    ids = names.ids(class_labels)
    if not ids:
        raise ValueError("at least one class label is needed.")
    labels = torch.tensor(ids, dtype=torch.int64, device=device).repeat_interleave(per_label)  # (B,)
    codes = torch.zeros(len(labels), num_tokens, dtype=torch.int64, device=device)
    prefix_length = 0
    if prefix_codes is not None:
        prefix = as_codes(prefix_codes, "prefix_codes", codebook_size, device)
        prefix = _as_prefix(prefix, codebook_size, len(ids), per_label, num_tokens)  # (B, k)
        prefix_length = prefix.shape[1]
        codes[:, :prefix_length] = prefix
    # All N numbers, however many are used: an image is a prefix of the one with more tokens.
    uniforms = draw_uniforms(len(labels), limit, generator, device)
    state = RunState(sampling.pop("guidance_scale"), num_tokens - prefix_length)
    return GenerationArguments(
        tokenizer, transformer, labels, codes, prefix_length, uniforms, state, sampling, output_type, callback,
        tensor_inputs,
    )  # fmt: skip


def _check_callback(callback: Any, tensor_inputs: Any, may_have: Sequence[str]) -> list[str]:
    """The names of the tensors that a callback gets."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end must be a function, got {shown(callback)}.")
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        tensor_inputs = callback.tensor_inputs
    tensor_inputs = [] if tensor_inputs is None else tensor_inputs
    if isinstance(tensor_inputs, str) or not isinstance(tensor_inputs, Iterable):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be a list of names of {may_have}, got {shown(tensor_inputs)}."
        )
    tensor_inputs = list(tensor_inputs)
    if unknown := [name for name in tensor_inputs if name not in may_have]:
        raise ValueError(f"callback_on_step_end_tensor_inputs may name {may_have}, not {shown(unknown)}.")
    return tensor_inputs


def _as_prefix(
    prefix: Tensor, codebook_size: int, num_labels: int, num_images_per_prompt: int, num_tokens: int
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
        prefix = check_codes(prefix, "prefix_codes", num_tokens, codebook_size)
    return prefix.repeat_interleave(batch // prefix.shape[0], dim=0)


def returned_latents(returned: Any, codes: Tensor, codebook_size: int) -> Tensor:
    """What takes the place of `codes` (B, t) after a callback has returned something.

    Raises:
        ValueError: if that is neither a dict nor None, or its latents are no codes of this shape.
    """
    if returned is None:
        return codes
    if not isinstance(returned, Mapping):
        raise ValueError(f"callback_on_step_end must return the dict it is given, or None, got {shown(returned)}.")
    if "latents" not in returned:
        return codes
    latents = as_codes(returned["latents"], "latents of callback_on_step_end", codebook_size, codes.device)
    if latents.shape != codes.shape:
        shapes = f"{tuple(codes.shape)}, got {tuple(latents.shape)}"
        raise ValueError(f"callback_on_step_end must return latents of shape {shapes}.")
    return check_codes(latents, "latents of callback_on_step_end", codes.shape[1], codebook_size)


# What a component is known by, also wrapped, as by torch.compile.
_KINDS = {"tokenizer": ("SpectralTokenizer", "quantizer"), "transformer": ("SpectralARTransformer", "null_label")}


def _check_kinds(**components: Any) -> None:
    for name, model in components.items():
        kind, part = _KINDS[name]
        if model is not None and not (isinstance(model, nn.Module) and hasattr(model, part)):
            raise ValueError(f"the {name} must be a {kind}, got {type(model).__name__}.")


def check_usable(*names: str, **components: Any) -> None:
    """Raises a ValueError if those named cannot be computed with, as they are and where they are."""
    _check_kinds(**components)
    for name, model in ((name, components[name]) for name in names):
        if model is None:
            continue
        if model.device.type == "meta" and not hasattr(model, "_hf_hook"):
            raise ValueError(f"the {name} is on the meta device, where it has no weights.")
        if model.dtype.itemsize == 1:
            raise ValueError(
                f"the {name} is in {model.dtype}, in which nothing can be computed: `enable_layerwise_casting` stores "
                "weights in it."
            )


def check_components(tokenizer: Any, transformer: Any) -> None:
    """Raises a ValueError if these are not a tokenizer and a transformer that fit each other; either may be None."""
    _check_kinds(tokenizer=tokenizer, transformer=transformer)
    if tokenizer is not None and transformer is not None:
        for name in ("codebook_size", "num_tokens"):
            ours, theirs = tokenizer.config[name], transformer.config[name]
            if ours != theirs:
                raise ValueError(f"{name} is {ours} in the tokenizer and {theirs} in the transformer.")
