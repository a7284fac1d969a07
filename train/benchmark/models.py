"""The models that are measured, and the loops they are measured against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar import SpectralARPipeline, SpectralARTransformer, SpectralTokenizer
from spectralar.inference.feedback import feedback_for
from spectralar.inference.generation import TokenGenerator
from spectralar.layers import KVCache
from spectralar.sampling import guide, sample_tokens
from spectralar.transformer import PRESETS

from ..configs.reading import load_config

GUIDANCE = 2.0
NEXT_SCALE_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # VAR's schedule at 256x256: squared, 680 tokens in 10 steps
EMBEDDED_MODELS = Path(__file__).parents[2] / "assets" / "models"


@dataclass(frozen=True)
class Shape:
    """A pipeline to measure: a folder with a trained one, or sizes that get random weights, which are as fast."""

    name: str
    tokenizer: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def build(self, device: torch.device, dtype: torch.dtype) -> SpectralARPipeline:
        if self.folder is not None:
            pipeline = SpectralARPipeline.from_pretrained(self.folder)
        else:
            pipeline = SpectralARPipeline(
                SpectralTokenizer(**self.tokenizer), SpectralARTransformer(**self.transformer)
            )
            # What training starts from has a head of zeros and gates of zeros: not what anybody samples from.
            for parameter in pipeline.transformer.parameters():
                if parameter.ndim == 2:
                    parameter.data.uniform_(-0.03, 0.03)
        for model in (pipeline.tokenizer, pipeline.transformer):
            # Not diffusers' own `to`, which warns of every type.
            torch.nn.Module.to(model.eval().requires_grad_(False), device, dtype)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def embedded(name: str = "fashion-mnist-32") -> Shape:
    """The model in assets/models if it is there, else random weights in the sizes of the preset of that name."""
    folder = EMBEDDED_MODELS / name
    if folder.exists():
        return Shape(name, folder=folder)
    config = load_config(name)
    transformer = asdict(config.transformer) | {
        "num_classes": 10,
        "codebook_size": config.tokenizer.codebook_size,
        "num_tokens": config.tokenizer.num_tokens,
    }
    return Shape(name, asdict(config.tokenizer), transformer)


def d16(num_layers: int = 16) -> Shape:
    """The paper's transformer, or its first layers, and a tokenizer for 256x256 of a size that goes with it."""
    transformer = PRESETS["d16"] | {"num_layers": num_layers}
    tokenizer = {
        "image_size": 256, "in_channels": 3, "patch_size": 16, "num_tokens": transformer["num_tokens"],
        "codebook_size": transformer["codebook_size"], "codebook_dim": 16, "hidden_size": 512, "num_heads": 8,
        "encoder_layers": 8, "decoder_layers": 8,
    }  # fmt: skip
    return Shape("d16" if num_layers == 16 else f"d16, {num_layers} of 16 layers", tokenizer, transformer)


