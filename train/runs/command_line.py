"""The command line of the training scripts, and how what is wrong outside of them is told: in one sentence."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from ..configs.config import Config, config_to_dict
from ..configs.reading import load_config
from .checkpoints import first_line

T = TypeVar("T")


def parse_arguments(description: str, argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The command line of a training stage: PRESET, --output, --max-minutes, --dry-run, key=value overrides."""
    parser = make_parser(description)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--max-minutes", type=_minutes, default=math.inf, metavar="MINUTES",
        help="stop after so many minutes with a checkpoint; the same command goes on from there (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-changes", action="store_true",
        help="go on from a checkpoint of other images, or another batch size or seed",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="a few steps, their speed, and nothing written")
    args, config = parse_settings(parser, argv)
    if args.dry_run and config.data.decode == "once":
        config.data.decode = "on-the-fly"  # nothing is written, the decoded images neither
    args.output = args.output or Path("runs") / config.name
    if not args.dry_run:
        check_output(parser, args.output)
    return args, config


def check_output(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Ends the program with one sentence if nothing can be written to a folder, or it cannot be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        parser.error(f"--output {folder} cannot be made, since {there} is no folder: give another one.")
    if not os.access(there, os.W_OK | os.X_OK):
        parser.error(f"--output {folder} cannot be written, since {there} may not be: give another folder.")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of PRESET and key=value overrides, whose --help explains all settings."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="a name in train/configs, or the path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. train_tokenizer.lr=5e-4")
    return parser


def parse_settings(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, *first: str
) -> tuple[argparse.Namespace, Config]:
    """The arguments of `make_parser`, and of what was added to it, with the configuration that they name.

    first: overrides of the preset that come before those of the command line.
    """
    args = parser.parse_intermixed_args(argv)
    try:
        return args, load_config(args.preset, [*first, *args.overrides])
    except ValueError as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return f"{super().format_help()}\n{describe_settings()}\n"


def _minutes(text: str) -> float:
    if not 0 <= (minutes := float(text)):  # written so that nan fails too
        raise ValueError
    return minutes


_minutes.__name__ = "number of minutes"  # argparse: "invalid number of minutes value: 'ten'"


def describe_settings() -> str:
    """All settings with defaults, units and meaning, for --help: the comments of the dataclasses in config.py."""
    lines = ["settings, with their defaults; a preset has its own:"]
    for section in fields(Config):
        if not inspect.isclass(section.type) or section.type is str:
            continue
        comments = {}
        for cls in reversed(section.type.__mro__[:-1]):  # without `object`
            comments |= dict(re.findall(r"^    (\w+): .*# (.*)$", inspect.getsource(cls), re.MULTILINE))
        values = config_to_dict(Config())[section.name]
        lines += [f"  {section.name}.{name}={value}  {comments.get(name, '')}" for name, value in values.items()]
    return "\n".join(lines)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What the machine refuses (a full disk, no permission) ends the program with one sentence."""
    if hasattr(sys.stdout, "reconfigure"):  # paths may hold bytes that are no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SystemExit(
            f"{first_line(error)}. What was finished before is whole, and once it is mended the same command goes on."
        ) from error


def read(load: Callable[..., T], *arguments: Any) -> T:
    """What `load` gives, one of the functions that load images; an unfit source ends the program with its sentence."""
    try:
        return load(*arguments)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
