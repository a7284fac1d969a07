"""Generated codes of many images, kept in a folder: an evaluation that was interrupted, or wants more, goes on.

Image i of a bank has the class i mod C and the generator seed `seed` + i, so it can be made again alone:

    pipe([i % C], guidance_scale=w, generator=torch.Generator().manual_seed(seed + i))
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from spectralar.pipeline import SpectralARPipeline

from ..data.codes import fingerprint, shard_identity, write_shard
from ..runs.processes import Team

SHARD = 250  # images, generated side by side


def sample_bank(
    pipe: SpectralARPipeline, folder: Path, samples: int, guidance_scale: float, seed: int, team: Team
) -> tuple[Tensor, Tensor]:
    """Codes (n, N) int64 and labels (n,) int64 of `samples` images; generates what the folder does not hold yet.

    Shards of another model, seed or guidance scale are replaced. Temperature 1, no top-k, no top-p. Of several
    processes each makes some of the shards; on several machines they have to share the folder.

    Raises:
        SystemExit: if the folder does not hold all shards in the end.
    """
    model = {"tokenizer": fingerprint(pipe.tokenizer), "transformer": fingerprint(pipe.transformer)}
    labels = torch.arange(samples) % pipe.transformer.config.num_classes

    def shard(start: int) -> tuple[Path, dict[str, str]]:
        identity = {**model, "guidance_scale": str(guidance_scale), "seed": str(seed), "start": str(start)}
        return folder / f"guidance-{guidance_scale:g}" / f"{start:07d}.safetensors", identity

    def fill(indices: Tensor) -> None:
        path, identity = shard(int(indices[0]))
        if len(_stored_codes(path, identity)) < len(indices):
            generators = [torch.Generator().manual_seed((seed + i) % 2**63) for i in indices.tolist()]
            output = pipe(labels[indices], guidance_scale=guidance_scale, generator=generators, output_type="latent")
            write_shard(path, output.codes.cpu(), labels[indices], identity)

    team.map(fill, SHARD, f"sampling, guidance scale {guidance_scale:g}", torch.arange(samples))
    team.wait()
    parts = []
    for start in range(0, samples, SHARD):
        path, identity = shard(start)
        parts.append(_stored_codes(path, identity)[:SHARD].long())
    codes = torch.cat(parts)
    if len(codes) < samples:
        raise SystemExit(f"{folder} lacks samples that other processes made: all machines have to share it.")
    return codes[:samples], labels


def _stored_codes(path: Path, identity: dict[str, str]) -> Tensor:
    """Codes of a shard; none if it is missing, damaged or of another identity."""
    return load_file(path)["codes"] if shard_identity(path) == identity else torch.empty(0)