def sizes(shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the tokenizer and of the transformer."""
    if shape.folder is None:
        return shape.tokenizer, shape.transformer
    configs = (SpectralTokenizer, "tokenizer"), (SpectralARTransformer, "transformer")
    loaded = [kind.load_config(shape.folder, subfolder=name) for kind, name in configs]
    return tuple({key: value for key, value in config.items() if not key.startswith("_")} for config in loaded)


def with_tokens(shape: Shape, num_tokens: int) -> Shape:
    """The sizes of `shape` with another number of tokens, random weights."""
    tokenizer, transformer = (kwargs | {"num_tokens": num_tokens} for kwargs in sizes(shape))
    return Shape(shape.name, tokenizer, transformer)


class Models:
    """Pipelines by shape, each built once."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._built: dict[tuple[str, torch.dtype], SpectralARPipeline] = {}

    def __getitem__(self, shape: Shape) -> SpectralARPipeline:
        return self.of_type(shape, self.dtype)

    def of_type(self, shape: Shape, dtype: torch.dtype) -> SpectralARPipeline:
        key = repr(shape), dtype
        if key not in self._built:
            self._built[key] = shape.build(self.device, dtype)
        return self._built[key]


# ------------------------------------------------------------------------------------------------ loops


def labels_of(transformer: SpectralARTransformer, batch: int) -> list[int]:
    return [i % transformer.config.num_classes for i in range(batch)]


def weights_read(transformer: SpectralARTransformer) -> int:
    """Bytes of weights that one token step reads: blocks and head; the adaLN projections run once a sample."""
    read = [*transformer.blocks.parameters(), *transformer.head.parameters()]
    return sum(p.numel() * p.element_size() for p in read)


def cache_traffic(transformer: SpectralARTransformer, rows: int) -> int:
    """Bytes that a whole sample reads and writes in the key/value cache: at step t, t + 1 positions and one.

    On a CPU all N positions are read: see `layers.KVCache.slots`.
    """
    config = transformer.config
    position = 2 * config.num_layers * config.hidden_size * transformer.dtype.itemsize
    n = config.num_tokens
    read = n * n if transformer.device.type == "cpu" else n * (n + 1) // 2
    return rows * position * (read + n)


def sampler(pipeline: SpectralARPipeline, batch: int, guidance_scale: float = GUIDANCE) -> Callable[[], Tensor]:
    """The pipeline's own sampling, codes only."""
    labels = labels_of(pipeline.transformer, batch)

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(labels, guidance_scale=guidance_scale, generator=generator, output_type="latent").codes

    return sample


def plain_sampler(pipeline: SpectralARPipeline, batch: int) -> Callable[[], Tensor]:
    """The same token loop without CUDA graphs, in which operations can be counted."""
    transformer = pipeline.transformer
    n, device = transformer.config.num_tokens, transformer.device
    labels = torch.tensor(labels_of(transformer, batch), device=device)

    def sample() -> Tensor:
        codes = torch.zeros(batch, n, dtype=torch.long, device=device)
        uniforms = torch.rand(batch, n, generator=torch.Generator().manual_seed(0)).to(device)
        feedback = feedback_for(transformer, pipeline.tokenizer, batch)
        generator = TokenGenerator(transformer, labels, codes, uniforms, feedback=feedback)
        for index in range(n):
            generator.sample(index, GUIDANCE)
        return codes

    return sample


def recomputing_sampler(pipeline: SpectralARPipeline, batch: int) -> Callable[[], Tensor]:
    """Guided sampling that runs the whole prefix again for each token.

    All the rest is as fast as with the cache: adaLN computed once, logits at the last position only.
    """
    transformer = pipeline.transformer
    config, device = transformer.config, transformer.device
    labels = torch.tensor(labels_of(transformer, batch), device=device)
    labels = torch.cat([labels, torch.full_like(labels, transformer.null_label)])

    @torch.no_grad()
    def sample() -> Tensor:
        uniforms = torch.rand(batch, config.num_tokens, generator=torch.Generator().manual_seed(0)).to(device)
        codes = torch.zeros(batch, config.num_tokens, dtype=torch.long, device=device)
        conditioning, scratch = transformer.condition(labels), transformer.make_cache(2 * batch)
        for t in range(config.num_tokens):
            prefix = codes[:, :t].repeat(2, 1) if t else None
            cond, uncond = transformer.step(prefix, 0, conditioning, scratch).chunk(2)
            codes[:, t] = sample_tokens(guide(cond, uncond, GUIDANCE), uniforms[:, t])
        return codes

    return sample


def next_scale_sampler(
    transformer: SpectralARTransformer, batch: int, sides: tuple[int, ...] = NEXT_SCALE_SIDES
) -> Callable[[], Tensor]:
    """Next-scale prediction (VAR; Tian et al., 2024) through the same blocks: scale s predicts s x s tokens at once
    from those of the scale before, each seeing all scales so far; guided, cached.

    What VAR does between scales (look-up, interpolation and summing of feature maps) is left out but for the
    interpolation of codes: the baseline is a little faster than VAR.
    """
    config, device = transformer.config, transformer.device
    labels = torch.tensor(labels_of(transformer, batch), device=device)
    labels = torch.cat([labels, torch.full_like(labels, transformer.null_label)])
    total = sum(side**2 for side in sides)
    position_embed = torch.rand(total, config.hidden_size, device=device, dtype=transformer.dtype)

    @torch.no_grad()
    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        conditioning = transformer.condition(labels)
        cache = KVCache(
            config.num_layers, 2 * batch, config.num_heads, total, config.hidden_size // config.num_heads,
            like=transformer.position,
        )  # fmt: skip
        x, start = conditioning.start.unsqueeze(1), 0  # (2B, 1, D)
        for side, following in zip(sides, (*sides[1:], None), strict=True):
            count = side**2
            x = x + position_embed[start : start + count]
            for layer, block in enumerate(transformer.blocks):
                x = _next_scale_block(block, x, conditioning.blocks[:, layer], cache, layer, start)
            cond, uncond = transformer._logits(x, conditioning, slice(start, start + count)).chunk(2)
            uniforms = torch.rand(batch * count, generator=generator).to(device)
            codes = sample_tokens(guide(cond, uncond, GUIDANCE).flatten(0, 1), uniforms).view(batch, 1, side, side)
            if following:
                upsampled = F.interpolate(codes.float(), size=following).long().flatten(1)
                x = transformer.token_embed(upsampled.repeat(2, 1))  # (2B, s' s', D)
            start += count
        return codes.flatten(1)

    return sample


def _next_scale_block(block, x: Tensor, modulation: Tensor, cache: KVCache, layer: int, position: int) -> Tensor:
    """`AdaLNBlock` without the causal mask: tokens of a scale see each other."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(2).unbind(1)
    q, k, v = block.attn.qkv(torch.addcmul(shift1, block.norm1(x), scale1))
    k, v = cache.write(layer, position, k, v)
    x = torch.addcmul(x, gate1, block.attn.out(F.scaled_dot_product_attention(q, k, v)))
    return torch.addcmul(x, gate2, block.mlp(torch.addcmul(shift2, block.norm2(x), scale2)))


def compiled_sampler(pipeline: SpectralARPipeline, batch: int) -> Callable[[], Tensor]:
    """`sampler` of a copy whose step is compiled."""
    transformer = copy.deepcopy(pipeline.transformer)
    transformer.compile()
    compiled = SpectralARPipeline(pipeline.tokenizer, transformer)
    compiled.set_progress_bar_config(disable=True)
    return sampler(compiled, batch)


def llama_sampler(
    transformer: SpectralARTransformer, rows: int, cache: str, compiled: bool = False
) -> Callable[[], Tensor]:
    """`LlamaForCausalLM.generate` at the same depth, width, heads, vocabulary and number of tokens.

    Classes are extra words. Its gated MLP has three matrices where ours has two, so it is two thirds as wide.
    `compiled`: its forward pass goes through torch.compile, as transformers itself does on GPUs with a static cache.
    `rows` counts unconditional rows too, but they are sampled as if they were images of their own: transformers'
    own guidance runs a second pass for them, which is slower.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config, device = transformer.config, transformer.device
    llama_config = LlamaConfig(
        vocab_size=config.codebook_size + config.num_classes + 1,
        hidden_size=config.hidden_size,
        intermediate_size=round(config.hidden_size * config.mlp_ratio * 2 / 3),
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.num_tokens + 1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(llama_config).eval().requires_grad_(False).to(device, transformer.dtype)
    if compiled:
        model.forward = torch.compile(model.forward, dynamic=False)
    start = torch.tensor(labels_of(transformer, rows), device=device)[:, None] + config.codebook_size  # (rows, 1)
    settings = GenerationConfig(
        max_new_tokens=config.num_tokens, min_new_tokens=config.num_tokens, do_sample=True, top_k=0,
        cache_implementation=cache, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip

    def sample() -> Tensor:
        torch.manual_seed(0)
        return model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)[:, 1:]

    return sample
