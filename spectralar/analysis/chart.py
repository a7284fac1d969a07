"""A figure with its numbers, in the colours of a palette: what every function of `plots` returns."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Columns = Mapping[str, Sequence[Any]]
# A thread that draws, one figure at a time: matplotlib is not safe for threads, the settings for text in SVG are
# global ones, and for each thread that has drawn it keeps fonts, some megabytes.
_DRAWING = ThreadPoolExecutor(1, thread_name_prefix="drawing")
_SVG_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "spectralar"}  # text stays text; same numbers, same file


@dataclass(frozen=True)
class Palette:
    """Colours of a chart, as #rrggbb; no two alike, so that a page may restyle an SVG by replacing them."""

    background: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, str, str, str, str]
    sequential: str  # colour maps: of amounts,
    diverging: str  # and of differences, neutral at zero


LIGHT = Palette(
    "#ffffff", "#1e293b", "#64748b", "#e2e8f0", ("#4f46e5", "#c2410c", "#0d9488", "#a16207", "#7c3aed"),
    "magma", "RdBu_r",
)  # fmt: skip
DARK = Palette(
    "#020617", "#e2e8f0", "#94a3b8", "#334155", ("#818cf8", "#fb923c", "#2dd4bf", "#facc15", "#c084fc"),
    "magma", "RdBu_r",
)  # fmt: skip
THIRD = (4.2, 2.8)  # inches, of a chart that shares its row with two others: there, letters stay legible


class Chart(Figure):
    """A figure and its numbers.

    Args:
        columns: the table behind the figure, all columns of one length; None is an empty cell.
        palette: `LIGHT` or `DARK`.
        size: width and height in inches. Text has 9 points: about a phone's width at 1:1.
    """

    def __init__(self, columns: Columns, palette: Palette = LIGHT, size: tuple[float, float] = (5.6, 3.3)) -> None:
        super().__init__(figsize=size, layout="constrained", facecolor=palette.background)
        self.columns = columns
        self.palette = palette

    def png(self, dpi: int = 200) -> bytes:
        """The figure as a PNG file."""
        return self._saved("png", dpi=dpi)

    def svg(self) -> str:
        """The figure as an SVG file, its text as text."""
        return self._saved("svg", metadata={"Date": None}).decode("utf-8")

    def csv(self) -> str:
        """The numbers as comma-separated values with a heading."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        for row in zip(*self.columns.values(), strict=True):
            writer.writerow("" if cell is None else f"{cell:.7g}" if isinstance(cell, float) else cell for cell in row)
        return out.getvalue()

    def _saved(self, file_format: str, **options: Any) -> bytes:
        return _DRAWING.submit(self._draw, file_format, options).result()

    def _draw(self, file_format: str, options: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(_SVG_SETTINGS):
            self.savefig(buffer, format=file_format, facecolor=self.get_facecolor(), **options)
        return buffer.getvalue()

    def plot_axes(self, x: str, y: str, *position: int, grid: bool = True) -> Axes:
        """Axes with named directions in the palette's colours."""
        axes = self.add_subplot(*position)
        axes.set_facecolor("none")
        axes.set_xlabel(x, color=self.palette.muted, fontsize=9)
        axes.set_ylabel(y, color=self.palette.muted, fontsize=9)
        axes.tick_params(which="both", colors=self.palette.muted, labelsize=8.5, width=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(self.palette.muted)
        axes.spines[["left", "bottom"]].set_linewidth(0.6)
        if grid:
            axes.grid(True, color=self.palette.grid, linewidth=0.6)
            axes.set_axisbelow(True)
        return axes

    def legend_of(self, axes: Axes, **options: Any) -> None:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=self.palette.ink, **options)
