"""Encodes a data set once with a trained tokenizer, for stage 2.

    python -m train.encode_dataset fashion-mnist-32

Writes OUTPUT/codes/train-*.safetensors, a shard of each 65536 images of a copy: the first copy is not augmented, the
others are, each differently. Held-out images are encoded once, not augmented. Shards that are there already are kept.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from spectralar.tokenizer import SpectralTokenizer

from .codes import fingerprint, shard_identity, shard_name, write_shard
from .command_line import clear_errors, parse_arguments, read_split
from .config import Config
from .data import Prefetch, augment, to_float
from .decoding import LazyImages
from .engine import make_accelerator

BATCH = 256
SHARD = 65536  # images of a larger data set that a file holds: what a kill loses, and what processes share


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


def encode_split(
    tokenizer: SpectralTokenizer, config: Config, split: str, folder: Path, rank: int = 0, world: int = 1,
    deadline: float = math.inf,
) -> bool:  # fmt: skip
    """Writes those shards of a split that are missing or out of date; with several processes every world-th.

    Returns whether all were written before `deadline`, in seconds of `time.monotonic`.
    """
    data = read_split(config, split)
    common = {"images": str(len(data)), "class_names": json.dumps(data.class_names)}  # what only the data can say
    jobs = {}
    for first, identity in wanted_shards(config, split, tokenizer).items():
        for start in range(0, len(data), SHARD):
            bounds = {"start": str(start), "stop": str(min(len(data), start + SHARD))} if len(data) > SHARD else {}
            jobs[shard_name(first, start)] = {**identity, **common, **bounds}
    for name, identity in list(jobs.items())[rank::world]:
        if shard_identity(folder / name) == identity:
            print(f"{folder / name} is there already.")
            continue
        if time.monotonic() > deadline:
            return False
        names = identity["augment"].split(",") if identity["augment"] else []
        start, stop = int(identity.get("start", 0)), int(identity.get("stop", len(data)))
        codes = encode_images(tokenizer, data.images, names, int(identity["seed"]), start, stop)
        write_shard(folder / name, codes, data.labels[start:stop], identity)
        print(f"{folder / name}: {len(codes)} x {codes.shape[1]} codes.")
    for path in folder.glob(f"{split}-*") if rank == 0 else ():  # copies no longer wanted, leftovers of a kill
        if path.with_suffix(".safetensors").name not in jobs:
            path.unlink()
    return True


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(__doc__.split("\n\n")[0], argv)
    accelerator, deadline = make_accelerator(), time.monotonic() + 60 * args.max_minutes
    with clear_errors():
        tokenizer = load_tokenizer(args.output / "tokenizer").to(accelerator.device)
        if args.dry_run:
            config.data.limit = 2 * BATCH
            codes = encode_images(tokenizer, read_split(config, "eval").images, config.data.augment, 0)
            print(f"Dry run: {len(codes)} images encoded, nothing was written.")
            return
        folder, rank, world = args.output / "codes", accelerator.process_index, accelerator.num_processes
        for split in ("train", "eval"):
            if not encode_split(tokenizer, config, split, folder, rank, world, deadline):
                print(f"Stopped: {args.max_minutes:g} minutes are over. The same command goes on.")
                return


if __name__ == "__main__":
    main()
