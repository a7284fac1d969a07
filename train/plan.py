"""What a preset costs before it is started: parameters, operations, memory, hours, disk. Nothing is trained or read.

    python -m train.plan imagenet-256-d16 --gpus 8x16
    python -m train.plan fashion-mnist-32 --gpus 1 --tflops 0.1 train_tokenizer.steps=20000

Parameters are counted on the models themselves, built without storage. The rest is by formula, stated at each
function and printed with its numbers. Convention: an addition of a product is two operations; attention counts all
T² pairs and its backward pass 2.5 times the forward one, since fused kernels compute the scores again.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from spectralar.quantizer import VectorQuantizer
from spectralar.tokenizer import SpectralTokenizer
from spectralar.transformer import SpectralARTransformer

from .command_line import make_parser, parse_settings
from .config import Config, StageConfig


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
    "zh-plus/tiny-imagenet": (100_000, 10_000, 200),
    "ILSVRC/imagenet-1k": (1_281_167, 50_000, 1000),
}
# Operations of one pass at 224 x 224, as far as the losses look into the network.
PERCEPTUAL_FLOPS = {"efficientnet-lite0": 0.487e9, "lpips-vgg": 30.7e9}
GIB = 2**30


# ------------------------------------------------------------------------------------------------ operations


@dataclass
class Flops:
    """Operations of one image's forward pass, by what their backward pass takes."""

    products: float = 0  # two products as large: the gradients of both factors
    halves: float = 0  # one: the other factor needs no gradient
    constants: float = 0  # none
    attention: float = 0  # 2.5 times

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(factor * value for value in vars(self).values()))

    @property
    def forward(self) -> float:
        return self.products + self.halves + self.constants + self.attention

    @property
    def training(self) -> float:
        return 3 * self.products + 2 * self.halves + self.constants + 3.5 * self.attention


def block_flops(rows: int, keys: int, width: int, inner: int) -> Flops:
    """A transformer block over `rows` tokens of which each sees `keys`: 2 rows (4 D² + 2 D inner) + 4 rows keys D."""
    return Flops(products=2 * rows * (4 * width**2 + 2 * width * inner), attention=4 * rows * keys * width)


class TokenizerCost:
    """Costs of an image in stage 1. P patches, N tokens, S frames (1 + sampled prefixes), D width, H side.

    forward = encoder blocks over P + N tokens, decoder blocks over N spectral tokens, once, and over P mask tokens a
    frame, which also see the N; patches in (2 P p² C D) and out, code look-up (2 N d K), seam convolutions, and the
    products with H x H matrices that limit frames and targets to their band.
    """

    def __init__(self, model: SpectralTokenizer, frames: int) -> None:
        c = model.config
        self.model, self.frames = model, frames
        self.width, self.inner = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
        self.patches, self.tokens = model.num_patches, c.num_tokens
        self.patch_dim, self.latent_dim = model.patch_embed.in_features, model.to_latent.out_features
        self.side, self.channels = c.image_size, c.in_channels

    def encoder_blocks(self) -> Flops:
        length = self.patches + self.tokens
        return block_flops(length, length, self.width, self.inner) * self.model.config.encoder_layers

    def recomputed(self) -> float:
        """Of the blocks' forward pass, which checkpointing does again up to the last product of each."""
        c = self.model.config
        rows = c.encoder_layers * (self.patches + self.tokens) + (c.decoder_layers - 1) * self.tokens
        rows += c.decoder_layers * self.frames * self.patches
        last = 2 * self.width * (rows * self.inner + self.tokens * 3 * self.width)
        return (self.encoder_blocks() + self.decoder_blocks()).forward - last

    def encoder(self) -> Flops:
        c, flops = self.model.config, self.encoder_blocks()
        flops += Flops(halves=2 * self.patches * self.patch_dim * self.width)
        flops += Flops(products=2 * self.tokens * self.width * self.latent_dim)
        if isinstance(self.model.quantizer, VectorQuantizer):
            flops += Flops(constants=2 * self.tokens * self.latent_dim * c.codebook_size)
        return flops

    def decoder_blocks(self) -> Flops:
        layers, n, width = self.model.config.decoder_layers, self.tokens, self.width
        tokens = block_flops(n, n, width, self.inner) * (layers - 1) + Flops(products=2 * n * 3 * width**2)
        masks = block_flops(self.patches, self.patches + n, width, self.inner) * layers
        return tokens + masks * self.frames

    def decoder(self) -> Flops:
        pixels = self.channels * self.side**2
        frame = Flops(
            products=2 * pixels * self.width + 2 * 2 * 9 * 16 * pixels,  # to pixels, and the two seam convolutions
            halves=2 * 2 * self.side * pixels,  # the band limit of the frame
            constants=2 * 2 * self.side * pixels + 2 * 2 * self.side**3,  # that of its target, and their matrices
        )
        embed = Flops(products=2 * self.tokens * self.latent_dim * self.width)
        return self.decoder_blocks() + embed + frame * self.frames

    def activations(self, half: bool, checkpointing: bool) -> float:
        """Bytes kept for the backward pass. A block keeps the two inputs of its norms in float32, and (6 + 2 r) D a
        token in the products' type: both normed inputs, q k v, what was attended to, twice the inner width."""
        c, size = self.model.config, 2 if half else 4
        full = self.width * (2 * 4 + 6 * size) + 2 * self.inner * size  # bytes a token and layer
        rows = self.patches + self.tokens
        shared = 2 * size * self.width * rows  # a frame's keys and values with those of the spectral tokens
        # Of a frame: both seam convolutions and a gradient, the band limit, frame, target, difference.
        pixels = self.frames * self.side**2 * (16 * (2 * size + 4) + 4 * (4 * self.channels + 1))
        if checkpointing:
            inputs = 4 * self.width * (c.encoder_layers * rows + c.decoder_layers * self.frames * self.patches)
            pairs = c.decoder_layers * self.tokens * self.width * (4 + 3 * size)
            return inputs + pairs + max(full * rows, self.frames * (full * self.patches + shared)) + pixels
        layers = c.encoder_layers * full * rows + (c.decoder_layers - 1) * full * self.tokens
        return layers + c.decoder_layers * self.frames * (full * self.patches + shared) + pixels


