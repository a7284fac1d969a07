"""Training that starts from a model that was trained before."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin

from .engine import Run

Model = TypeVar("Model", bound=ModelMixin)


def warm_start(run: Run, fresh: Model, folder: str) -> Model:
    """`fresh`, or the model in `folder` with all settings of `fresh`: in float32, to be trained. "" is no folder.

    Raises:
        SystemExit: if no model is there, or one of other settings; one process says so.
    """
    if not folder:
        return fresh
    what = type(fresh).__name__
    if not (Path(folder) / "config.json").is_file():
        run.exit(f"init_from: there is no {what} in {folder}, which must hold a config.json and weights.")
    trained = type(fresh).from_pretrained(folder, dtype=torch.float32)
    trained.register_to_config(_name_or_path="")  # a path of this machine, which would be saved with the model
    settings = {name: value for name, value in fresh.config.items() if not name.startswith("_")}
    different = [f"{name}={trained.config[name]}" for name in settings if trained.config[name] != settings[name]]
    if different:
        run.exit(f"The {what} in {folder} has {', '.join(different)}, other than this run: set the same.")
    return trained.train()
