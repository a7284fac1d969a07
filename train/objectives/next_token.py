"""Next-token cross-entropy of the codes, by position, with decoder feedback where the model listens to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.inference.feedback import all_logits
from spectralar.tokenizer import SpectralTokenizer
from spectralar.transformer import SpectralARTransformer

STRATA = 8
IMAGES_AT_ONCE = 256


def next_token_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy (S,) in nats at each position, averaged over images: logits (B, S, K), codes (B, S)."""
    # Flat, with the K logits of a token side by side: of (B, K, S) a CPU takes three times as long.
    losses = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")  # (B S,)
    return losses.view(codes.shape).mean(dim=0)


def strata(num_tokens: int) -> list[range]:
    """Positions 1..N-1 in up to eight parts of equal length."""
    edges = sorted({round(1 + (num_tokens - 1) * i / STRATA) for i in range(STRATA + 1)})
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def drawn_positions(num_tokens: int, generator: torch.Generator) -> list[int]:
    """Position 0, and one drawn from each of the `strata`: those that a step with decoder feedback learns from.

    An image of each prefix for each image of a batch would take the time of ten steps. With parts of equal length
    the mean over steps is that over all positions but the first, which comes more often; with more of the other early
    ones, too, the held-out loss was higher (docs/ablations.md).

    Returns:
        At most nine positions in 0..num_tokens-1, ascending.
    """
    draws = torch.rand(STRATA, generator=generator, dtype=torch.float64).tolist()
    return [0, *(part[int(u * len(part))] for part, u in zip(strata(num_tokens), draws, strict=False))]


def middle_positions(num_tokens: int) -> list[int]:
    """The same of the middle of each part: a step that draws them takes as long as steps do on average."""
    return [0, *(part[len(part) // 2] for part in strata(num_tokens))]


@torch.no_grad()
def next_token_losses(
    model: SpectralARTransformer, codes: Tensor, labels: Tensor, device: torch.device, tokenizer: SpectralTokenizer
) -> Tensor:
    """Next-token loss by position (N,), in nats, without dropout. The tokenizer is asked for its expectations."""
    model.eval()
    total = torch.zeros(codes.shape[1], device=device)
    for c, y in zip(codes.split(IMAGES_AT_ONCE), labels.split(IMAGES_AT_ONCE), strict=True):
        c, y = c.to(device), y.to(device)
        total += next_token_loss(all_logits(model, tokenizer, c, y), c) * len(c)
    model.train()
    return total / len(codes)
