"""Nested reconstruction: which prefixes a step decodes, and how far each is from the low-pass image it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralar.spectral import low_pass


def sample_lengths(
    batch: int, samples: int, num_tokens: int, generator: torch.Generator, law: str = "mixed"
) -> Tensor:
    """Prefix lengths (B, 1 + S): the full one first, then samples.

    law: "uniform" on 1..N, "powers" = uniform on the powers of two up to N, "mixed" = one of the two, by half.
    """
    uniform = torch.randint(1, num_tokens + 1, (batch, samples), generator=generator)
    powers = 2 ** torch.randint(0, num_tokens.bit_length(), (batch, samples), generator=generator)
    pick = torch.rand(batch, samples, generator=generator) < {"uniform": 1.0, "mixed": 0.5, "powers": 0.0}[law]
    sampled = torch.where(pick, uniform, powers.clamp(max=num_tokens))
    return torch.cat([torch.full((batch, 1), num_tokens), sampled], dim=1)


def nested_loss(
    frames: Tensor, images: Tensor, lengths: Tensor, cutoffs: Tensor, weight: float = 0.5, largest_boost: float = 1.0
) -> dict[str, Tensor]:
    """Squared errors of frames (B, 1 + S, C, H, H) against the low-passes of images (B, C, H, H), weighted by w_k.

    The first frame is of the full prefix, whose low-pass is the image.
    """
    prefix_cutoffs = cutoffs[lengths[:, 1:]]  # (B, S)
    targets = low_pass(images.unsqueeze(1), prefix_cutoffs)
    error = (frames[:, 1:].float() - targets).square().mean(dim=(2, 3, 4))  # (B, S)
    weights = weight * (images.shape[-1] / prefix_cutoffs).clamp(max=largest_boost)
    full = (frames[:, 0].float() - images).square().mean()
    return {"full": full, "prefix": (weights * error).sum(dim=1).mean()}
