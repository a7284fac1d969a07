"""Pictures of an evaluation: always the first images of each class in their order, none chosen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spectralar import SpectralARPipeline

from ..data.images import to_float
from .report_figures import draw_grid

ROWS, COLUMNS = 10, 10  # of a sheet
CLASSES_A_ROW = 20  # of the sheet of all classes
CLOSEST = 5  # samples shown in each space


def shown_classes(num_classes: int) -> list[int]:
    """At most `ROWS` of the classes, spread evenly."""
    rows = min(ROWS, num_classes)
    return [i * num_classes // rows for i in range(rows)]


@torch.no_grad()
def draw_samples(
    pipe: SpectralARPipeline, folder: Path, codes: dict[float, Tensor], best: float, lengths: list[int]
) -> None:
    """A sheet for each guidance scale, one row a class; at the scale `best` also prefixes of the first column.

    Args:
        codes: (n, N) of the sample bank by guidance scale, in which image i has class i mod the number of classes.
    """
    names = pipe.class_names
    for scale, bank in codes.items():
        columns = max(1, min(COLUMNS, len(bank) // len(names)))
        classes = [c for c in shown_classes(len(names)) if c < len(bank)]
        index = torch.tensor(classes)[:, None] + len(names) * torch.arange(columns)  # (rows, columns)
        index = index.clamp(max=len(bank) - 1)
        sheet, rows = bank[index].to(pipe.tokenizer.device), [names[c] for c in classes]
        images = torch.stack([pipe.tokenizer.decode(row).float().cpu() for row in sheet])
        draw_grid(images, rows, [""] * columns, folder / "figures" / f"samples-{scale:g}.png")
        if scale == best:
            frames = pipe.tokenizer.decode(sheet[:, 0], lengths).float().cpu()
            draw_grid(frames, rows, [f"k = {k}" for k in lengths], folder / "figures" / "sample-prefixes.png")
            if len(names) > ROWS:
                draw_classes(pipe, folder, bank[: len(names)])


@torch.no_grad()
def draw_classes(pipe: SpectralARPipeline, folder: Path, codes: Tensor) -> None:
    """One sample of every class, codes (classes, N), by id; a row has the name of its first class."""
    rows = [row.to(pipe.tokenizer.device) for row in codes.split(CLASSES_A_ROW)]
    images = [pipe.tokenizer.decode(row).float().cpu() for row in rows]
    white = torch.ones(CLASSES_A_ROW - len(images[-1]), *images[-1].shape[1:])
    images[-1] = torch.cat([images[-1], white])
    names = pipe.class_names[: len(codes) : CLASSES_A_ROW]
    draw_grid(torch.stack(images), names, [""] * CLASSES_A_ROW, folder / "figures" / "classes.png")


@torch.no_grad()
def draw_reconstructions(
    pipe: SpectralARPipeline, folder: Path, images: Tensor, labels: Tensor, codes: Tensor, lengths: list[int]
) -> None:
    """Prefixes of the first held-out image of each class, and the image (uint8) itself."""
    present = labels.unique().tolist()
    classes = [present[i] for i in shown_classes(len(present))]
    firsts = [int((labels == c).nonzero()[0]) for c in classes]
    frames = pipe.tokenizer.decode(codes[firsts].long().to(pipe.tokenizer.device), lengths).float().cpu()
    frames = torch.cat([frames, to_float(images[firsts]).unsqueeze(1)], dim=1)  # (rows, S + 1, C, H, H)
    columns = [*(f"k = {k}" for k in lengths), "image"]
    draw_grid(frames, [pipe.class_names[c] for c in classes], columns, folder / "figures" / "reconstructions.png")


def draw_neighbours(
    class_names: list[str], folder: Path, samples: Tensor, train: Tensor, places: dict[str, Tensor]
) -> None:
    """Samples beside their nearest training images in pixels and to the first judge: those of each class that come
    first, and those that lie closest of all.

    Args:
        samples, train: (n, C, H, H) and (m, C, H, H) uint8.
        places: from `find_neighbours`.
    """
    spaces = [space for space in places if not space.endswith("closest")][:2]
    columns = ["sample", *(f"{space} {i + 1}" for space in spaces for i in range(places[space].shape[1]))]

    def draw(chosen: list[int], rows: list[str], name: str) -> None:
        found = [torch.cat([samples[i : i + 1], *(train[places[space][i]] for space in spaces)]) for i in chosen]
        draw_grid(to_float(torch.stack(found)), rows, columns, folder / "figures" / name)

    known = len(places[spaces[0]])
    classes = [c for c in shown_classes(len(class_names)) if c < known]
    draw(classes, [class_names[c] for c in classes], "neighbours.png")
    closest = [int(i) for space in spaces for i in places[f"{space}, closest"][:CLOSEST]]
    draw(closest, [class_names[i % len(class_names)] for i in closest], "closest.png")
