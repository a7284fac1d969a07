"""What a preset costs before it is started: parameters, operations, memory, hours, disk. Nothing is trained or read.

    python -m train.plan imagenet-256-d16 --gpus 8x16
    python -m train.plan fashion-mnist-32 --gpus 1 --tflops 0.1 train_tokenizer.steps=20000

Parameters are counted on the models themselves, built without storage; the rest is by formula: those of an image in
train/runs/costs.py, those of a step here.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from spectralar.inference.feedback import FRAMES_AT_ONCE
from spectralar.tokenizer import SpectralTokenizer
from spectralar.transformer import SpectralARTransformer

from .configs.config import Config, StageConfig
from .objectives.next_token import STRATA, middle_positions
from .runs.command_line import make_parser, parse_settings
from .runs.costs import FeedbackCost, TokenizerCost, TransformerCost, extra_flops
from .runs.optimizers import Muon, make_optimizer


class Device(NamedTuple):
    """Peak dense rates, TFLOP/s, and memory, GiB, from the makers' data sheets."""

    half: float  # bf16 or fp16 with float32 sums
    single: float  # float32, no TF32
    memory: float


DEVICES = {
    "h100": Device(989, 67, 80), "h200": Device(989, 67, 141), "a100": Device(312, 19.5, 80),
    "l40s": Device(362, 91.6, 48), "l4": Device(121, 30.3, 24), "rtx4090": Device(165, 82.6, 24),
}  # fmt: skip
# Images of the presets' data sets, training and evaluation, and classes.
DATA = {
    "fashion-mnist": (60_000, 10_000, 10),
    "fashion-products": (21_588, 1_362, 37),
    "zh-plus/tiny-imagenet": (100_000, 10_000, 200),
    "ILSVRC/imagenet-1k": (1_281_167, 50_000, 1000),
}
GIB = 2**30


# ------------------------------------------------------------------------------------------------ a stage


