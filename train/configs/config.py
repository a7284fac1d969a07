"""Every setting of a training run: typed dataclasses, their ranges, and what fits together."""

import math
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from typing import Any, get_args, get_origin

from spectralar.spectral import check_cutoffs

# What the fields below may hold, by name; every other number must be above 0.
CHOICES = {
    "channels": (1, 3),
    "augment": ("flip", "shift", "crop", "scale", "color"),  # see data.images.augment
    "mixed_precision": ("no", "bf16", "fp16"),
    "optimizer": ("adamw", "muon"),
    "codes": ("stored", "on-the-fly"),
    "adversarial": ("", "patchgan"),
    "prefix_law": ("uniform", "powers", "mixed"),
    "perceptual": ("", "efficientnet-lite0", "lpips-vgg"),  # see objectives.losses
    "class_balance": ("none", "sqrt", "even"),
    "decode": ("once", "on-the-fly", "stream"),
}
FRACTIONS = {"dropout", "label_dropout", "min_lr_ratio", "beta1", "beta2", "ema_decay", "revive_until"}
MAY_BE_ZERO = {
    "limit",
    "seed",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "quantizer_weight",
    "commitment",
    "quantize_from",
    "prefixes_per_step",
    "adversarial_from",
    "lecam_weight",
    "alpha",
    "early_stopping",
    "encoder_layers",
    "codebook_dim",
}


@dataclass
class MixedSource:
    """A further source of images, for the tokenizer alone: what it learns from beside `DataConfig.source`."""

    source: str = ""  # as data.source
    share: float = 0.5  # of the images of each step, below 1; data.source has the rest; 0 = leave the source out
    train_split: str = "${data.train_split}"  # as in data
    eval_split: str = "${data.eval_split}"  # as in data
    image_column: str = "${data.image_column}"  # as in data
    label_column: str = "${data.label_column}"  # as in data


@dataclass
class DataConfig:
    """What to train on."""

    source: str = "fashion-mnist"  # or a folder of class folders, a Parquet file, glob or folder, a Hub id
    root: str = ""  # folder of Fashion-MNIST's files; "" = $FASHION_MNIST_DIR, else where Debian has them
    image_size: int = 32  # side of the square images, pixels
    channels: int = 1  # 1 = grey, 3 = RGB
    train_split: str = "train"  # the split to learn from
    eval_split: str = "test"  # the split to measure on; the same as train_split = hold out a tenth of that
    image_column: str = "image"  # column of the images (Parquet, Hub)
    label_column: str = "label"  # column of the class ids or names (Parquet, Hub)
    class_balance: str = "none"  # draw classes by their size; "sqrt" = by its square root; "even" = equally often
    augment: list[str] = field(default_factory=list)  # "flip", "shift", "crop", "scale", "color"; in this order
    class_names: str = ""  # JSON file, raw class name -> readable names ("a, b" or a list; the first is shown)
    cache: str = ""  # folder of decoded images, for later runs too; "" = $SPECTRALAR_CACHE, else ~/.cache/spectralar
    decode: str = "once"  # "once" = keep in `cache`; "on-the-fly" = at each use, if not kept; "stream" = read then too
    window: int = 8192  # stream: images shuffled together; two windows of encoded images are held in memory
    limit: int = 0  # use only so many images of a split, a fixed random choice; 0 = all
    mix: dict[str, MixedSource] = field(default_factory=dict)  # what else the tokenizer learns: mix.NAME.source=...

    def mixed(self) -> dict[str, "DataConfig"]:
        """The settings of each source of `mix` that has a share, by name."""
        own = ("source", "train_split", "eval_split", "image_column", "label_column")
        return {
            name: replace(self, mix={}, class_names="", **{key: getattr(other, key) for key in own})
            for name, other in self.mix.items()
            if other.share
        }

    def images_a_step(self, batch_size: int) -> list[int]:
        """How many of a step's images come from `source`, and from each of `mixed`: its share, rounded.

        Raises:
            ValueError: a source has none.
        """
        counts = [round(other.share * batch_size) for other in self.mix.values() if other.share]
        counts = [batch_size - sum(counts), *counts]
        if min(counts) < 1:
            raise ValueError(
                f"data.mix: of {batch_size} images a step, {', '.join(map(str, counts))} would come from "
                f"{', '.join(('data.source', *self.mixed()))}: set other shares or a larger batch_size."
            )
        return counts


