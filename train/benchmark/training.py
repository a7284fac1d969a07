"""Figures of training: step time of both stages, and the share of the machine's matrix rate that it uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from spectralar import SpectralARTransformer, SpectralTokenizer
from spectralar.inference.feedback import expected_latents

from ..configs.config import StageConfig, TokenizerStage, TransformerStage
from ..configs.reading import load_config
from ..objectives.nested import nested_loss, sample_lengths
from ..objectives.next_token import drawn_positions, next_token_loss
from ..runs.engine import make_ema
from ..runs.hardware import keep_freed_memory
from ..runs.optimizers import make_optimizer
from .measure import Result, count_flops, medians, rate, share
from .models import Shape, sizes
from .suite import Figure, Suite

TARGETS = {"tokenizer": 0.3, "transformer": 0.4}  # of the bf16 matrix rate, on CUDA
CPU_TARGET = 0.75  # of the matrix rate that forward and backward pass reach
OPTIMISER_TARGET = 0.1  # of a step, on a CPU


class Step(NamedTuple):
    """A training step and its two parts, each to be called alone."""

    whole: Callable[[], object]
    backward: Callable[[], object]  # forward and backward pass, whose operations are counted
    update: Callable[[], object]  # clipping, optimiser, averaged weights


def figures(suite: Suite) -> list[Figure]:
    on_cpu = suite.device.type == "cpu"
    grey, colour = load_config("fashion-mnist-32"), load_config("products-64")
    found = []
    for shape, tokenizer_stage, transformer_stage in (
        (suite.small, grey.train_tokenizer, grey.train_transformer),
        (suite.colour, colour.train_tokenizer, colour.train_transformer),
        (suite.large, TokenizerStage(batch_size=128), TransformerStage(batch_size=512)),
    ):
        skip = "minutes a step on a CPU" if on_cpu and shape is suite.large else ""
        for name, stage in (("tokenizer", tokenizer_stage), ("transformer", transformer_stage)):
            stage = replace(stage, mixed_precision="no" if on_cpu else "bf16", compile=not on_cpu)
            setting = f"{shape.name}, {name}, batch {stage.batch_size}"
            run = lambda shape=shape, name=name, stage=stage: training(suite, shape, name, stage)  # noqa: E731
            found.append(Figure("training step", setting, run, skip))
    return found


def training(suite: Suite, shape: Shape, name: str, stage: StageConfig) -> Result:
    """Forward, backward, clipping, optimiser and EMA; data are ready on the device."""
    if suite.device.type == "cpu":
        keep_freed_memory()  # as a run does
    torch.manual_seed(0)
    tokenizer_sizes, transformer_sizes = sizes(shape)
    if name == "tokenizer":
        step = tokenizer_step(SpectralTokenizer(**tokenizer_sizes), stage, suite.device)
    else:
        tokenizer = SpectralTokenizer(**tokenizer_sizes).to(suite.device)
        step = transformer_step(SpectralARTransformer(**transformer_sizes), tokenizer, stage, suite.device)
    flops = count_flops(step.backward)
    samples = suite.time({"step": step.whole, "backward": step.backward, "update": step.update}, 1 / 2)
    time, peak = medians(samples), suite.machine.matmul_rate() / 1e9
    comparisons = []
    if suite.device.type == "cpu":
        target = CPU_TARGET if shape is suite.colour else None
        baseline = "the matrix rate, GFLOP/s, by forward and backward pass"
        comparisons.append(rate(flops / time["backward"] / 1e9, baseline, peak, target))
        target = OPTIMISER_TARGET if shape is suite.colour else None
        update, whole = time["update"] * 1e3, time["step"] * 1e3
        comparisons.append(share(update, "the step, by clipping, optimiser and EMA", whole, target))
    else:
        target = TARGETS[name] if shape is suite.large else None
        comparisons.append(rate(flops / time["step"] / 1e9, "the matrix rate, GFLOP/s", peak, target))
    return Result(
        time["step"] * 1e3,
        "ms a step",
        comparisons,
        floor=flops / peak / 1e6,
        note=f"{stage.batch_size / time['step']:.0f} images/s, {flops / 1e9:.1f} GFLOP a step",
        samples=samples,
    )


def tokenizer_step(model: SpectralTokenizer, stage: TokenizerStage, device: torch.device) -> Step:
    config = model.to(device).train().config
    batch = stage.batch_size
    images = torch.rand(batch, config.in_channels, config.image_size, config.image_size).to(device) * 2 - 1
    lengths = sample_lengths(batch, stage.prefixes_per_step, config.num_tokens, torch.Generator().manual_seed(0))
    lengths, cutoffs = lengths.to(device), torch.tensor((1, *model.cutoffs), device=device)

    def loss(forward: Callable) -> torch.Tensor:
        frames, quantized, _ = forward(images, lengths)
        parts = nested_loss(frames, images, lengths, cutoffs, stage.prefix_weight, stage.largest_boost)
        quantizer = quantized.codebook_loss + stage.commitment * quantized.commitment_loss
        return parts["full"] + parts["prefix"] + stage.quantizer_weight * quantizer

    return _step(model, loss, stage, device)


def transformer_step(
    model: SpectralARTransformer, tokenizer: SpectralTokenizer, stage: TransformerStage, device: torch.device
) -> Step:
    config = model.to(device).train().config
    codes = torch.randint(config.codebook_size, (stage.batch_size, config.num_tokens)).to(device)
    labels = torch.randint(config.num_classes + 1, (stage.batch_size,)).to(device)
    places = drawn_positions(config.num_tokens, torch.Generator().manual_seed(0))

    def loss(forward: Callable) -> torch.Tensor:
        if not config.decoder_feedback:
            return next_token_loss(forward(codes[:, :-1], labels), codes).mean()
        at, expected = torch.tensor(places, device=device), expected_latents(tokenizer, codes, places)
        return next_token_loss(forward(codes[:, :-1], labels, expected, at), codes[:, at]).mean()

    return _step(model, loss, stage, device)


def _step(model: torch.nn.Module, loss: Callable, stage: StageConfig, device: torch.device) -> Step:
    optimizer, parameters = make_optimizer(model, stage), list(model.parameters())
    ema = make_ema(parameters, stage.ema_decay)
    ema.to(device)
    compiled = torch.compile(model) if stage.compile else model

    def backward(forward: Callable) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.mixed_precision == "bf16"):
            value = loss(forward)
        value.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, stage.grad_clip)
        optimizer.step()
        ema.step(parameters)

    def whole() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward(compiled)
        update()

    def alone() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward(model)

    return Step(whole, alone, update)