@dataclass
class StagePlan:
    """One stage on so many devices."""

    name: str
    stage: StageConfig
    parameters: int
    trained: int  # of these
    flops_per_image: float
    activations_per_image: float  # bytes
    devices: int
    matrices: list[torch.Size]  # that Muon steps; the other parameters are AdamW's
    fixed: int  # numbers beside those that are trained, float32: buffers, a frozen codebook, the tokenizer in stage 2
    decoding_per_image: float = 0  # bytes, by decoder feedback

    @property
    def flops(self) -> float:
        """Of a step, all devices together. Muon, on every device, takes 5 (4 m² n + 2 m³) for a matrix m x n, m <= n:
        five Newton-Schulz iterations, each a product with the transpose and two more."""
        muon = sum(5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in self.matrices)
        return self.flops_per_image * self.stage.batch_size + muon * self.devices

    @property
    def images_at_once(self) -> int:
        return self.stage.batch_size // (self.devices * self.stage.grad_accumulation)

    def state_bytes(self, shards: int = 1) -> float:
        """16 bytes a parameter: float32 weight, Adam's two moments (Muon has one), average. In shards with FSDP; else
        all of it on every device and, on several, 4 more for DDP's buckets. 2 more where products run in half. And 4
        for each number that is fixed."""
        buckets = 4 * (self.devices > 1 and shards == 1)
        half = 2 * (self.stage.mixed_precision != "no")
        saved = 4 * sum(map(math.prod, self.matrices)) / shards
        return self.trained * (16 / shards + buckets + half) - saved + 4 * self.fixed

    def passing_bytes(self, shards: int = 1) -> float:
        """Activations, and gradients, which come as those go, unless earlier rounds of the step have left some. What
        decoder feedback takes is gone before there are activations."""
        decoding = min(self.images_at_once, FRAMES_AT_ONCE // (1 + STRATA)) * self.decoding_per_image
        activations = max(self.images_at_once * self.activations_per_image, decoding)
        gradients = 4 * self.trained / shards
        return activations + gradients if self.stage.grad_accumulation > 1 else max(activations, gradients)

    def memory(self, shards: int = 1) -> float:
        """Bytes on a device."""
        return self.state_bytes(shards) + self.passing_bytes(shards)

    def hours(self, peak: float, utilisation: float) -> float:
        """flops * steps / (devices * peak * utilisation); `peak` in TFLOP/s."""
        return self.flops * self.stage.steps / (self.devices * peak * 1e12 * utilisation) / 3600


def make_models(config: Config, num_classes: int) -> tuple[SpectralTokenizer, SpectralARTransformer]:
    """Both models as they would be trained, without storage."""
    with torch.device("meta"):
        tokenizer = SpectralTokenizer(**asdict(config.tokenizer))
        transformer = SpectralARTransformer(
            num_classes=num_classes, codebook_size=tokenizer.config.codebook_size,
            num_tokens=tokenizer.config.num_tokens, **asdict(config.transformer),
        )  # fmt: skip
    tokenizer.quantizer.requires_grad_(config.tokenizer.encoder_layers > 0)
    return tokenizer, transformer


def plan_stages(config: Config, devices: int, num_classes: int) -> list[StagePlan]:
    tokenizer, transformer = make_models(config, num_classes)
    stage = config.train_tokenizer
    cost = TokenizerCost(tokenizer, 1 + stage.prefixes_per_step)
    encoder = cost.encoder()
    flops = (encoder + cost.decoder() + cost.targets()).training + extra_flops(config)
    half = stage.mixed_precision != "no"
    if stage.gradient_checkpointing:
        flops += cost.recomputed()
    activations = cost.activations(half, stage.gradient_checkpointing)
    trained = count(tokenizer, trained=True)
    first = StagePlan(
        "tokenizer", stage, count(tokenizer), trained, flops, activations, devices, muon_matrices(tokenizer, stage),
        numbers(tokenizer) - trained,
    )  # fmt: skip

    stage = config.train_transformer
    half = stage.mixed_precision != "no"
    feedback, places = None, range(config.tokenizer.num_tokens)
    if config.transformer.decoder_feedback:
        places = middle_positions(len(places))
        feedback = FeedbackCost(tokenizer, places)
    own = TransformerCost(transformer, len(places))
    flops = own.all().training + (feedback.flops() if feedback else 0)
    if stage.gradient_checkpointing:
        flops += own.blocks().forward
    if stage.codes == "on-the-fly":
        flops += encoder.forward
    activations = own.activations(half, stage.gradient_checkpointing)
    trained = count(transformer)
    second = StagePlan(
        "transformer", stage, trained, trained, flops, activations, devices, muon_matrices(transformer, stage),
        numbers(transformer) - trained + numbers(tokenizer), feedback.memory(half) if feedback else 0,
    )  # fmt: skip
    return [first, second]


def muon_matrices(model: torch.nn.Module, stage: StageConfig) -> list[torch.Size]:
    """Shapes of what Muon steps, if the stage has it."""
    optimizer = make_optimizer(model, stage)
    parts = [part for part in getattr(optimizer, "parts", []) if isinstance(part, Muon)]
    return [p.shape for part in parts for group in part.param_groups for p in group["params"]]


def count(model: torch.nn.Module, trained: bool = False) -> int:
    """Parameters, or those of them that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def numbers(model: torch.nn.Module) -> int:
    """Parameters and what else the model holds."""
    return count(model) + sum(buffer.numel() for buffer in model.buffers())


# ------------------------------------------------------------------------------------------------ what is printed


def describe(config: Config, args: argparse.Namespace) -> str:
    """The whole plan as text.

    Raises:
        ValueError: a batch cannot be divided among the devices.
    """
    gpus, nodes = args.gpus
    known = DATA.get(config.data.source)
    stages = plan_stages(config, gpus * nodes, known[2] if known else args.classes)
    for plan in stages:
        if plan.stage.batch_size % (plan.devices * plan.stage.grad_accumulation):
            raise ValueError(
                f"train_{plan.name}.batch_size={plan.stage.batch_size} is no multiple of {plan.devices} GPUs x "
                f"grad_accumulation={plan.stage.grad_accumulation}: set another batch_size or other --gpus."
            )
    nodes_text = f", {gpus} on each of {nodes} nodes" if nodes > 1 else ""
    shown = config.data.images_a_step(stages[0].stage.batch_size)[0], stages[1].stage.batch_size  # of data.source
    columns = [dict(stage_rows(plan, args, known, own)) for plan, own in zip(stages, shown, strict=True)]
    width = max(map(len, columns[0]))
    lines = [
        f"{config.name} on {gpus * nodes} {'devices' if args.tflops else args.gpu}{nodes_text}", "",
        " " * width + "".join(f"{plan.name:>18}" for plan in stages),
        *(name.ljust(width) + "".join(f"{column[name]:>18}" for column in columns) for name in columns[0]), "",
        *notes(config, args, stages, known),
    ]  # fmt: skip
    return "\n".join(lines)


def stage_rows(
    plan: StagePlan, args: argparse.Namespace, known: tuple[int, int, int] | None, own: int
) -> Iterator[tuple[str, str]]:
    """Names and values of a stage's column; `own` images a step are of data.source."""
    stage, devices = plan.stage, plan.devices
    yield "parameters", f"{plan.parameters / 1e6:.2f} M"
    yield "images a step", f"{stage.batch_size}"
    yield "  at once on a GPU", f"{plan.images_at_once}"
    yield "operations a step", f"{plan.flops / 1e12:.4g} TFLOP"
    yield "  an image", f"{plan.flops_per_image / 1e9:.4g} GFLOP"
    for name, shards in (("DDP", 1), ("FSDP", devices))[: 1 + (devices > 1)]:
        yield f"memory a GPU, {name}", f"{plan.memory(shards) / GIB:.2f} GiB"
        yield f"  {name}: weights, moments, average", f"{plan.state_bytes(shards) / GIB:.2f} GiB"
        yield f"  {name}: activations, gradients", f"{plan.passing_bytes(shards) / GIB:.2f} GiB"
    yield "steps", f"{stage.steps}"
    if known:
        yield "  epochs", f"{stage.steps * own / known[0]:.1f}"
    seconds = plan.hours(peak(stage, args), args.utilisation) * 3600 / stage.steps
    yield f"hours at {args.utilisation:.0%} of the peak", f"{plan.hours(peak(stage, args), args.utilisation):.3g}"
    yield "  a step", f"{seconds * 1e3:.3g} ms"
    yield "  peak a GPU", f"{peak(stage, args):g} TFLOP/s"


def peak(stage: StageConfig, args: argparse.Namespace) -> float:
    """TFLOP/s of a GPU in the stage's precision."""
    device = DEVICES[args.gpu]
    return args.tflops or (device.single if stage.mixed_precision == "no" else device.half)


def notes(
    config: Config, args: argparse.Namespace, stages: list[StagePlan], known: tuple[int, int, int] | None
) -> Iterator[str]:
    data, second = config.data, config.train_transformer
    if known:
        images = sum(known[:2])
        kept = images + sum(sum(DATA.get(other.source, (0, 0))[:2]) for other in data.mixed().values())
        pixels = kept * data.channels * data.image_size**2
        if data.source != "fashion-mnist":
            yield f"Disk: {pixels / GIB:.1f} GiB of decoded images (none with data.decode=on-the-fly or stream)."
        if second.codes == "stored":
            encoded = known[0] * second.copies + known[1]
            flops = encoded * TokenizerCost(make_models(config, 1)[0], 1).encoder().forward
            hours = flops / (stages[0].devices * peak(config.train_tokenizer, args) * 1e12 * args.utilisation) / 3600
            size = encoded * (config.tokenizer.num_tokens + 1) * 4 / GIB
            yield f"Between the stages: {encoded} images encoded, {hours:.2g} hours, {size:.2g} GiB of codes."
    else:
        yield f"{data.source} is not among the data sets known here: {args.classes} classes are assumed."
    for plan in stages:
        if plan.memory() > DEVICES[args.gpu].memory * GIB:
            yield (
                f"The {plan.name} does not fit a GPU with {DEVICES[args.gpu].memory} GiB: raise "
                f"train_{plan.name}.grad_accumulation or set train_{plan.name}.gradient_checkpointing=true."
            )
    yield "Not counted: communication, data, compilation, evaluation, samples. Formulas: train/runs/costs.py, plan.py."


# ------------------------------------------------------------------------------------------------ command line


def _gpus(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not found:
        raise ValueError
    return int(found[1]), int(found[2] or 1)


def _share(text: str) -> float:
    if not 0 < (share := float(text)) <= 1:
        raise ValueError
    return share


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError
    return number


# argparse: "invalid GPUS or GPUSxNODES value: 'many'"
_gpus.__name__, _share.__name__, _positive.__name__ = "GPUS or GPUSxNODES", "number between 0 and 1", "positive number"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__.split("\n\n")[0])
    parser.add_argument(
        "--gpus", type=_gpus, default=(1, 1), metavar="GPUSxNODES",
        help="so many GPUs, on each of so many nodes: 8 or 8x16 (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", choices=DEVICES, default="h100",
        help="which one, for its peak rate (dense, TFLOP/s) and memory (GiB) by data sheet (default: h100)",
    )  # fmt: skip
    parser.add_argument("--tflops", type=_positive, help="peak rate, TFLOP/s, of any other device, a CPU for instance")
    parser.add_argument(
        "--utilisation", type=_share, default=0.35,
        help="share of the peak that training reaches; measure yours with train.benchmark (default: 0.35)",
    )  # fmt: skip
    parser.add_argument("--classes", type=int, default=1000, help="classes of a data set unknown here (default: 1000)")
    args, config = parse_settings(parser, argv)
    try:
        print(describe(config, args))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
