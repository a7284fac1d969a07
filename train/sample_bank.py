"""Generated codes of many images, kept in a folder: an evaluation that was interrupted, or wants more, goes on.

Image i of a bank has the class i mod C and the generator seed `seed` + i, so it can be made again alone:

    pipe([i % C], guidance_scale=w, generator=torch.Generator().manual_seed(seed + i))
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from spectralar.pipeline import SpectralARPipeline

from .codes import fingerprint, shard_identity, write_shard

SHARD = 250  # images, generated side by side


def sample_bank(
    pipe: SpectralARPipeline, folder: Path, samples: int, guidance_scale: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Codes (n, N) int64 and labels (n,) int64 of `samples` images; generates what the folder does not hold yet.

    Shards of another model, seed or guidance scale are replaced. Temperature 1, no top-k, no top-p.
    """
    model = {"tokenizer": fingerprint(pipe.tokenizer), "transformer": fingerprint(pipe.transformer)}
    num_classes = pipe.transformer.config.num_classes
    parts = []
    with tqdm(total=samples, desc=f"sampling, guidance scale {guidance_scale:g}", unit="img", leave=False) as bar:
        for start in range(0, samples, SHARD):
            count = min(SHARD, samples - start)
            path = folder / f"guidance-{guidance_scale:g}" / f"{start:07d}.safetensors"
            identity = {**model, "guidance_scale": str(guidance_scale), "seed": str(seed), "start": str(start)}
            codes = load_file(path)["codes"] if shard_identity(path) == identity else torch.empty(0)
            if len(codes) < count:
                indices = range(start, start + count)
                labels = torch.tensor([i % num_classes for i in indices])
                generators = [torch.Generator().manual_seed((seed + i) % 2**63) for i in indices]
                output = pipe(labels, guidance_scale=guidance_scale, generator=generators, output_type="latent")
                codes = output.codes.cpu()
                write_shard(path, codes, labels, identity)
            parts.append(codes[:count].long())
            bar.update(count)
    return torch.cat(parts), torch.arange(samples) % num_classes
