"""The curves of an evaluation as charts, and its sheets of images. Knows no model: results in, figures out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from tqdm import tqdm

from spectralar.analysis.chart import LIGHT, Chart

from ..data.listing import reason

T = TypeVar("T")
PANEL = 3.1, 2.6  # inches
MARKERS = "osD^v"


def charts(results: dict[str, Any], rendered: Callable[[Chart], T]) -> dict[str, T]:
    """All curves as `rendered` makes them, by the name of their file; one that cannot be drawn is left out.

    The first judge's have plain names, another's end in its name.
    """
    makers = {
        "prefix-quality": partial(_prefix_quality, results["prefixes"]),
        "codebook": partial(_codebook, results["codebook"]),
        "next-token-loss": partial(_loss, results["next_token_loss"]),
    }
    if "neighbours" in results:
        makers["neighbour-distances"] = partial(_neighbours, results["neighbours"])
    for i, judge in enumerate(results["judges"]):
        ending = f"-{judge}" if i else ""
        makers[f"guidance{ending}"] = partial(_guidance, results, judge)
        makers[f"generated-prefixes{ending}"] = partial(_generated_prefixes, results, judge)
    drawn = {}
    for name, make in makers.items():
        with may_fail(name):
            drawn[name] = rendered(make())
    return drawn


@contextmanager
def may_fail(name: str) -> Iterator[None]:
    """A figure that cannot be drawn costs that figure, and no more of what was measured."""
    try:
        yield
    except Exception as error:  # what libraries raise while they draw is of any kind
        tqdm.write(f"The figure {name} is left out, {reason(error)}.")


def draw_charts(results: dict[str, Any], folder: Path) -> None:
    """All curves as PNG files."""
    for name, png in charts(results, lambda chart: chart.png(dpi=150)).items():
        (folder / f"{name}.png").write_bytes(png)


class Panels:
    """Charts side by side with one legend each, the numbers of all in one table."""

    def __init__(self, x: str, values: Sequence[float], count: int) -> None:
        self.x, self.values, self.count, self.at = x, list(values), count, 0
        self.chart = Chart({x: self.values}, LIGHT, size=(max(4.2, PANEL[0] * count), PANEL[1]))

    def panel(
        self, y: str, series: dict[str, Sequence[float]], levels: dict[str, float] | None = None,
        columns: int = 1, style: Callable[[Axes], Any] | None = None,
    ) -> None:  # fmt: skip
        """One chart: curves by their labels, and horizontal lines by theirs."""
        self.at += 1
        axes = self.chart.plot_axes(self.x, y, 1, self.count, self.at)
        colours = list(LIGHT.series)
        for i, (label, values) in enumerate(series.items()):
            axes.plot(
                self.values, values, color=colours[i % len(colours)], label=label, linewidth=1.6,
                marker=MARKERS[i % len(MARKERS)] if len(self.values) <= 32 else "", markersize=3.5,
            )  # fmt: skip
            self.chart.columns[f"{y}, {label}" if label else y] = list(values)
        for i, (label, value) in enumerate((levels or {}).items()):
            if value is not None:
                axes.axhline(value, color=LIGHT.muted, linewidth=1.1, linestyle=(0, (4, 2 + 2 * i)), label=label)
        if style:
            style(axes)
        if axes.get_legend_handles_labels()[1]:
            self.chart.legend_of(axes, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)


def _prefix_quality(p: dict[str, Any]) -> Chart:
    panels = Panels("prefix length k (tokens)", p["length"], 2)
    for name, unit in (("psnr", "PSNR (dB)"), ("ssim", "SSIM")):
        panels.panel(
            unit,
            {"to the low-pass x_k": p[f"{name}_low_pass"], "to the image": p[f"{name}_image"]}, style=_whole_x,
        )  # fmt: skip
    return panels.chart


def _codebook(book: dict[str, Any]) -> Chart:
    values = book["perplexity_by_position"]
    panels = Panels("position", range(1, len(values) + 1), 1)
    levels = {"all positions": book["perplexity"], "codebook size": book["codebook_size"]}

    def style(axes: Axes) -> None:
        axes.set_yscale("log")
        _whole_x(axes)

    panels.panel("codebook perplexity", {"at one position": values}, levels, 3, style)
    return panels.chart


def _loss(loss: dict[str, Any]) -> Chart:
    panels = Panels("position", range(1, len(loss["heldout_by_position"]) + 1), 1)
    series = {
        f"training images, mean {loss['train']:.3f}": loss["train_by_position"],
        f"held-out images, mean {loss['heldout']:.3f}": loss["heldout_by_position"],
    }
    panels.panel("next-token loss (nats)", series, style=_whole_x)
    return panels.chart


def _guidance(r: dict[str, Any], judge: str) -> Chart:
    samples = sorted(r["samples"], key=lambda m: m["guidance_scale"])
    measures = [m["judged"][judge] for m in samples]
    accurate = measures[0]["accuracy"] is not None
    shares = {name: [m[name] for m in measures] for name in ("precision", "recall", "coverage")}
    many = measures[0]["recall"] is not None  # images enough
    panels = Panels("guidance scale", [m["guidance_scale"] for m in samples], 1 + many + accurate)
    levels = {"reconstructions": r["reconstruction"]["judged"][judge]["fd"],
              "training images": r["references"]["train"][judge]["fd"]}  # fmt: skip
    panels.panel("Fréchet distance", {"samples": [m["fd"] for m in measures]}, levels, 1, _from_zero)
    if many:
        panels.panel("share", shares, columns=1, style=lambda axes: axes.set_ylim(0, 1.02))
    if accurate:
        levels = {"held-out images": r["references"]["heldout"][judge]["accuracy"]}
        panels.panel("class accuracy", {"samples": [m["accuracy"] for m in measures]}, levels)
    return panels.chart


def _generated_prefixes(r: dict[str, Any], judge: str) -> Chart:
    rebuilt = r["prefixes"]["judged"][judge]
    lengths = [m["length"] for m in rebuilt]
    accurate = rebuilt[0]["accuracy"] is not None
    panels = Panels("prefix length k (tokens)", lengths, 1 + accurate)

    def style(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(k) for k in lengths])
        axes.minorticks_off()

    def log_style(axes: Axes) -> None:
        style(axes)
        axes.set_yscale("log")

    def curves(key: str) -> dict[str, list[float]]:
        return {f"guidance {m['guidance_scale']:g}": [p[key] for p in m["prefixes"][judge]] for m in r["samples"]}

    fd = {**curves("fd"), "reconstructions": [m["fd"] for m in rebuilt]}
    panels.panel("Fréchet distance to real x_k", fd, columns=2, style=log_style)
    if accurate:
        accuracy = {**curves("accuracy"), "real x_k": [m["accuracy_low_pass"] for m in rebuilt]}
        panels.panel("class accuracy", accuracy, columns=2, style=style)
    return panels.chart


def _neighbours(found: dict[str, Any]) -> Chart:
    spaces = found["spaces"]
    panels = Panels("share of the images (%)", range(101), len(spaces))
    for space, sets in spaces.items():
        names = {"samples": "samples", "reconstructions": "reconstructions", "heldout": "held-out images"}
        panels.panel(f"distance, {space}", {text: sets[name] for name, text in names.items()}, style=_from_zero)
    return panels.chart


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, None)


def _whole_x(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def draw_grid(images: Tensor, rows: list[str], columns: list[str], path: Path) -> None:
    """Images (R, S, C, H, H) in [-1, 1] as a table of R rows and S columns with their names, every pixel a square.

    Names are shown as they are, whatever is in them.
    """
    scale = max(1, round(64 / images.shape[-1]))  # small images are enlarged
    pixels = (images.clamp(-1, 1) / 2 + 0.5).movedim(2, -1).expand(*images.shape[:2], -1, -1, 3).numpy()
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)  # (R, S, h, h, 3)
    side, gap = pixels.shape[2], 4
    canvas = np.ones((len(rows) * (side + gap), len(columns) * (side + gap), 3), np.float32)
    for i, row in enumerate(pixels):
        for j, image in enumerate(row):
            top, left = i * (side + gap), j * (side + gap)
            canvas[top : top + side, left : left + side] = image
    dpi, names, header = 100, 100, 24  # pixels left and above
    width, height = canvas.shape[1] + names, canvas.shape[0] + header
    with plt.rc_context({"font.size": 8, "text.parse_math": False}):
        figure = plt.figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
        # One pixel of the canvas is one of the file.
        figure.figimage(canvas, xo=names, yo=0)
        for i, name in enumerate(rows):
            y = 1 - (header + i * (side + gap) + side / 2) / height
            figure.text((names - 6) / width, y, name[:18], ha="right", va="center")
        for j, name in enumerate(columns):
            x = (names + j * (side + gap) + side / 2) / width
            figure.text(x, 1 - header / 2 / height, name, ha="center", va="center")
        figure.savefig(path, dpi=dpi)
        plt.close(figure)
