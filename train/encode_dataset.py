"""Encodes a data set once with a trained tokenizer, for stage 2.

    python -m train.encode_dataset fashion-mnist-32

Writes OUTPUT/codes/train-*.safetensors, one shard a copy: the first is not augmented, the others are, each
differently. Held-out images are encoded once, not augmented. Shards that are there already are kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from spectralar.tokenizer import SpectralTokenizer

from .codes import fingerprint, shard_identity, write_shard
from .config import Config
from .data import ImageSet, augment, load_images, to_float
from .engine import parse_arguments

BATCH = 256


def load_tokenizer(folder: Path) -> SpectralTokenizer:
    """The finished tokenizer of stage 1, in evaluation mode and float32 with its shipped (half) weights."""
    if not (folder / "config.json").is_file():
        raise SystemExit(f"There is no trained tokenizer in {folder}: run train.train_tokenizer to its end first.")
    return SpectralTokenizer.from_pretrained(folder).eval().requires_grad_(False)


@torch.no_grad()
def encode_images(
    tokenizer: SpectralTokenizer, data: ImageSet, augmentations: list[str], seed: int, device: torch.device
) -> Tensor:
    """Codes (n, N) int32 of all images, augmented by `augmentations` drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for batch in tqdm(data.images.split(BATCH), "encoding", unit_scale=BATCH, unit="img", leave=False):
        images = augment(batch.to(device), augmentations, generator)
        parts.append(tokenizer.encode(to_float(images)).int().cpu())
    return torch.cat(parts)


def encode_split(tokenizer: SpectralTokenizer, config: Config, split: str, folder: Path, device: torch.device) -> None:
    own, copies = fingerprint(tokenizer), config.train_transformer.copies if split == "train" else 1
    data = load_images(config.data, split)
    names_json = json.dumps(data.class_names)
    for copy in range(copies):
        names = config.data.augment if copy else []
        path = folder / f"{split}-{copy:03d}.safetensors"
        identity = {
            "tokenizer": own, "source": config.data.source, "images": str(len(data)), "class_names": names_json,
            "augment": ",".join(names), "seed": str(config.train_transformer.seed + copy),
        }  # fmt: skip
        if shard_identity(path) == identity:
            print(f"{path} is there already.")
            continue
        codes = encode_images(tokenizer, data, names, config.train_transformer.seed + copy, device)
        write_shard(path, codes, data.labels, identity)
        print(f"{path}: {len(codes)} x {codes.shape[1]} codes.")
    for stale in sorted(folder.glob(f"{split}-*.safetensors"))[copies:]:
        stale.unlink()


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(__doc__.split("\n\n")[0], argv)
    device = Accelerator().device
    tokenizer = load_tokenizer(args.output / "tokenizer").to(device)
    if args.dry_run:
        config.data.limit = 2 * BATCH
        codes = encode_images(tokenizer, load_images(config.data, "eval"), config.data.augment, 0, device)
        print(f"Dry run: {len(codes)} images encoded, nothing was written.")
        return
    for split in ("train", "eval"):
        encode_split(tokenizer, config, split, args.output / "codes", device)


if __name__ == "__main__":
    main()
