"""Stored codes: compact shards of one tokenizer's codes, which know whose they are."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectralar.tokenizer import SpectralTokenizer

AGAIN = "run train.encode_dataset again."
# Parts of a tokenizer that codes do not depend on.
DECODER = ("from_latent", "token_position", "mask_tokens", "decoder", "to_pixels", "seam_conv", "base_embed")


def fingerprint(tokenizer: SpectralTokenizer, decoder: bool = False) -> str:
    """SHA-256 of a tokenizer's shape and of the weights that make codes, at the half precision they ship in.

    The decoder is left out unless `decoder` says otherwise, for a transformer that listens to it: it may be trained on
    without the codes, and what learnt them, being made again.
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in tokenizer.config.items() if not key.startswith("_")}
    for name in ("fsq_levels", "cutoffs", "spectral_shortcut", "decoder_feedback"):
        if not config.get(name):
            config.pop(name, None)  # came later: older models keep their fingerprint
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        if name.startswith(DECODER) and not decoder:
            continue
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


def shard_name(first: str, start: int) -> str:
    """The file of the images from `start` on, of a copy that begins in `first`: train-001-00065536.safetensors."""
    return first if start == 0 else first.replace(".", f"-{start:08d}.")


def read_shards(folder: Path, wanted: dict[str, dict[str, str]]) -> StoredCodes:
    """The stored copies of a split, in the order of `wanted`.

    Args:
        folder: where `write_shard` wrote them.
        wanted: by name of a copy's first file, what the identity of its shards has to hold. If that says `images`
            and `stop`, more shards follow, each from where the one before it stops.

    Raises:
        ValueError: if a shard is missing, damaged, or was made by another tokenizer or with other settings.
    """
    copies, labels, names = [], None, []
    for first, expected in wanted.items():
        parts, start, total = [], 0, 1
        while start < total:
            path = folder / shard_name(first, start)
            identity, tensors = _read_shard(path, expected)
            parts.append(tensors)
            start = total = int(identity.get("stop", 1))
            if "stop" in identity:
                total = int(identity["images"])
        codes, own = (torch.cat([part[name] for part in parts]) for name in ("codes", "labels"))
        if labels is not None and not torch.equal(labels, own):
            raise ValueError(f"{path} was made from other images than the shards before it: {AGAIN}")
        copies.append(codes)
        labels, names = own, json.loads(identity["class_names"])
    return StoredCodes(torch.stack(copies), labels.long(), names)


def _read_shard(path: Path, expected: dict[str, str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.exists():
        raise ValueError(f"There are no codes in {path}: run train.encode_dataset with the same preset first.")
    identity = shard_identity(path)
    if identity is None:
        raise ValueError(f"{path} is damaged: {AGAIN}")
    if identity.get("tokenizer") != expected["tokenizer"]:
        theirs, own = identity.get("tokenizer", "unknown")[:12], expected["tokenizer"][:12]
        raise ValueError(f"{path} holds codes of another tokenizer ({theirs}, this one is {own}): {AGAIN}")
    for key, value in expected.items():
        if identity.get(key) != value:
            raise ValueError(f"{path} was made with {key}={identity.get(key)}, not {value}: {AGAIN}")
    return identity, load_file(path)
