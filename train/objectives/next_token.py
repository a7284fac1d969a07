"""Next-token cross-entropy of the codes, by position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.transformer import SpectralARTransformer


def next_token_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy (N,) in nats at each position, averaged over images: logits (B, N, K), codes (B, N)."""
    # Flat, with the K logits of a token side by side: of (B, K, N) a CPU takes three times as long.
    losses = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")  # (B N,)
    return losses.view(codes.shape).mean(dim=0)


@torch.no_grad()
def next_token_losses(model: SpectralARTransformer, codes: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """Next-token loss by position (N,), in nats, without dropout."""
    model.eval()
    total = torch.zeros(codes.shape[1], device=device)
    for c, y in zip(codes.split(256), labels.split(256), strict=True):
        c, y = c.to(device), y.to(device)
        total += next_token_loss(model(c[:, :-1], y), c) * len(c)
    model.train()
    return total / len(codes)
