"""Pictures of an evaluation: always the first images of each class in their order, none chosen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spectralar import SpectralARPipeline

from .data import to_float
from .report import draw_grid
from .sample_bank import sample_bank

ROWS, COLUMNS = 10, 10  # of a sheet


def shown_classes(num_classes: int) -> list[int]:
    """At most `ROWS` of the classes, spread evenly."""
    rows = min(ROWS, num_classes)
    return [i * num_classes // rows for i in range(rows)]


@torch.no_grad()
def draw_samples(
    pipe: SpectralARPipeline, folder: Path, seed: int, guidance_scales: list[float], best: float, lengths: list[int]
) -> None:
    """A sheet for each guidance scale, one row a class; at the scale `best` also prefixes of the first column."""
    names, classes = pipe.class_names, shown_classes(len(pipe.class_names))
    rows, device = [names[c] for c in classes], pipe.tokenizer.device
    for scale in guidance_scales:
        codes, _ = sample_bank(pipe, folder / "samples", COLUMNS * len(names), scale, seed)
        sheet = codes.view(COLUMNS, len(names), -1)[:, classes].transpose(0, 1).to(device)  # (rows, COLUMNS, N)
        images = torch.stack([pipe.tokenizer.decode(row).float().cpu() for row in sheet])
        draw_grid(images, rows, [""] * COLUMNS, folder / "figures" / f"samples-{scale:g}.png")
        if scale == best:
            frames = pipe.tokenizer.decode(sheet[:, 0], lengths).float().cpu()
            draw_grid(frames, rows, [f"k = {k}" for k in lengths], folder / "figures" / "sample-prefixes.png")


@torch.no_grad()
def draw_reconstructions(
    pipe: SpectralARPipeline, folder: Path, images: Tensor, labels: Tensor, codes: Tensor, lengths: list[int]
) -> None:
    """Prefixes of the first held-out image of each class, and the image (uint8) itself."""
    classes = [c for c in shown_classes(len(pipe.class_names)) if (labels == c).any()]
    firsts = [int((labels == c).nonzero()[0]) for c in classes]
    frames = pipe.tokenizer.decode(codes[firsts].long().to(pipe.tokenizer.device), lengths).float().cpu()
    frames = torch.cat([frames, to_float(images[firsts]).unsqueeze(1)], dim=1)  # (rows, S + 1, C, H, H)
    columns = [*(f"k = {k}" for k in lengths), "image"]
    draw_grid(frames, [pipe.class_names[c] for c in classes], columns, folder / "figures" / "reconstructions.png")
