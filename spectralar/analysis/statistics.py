"""What a model's codes are like: how often each stands where, how open the next one is; kept beside the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATISTICS_FILE = "statistics.safetensors"


def code_marginals(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code stands at each position: codes (n, N) -> probabilities (N, K)."""
    one_hot = torch.zeros(codes.shape[1], codebook_size, dtype=torch.float64, device="cpu")
    one_hot.scatter_add_(1, codes.T.cpu().long(), torch.ones_like(codes.T, dtype=torch.float64, device="cpu"))
    return one_hot / codes.shape[0]


@torch.no_grad()
def next_token_entropy(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    codes: Tensor,
    class_labels: Tensor,
    codebook_sizes: Sequence[int] | None = None,
    batch_size: int = 256,
) -> Tensor:
    """How open the next token is: entropy of p(q_t | q_1..q_(t-1), class) in nats, averaged over images.

    Args:
        logits_of: gives the logits (b, N, K) of all tokens of codes (b, N) of classes (b,), as
            `inference.feedback.all_logits` does for a transformer.
        codes: (n, N) of images.
        class_labels: (n,) int64, their classes.
        codebook_sizes: entries that each position may use, of a tokenizer with nested codebooks. None: all.
        batch_size: images at a time.

    Returns:
        (N,) float32, on the CPU: 0 where the token is certain, log K where all are equally likely.
    """
    total = torch.zeros(codes.shape[1], dtype=torch.float64, device="cpu")
    for part, labels in zip(codes.split(batch_size), class_labels.split(batch_size), strict=True):
        logits = logits_of(part, labels)  # (b, N, K)
        for t, size in enumerate(codebook_sizes or ()):
            logits[:, t, size:] = -torch.inf
        total += torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).sum(dim=0).cpu()
    return (total / len(codes)).float()


class CodeUse(NamedTuple):
    """How much of the codebook each position uses."""

    used: Tensor  # (N,) int64, entries seen at least once: never more than there were images
    perplexity: Tensor  # (N,) float64, exp of the entropy of the code frequencies: as many equally likely entries


def code_use(weights: Tensor) -> CodeUse:
    """Use of the codebook by position, from counts or marginals (N, K)."""
    weights = weights.double()
    p = weights / weights.sum(dim=1, keepdim=True)
    return CodeUse((weights > 0).sum(dim=1), torch.special.entr(p).sum(dim=1).exp())


class Statistics(NamedTuple):
    """What is known of a model's codes on held-out images, kept beside its weights."""

    code_counts: Tensor  # (N, K) int32: how often each code stood at each position
    next_token_entropy: Tensor  # (N,) float32, nats
    psnr: Tensor | None = None  # (N,) float32, dB, of the mean squared error of each prefix length
    gaussian_psnr: Tensor | None = None  # (N,) float32, dB, its bound, see `spectral.gaussian_psnr`


def write_statistics(
    folder: str | os.PathLike,
    codes: Tensor,
    codebook_size: int,
    next_token_entropy: Tensor,
    psnr: Sequence[float] | None = None,
    gaussian_psnr: Sequence[float] | None = None,
) -> Path:
    """Stores the statistics of a model in its folder, in statistics.safetensors.

    Args:
        folder: of the saved pipeline.
        codes: (n, N) of held-out images, in 0..K-1.
        codebook_size: K.
        next_token_entropy: (N,) in nats, as the function of this name returns it.
        psnr: (N,) in dB, of the mean squared error of each prefix length.
        gaussian_psnr: (N,) in dB, the bound on it for Gaussian images.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the shapes do not fit or a code is out of range.
    """
    entropy = torch.as_tensor(next_token_entropy, dtype=torch.float32, device="cpu")
    if codes.ndim != 2 or entropy.shape != codes.shape[1:]:
        raise ValueError(
            f"codes must be (n, N) and next_token_entropy (N,), got {tuple(codes.shape)} and {tuple(entropy.shape)}."
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise ValueError(f"codes must be between 0 and {codebook_size - 1}.")
    codes = codes.cpu().long()
    counts = torch.stack([torch.bincount(column, minlength=codebook_size) for column in codes.T])  # (N, K)
    path = Path(folder) / STATISTICS_FILE
    tensors = {"code_counts": counts.int(), "next_token_entropy": entropy.contiguous()}
    for name, values in (("psnr", psnr), ("gaussian_psnr", gaussian_psnr)):
        if values is not None:
            tensors[name] = torch.tensor(values, dtype=torch.float32, device="cpu")
            if tensors[name].shape != entropy.shape:
                raise ValueError(f"{name} must be {tuple(entropy.shape)}, got {tuple(tensors[name].shape)}.")
    save_file(tensors, path)
    return path


def read_statistics(folder: str | os.PathLike) -> Statistics | None:
    """The statistics stored in a model's folder; None where there are none.

    Raises:
        ValueError: if the file holds something else.
    """
    path = Path(folder) / STATISTICS_FILE
    if not path.is_file():
        return None
    try:
        statistics = Statistics(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path} holds no statistics of a model's codes: {error}.") from error
    by_position = [x for x in statistics[1:] if x is not None]
    if statistics.code_counts.ndim != 2 or any(x.shape != statistics.code_counts.shape[:1] for x in by_position):
        raise ValueError(f"{path} must hold code_counts (N, K), and beside it next_token_entropy and others, (N,).")
    return statistics
