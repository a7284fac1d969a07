"""Encodes a data set once with a trained tokenizer, for stage 2.

    python -m train.encode_dataset fashion-mnist-32

Writes OUTPUT/codes/train-*.safetensors, a shard of each 65536 images of a copy: the first copy is not augmented, the
others are, each differently. Held-out images are encoded once, not augmented. Shards that are there already are kept.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

from spectralar.tokenizer import SpectralTokenizer

from .configs.config import Config
from .data.codes import shard_identity, shard_name, write_shard
from .data.encoding import BATCH, encode_images, load_tokenizer, wanted_shards
from .data.images import load_images
from .runs.command_line import clear_errors, parse_arguments, read
from .runs.engine import make_accelerator

SHARD = 65536  # images of a larger data set that a file holds: what a kill loses, and what processes share


def encode_split(
    tokenizer: SpectralTokenizer, config: Config, split: str, folder: Path, rank: int = 0, world: int = 1,
    deadline: float = math.inf,
) -> bool:  # fmt: skip
    """Writes those shards of a split that are missing or out of date; with several processes every world-th.

    Returns whether all were written before `deadline`, in seconds of `time.monotonic`.
    """
    data = read(load_images, config.data, split)
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
            codes = encode_images(tokenizer, read(load_images, config.data, "eval").images, config.data.augment, 0)
            print(f"Dry run: {len(codes)} images encoded, nothing was written.")
            return
        folder, rank, world = args.output / "codes", accelerator.process_index, accelerator.num_processes
        for split in ("train", "eval"):
            if not encode_split(tokenizer, config, split, folder, rank, world, deadline):
                print(f"Stopped: {args.max_minutes:g} minutes are over. The same command goes on.")
                return


if __name__ == "__main__":
    main()