class TransformerCost:
    """Costs of an image in stage 2: L blocks over N tokens, adaLN (12 rows D², once an image), head (2 N D K)."""

    def __init__(self, model: SpectralARTransformer) -> None:
        self.model, self.config = model, model.config
        self.width = self.config.hidden_size
        self.inner = int(self.width * self.config.mlp_ratio)

    def blocks(self) -> Flops:
        n = self.config.num_tokens
        return block_flops(n, n, self.width, self.inner) * self.config.num_layers

    def all(self) -> Flops:
        c = self.config
        condition = 2 * self.width * (self.model.adaln.out_features + 2 * self.width)
        return self.blocks() + Flops(products=condition + 2 * c.num_tokens * self.width * c.codebook_size)

    def activations(self, half: bool, checkpointing: bool) -> float:
        """Bytes kept for the backward pass. A block keeps 4 D a token in float32 (the inputs of its norms and their
        outputs) and (11 + 2 r) D in the products' type; the head keeps N K probabilities and passes two copies."""
        c, size = self.config, 2 if half else 4
        full = self.width * (4 * 4 + 11 * size) + 2 * self.inner * size  # bytes a token and layer
        if half:
            full += 2 * 4 * self.width  # queries and keys in float32, for their norms
        if c.dropout:
            full += 2 * self.width  # one byte for each number that may be dropped
        head = c.num_tokens * (3 * 4 * c.codebook_size + self.width * (2 * 4 + size))
        adaln = 6 * self.width * size * c.num_layers
        layers = 4 * self.width * c.num_layers + full if checkpointing else full * c.num_layers
        return c.num_tokens * layers + adaln + head


# ------------------------------------------------------------------------------------------------ a stage


@dataclass
class StagePlan:
    """One stage on so many devices."""

    name: str
    stage: StageConfig
    parameters: int
    flops_per_image: float
    activations_per_image: float  # bytes
    devices: int

    @property
    def flops(self) -> float:
        """Of a step, all devices together."""
        return self.flops_per_image * self.stage.batch_size

    @property
    def images_at_once(self) -> int:
        return self.stage.batch_size // (self.devices * self.stage.grad_accumulation)

    def state_bytes(self, shards: int = 1) -> float:
        """16 bytes a parameter: float32 weight, Adam's two moments, average. In shards with FSDP; else all of it on
        every device and, on several, 4 more for the buckets of DDP. 2 more where products run in half precision."""
        buckets = 4 * (self.devices > 1 and shards == 1)
        half = 2 * (self.stage.mixed_precision != "no")
        return self.parameters * (16 / shards + buckets + half)

    def passing_bytes(self, shards: int = 1) -> float:
        """Activations, and gradients, which come as those go, unless earlier rounds of the step have left some."""
        activations = self.images_at_once * self.activations_per_image
        gradients = 4 * self.parameters / shards
        return activations + gradients if self.stage.grad_accumulation > 1 else max(activations, gradients)

    def memory(self, shards: int = 1) -> float:
        """Bytes on a device."""
        return self.state_bytes(shards) + self.passing_bytes(shards)

    def hours(self, peak: float, utilisation: float) -> float:
        """flops * steps / (devices * peak * utilisation); `peak` in TFLOP/s."""
        return self.flops * self.stage.steps / (self.devices * peak * 1e12 * utilisation) / 3600


