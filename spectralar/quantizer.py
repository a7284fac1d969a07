"""Quantizers, a cosine codebook and finite scalars as its baseline, and the revival of entries that no image uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Of what is drawn at random: the same on all devices.
INDICES = {"dtype": torch.int64, "device": "cpu"}


class QuantizerOutput(NamedTuple):
    quantized: Tensor  # (B, N, d) the codes' vectors, with a gradient to the latents
    codes: Tensor  # (B, N) int64
    codebook_loss: Tensor  # scalar: entries towards latents; 0 without a codebook to learn
    commitment_loss: Tensor  # scalar: latents towards entries; 0 without a codebook to learn


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def nested_codebook_sizes(first: int, last: int, num_tokens: int) -> list[int]:
    """Sizes (K_1, ..., K_N) that grow in equal ratios from `first` to `last`: so do the bits of a token, evenly."""
    steps = max(1, num_tokens - 1)
    return [round(first * (last / first) ** (t / steps)) for t in range(num_tokens)]


class VectorQuantizer(nn.Module):
    """Nearest codebook entry by cosine similarity (ViT-VQGAN, Yu et al. 2022, section 3.2).

    Latents and entries are l2-normalised, so the nearest entry in angle is the nearest in distance. The look-up
    runs in float32 or better whatever the weights' type: bfloat16 ties would make codes depend on the hardware.

    Args:
        codebook_size: number of entries K.
        codebook_dim: dimension d of an entry, 12 to 16 works well; high dimensions leave entries unused.
        codebook_sizes: nested codebooks (arXiv 2605.06207): position t uses only the first K_t entries. None: all.

    Attributes:
        rotation_trick: the gradient that latents get is that of the quantized vectors, turned by the rotation which
            turns a latent into its entry (Fifty et al. 2024), instead of the same one (straight through).
            Of training only; no value depends on it.

    Raises:
        ValueError: if a size is not positive, or a nested one is larger than `codebook_size`.
    """

    rotation_trick = False

    def __init__(
        self, codebook_size: int, codebook_dim: int, codebook_sizes: list[int] | tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        if codebook_size < 1 or codebook_dim < 1:
            raise ValueError(
                f"codebook_size and codebook_dim must be at least 1, got {codebook_size}, {codebook_dim}."
            )
        if codebook_sizes is not None and not all(1 <= size <= codebook_size for size in codebook_sizes):
            raise ValueError(f"codebook_sizes must lie between 1 and codebook_size ({codebook_size}).")
        self.codebook_size = codebook_size
        self.codebook_sizes = None if codebook_sizes is None else tuple(codebook_sizes)
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, codebook_dim), dim=-1))

    def _unit_entries(self) -> Tensor:
        return F.normalize(at_least_float32(self.codebook), dim=-1)

    def continuous(self, latents: Tensor) -> Tensor:
        """Latents (B, n, d) where entries lie too, on the unit sphere, but not quantized; at least float32."""
        return F.normalize(latents.to(torch.promote_types(latents.dtype, torch.float32)), dim=-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Entries of codes (..., ) int64 -> unit vectors (..., d)."""
        return F.normalize(at_least_float32(F.embedding(codes, self.codebook)), dim=-1).to(self.codebook.dtype)

    def encode(self, latents: Tensor) -> Tensor:
        """Codes (B, n) of latents (B, n, d), the first n positions of the sequence."""
        with torch.autocast(latents.device.type, enabled=False):
            entries = self._unit_entries().to(torch.promote_types(latents.dtype, torch.float32))
            similarity = F.normalize(latents.to(entries.dtype), dim=-1) @ entries.mT  # (B, n, K)
        if self.codebook_sizes is not None:
            sizes = torch.tensor(self.codebook_sizes[: latents.shape[1]], dtype=torch.int64, device=latents.device)
            entry = torch.arange(self.codebook_size, dtype=torch.int64, device=latents.device)
            similarity = similarity.masked_fill(entry >= sizes[:, None], -torch.inf)  # (n, K)
        return similarity.argmax(dim=-1)

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantizes latents (B, n, d), with straight-through gradients or those of the rotation trick."""
        with torch.autocast(latents.device.type, enabled=False):
            unit = F.normalize(at_least_float32(latents), dim=-1)
            codes = self.encode(unit.detach())
            entries = F.normalize(at_least_float32(F.embedding(codes, self.codebook)), dim=-1)
            return QuantizerOutput(
                quantized=rotate(unit, entries.detach()) if self.rotation_trick else unit + (entries - unit).detach(),
                codes=codes,
                codebook_loss=(entries - unit.detach()).square().sum(-1).mean(),
                commitment_loss=(unit - entries.detach()).square().sum(-1).mean(),
            )


def rotate(unit: Tensor, entries: Tensor) -> Tensor:
    """R unit = entries, for unit vectors (..., d): R, a constant for gradients, turns in the plane of the two.

    R = 1 - 2 r r^T + 2 q e^T with e = unit, q = entries, r = (e + q) / |e + q| (Fifty et al. 2024).
    """
    e = unit.detach()
    r = F.normalize(e + entries, dim=-1)
    turned = unit - 2 * (unit * r).sum(-1, keepdim=True) * r + 2 * (unit * e).sum(-1, keepdim=True) * entries
    return turned + (entries - turned).detach()  # the entry itself, without the rounding of the way there


class FiniteScalarQuantizer(nn.Module):
    """Each of d numbers, bounded, to the nearest of L_i values (FSQ, Mentzer et al. 2023): a codebook that is a grid.

        q_i = round(half_i tanh(z_i + shift_i) - offset_i) / floor(L_i / 2),   half_i = (L_i - 1) / 2,

    with offset 1/2 for even L_i, 0 for odd ones, and the shift that maps z = 0 to 0. Nothing is learned here and no
    entry can die. Codes number the grid points in mixed radix, the first dimension running fastest.

    Args:
        levels: (L_1, ..., L_d), such as (8, 5, 5, 5) for 1000 codes or (7, 5, 5, 5, 5) for 4375.

    Raises:
        ValueError: if there are no levels, or one is below 3: of two values there is none in the middle, for z = 0.
    """

    codebook_sizes = None

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"fsq_levels must be one or more numbers of at least 3, got {list(levels)}.")
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)
        code = torch.arange(self.codebook_size, dtype=torch.int64)
        columns = []
        for level in self.levels:
            columns.append((code % level - level // 2).float() / (level // 2))
            code = code // level
        # Follows from the levels, so it is not saved.
        self.register_buffer("codebook", torch.stack(columns, dim=-1), persistent=False)  # (K, d)

    def _bounded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (..., d), bounded: rounded they are whole numbers from -floor(L / 2) on; and floor(L / 2), (d,)."""
        x = at_least_float32(latents)
        levels = torch.tensor(self.levels, dtype=x.dtype, device=x.device)
        half, offset = (levels - 1) / 2, 0.5 * (levels % 2 == 0)
        return half * torch.tanh(x + torch.atanh(offset / half)) - offset, levels // 2

    def lookup(self, codes: Tensor) -> Tensor:
        """Grid points of codes (..., ) int64 -> (..., d) in [-1, 1]."""
        return F.embedding(codes, self.codebook)

    def continuous(self, latents: Tensor) -> Tensor:
        """Latents (B, n, d) in the grid's cube, not rounded; at least float32."""
        with torch.autocast(latents.device.type, enabled=False):
            bounded, width = self._bounded(latents)
            return bounded / width

    def encode(self, latents: Tensor) -> Tensor:
        """Codes (B, n) of latents (B, n, d)."""
        return self(latents).codes

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantizes latents (B, n, d) with straight-through gradients."""
        with torch.autocast(latents.device.type, enabled=False):
            bounded, width = self._bounded(latents)
            whole = bounded.round()
            radix = torch.tensor(
                [math.prod(self.levels[:i]) for i in range(len(self.levels))], dtype=torch.int64, device=latents.device
            )
            codes = ((whole + width).long() * radix).sum(dim=-1)
            quantized = (bounded + (whole - bounded).detach()) / width
            nothing = torch.zeros((), dtype=torch.float32, device=latents.device)
            return QuantizerOutput(quantized, codes, nothing, nothing)


class CodebookRevival:
    """Moves entries that have not been used for a while onto latents of the current batch.

    Kept apart from the module: it belongs to training, and its counters go into checkpoints, not into the model.
    Under data parallelism every process sees the gathered codes and latents and draws from an equally seeded
    generator, so all make the same move, and the same as one process with the whole batch.

    Args:
        quantizer: the quantizer to watch.
        patience: steps without use after which an entry is revived.
        seed: seed of the choice among latents, combined with the step.

    Raises:
        ValueError: if `patience` is below 1: entries in use would be moved as well.
    """

    def __init__(self, quantizer: VectorQuantizer, patience: int = 100, seed: int = 0) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1 step, got {patience}.")
        self.quantizer = quantizer
        self.patience = patience
        self.seed = seed
        self.idle_steps = torch.zeros(quantizer.codebook_size, dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def update(self, codes: Tensor, latents: Tensor, step: int, revive: bool = True) -> int:
        """Counts the use in this step; with `revive`, replaces dead entries. Returns how many were replaced.

        codes (B, n), latents (B, n, d): this process's part of the batch; equal shapes on all processes.
        """
        codes = _gather(codes.flatten())
        # All that is needed is a yes or no for each entry: bincount would wait for the device.
        used = torch.zeros(self.quantizer.codebook_size, dtype=torch.bool, device=codes.device)
        used[codes] = True
        self.idle_steps = torch.where(used, 0, self.idle_steps.to(codes.device) + 1)
        if not revive:
            return 0
        dead = (self.idle_steps >= self.patience).nonzero().flatten()
        if self.quantizer.codebook_sizes is not None:
            dead = dead[dead < max(self.quantizer.codebook_sizes[: latents.shape[1]])]  # others have no position
        if dead.numel() == 0:
            return 0
        positions = torch.arange(latents.shape[1], dtype=torch.int64, device=latents.device)
        positions = positions.expand(latents.shape[:2]).flatten()
        pool, positions = _gather(latents.flatten(0, 1).float()), _gather(positions)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        if self.quantizer.codebook_sizes is None:
            order = torch.randperm(pool.shape[0], generator=generator, **INDICES)[: dead.numel()]
            dead = dead[: order.numel()]
            chosen = pool[order.to(pool.device)]
        else:
            # An entry is revived only onto a latent of a position that may use it.
            sizes = torch.tensor(self.quantizer.codebook_sizes, **INDICES)[positions.cpu()]
            picks = []
            for entry in dead.tolist():
                candidates = (sizes > entry).nonzero().flatten()
                picks.append(candidates[torch.randint(candidates.numel(), (), generator=generator, **INDICES)])
            chosen = pool[torch.stack(picks).to(pool.device)]
        codebook = self.quantizer.codebook
        _set_rows(codebook, dead.to(codebook.device), F.normalize(chosen, dim=-1))
        self.idle_steps[dead] = 0
        return dead.numel()

    @torch.no_grad()
    def fill(self, latents: Tensor, step: int) -> None:
        """Starts every entry at a latent of this batch, for the first quantized step.

        latents (B, n, d): this process's part. Where there are fewer latents than entries they are used again, a
        little moved, so that no two entries are equal.
        """
        pool = _gather(F.normalize(latents.flatten(0, 1).float(), dim=-1))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        codebook = self.quantizer.codebook
        rounds = -(-len(codebook) // len(pool))
        order = torch.cat([torch.randperm(len(pool), generator=generator, **INDICES) for _ in range(rounds)])
        noise = 0.01 * torch.randn(codebook.shape, generator=generator, dtype=torch.float32, device="cpu")
        chosen = pool[order[: len(codebook)].to(pool.device)] + noise.to(pool.device)
        rows = torch.arange(len(codebook), dtype=torch.int64, device=codebook.device)
        _set_rows(codebook, rows, F.normalize(chosen, dim=-1))
        self.idle_steps.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"idle_steps": self.idle_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.idle_steps = state["idle_steps"].clone()


def _set_rows(codebook: nn.Parameter, rows: Tensor, values: Tensor) -> None:
    """codebook[rows] = values; of a codebook in shards (FSDP) every process sets its own."""
    if not hasattr(codebook, "full_tensor"):
        codebook.data[rows] = values.to(codebook)
        return
    from torch.distributed.tensor import distribute_tensor

    full = codebook.full_tensor().index_copy(0, rows, values.to(codebook.dtype))
    codebook.copy_(distribute_tensor(full, codebook.device_mesh, codebook.placements, src_data_rank=None))


def _gather(x: Tensor) -> Tensor:
    """Concatenates x over processes in rank order along the first axis; x itself in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def codebook_statistics(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """Perplexity exp(entropy) and the share of entries used, of codes of any shape.

    Both are biased low when there are not many more codes than entries: measure on thousands of images.
    """
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    p = counts / counts.sum().clamp(min=1)
    return {
        "perplexity": float(torch.exp(torch.special.entr(p).sum())),
        "usage": float((counts > 0).double().mean()),
    }
