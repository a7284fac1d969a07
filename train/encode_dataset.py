"""Encodes a data set once with a trained tokenizer, for stage 2.

    python -m train.encode_dataset fashion-mnist-32

Writes OUTPUT/codes/train-*.safetensors, one shard a copy: the first is not augmented, the others are, each
differently. Held-out images are encoded once, not augmented. Shards that are there already are kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spectralar.tokenizer import SpectralTokenizer

from .codes import fingerprint, shard_identity, write_shard
from .command_line import clear_errors, parse_arguments, read_split
from .config import Config
from .data import augment, to_float
from .engine import make_accelerator

BATCH = 256


def load_tokenizer(folder: Path) -> SpectralTokenizer:
    """The finished tokenizer of stage 1, in evaluation mode and float32 with its shipped (half) weights."""
    if not (folder / "config.json").is_file():
        raise SystemExit(f"There is no trained tokenizer in {folder}: run train.train_tokenizer to its end first.")
    tokenizer = SpectralTokenizer.from_pretrained(folder, dtype=torch.float32)
    return tokenizer.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(tokenizer: SpectralTokenizer, images: Tensor, augmentations: list[str], seed: int) -> Tensor:
    """Codes (n, N) int32 of images (n, C, H, H) uint8, augmented by `augmentations` drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    parts = []
    with tqdm(total=len(images), desc="encoding", unit="img", leave=False) as bar:
        for batch in images.split(BATCH):
            batch = augment(batch.to(tokenizer.device), augmentations, generator)
            parts.append(tokenizer.encode(to_float(batch)).int().cpu())
            bar.update(len(batch))
    return torch.cat(parts)


def wanted_shards(config: Config, split: str, tokenizer: SpectralTokenizer) -> dict[str, dict[str, str]]:
    """What a run's codes of a split have to be: file name -> identity of each shard, as far as the settings say."""
    data = asdict(config.data)
    # Places, what the shards differ in, and mere names.
    for name in ("root", "augment", "class_names", "cache", "decode"):
        del data[name]
    common = {"tokenizer": fingerprint(tokenizer), "split": split, "data": json.dumps(data)}
    shards = {}
    for copy in range(config.train_transformer.copies if split == "train" else 1):
        names = config.data.augment if copy else []  # the first as it is
        seed = config.train_transformer.seed + copy
        shards[f"{split}-{copy:03d}.safetensors"] = {**common, "augment": ",".join(names), "seed": str(seed)}
    return shards


def encode_split(
    tokenizer: SpectralTokenizer, config: Config, split: str, folder: Path, rank: int = 0, world: int = 1
) -> None:
    """Writes those shards of a split that are missing or out of date; with several processes every world-th."""
    wanted = wanted_shards(config, split, tokenizer)
    data = read_split(config, split)
    for name, identity in list(wanted.items())[rank::world]:
        # What only the data can say.
        identity |= {"images": str(len(data)), "class_names": json.dumps(data.class_names)}
        if shard_identity(folder / name) == identity:
            print(f"{folder / name} is there already.")
            continue
        names = identity["augment"].split(",") if identity["augment"] else []
        codes = encode_images(tokenizer, data.images, names, int(identity["seed"]))
        write_shard(folder / name, codes, data.labels, identity)
        print(f"{folder / name}: {len(codes)} x {codes.shape[1]} codes.")
    for path in folder.glob(f"{split}-*") if rank == 0 else ():  # copies no longer wanted, leftovers of a kill
        if path.with_suffix(".safetensors").name not in wanted:
            path.unlink()


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(__doc__.split("\n\n")[0], argv)
    accelerator = make_accelerator()
    with clear_errors():
        tokenizer = load_tokenizer(args.output / "tokenizer").to(accelerator.device)
        if args.dry_run:
            config.data.limit = 2 * BATCH
            codes = encode_images(tokenizer, read_split(config, "eval").images, config.data.augment, 0)
            print(f"Dry run: {len(codes)} images encoded, nothing was written.")
            return
        for split in ("train", "eval"):
            folder, rank = args.output / "codes", accelerator.process_index
            encode_split(tokenizer, config, split, folder, rank, accelerator.num_processes)


if __name__ == "__main__":
    main()
