"""What may differ between a checkpoint and its resumption: nothing that would make of it a mixture of two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..configs.config import Config, config_to_dict, flatten
from ..configs.reading import load_config

# Settings that leave the result as it is, or as it is but for rounding.
HARMLESS = {
    "log_every", "sample_every", "eval_every", "checkpoint_every", "compile", "gradient_checkpointing", "fsdp",
    "grad_accumulation", "root", "cache", "window", "class_names",
}  # fmt: skip
# Settings of which images come when. All others, such as the learning rate, may well be changed on the way.
IMAGES = {
    "batch_size", "seed", "codes", "copies", "init_from", "source", "train_split", "eval_split", "image_column",
    "label_column", "limit", "mix", "decode",
}  # fmt: skip


def check_changes(path: Path, config: Config, images_before: int, images: int, allowed: bool) -> str:
    """What differs from the configuration in `path` that a run had so far, as "a=1, not 2 and b=3, not 4"; or "".

    Args:
        path: RUN/train_STAGE/config.yaml.
        images_before, images: how many there are to train on.
        allowed: whether it may become another run.

    Raises:
        ValueError: if it would and may not; one sentence that says what would be right.
    """
    told, refused = [], []
    try:
        told, refused = changed_settings(load_config(str(path)), config, path.parent.name)
    except ValueError:  # of a version with other settings, or none is there
        pass
    if images != images_before:
        refused.append(f"{images_before} images, not {images}")
    if refused and not allowed:
        raise ValueError(
            f"{path.parent} was trained with {' and '.join(refused)}, and would end as neither run does: set that "
            "back, take another --output, or go on from here with --allow-changes."
        )
    return " and ".join([*refused, *told])


def changed_settings(before: Config, now: Config, section: str) -> tuple[list[str], list[str]]:
    """Changes that a run may go on with, and changes that make it another one, as "data.limit=5, not 7".

    Args:
        section: "train_tokenizer", ..: the stage that goes on; what only the others use may be anything.
    """
    old, new = (_settings(config, section) for config in (before, now))
    told, refused = [], []
    for key in {**old, **new}:
        names = set(key.split("."))
        if old.get(key) == new.get(key) or names & HARMLESS:
            continue
        text = f"{key}={old.get(key, 'unset')}, not {new.get(key, 'unset')}"
        (refused if names & IMAGES else told).append(text)
    return told, refused


def _settings(config: Config, section: str) -> dict[str, Any]:
    """Of what a stage reads, the values by dotted key; such as give the same images are equal."""
    data = config_to_dict(config)["data"]
    data["decode"] = f"stream with data.window={data['window']}" if data["decode"] == "stream" else "no stream"
    data["mix"] = {name: " ".join(map(str, source.values())) for name, source in data["mix"].items()}
    if section != "train_tokenizer":
        del data["mix"]
    return flatten({"data": data, section: config_to_dict(config)[section]})
