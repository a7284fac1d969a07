"""Figures of sampling: against no cache, against other models, against the machine's limits."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from spectralar.inference.compiled import has_compiler

from .measure import Result, count_flops, faster, medians, rate, share
from .models import (
    GUIDANCE,
    Shape,
    cache_traffic,
    compiled_sampler,
    llama_sampler,
    next_scale_sampler,
    plain_sampler,
    recomputing_sampler,
    sampler,
    weights_read,
    with_tokens,
)
from .suite import Figure, Suite

TARGET_CACHED = 4.0
TARGETS_LLAMA = {"cpu": 4.0, "cuda": 3.0}
TARGET_BANDWIDTH = 0.6
TARGETS_FLOOR = {1: 3.5, 64: 2.0}  # times the floor, by batch size: of d16 on CUDA


def figures(suite: Suite) -> list[Figure]:
    on_cpu = suite.device.type == "cpu"
    small, large = suite.small, suite.large
    found = [
        Figure("cached sampling", f"{small.name}, N = 64, batch 8", lambda: cached(suite, with_tokens(small, 64), 8)),
        Figure("weights read", f"{large.name}, batch 1, no guidance", lambda: bandwidth(suite, large, 1.0)),
        Figure("weights read", f"{large.name}, batch 1", lambda: bandwidth(suite, large, GUIDANCE)),
        Figure("weights read", f"{small.name}, batch 1", lambda: bandwidth(suite, small, GUIDANCE)),
    ]
    for shape in (small, large):
        for batch in (1, 8, 64, 256):
            skip = ""
            if on_cpu and shape is large and batch > 8:
                skip = "minutes a call on a CPU"
            elif suite.quick and batch > (1 if shape is large else 8):
                skip = "left out of the quick run"
            setting = f"{shape.name}, batch {batch}"
            found.append(Figure("sampling", setting, lambda s=shape, b=batch: against_others(suite, s, b), skip))
    if on_cpu:  # on CUDA steps are graphs, and all is bfloat16
        setting = f"{small.name}, batch 1"
        skip = "" if has_compiler() else "no C++ compiler"
        found.append(Figure("sampling, compiled", setting, lambda: compiled(suite, small, 1), skip))
        skip = "" if suite.fast_bfloat16 else "this CPU has no instructions for bfloat16"
        for shape, batch in ((small, 1), (large, 1), (large, 4)):
            setting = f"{shape.name}, batch {batch}"
            found.append(
                Figure("sampling, bfloat16", setting, lambda s=shape, b=batch: in_bfloat16(suite, s, b), skip)
            )
    return found


def compiled(suite: Suite, shape: Shape, batch: int) -> Result:
    """Guided sampling through torch.compile, and the Llama too."""
    pipeline = suite.models[shape]
    functions = {"compiled": compiled_sampler(pipeline, batch), "plain": sampler(pipeline, batch)}
    baselines = {"plain": "without torch.compile"}
    if find_spec("transformers") is not None:
        baselines |= {"dynamic": "Llama, dynamic cache", "static": "compiled Llama, static cache"}
        functions["dynamic"] = llama_sampler(pipeline.transformer, 2 * batch, "dynamic")
        functions["static"] = llama_sampler(pipeline.transformer, 2 * batch, "static", compiled=True)
    samples = suite.time(functions)
    time = {name: value * 1e3 for name, value in medians(samples).items()}
    comparisons = [faster(time["compiled"], text, time[name]) for name, text in baselines.items()]
    return Result(time["compiled"], "ms a batch", comparisons, samples=samples)


def in_bfloat16(suite: Suite, shape: Shape, batch: int) -> Result:
    """Guided sampling with all weights and activations in half the bytes."""
    functions = {
        "bfloat16": sampler(suite.models.of_type(shape, torch.bfloat16), batch),
        "float32": sampler(suite.models[shape], batch),
    }
    samples = suite.time(functions)
    time = {name: value * 1e3 for name, value in medians(samples).items()}
    comparison = faster(time["bfloat16"], "float32", time["float32"])
    return Result(time["bfloat16"], "ms a batch", [comparison], samples=samples)


def cached(suite: Suite, shape: Shape, batch: int) -> Result:
    """Key/value cache against running the whole prefix for each token."""
    pipeline = suite.models[shape]
    functions = {"cached": sampler(pipeline, batch), "recomputing": recomputing_sampler(pipeline, batch)}
    samples = suite.time(functions)
    time = medians(samples)
    counted = functions | {"cached": plain_sampler(pipeline, batch)}
    flops = {name: count_flops(function) for name, function in counted.items()}
    return Result(
        time["cached"] * 1e3,
        "ms a batch",
        [faster(time["cached"] * 1e3, "whole prefix at each step", time["recomputing"] * 1e3, TARGET_CACHED)],
        floor=sampling_floor(suite, pipeline, 2 * batch, flops["cached"]) * 1e3,
        note=f"{flops['recomputing'] / flops['cached']:.1f} times fewer operations",
        samples=samples,
    )


def bandwidth(suite: Suite, shape: Shape, guidance_scale: float) -> Result:
    """Weight bytes a second of batch-1 sampling, beside what plain kernels read from a buffer of that size."""
    pipeline = suite.models[shape]
    samples = suite.time({"sampling": sampler(pipeline, 1, guidance_scale)}, 1 / 2)
    size = weights_read(pipeline.transformer)
    read = size * pipeline.transformer.config.num_tokens / medians(samples)["sampling"]
    target = TARGET_BANDWIDTH if shape is suite.large and suite.device.type == "cpu" else None
    plain = rate(read / 1e9, f"plain reads of {size / 1e6:.0f} MB", suite.machine.read_rate(size) / 1e9, target)
    return Result(read / 1e9, "GB/s", [plain], samples=samples)


def against_others(suite: Suite, shape: Shape, batch: int) -> Result:
    """Guided sampling of a batch against a Llama of the same size and against the next-scale schedule."""
    pipeline = suite.models[shape]
    transformer = pipeline.transformer
    functions = {"spectral": sampler(pipeline, batch)}
    with_llama = find_spec("transformers") is not None
    if with_llama:
        functions["static"] = llama_sampler(transformer, 2 * batch, "static")
        functions["dynamic"] = llama_sampler(transformer, 2 * batch, "dynamic")
    on_cuda = suite.device.type == "cuda"
    if on_cuda:
        functions["no graphs"] = plain_sampler(pipeline, batch)
    with_next_scale = shape is suite.large and batch in (1, 64)
    if with_next_scale:
        functions["next-scale"] = next_scale_sampler(transformer, batch)
    samples = suite.time(functions)
    time = {name: value * 1e3 for name, value in medians(samples).items()}
    comparisons = []
    if with_llama:
        best = min(("static", "dynamic"), key=time.__getitem__)
        target = TARGETS_LLAMA[suite.device.type] if batch == 1 and _has_llama_target(suite, shape) else None
        comparisons.append(faster(time["spectral"], f"Llama, {best} cache", time[best], target))
    if with_next_scale:
        comparisons.append(
            faster(time["spectral"], "next-scale schedule, 680 tokens in 10 steps", time["next-scale"], 1.0)
        )
    floor = sampling_floor(suite, pipeline, 2 * batch, count_flops(plain_sampler(pipeline, batch))) * 1e3
    if on_cuda:
        comparisons.append(faster(time["spectral"], "without CUDA graphs", time["no graphs"]))
        if shape is suite.large and batch in TARGETS_FLOOR:
            comparisons.append(share(time["spectral"], "the floor", floor, TARGETS_FLOOR[batch]))
    return Result(
        time["spectral"],
        "ms a batch",
        comparisons,
        floor=floor,
        note=f"{1e3 * batch / time['spectral']:.2f} images/s" + ("" if with_llama else "; no transformers, no Llama"),
        samples=samples,
    )


def _has_llama_target(suite: Suite, shape: Shape) -> bool:
    """The target is the embedded model's on a CPU, d16's on CUDA."""
    return shape is (suite.small if suite.device.type == "cpu" else suite.large)


def sampling_floor(suite: Suite, pipeline, rows: int, flops: float) -> float:
    """Seconds for one batch: operations counted, weights once a token, the cache of `rows` sequences."""
    weights = weights_read(pipeline.transformer)
    traffic = weights * pipeline.transformer.config.num_tokens + cache_traffic(pipeline.transformer, rows)
    return suite.machine.floor(flops, weights, traffic)