@dataclass
class TokenizerConfig:
    """Shape of the spectral tokenizer."""

    image_size: int = "${data.image_size}"  # type: ignore[assignment]  # pixels; follows the data
    in_channels: int = "${data.channels}"  # type: ignore[assignment]  # colour channels; follows the data
    patch_size: int = 8  # pixels; divides image_size
    num_tokens: int = 32  # N, spectral tokens an image
    alpha: float = 1.5  # exponent of the cutoff schedule; > 1 spends more tokens on low frequencies, 0 = no cutoffs
    cutoffs: list[int] = field(default_factory=list)  # r_1 to r_N, as train.cutoffs prints them; [] = alpha's law
    codebook_size: int = 1024  # K, entries
    codebook_dim: int = 12  # dimension of an entry
    codebook_sizes: list[int] = field(default_factory=list)  # nested: K_1 alone, growing to K, or all K_t; [] = all K
    fsq_levels: list[int] = field(default_factory=list)  # values a dimension, K in all; [] = a learned cosine codebook
    hidden_size: int = 144  # width of encoder and decoder
    num_heads: int = 4  # attention heads; divides hidden_size
    encoder_layers: int = 4  # blocks; with a spectral shortcut 0 = the shortcut alone encodes
    decoder_layers: int = 4  # blocks
    mlp_ratio: float = 4.0  # width of the MLP / hidden_size
    spectral_shortcut: bool = False  # residual quantization of the spectrum, fitted to data, as the networks' start


@dataclass
class TransformerConfig:
    """Shape of the transformer; vocabulary and length are the tokenizer's, classes the data's."""

    hidden_size: int = 192  # width
    num_layers: int = 6  # blocks
    num_heads: int = 6  # attention heads; divides hidden_size
    mlp_ratio: float = 4.0  # width of the MLP / hidden_size
    dropout: float = 0.1  # probability
    shared_adaln: bool = False  # one adaLN modulation for all blocks: a third fewer parameters
    codebook_dim: int = 0  # tokenizer.codebook_dim = inputs and outputs know the entries; 0 = they do not
    decoder_feedback: bool = False  # each token is predicted from the image of those before it, too


@dataclass
class StageConfig:
    """What both training stages share."""

    batch_size: int = 64  # images an optimiser step, over all processes and accumulation rounds
    lr: float = 1e-3  # peak learning rate
    min_lr_ratio: float = 0.02  # last learning rate / lr, reached by a cosine
    warmup_steps: int = 300  # steps of linear warm-up
    steps: int = 10000  # optimiser steps in all
    optimizer: str = "adamw"  # or "muon": it for the matrices of the blocks, AdamW for the rest
    weight_decay: float = 0.05  # never on norms, embeddings or the codebook
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    ema_decay: float = 0.999  # of the averaged weights, a step
    seed: int = 0  # of initial weights, data order, augmentation, dropout and sampled prefixes
    mixed_precision: str = "no"  # "no", "bf16" or "fp16"; DCT and code look-up stay float32
    grad_accumulation: int = 1  # rounds an optimiser step; divides batch_size
    compile: bool = False  # torch.compile the model
    log_every: int = 50  # steps
    sample_every: int = 1000  # steps between sample grids
    eval_every: int = 1000  # steps between held-out measurements
    checkpoint_every: int = 500  # steps


