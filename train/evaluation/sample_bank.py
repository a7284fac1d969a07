"""Generated codes of many images, kept in a folder: an evaluation that was interrupted, or wants more, goes on.

Image i of a bank has the class labels[i] and the generator seed `seed` + i, so it can be made again alone:

    pipe([labels[i]], guidance_scale=w, temperature=t, generator=torch.Generator().manual_seed(seed + i))
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
    pipe: SpectralARPipeline, folder: Path, labels: Tensor, guidance_scale: float, seed: int, team: Team,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Codes (n, N) int64 of images of the classes `labels` (n,) int64; generates what the folder does not hold yet.

    Shards of another model, seed, guidance scale or temperature, or of other classes, are replaced. No top-k, no
    top-p. Of several processes each makes some of the shards; on several machines they have to share the folder.

    Raises:
        SystemExit: if the folder does not hold all shards in the end.
    """
    decoder = pipe.transformer.config.decoder_feedback
    model = {"tokenizer": fingerprint(pipe.tokenizer, decoder), "transformer": fingerprint(pipe.transformer)}

    def shard(start: int) -> tuple[Path, dict[str, str]]:
        how = {"guidance_scale": str(guidance_scale), "temperature": str(temperature)}
        identity = {**model, **how, "seed": str(seed), "start": str(start)}
        return folder / f"guidance-{guidance_scale:g}" / f"{start:07d}.safetensors", identity

    def fill(indices: Tensor) -> None:
        path, identity = shard(int(indices[0]))
        if len(_stored_codes(path, identity, labels[indices])) < len(indices):
            generators = [torch.Generator().manual_seed((seed + i) % 2**63) for i in indices.tolist()]
            output = pipe(
                labels[indices], guidance_scale=guidance_scale, temperature=temperature, generator=generators,
                output_type="latent",
            )  # fmt: skip
            write_shard(path, output.codes.cpu(), labels[indices], identity)

    team.map(fill, SHARD, f"sampling, guidance scale {guidance_scale:g}", torch.arange(len(labels)))
    team.wait()
    parts = []
    for start in range(0, len(labels), SHARD):
        path, identity = shard(start)
        parts.append(_stored_codes(path, identity, labels[start : start + SHARD]).long())
    codes = torch.cat(parts)
    if len(codes) < len(labels):
        raise SystemExit(f"{folder} lacks samples that other processes made: all machines have to share it.")
    return codes


def _stored_codes(path: Path, identity: dict[str, str], labels: Tensor) -> Tensor:
    """Codes of a shard, at most as many as `labels`; none if it is missing, damaged, or not of these."""
    if shard_identity(path) != identity:
        return torch.empty(0)
    stored = load_file(path)
    count = min(len(labels), len(stored["labels"]))
    return stored["codes"][:count] if torch.equal(stored["labels"][:count].long(), labels[:count]) else torch.empty(0)
