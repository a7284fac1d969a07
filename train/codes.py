"""Stored codes: compact shards of one tokenizer's codes, which know whose they are."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectralar.tokenizer import SpectralTokenizer


def fingerprint(tokenizer: SpectralTokenizer) -> str:
    """SHA-256 of a tokenizer's shape and weights, at the half precision they ship in."""
    digest = hashlib.sha256()
    config = {key: value for key, value in tokenizer.config.items() if not key.startswith("_")}
    if config.get("fsq_levels") is None:
        config.pop("fsq_levels", None)  # came later: older models keep their fingerprint
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_shard(path: Path, codes: Tensor, labels: Tensor, identity: dict[str, str]) -> None:
    """Writes codes (n, N) and labels (n,) with the identity they were made under; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # int32 where uint16 would do: half the size again is not worth a type that torch cannot index with.
    save_file({"codes": codes.int(), "labels": labels.int()}, str(partial), metadata=identity)
    os.replace(partial, path)


def shard_identity(path: Path) -> dict[str, str] | None:
    """What `write_shard` recorded; None if the file is missing or damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata()
    except Exception:  # safetensors raises its own error types on truncated files
        return None


@dataclass
class StoredCodes:
    """One split of a data set as codes."""

    codes: Tensor  # (copies, n, N) int32
    labels: Tensor  # (n,) int64
    class_names: list[str]


def read_shards(folder: Path, wanted: dict[str, dict[str, str]]) -> StoredCodes:
    """The stored copies of a split, in the order of `wanted`.

    Args:
        folder: where `write_shard` wrote them.
        wanted: by file name, what the identity of each shard has to hold.

    Raises:
        ValueError: if a shard is missing, damaged, or was made by another tokenizer or with other settings.
    """
    again = "run train.encode_dataset again."
    copies, labels, names = [], None, []
    for name, expected in wanted.items():
        path = folder / name
        if not path.exists():
            raise ValueError(f"There are no codes in {path}: run train.encode_dataset with the same preset first.")
        identity = shard_identity(path)
        if identity is None:
            raise ValueError(f"{path} is damaged: {again}")
        if identity.get("tokenizer") != expected["tokenizer"]:
            theirs, own = identity.get("tokenizer", "unknown")[:12], expected["tokenizer"][:12]
            raise ValueError(f"{path} holds codes of another tokenizer ({theirs}, this one is {own}): {again}")
        for key, value in expected.items():
            if identity.get(key) != value:
                raise ValueError(f"{path} was made with {key}={identity.get(key)}, not {value}: {again}")
        with safe_open(str(path), framework="pt") as file:
            copies.append(file.get_tensor("codes"))
            if labels is not None and not torch.equal(labels, file.get_tensor("labels")):
                raise ValueError(f"{path} was made from other images than the shards before it: {again}")
            labels = file.get_tensor("labels")
        names = json.loads(identity["class_names"])
    return StoredCodes(torch.stack(copies), labels.long(), names)
