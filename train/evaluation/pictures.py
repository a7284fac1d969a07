"""Pictures of an evaluation: always the first images of each class in their order, none chosen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spectralar import SpectralARPipeline

from ..data.images import to_float
from ..data.order import evenly
from .report_figures import draw_grid

ROWS, COLUMNS = 10, 10  # of a sheet
CLASSES_A_ROW = 20  # of the sheet of all classes
CLOSEST = 5  # samples shown in each space


def shown_classes(labels: Tensor) -> list[int]:
    """At most `ROWS` of the classes that images have, spread evenly."""
    present = labels.unique()  # ascending
    return present[evenly(len(present), ROWS)].tolist()


@torch.no_grad()
def draw_samples(
    pipe: SpectralARPipeline, folder: Path, codes: dict[float, Tensor], labels: Tensor, best: float, lengths: list[int]
) -> None:
    """A sheet for each guidance scale, one row a class; at the scale `best` also prefixes of the first column.

    Args:
        codes: (n, N) of the sample bank by guidance scale.
        labels: (n,) their classes.
    """
    names, classes = pipe.class_names, shown_classes(labels)
    members = [(labels == c).nonzero()[:, 0] for c in classes]
    columns = min(COLUMNS, *map(len, members))
    index = torch.stack([member[:columns] for member in members])  # (rows, columns)
    rows = [names[c] for c in classes]
    for scale, bank in codes.items():
        sheet = bank[index].to(pipe.tokenizer.device)
        images = torch.stack([pipe.tokenizer.decode(row).float().cpu() for row in sheet])
        draw_grid(images, rows, [""] * columns, folder / "figures" / f"samples-{scale:g}.png")
        if scale == best:
            frames = pipe.tokenizer.decode(sheet[:, 0], lengths).float().cpu()
            draw_grid(frames, rows, [f"k = {k}" for k in lengths], folder / "figures" / "sample-prefixes.png")
            if len(names) > ROWS:
                draw_classes(pipe, folder, bank, labels)


@torch.no_grad()
def draw_classes(pipe: SpectralARPipeline, folder: Path, codes: Tensor, labels: Tensor) -> None:
    """The first sample of every class, by id, out of codes (n, N); a row has the name of its first class."""
    classes = labels.unique()  # ascending
    firsts = torch.stack([(labels == c).nonzero()[0, 0] for c in classes])
    rows = codes[firsts].to(pipe.tokenizer.device).split(CLASSES_A_ROW)
    images = torch.cat([pipe.tokenizer.decode(row).float().cpu() for row in rows])  # (classes, C, H, H)
    white = torch.ones(-len(images) % CLASSES_A_ROW, *images.shape[1:])
    images = torch.cat([images, white]).unflatten(0, (-1, CLASSES_A_ROW))
    names = [pipe.class_names[c] for c in classes[::CLASSES_A_ROW].tolist()]
    draw_grid(images, names, [""] * CLASSES_A_ROW, folder / "figures" / "classes.png")


@torch.no_grad()
def draw_reconstructions(
    pipe: SpectralARPipeline, folder: Path, images: Tensor, labels: Tensor, codes: Tensor, lengths: list[int]
) -> None:
    """Prefixes of the first held-out image of each class, and the image (uint8) itself."""
    classes = shown_classes(labels)
    firsts = [int((labels == c).nonzero()[0]) for c in classes]
    frames = pipe.tokenizer.decode(codes[firsts].long().to(pipe.tokenizer.device), lengths).float().cpu()
    frames = torch.cat([frames, to_float(images[firsts]).unsqueeze(1)], dim=1)  # (rows, S + 1, C, H, H)
    columns = [*(f"k = {k}" for k in lengths), "image"]
    draw_grid(frames, [pipe.class_names[c] for c in classes], columns, folder / "figures" / "reconstructions.png")


def draw_neighbours(
    class_names: list[str], folder: Path, samples: Tensor, labels: Tensor, train: Tensor, places: dict[str, Tensor]
) -> None:
    """Samples beside their nearest training images in pixels and to the first judge: those of each class that come
    first, and those that lie closest of all.

    Args:
        samples, train: (n, C, H, H) and (m, C, H, H) uint8.
        labels: (n,) of the samples.
        places: from `find_neighbours`.
    """
    spaces = [space for space in places if not space.endswith("closest")][:2]
    columns = ["sample", *(f"{space} {i + 1}" for space in spaces for i in range(places[space].shape[1]))]

    def draw(chosen: list[int], rows: list[str], name: str) -> None:
        found = [torch.cat([samples[i : i + 1], *(train[places[space][i]] for space in spaces)]) for i in chosen]
        draw_grid(to_float(torch.stack(found)), rows, columns, folder / "figures" / name)

    known = labels[: len(places[spaces[0]])]
    classes = shown_classes(known)
    draw([int((known == c).nonzero()[0]) for c in classes], [class_names[c] for c in classes], "neighbours.png")
    closest = [int(i) for space in spaces for i in places[f"{space}, closest"][:CLOSEST]]
    draw(closest, [class_names[labels[i]] for i in closest], "closest.png")