def extra_flops(config: Config) -> float:
    """Of an image, by the networks that judge it in stage 1.

    Perceptual: three passes (target, frame, its gradient) for the full prefix and at most one sampled one.
    Adversarial: of the discriminator, two passes for the tokenizer, and three each for image and frame to train it.
    """
    stage, data, flops = config.train_tokenizer, config.data, 0.0
    if stage.perceptual:
        small = stage.perceptual == "efficientnet-lite0"
        side = max(data.image_size, stage.perceptual_size) if small else data.image_size
        frames = 2 if stage.prefixes_per_step else 1
        flops += 3 * frames * PERCEPTUAL_FLOPS[stage.perceptual] * (side / 224) ** 2
    if stage.adversarial:
        w, pixels = stage.discriminator_width, data.image_size**2
        layers = 16 * data.channels * w / 4 + 16 * 2 * w**2 / 16 + 16 * 8 * w**2 / 64 + 9 * 4 * w / 64
        flops += 8 * 2 * layers * pixels
    return flops


def make_models(config: Config, num_classes: int) -> tuple[SpectralTokenizer, SpectralARTransformer]:
    """Both models as they would be trained, without storage."""
    with torch.device("meta"):
        tokenizer = SpectralTokenizer(**asdict(config.tokenizer))
        transformer = SpectralARTransformer(
            num_classes=num_classes, codebook_size=tokenizer.config.codebook_size,
            num_tokens=tokenizer.config.num_tokens, **asdict(config.transformer),
        )  # fmt: skip
    return tokenizer, transformer


def plan_stages(config: Config, devices: int, num_classes: int) -> list[StagePlan]:
    tokenizer, transformer = make_models(config, num_classes)
    stage = config.train_tokenizer
    cost = TokenizerCost(tokenizer, 1 + stage.prefixes_per_step)
    encoder, decoder = cost.encoder(), cost.decoder()
    flops = (encoder + decoder).training + extra_flops(config)
    half = stage.mixed_precision != "no"
    if stage.gradient_checkpointing:
        flops += cost.recomputed()
    activations = cost.activations(half, stage.gradient_checkpointing)
    plans = [StagePlan("tokenizer", stage, count(tokenizer), flops, activations, devices)]

    stage = config.train_transformer
    half = stage.mixed_precision != "no"
    own = TransformerCost(transformer)
    flops = own.all().training
    if stage.gradient_checkpointing:
        flops += own.blocks().forward
    if stage.codes == "on-the-fly":
        flops += encoder.forward
    activations = own.activations(half, stage.gradient_checkpointing)
    return [*plans, StagePlan("transformer", stage, count(transformer), flops, activations, devices)]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
    columns = [dict(stage_rows(plan, args, known)) for plan in stages]
    width = max(map(len, columns[0]))
    lines = [
        f"{config.name} on {gpus * nodes} {'devices' if args.tflops else args.gpu}{nodes_text}", "",
        " " * width + "".join(f"{plan.name:>18}" for plan in stages),
        *(name.ljust(width) + "".join(f"{column[name]:>18}" for column in columns) for name in columns[0]), "",
        *notes(config, args, stages, known),
    ]  # fmt: skip
    return "\n".join(lines)


def stage_rows(
    plan: StagePlan, args: argparse.Namespace, known: tuple[int, int, int] | None
) -> Iterator[tuple[str, str]]:
    """Names and values of a stage's column."""
    stage, devices = plan.stage, plan.devices
    yield "parameters", f"{plan.parameters / 1e6:.2f} M"
    yield "images a step", f"{stage.batch_size}"
    yield "  at once on a GPU", f"{plan.images_at_once}"
    yield "operations a step", f"{plan.flops / 1e12:.4g} TFLOP"
    yield "  an image", f"{plan.flops_per_image / 1e9:.4g} GFLOP"
    for name, shards in (("DDP", 1), ("FSDP", devices))[: 1 + (devices > 1)]:
        yield f"memory a GPU, {name}", f"{plan.memory(shards) / GIB:.2f} GiB"
        yield f"  {name}: weights, Adam, average", f"{plan.state_bytes(shards) / GIB:.2f} GiB"
        yield f"  {name}: activations, gradients", f"{plan.passing_bytes(shards) / GIB:.2f} GiB"
    yield "steps", f"{stage.steps}"
    if known:
        yield "  epochs", f"{stage.steps * stage.batch_size / known[0]:.1f}"
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
        pixels = images * data.channels * data.image_size**2
        if data.source != "fashion-mnist":
            yield f"Disk: {pixels / GIB:.1f} GiB of decoded images (none with data.decode=on-the-fly)."
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
    yield "Not counted: communication, data, compilation, evaluation, samples. Formulas: python -m pydoc train.plan."


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
