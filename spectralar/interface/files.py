"""Files of a pipeline beyond its weights: the one that the generic loader imports, and those of a Hub repository."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..checks import shown

logger = logging.getLogger(__name__)

# Saved beside the weights, so that `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline",
# trust_remote_code=True)` finds the class.
LOADER_FILE = "pipeline.py"
LOADER = "from spectralar.pipeline import SpectralARPipeline  # noqa: F401\n"

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class OptionalComponents:
    """`_optional_components` of a pipeline: of the class those that may be missing, of a pipeline those that are.

    diffusers asks the class when it loads and the pipeline when it saves. Its test-suite takes all that a pipeline
    names away and generates without.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def __get__(self, pipe: Any, owner: type) -> list[str]:
        return [name for name in self.names if pipe is None or pipe.__dict__.get(name) is None]


def holds_safetensors(folder: str | os.PathLike) -> bool:
    """Whether a saved pipeline has weights as safetensors; then no pickle beside them needs to be looked at."""
    return any(Path(folder).glob("*/*.safetensors"))


def write_loader(folder: Path) -> None:
    """Writes the file that the generic loader imports; one of the user's own stays, and a line says so."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOADER_FILE
    if path.exists() and not (path.is_file() and path.read_bytes() in (b"", LOADER.encode())):
        logger.warning("%s is not ours and stays as it is: the generic loader imports that.", path)
        return
    path.write_text(LOADER)


def download(repo_id: Any, kwargs: dict[str, Any]) -> str:
    """The local folder of a Hub repository's files; takes the arguments of the download out of `kwargs`.

    Pickles are downloaded only where `use_safetensors=False` asks for them.

    Raises:
        ValueError: if it is no Hub id.
    """
    repo_id = str(repo_id) if isinstance(repo_id, os.PathLike) else repo_id
    try:
        validate_repo_id(repo_id if isinstance(repo_id, str) else "")
    except HFValidationError as error:
        raise ValueError(f"{shown(repo_id)} is neither a folder nor a Hub id such as 'owner/name'.") from error
    arguments = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    ending = "bin" if kwargs.get("use_safetensors") is False else "safetensors"
    # Weights of other variants have their name between two dots: diffusion_pytorch_model.fp16.safetensors.
    others = [f"*/*.*.{ending}"] if kwargs.get("variant") is None else []
    return snapshot_download(repo_id, allow_patterns=["*.json", f"*.{ending}"], ignore_patterns=others, **arguments)


class PipelineFiles:
    """For pipelines from outside the library: how they are saved, and loaded from folders and the Hub."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `DiffusionPipeline.save_pretrained`, with a `pipeline.py` for the generic loader:

        `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)`

        A `pipeline.py` of your own that is there already stays as it is, and a warning says so.
        """
        write_loader(Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """As `DiffusionPipeline.from_pretrained`, from a folder or a Hub id, in float32 unless `dtype` says otherwise.

        A Hub id is downloaded first: diffusers itself loads components from outside the library from folders only.
        Pickles are loaded from folders that hold nothing else, as the library does, of the Hub only with
        `use_safetensors=False`; `use_safetensors=True` never loads one.

        Raises:
            ValueError: if it is neither a folder nor a Hub id.
        """
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)  # or it would be the default of whoever loads
        folder = pretrained_model_name_or_path
        if not (isinstance(folder, str | os.PathLike) and os.path.isdir(folder)):
            folder = download(folder, kwargs)
        kwargs.setdefault("use_safetensors", holds_safetensors(folder))
        return super().from_pretrained(folder, **kwargs)
