"""Figures of the tokenizer: encode, all prefix frames, streaming."""

from __future__ import annotations

from functools import partial

import torch

from spectralar import SpectralARPipeline, SpectralTokenizer

from .measure import Result, count_flops, faster, medians, share
from .models import Shape, labels_of
from .suite import Figure, Suite

TARGETS_ALL_PREFIXES = {"cpu": 0.5, "cuda": 0.1}
TARGET_COLOUR = 0.35  # the same of the colour model on a CPU
TARGET_STREAMING = 1.1


def figures(suite: Suite) -> list[Figure]:
    large_takes_minutes = "left out of the quick run" if suite.quick and suite.device.type == "cpu" else ""
    small, large = suite.small, suite.large
    on_cpu = suite.device.type == "cpu"
    no_bfloat16 = "" if suite.fast_bfloat16 else "this CPU has no instructions for bfloat16"
    in_bfloat16 = [
        Figure(
            "all prefix frames, bfloat16", shape.name, lambda s=shape: bfloat16_prefixes(suite, s), no_bfloat16 or skip
        )
        for shape, skip in ((small, ""), (suite.large, large_takes_minutes))
    ]
    return [
        Figure("encode", f"{small.name}, batch 1", lambda: encode(suite, small, 1)),
        Figure("encode", f"{small.name}, batch 64", lambda: encode(suite, small, 64)),
        Figure("encode", f"{large.name}, batch 8", lambda: encode(suite, large, 8), large_takes_minutes),
        Figure("all prefix frames", small.name, lambda: all_prefixes(suite, small)),
        Figure("all prefix frames", suite.colour.name, lambda: all_prefixes(suite, suite.colour)),
        Figure("all prefix frames", large.name, lambda: all_prefixes(suite, large), large_takes_minutes),
        Figure("streaming", f"{small.name}, batch 1", lambda: streaming(suite, small, 1)),
        Figure("streaming", f"{small.name}, batch 4", lambda: streaming(suite, small, 4)),
        Figure("streaming", f"{suite.colour.name}, batch 4", lambda: streaming(suite, suite.colour, 4)),
        Figure("streaming", f"{large.name}, batch 1", lambda: streaming(suite, large, 1), large_takes_minutes),
        *(in_bfloat16 if on_cpu else []),
    ]


def encode(suite: Suite, shape: Shape, batch: int) -> Result:
    """Images to codes; the baseline is the same images one by one."""
    tokenizer = suite.models[shape].tokenizer
    config = tokenizer.config
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, config.in_channels, config.image_size, config.image_size, generator=generator) * 2 - 1
    images = images.to(suite.device)
    functions = {"batch": torch.no_grad()(lambda: tokenizer.encode(images))}
    if batch > 1:
        functions["one by one"] = torch.no_grad()(lambda: [tokenizer.encode(image) for image in images.split(1)])
    samples = suite.time(functions, 1 / 4)
    time = {name: value * 1e3 for name, value in medians(samples).items()}
    return Result(
        time["batch"],
        "ms a batch",
        [faster(time["batch"], "one by one", time["one by one"])] if batch > 1 else [],
        floor=count_flops(functions["batch"]) / suite.machine.matmul_rate() * 1e3,
        note=f"{1e3 * batch / time['batch']:.1f} images/s",
        samples=samples,
    )


def random_codes(suite: Suite, tokenizer: SpectralTokenizer) -> torch.Tensor:
    """(1, N), the same each time."""
    n, codebook = tokenizer.config.num_tokens, tokenizer.config.codebook_size
    return torch.randint(codebook, (1, n), generator=torch.Generator().manual_seed(0)).to(suite.device)


def bfloat16_prefixes(suite: Suite, shape: Shape) -> Result:
    """All N frames in one call, in half the bytes; the note says how far the images are from those in float32."""
    plain, half = suite.models[shape].tokenizer, suite.models.of_type(shape, torch.bfloat16).tokenizer
    codes, lengths = random_codes(suite, plain), list(range(1, plain.config.num_tokens + 1))
    functions = {
        "bfloat16": torch.no_grad()(lambda: half.decode(codes, lengths)),
        "float32": torch.no_grad()(lambda: plain.decode(codes, lengths)),
    }
    samples = suite.time(functions)
    time = {name: value * 1e3 for name, value in medians(samples).items()}
    error = (functions["bfloat16"]().float() - functions["float32"]()) / 2  # on [0, 1]
    psnr = -10 * error.square().mean(dim=(0, 2, 3, 4)).log10()  # (N,)
    return Result(
        time["bfloat16"],
        f"ms for {len(lengths)} frames",
        [faster(time["bfloat16"], "float32", time["float32"])],
        note=f"at least {psnr.min():.0f} dB PSNR to float32's frames",
        samples=samples,
    )


def all_prefixes(suite: Suite, shape: Shape) -> Result:
    """All N frames of an image in one call against N calls, each with its own k tokens."""
    tokenizer = suite.models[shape].tokenizer
    codes, n = random_codes(suite, tokenizer), tokenizer.config.num_tokens
    lengths = list(range(1, n + 1))
    functions = {
        "one call": torch.no_grad()(lambda: tokenizer.decode(codes, lengths)),
        "separate": torch.no_grad()(lambda: [tokenizer.decode(codes[:, :k]) for k in lengths]),
    }
    samples = suite.time(functions)
    time = {name: value * 1e3 for name, value in medians(samples).items()}
    flops = {name: count_flops(function) for name, function in functions.items()}
    target = TARGETS_ALL_PREFIXES[suite.device.type]
    if shape is suite.colour and suite.device.type == "cpu":
        target = TARGET_COLOUR
    return Result(
        time["one call"],
        f"ms for {n} frames",
        [share(time["one call"], f"{n} calls at batch 1", time["separate"], target)],
        floor=flops["one call"] / suite.machine.matmul_rate() * 1e3,
        note=f"{flops['one call'] / flops['separate']:.3f} of their operations",
        samples=samples,
    )


def streaming(suite: Suite, shape: Shape, batch: int) -> Result:
    """An image after every token against sampling all tokens, then decoding all frames in one call; the colour model's
    against those of the small model too."""
    pipeline = suite.models[shape]
    labels = labels_of(pipeline.transformer, batch)
    lengths = list(range(1, pipeline.transformer.config.num_tokens + 1))

    def stream(of: SpectralARPipeline = pipeline) -> list:
        return list(of.stream(labels, generator=torch.Generator().manual_seed(0), output_type="pt"))

    def sample_then_decode() -> object:
        out = pipeline(labels, generator=torch.Generator().manual_seed(0), output_type="latent")
        return pipeline.decode(out.codes, lengths, output_type="pt")

    def first_image() -> object:
        with_first = pipeline.stream(labels, generator=torch.Generator().manual_seed(0), output_type="pt")
        step = next(with_first)
        with_first.close()
        return step

    functions = {"stream": stream, "sample, then decode": sample_then_decode, "first image": first_image}
    small = suite.small.name
    if shape is suite.colour:
        functions[small] = partial(stream, suite.models[suite.small])
    samples = suite.time(functions)
    time = {name: value * 1e3 for name, value in medians(samples).items()}
    all_at_end = time["sample, then decode"]
    comparisons = [share(time["stream"], "sampling, then decoding all frames", all_at_end, TARGET_STREAMING)]
    if small in time:
        comparisons.append(share(time["stream"], f"the same of {small}", time[small]))
    return Result(
        time["stream"],
        "ms a batch",
        comparisons,
        note=f"first image after {time['first image']:.1f} ms",
        samples=samples,
    )
