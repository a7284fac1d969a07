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


def read_shards(folder: Path, split: str, tokenizer: SpectralTokenizer) -> StoredCodes:
    """All stored copies of a split.

    Raises:
        ValueError: if there are none, or they were made by another tokenizer.
    """
    paths = sorted(folder.glob(f"{split}-*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no codes of {split!r}: run train.encode_dataset with the same preset first.")
    own = fingerprint(tokenizer)
    copies, names = [], []
    for path in paths:
        identity = shard_identity(path)
        if identity is None:
            raise ValueError(f"{path} is damaged: delete it and run train.encode_dataset again.")
        if identity.get("tokenizer") != own:
            raise ValueError(
                f"{path} holds codes of another tokenizer ({identity.get('tokenizer', 'unknown')[:12]}, this one is "
                f"{own[:12]}): run train.encode_dataset again."
            )
        with safe_open(str(path), framework="pt") as file:
            copies.append((file.get_tensor("codes"), file.get_tensor("labels")))
        names = json.loads(identity["class_names"])
    return StoredCodes(torch.stack([codes for codes, _ in copies]), copies[0][1].long(), names)
