"""Images to codes: the trained tokenizer, and what it makes of a data set."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spectralar.tokenizer import SpectralTokenizer

from ..configs.config import Config
from .codes import fingerprint
from .decoding import LazyImages
from .images import Prefetch, augment, to_float

BATCH = 256


def load_tokenizer(folder: Path) -> SpectralTokenizer:
    """The finished tokenizer of stage 1, in evaluation mode and float32 with its shipped (half) weights."""
    if not (folder / "config.json").is_file():
        raise SystemExit(f"There is no trained tokenizer in {folder}: run train.train_tokenizer to its end first.")
    tokenizer = SpectralTokenizer.from_pretrained(folder, dtype=torch.float32)
    tokenizer.register_to_config(_name_or_path="")  # a path of this machine, which would be saved with the pipeline
    return tokenizer.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(
    tokenizer: SpectralTokenizer,
    images: Tensor | LazyImages,
    augmentations: list[str],
    seed: int,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Codes (stop - start, N) int32 of images (n, C, H, H) uint8, augmented by draws from `seed` and `start`."""
    stop = len(images) if stop is None else stop
    generator = torch.Generator().manual_seed((seed + 1_000_003 * start) % 2**63)
    firsts = range(start, stop, BATCH)
    fetch = Prefetch(lambda i: images[start + i * BATCH : min(stop, start + (i + 1) * BATCH)])
    parts = []
    with tqdm(total=stop - start, desc="encoding", unit="img", leave=False) as bar:
        for i in range(len(firsts)):
            batch = augment(fetch(i).to(tokenizer.device), augmentations, generator)
            parts.append(tokenizer.encode(to_float(batch)).int().cpu())
            bar.update(len(batch))
    return torch.cat(parts)


def wanted_shards(config: Config, split: str, tokenizer: SpectralTokenizer) -> dict[str, dict[str, str]]:
    """What a run's codes of a split have to be: file name -> identity of each shard, as far as the settings say."""
    data = asdict(config.data)
    # Places, what the shards differ in, how often an image is drawn, mere names, and what the tokenizer alone learns.
    for name in ("root", "class_balance", "augment", "class_names", "cache", "decode", "window", "mix"):
        del data[name]
    common = {"tokenizer": fingerprint(tokenizer), "split": split, "data": json.dumps(data)}
    shards = {}
    for copy in range(config.train_transformer.copies if split == "train" else 1):
        names = config.data.augment if copy else []  # the first as it is
        seed = config.train_transformer.seed + copy
        shards[f"{split}-{copy:03d}.safetensors"] = {**common, "augment": ",".join(names), "seed": str(seed)}
    return shards
