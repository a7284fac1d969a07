"""Presets and overrides: YAML files and ``key=value`` as a `Config`.

    config = load_config("fashion-mnist-32", ["train_tokenizer.lr=5e-4", "data.augment=[flip]"])

A preset is a YAML file in ``train/configs`` (or any path) that sets only what differs from the defaults. Keys, types
and ranges are checked when the configuration is loaded, before anything slow has started.
"""

import difflib
import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import Config, check_config, config_to_dict, dotted_keys, flatten, schema_key

CONFIG_DIR = Path(__file__).parent


def available_presets() -> list[str]:
    """Names that `load_config` takes, sorted."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))


def load_config(preset: str, overrides: list[str] | None = None) -> Config:
    """Read a preset, apply ``dotted.key=value`` overrides in order and check the result.

    A setting that is text takes all behind the first ``=`` as it is, also ``no``, ``007``, ``a: b #1`` or nothing;
    numbers and lists (``[flip,crop]``) are parsed.

    Args:
        preset: a name out of `available_presets`, or the path of a .yaml file.
        overrides: such as ``["train_tokenizer.lr=1e-3", "data.augment=[flip,crop]"]``.

    Raises:
        ValueError: an unknown preset, a wrong key, type or value; one sentence that says what would be right.
    """
    merged = _merge(OmegaConf.structured(Config), _read_preset(preset), f"Preset {preset!r}")
    for override in overrides or []:
        merged = _merge(merged, _read_override(override), f"Override {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"The configuration cannot be resolved: {_first_line(error)}.") from error
    check_config(config)
    set_last = [override.partition("=")[0] for override in overrides or []]
    if config.tokenizer.cutoffs and "tokenizer.alpha" in set_last:
        raise ValueError(
            "tokenizer.alpha has no effect beside tokenizer.cutoffs: set tokenizer.cutoffs=[] too, for alpha's law."
        )
    return config


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write `config` as YAML, whole or not at all; `load_config(path)` gives an equal one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")
    os.replace(partial, path)


class _Loader(yaml.SafeLoader):
    """YAML in which every value is the text that stands there: what kind it is, `Config` says, not its looks."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if not key.tag.endswith(":merge")]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name!r} stands there twice")
        return super().construct_mapping(node, deep)


def _read_preset(preset: str) -> dict:
    path = Path(preset)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIG_DIR / f"{preset}.yaml"
    if not path.is_file():
        raise ValueError(
            f"There is no preset {preset!r}: give the path of a .yaml file, or one of "
            f"{', '.join(available_presets())}."
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a valid YAML file: {_first_line(error)}.") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} must hold sections with settings, such as 'data:', not a list.")
    return content or {}


def _read_override(override: str) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"Override {override!r} is not key=value, such as train_tokenizer.lr=1e-3.")
    value: Any = text
    if dotted_keys(Config).get(key, "").startswith("list"):
        try:
            value = yaml.load(text, Loader=_Loader) or []
        except yaml.YAMLError as error:
            raise ValueError(f"Override {override!r} cannot be read: {_first_line(error)}.") from error
    return _nested({key: value})


def _merge(base: DictConfig, extra: dict, origin: str) -> DictConfig:
    """`base` changed by `extra`; wrong keys and types become a `ValueError` that starts with `origin`."""
    known, values = dotted_keys(Config), flatten(extra)
    for key, value in values.items():
        kind = known.get(schema_key(key))
        if kind is None:
            raise ValueError(f"{origin} sets {key!r}, {_suggestion(key, known)}")
        if kind == "str" and isinstance(value, str | None):
            # Literal, so that OmegaConf sees no reference in "${...}".
            values[key] = re.sub(r"(\\*)\$\{", r"\1\1\\${", value or "")
    try:
        return OmegaConf.merge(base, _nested(values))
    except OmegaConfBaseException as error:
        key = (error.full_key or "").partition("[")[0]  # of a list's item, the list's
        kind = known.get(schema_key(key), "")
        hint = f", in brackets: {key}=[a,b]" if kind.startswith("list") else ""
        raise ValueError(
            f"{origin} has a wrong value for {key}, which takes {kind}{hint} ({_first_line(error)})."
        ) from error


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key as nested dicts."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def _suggestion(key: str, known: dict[str, str]) -> str:
    """What may have been meant by a wrong key, as the end of a sentence."""
    below = [name for name in known if name.startswith(f"{key}.")]
    if below:
        return f"which is a section: set one of {', '.join(below)}."
    section, _, last = key.rpartition(".")
    # Likeliest first: a slip in the name, the right name in another section, a slip in another section.
    inside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    near = [name for name in known if key.startswith(f"{name}.")]  # a setting taken for a section
    near = near or [inside[name] for name in difflib.get_close_matches(last, inside, n=2, cutoff=0.6)]
    if not near:
        lasts = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in known}, n=1, cutoff=0.6)
        elsewhere = [name for name in known if name.rpartition(".")[2] in lasts]
        near = difflib.get_close_matches(key, elsewhere, n=2, cutoff=0)
    sections = ", ".join(item.name for item in fields(Config) if is_dataclass(item.type))
    hint = f"did you mean {' or '.join(near)}?" if near else f"the sections are {sections}."
    return f"which does not exist: {hint}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