@dataclass
class TokenizerStage(StageConfig):
    """Stage 1: nested reconstruction."""

    init_from: str = ""  # folder of a tokenizer of the same shape to start from; "" = random weights
    fsdp: bool = False  # weights, gradients, moments, averages in shards, one a process, not a copy in each
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: memory for a third more work
    quantizer_weight: float = 0.1  # weight of the codebook + commitment loss
    commitment: float = 0.25  # weight of the commitment part in it
    perceptual: str = ""  # "efficientnet-lite0" or "lpips-vgg" = a loss in that network's features; "" = none
    perceptual_weight: float = 0.5  # gradient at the pixels / that of the squared error
    perceptual_size: int = 128  # pixels; efficientnet-lite0 sees smaller images enlarged to so many
    adversarial: str = ""  # "patchgan" = an adversarial loss on the full prefix, see objectives.adversarial; "" = none
    adversarial_weight: float = 0.3  # gradient at the pixels / that of the squared error
    adversarial_from: int = 0  # steps before it
    discriminator_width: int = 64  # channels of the first layer, a multiple of 8
    discriminator_lr: float = 2e-4  # learning rate, constant
    lecam_weight: float = 0.001  # weight of the LeCAM regularisation; 0 = none
    prefixes_per_step: int = 1  # sampled prefix lengths a step, beside the full one; 0 = no nesting
    prefix_law: str = "mixed"  # of the sampled lengths: "uniform", "powers" (of two), "mixed" = half and half
    prefix_weight: float = 0.5  # weight of a sampled prefix's squared error, times min(largest_boost, H / r_k)
    largest_boost: float = 1.0  # of prefixes of few coefficients; 1 = equal weights
    rotation_trick: bool = False  # gradients turned with the latent instead of straight through the quantizer
    quantize_from: int = 200  # steps of plain autoencoding before; the codebook then starts at what is encoded
    revive_after: int = 100  # steps without use after which a code is revived from the batch
    revive_until: float = 0.8  # fraction of the steps after which no code is revived any more


@dataclass
class TransformerStage(StageConfig):
    """Stage 2: next-token prediction."""

    init_from: str = ""  # folder of a transformer of the same shape to start from; "" = random weights
    fsdp: bool = False  # weights, gradients, moments, averages in shards, one a process, not a copy in each
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: memory for a third more work
    label_dropout: float = 0.1  # probability of the null class, for classifier-free guidance
    codes: str = "stored"  # "stored" = what encode_dataset wrote; "on-the-fly" = encode at each step, augmented
    early_stopping: int = 0  # measurements without a lower held-out loss to end after, with the best weights; 0 = off
    copies: int = 4  # stored: differently augmented encodings of every image, the first one not augmented


@dataclass
class ClassifierConfig:
    """Shape of the classifier that judges samples; image size, channels and classes are the data's."""

    width: int = 24  # channels of the first stage; each later one has twice as many
    blocks: int = 1  # residual blocks a stage


@dataclass
class ClassifierStage(StageConfig):
    """The judge of samples: plain classification, apart from the two models."""

    batch_size: int = 128  # images an optimiser step, over all processes and accumulation rounds
    lr: float = 4e-3  # peak learning rate
    steps: int = 2400  # optimiser steps in all
    beta2: float = 0.99  # AdamW


@dataclass
class Config:
    """One run: data, two models, the judge of samples, and how each is trained."""

    name: str = "spectralar"  # names the output folder and the model
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train_tokenizer: TokenizerStage = field(default_factory=TokenizerStage)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    train_transformer: TransformerStage = field(default_factory=TransformerStage)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    train_classifier: ClassifierStage = field(default_factory=ClassifierStage)


def config_to_dict(config: Config) -> dict[str, Any]:
    """`config` as nested plain dicts, ready for JSON."""
    return asdict(config)


