"""Every setting of a training run: typed dataclasses, YAML presets, ``key=value`` overrides.

    config = load_config("fashion-mnist-32", ["train_tokenizer.lr=5e-4", "data.augment=[flip]"])

A preset is a YAML file in ``train/configs`` (or any path) that sets only what differs from the defaults below.
Keys, types and ranges are checked when the configuration is loaded, before anything slow has started.
"""

import difflib
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIG_DIR = Path(__file__).parent / "configs"

AUGMENTATIONS = ("flip", "shift", "crop")  # names that data.augment may hold; see train.data.augment
MIXED_PRECISION = ("no", "bf16", "fp16")
CODE_SOURCES = ("stored", "on-the-fly")


@dataclass
class DataConfig:
    """What to train on."""

    source: str = "fashion-mnist"  # "fashion-mnist", a folder of class folders, Parquet (file, glob, folder) or a Hub id
    root: str = ""  # folder of the Fashion-MNIST idx files; "" = $FASHION_MNIST_DIR, then the Debian package's folder
    image_size: int = 32  # side of the square images, pixels
    channels: int = 1  # 1 = grey, 3 = RGB
    train_split: str = "train"  # name of the split to learn from
    eval_split: str = "test"  # name of the split to measure on
    image_column: str = "image"  # column of the images (Parquet, Hub)
    label_column: str = "label"  # column of the class ids or names (Parquet, Hub)
    augment: list[str] = field(default_factory=list)  # any of "flip", "shift", "crop"; applied in this order
    class_names: str = ""  # JSON file, raw class name -> readable name ("a, b", or a list: the first is taken)
    limit: int = 0  # use only the first so many images of a split; 0 = all


@dataclass
class TokenizerConfig:
    """Shape of the spectral tokenizer."""

    image_size: int = "${data.image_size}"  # type: ignore[assignment]  # pixels; follows the data
    in_channels: int = "${data.channels}"  # type: ignore[assignment]  # colour channels; follows the data
    patch_size: int = 8  # pixels; divides image_size
    num_tokens: int = 32  # N, spectral tokens an image
    alpha: float = 1.5  # exponent of the cutoff schedule; > 1 spends more tokens on low frequencies
    codebook_size: int = 1024  # K, entries
    codebook_dim: int = 12  # dimension of an entry
    hidden_size: int = 144  # width of encoder and decoder
    num_heads: int = 4  # attention heads; divides hidden_size
    encoder_layers: int = 4  # blocks
    decoder_layers: int = 4  # blocks
    mlp_ratio: float = 4.0  # width of the MLP / hidden_size


@dataclass
class TransformerConfig:
    """Shape of the autoregressive transformer. Vocabulary, length and classes come from tokenizer and data."""

    hidden_size: int = 192  # width
    num_layers: int = 6  # blocks
    num_heads: int = 6  # attention heads; divides hidden_size
    mlp_ratio: float = 4.0  # width of the MLP / hidden_size
    dropout: float = 0.1  # probability
    shared_adaln: bool = False  # one adaLN modulation for all blocks: a third fewer parameters


@dataclass
class StageConfig:
    """What both training stages share."""

    batch_size: int = 64  # images an optimiser step, over all processes and accumulation rounds
    lr: float = 1e-3  # peak learning rate
    min_lr_ratio: float = 0.02  # last learning rate / lr, reached by a cosine
    warmup_steps: int = 300  # steps of linear warm-up
    steps: int = 10000  # optimiser steps in all
    weight_decay: float = 0.05  # AdamW; never on norms, embeddings or the codebook
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

    quantizer_weight: float = 0.1  # weight of the codebook + commitment loss
    commitment: float = 0.25  # weight of the commitment part in it
    prefixes_per_step: int = 1  # sampled prefix lengths a step, beside the full one
    perceptual_weight: float = 0.0  # weight of the perceptual loss; 0 = none
    revive_after: int = 100  # steps without use after which a code is revived from the batch
    revive_until: float = 0.8  # fraction of the steps after which no code is revived any more


@dataclass
class TransformerStage(StageConfig):
    """Stage 2: next-token prediction."""

    label_dropout: float = 0.1  # probability of the null class, for classifier-free guidance
    codes: str = "stored"  # "stored" = encode all images once; "on-the-fly" = encode augmented images each step


@dataclass
class Config:
    """One run: data, two models and how each is trained."""

    name: str = "spectralar"  # names the output folder and the model
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train_tokenizer: TokenizerStage = field(default_factory=TokenizerStage)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    train_transformer: TransformerStage = field(default_factory=TransformerStage)