def check_config(config: Config) -> None:
    """Raise a `ValueError` that names the key, if a value is out of range or does not fit another one."""
    for key in dotted_keys(Config):
        if ".NAME." in key:  # of sources that are mixed in, see below
            continue
        section, _, name = key.rpartition(".")
        _check_value(key, name, getattr(getattr(config, section), name) if section else getattr(config, name))
    data, tokenizer = config.data, config.tokenizer
    if (tokenizer.image_size, tokenizer.in_channels) != (data.image_size, data.channels):
        raise ValueError(
            "tokenizer.image_size and tokenizer.in_channels follow data.image_size and data.channels: set those."
        )
    _check_mix(config)
    _check_cutoffs(tokenizer)
    if tokenizer.fsq_levels and config.train_tokenizer.rotation_trick:
        raise ValueError(
            "train_tokenizer.rotation_trick turns gradients onto the entries of a codebook, which "
            "tokenizer.fsq_levels has none of: switch one off."
        )
    if config.transformer.codebook_dim not in (0, tokenizer.codebook_dim):
        raise ValueError(
            f"transformer.codebook_dim must be 0 or tokenizer.codebook_dim ({tokenizer.codebook_dim}), not "
            f"{config.transformer.codebook_dim}."
        )
    if config.transformer.decoder_feedback and not (config.transformer.codebook_dim and tokenizer.spectral_shortcut):
        raise ValueError(
            "transformer.decoder_feedback needs transformer.codebook_dim and tokenizer.spectral_shortcut: what the "
            "decoder expects is told in the shortcut's terms."
        )
    for divisor, number in (
        ("tokenizer.patch_size", "data.image_size"),
        ("tokenizer.num_heads", "tokenizer.hidden_size"),
        ("transformer.num_heads", "transformer.hidden_size"),
        ("train_tokenizer.grad_accumulation", "train_tokenizer.batch_size"),
        ("train_transformer.grad_accumulation", "train_transformer.batch_size"),
        ("train_classifier.grad_accumulation", "train_classifier.batch_size"),
    ):
        small, large = attrgetter(divisor)(config), attrgetter(number)(config)
        if large % small:
            raise ValueError(f"{divisor}={small} does not divide {number}={large}.")


def _check_cutoffs(tokenizer: TokenizerConfig) -> None:
    if tokenizer.cutoffs:
        try:
            check_cutoffs(tokenizer.cutoffs, tokenizer.image_size, tokenizer.num_tokens)
        except ValueError as error:
            text = f"tokenizer.{error} train.cutoffs computes them; tokenizer.cutoffs=[] is alpha's law."
            raise ValueError(text) from error


def _check_mix(config: Config) -> None:
    for name, other in config.data.mix.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"data.mix.{name}: a source is named by letters, digits, '_' and '-' alone.")
        if not other.source:
            raise ValueError(f"data.mix.{name}.source is not set: name a source of images, as data.source takes it.")
        if not 0 <= other.share < 1:  # written so that nan fails too
            raise ValueError(f"data.mix.{name}.share must be 0 or more and below 1, not {other.share}.")
    config.data.images_a_step(config.train_tokenizer.batch_size)


def _check_value(key: str, name: str, value: Any) -> None:
    if name in CHOICES:
        for item in value if isinstance(value, list) else [value]:
            if item not in CHOICES[name]:
                choices = ", ".join(map(repr, CHOICES[name]))
                raise ValueError(f"{key} takes {choices}; {item!r} is none of them.")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # Written so that nan fails too.
        if name in FRACTIONS and not 0 <= value <= 1:
            raise ValueError(f"{key} must lie between 0 and 1, not {value}.")
        if name in MAY_BE_ZERO and not 0 <= value < math.inf:
            raise ValueError(f"{key} must be 0 or more, not {value}.")
        if name not in FRACTIONS | MAY_BE_ZERO and not 0 < value < math.inf:
            raise ValueError(f"{key} must be above 0, not {value}.")


def dotted_keys(section: type, prefix: str = "") -> dict[str, str]:
    """All dotted keys below a dataclass, with the name of each one's type; NAME stands for the keys of a dict."""
    keys = {}
    for item in fields(section):
        if is_dataclass(item.type):
            keys |= dotted_keys(item.type, f"{prefix}{item.name}.")
        elif get_origin(item.type) is dict:
            keys |= dotted_keys(get_args(item.type)[1], f"{prefix}{item.name}.NAME.")
        else:
            keys[prefix + item.name] = item.type.__name__ if isinstance(item.type, type) else str(item.type)
    return keys


def schema_key(key: str) -> str:
    """What `dotted_keys` calls a key: data.mix.photos.share is data.mix.NAME.share."""
    return re.sub(r"^data\.mix\.[^.]+\.", "data.mix.NAME.", key)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key."""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