def available_presets() -> list[str]:
    """Names that `load_config` takes, sorted."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))


def load_config(preset: str, overrides: list[str] | None = None) -> Config:
    """Read a preset, apply ``dotted.key=value`` overrides in order and check the result.

    Args:
        preset: a name out of `available_presets`, or the path of a .yaml file.
        overrides: such as ``["train_tokenizer.lr=1e-3", "data.augment=[flip,crop]"]``.

    Raises:
        ValueError: an unknown preset, a wrong key, type or value, in one sentence that says what would be right.
    """
    schema = OmegaConf.structured(Config)
    merged = _merge(schema, _read_preset(preset), f"preset {preset!r}")
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"Override {override!r} is not of the form key=value, such as train_tokenizer.lr=1e-3.")
        try:
            parsed = OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"Override {override!r} cannot be read: {_first_line(error)}.") from error
        merged = _merge(merged, parsed, f"override {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"The configuration cannot be resolved: {_first_line(error)}.") from error
    check_config(config)
    return config


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write `config` as YAML; `load_config(path)` gives an equal one. The file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(partial, path)


def config_to_dict(config: Config) -> dict[str, Any]:
    """`config` as nested plain dicts, ready for JSON."""
    return asdict(config)


def check_config(config: Config) -> None:
    """Raise a `ValueError` that names the key, if a value is out of range or does not fit another one."""
    data, tokenizer, transformer = config.data, config.tokenizer, config.transformer
    for name in data.augment:
        _check_choice("data.augment", name, AUGMENTATIONS)
    _require(data.channels in (1, 3), f"data.channels is 1 (grey) or 3 (RGB), not {data.channels}.")
    _require(data.limit >= 0, f"data.limit is 0 (all) or a number of images, not {data.limit}.")
    _require(tokenizer.image_size == data.image_size and tokenizer.in_channels == data.channels,
             "tokenizer.image_size and tokenizer.in_channels follow data.image_size and data.channels: set only those.")
    for section, names in (
        ("data", ("image_size",)),
        ("tokenizer", ("patch_size", "num_tokens", "codebook_size", "codebook_dim", "hidden_size", "num_heads",
                       "encoder_layers", "decoder_layers", "alpha", "mlp_ratio")),
        ("transformer", ("hidden_size", "num_layers", "num_heads", "mlp_ratio")),
    ):
        for name in names:
            _check_positive(f"{section}.{name}", getattr(getattr(config, section), name))
    _require(data.image_size % tokenizer.patch_size == 0,
             f"tokenizer.patch_size={tokenizer.patch_size} does not divide data.image_size={data.image_size}.")
    for section, model in (("tokenizer", tokenizer), ("transformer", transformer)):
        _require(model.hidden_size % model.num_heads == 0,
                 f"{section}.num_heads={model.num_heads} does not divide {section}.hidden_size={model.hidden_size}.")
    _check_fraction("transformer.dropout", transformer.dropout)
    for section in ("train_tokenizer", "train_transformer"):
        _check_stage(section, getattr(config, section))
    _check_fraction("train_tokenizer.revive_until", config.train_tokenizer.revive_until)
    _check_positive("train_tokenizer.revive_after", config.train_tokenizer.revive_after)
    _check_fraction("train_transformer.label_dropout", config.train_transformer.label_dropout)
    _check_choice("train_transformer.codes", config.train_transformer.codes, CODE_SOURCES)


def _check_stage(section: str, stage: StageConfig) -> None:
    for name in ("batch_size", "lr", "steps", "grad_accumulation", "log_every", "sample_every", "eval_every",
                 "checkpoint_every"):
        _check_positive(f"{section}.{name}", getattr(stage, name))
    for name in ("min_lr_ratio", "beta1", "beta2", "ema_decay"):
        _check_fraction(f"{section}.{name}", getattr(stage, name))
    _check_choice(f"{section}.mixed_precision", stage.mixed_precision, MIXED_PRECISION)
    _require(stage.batch_size % stage.grad_accumulation == 0,
             f"{section}.grad_accumulation={stage.grad_accumulation} does not divide "
             f"{section}.batch_size={stage.batch_size}.")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _check_positive(key: str, value: float) -> None:
    _require(value > 0, f"{key} must be greater than 0, not {value}.")


def _check_fraction(key: str, value: float) -> None:
    _require(0 <= value <= 1, f"{key} must lie between 0 and 1, not {value}.")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{key} takes {', '.join(repr(c) for c in choices)}; {value!r} is none of them.")


def _read_preset(preset: str) -> DictConfig:
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIG_DIR / f"{preset}.yaml"
    if not path.is_file():
        raise ValueError(f"There is no preset {preset!r}: give the path of a .yaml file, or one of "
                         f"{', '.join(available_presets())}.")
    try:
        content = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a valid YAML file: {_first_line(error)}.") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path} must hold sections with settings, such as 'data:', not a list.")
    return content


def _merge(base: DictConfig, extra: DictConfig, origin: str) -> DictConfig:
    """Merge `extra` into a copy of `base`; wrong keys and types become a `ValueError` that names `origin`."""
    known = _dotted_keys(Config)
    for key in _flatten(OmegaConf.to_container(extra, resolve=False)):
        if key not in known:
            raise ValueError(f"{origin[0].upper()}{origin[1:]} sets {key!r}, which does not exist: "
                             f"{_suggestion(key, known)}.")
    try:
        return OmegaConf.merge(base, extra)
    except OmegaConfBaseException as error:
        raise ValueError(f"{origin[0].upper()}{origin[1:]} has a value of the wrong type for {error.full_key}, "
                         f"which is {known.get(error.full_key, 'a section')}: {_first_line(error)}.") from error


def _dotted_keys(section: type, prefix: str = "") -> dict[str, str]:
    """All dotted keys below a dataclass, with the name of each one's type."""
    keys = {}
    for item in fields(section):
        if is_dataclass(item.type):
            keys |= _dotted_keys(item.type, f"{prefix}{item.name}.")
        else:
            keys[prefix + item.name] = item.type.__name__ if isinstance(item.type, type) else str(item.type)
    return keys


def _flatten(tree: dict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        nested = isinstance(value, dict) and value
        keys += _flatten(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return keys


def _suggestion(key: str, known: dict[str, str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"it is a section, set one of {', '.join(inside)}"
    # A right last part in the wrong section is the likelier slip, so it goes before mere likeness.
    last = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == last]
    near += [name for name in difflib.get_close_matches(key, known, n=3, cutoff=0.6) if name not in near]
    if not near:
        tails = {name.rpartition(".")[2]: name for name in known}
        near = [tails[tail] for tail in difflib.get_close_matches(last, tails, n=3, cutoff=0.6)]
    return f"did you mean {' or '.join(near[:4])}?".rstrip("?") if near else "the sections are data, tokenizer, " \
        "train_tokenizer, transformer and train_transformer"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
