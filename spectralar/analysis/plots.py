"""The numbers of `analysis` and `spectral` as figures. Knows no model.

Every function returns a `Chart`: a matplotlib `Figure` made without pyplot, so that a server may draw in threads, with
the numbers it shows as a table. Arrays may be torch tensors on the CPU or anything numpy takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PatchCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike

from ..spectral import bands
from .chart import LIGHT, THIRD, Chart, Columns, Palette

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _floats(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)


def _whole_ticks(*axes: Axis, count: int = 8) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(count, integer=True, min_n_ticks=1))


def _power_of_ten(value: float, _: Any = None) -> str:
    exponent = round(math.log10(value)) if value > 0 else 0
    if 0 <= exponent <= 3:
        return f"{value:g}"
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def _log_energy_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    axes.yaxis.set_minor_locator(NullLocator())


def _positive(values: np.ndarray) -> np.ndarray:
    """Gaps where there is nothing to show on a log axis."""
    return np.where(values > 0, values, np.nan)


def _band_name(low: int, high: int) -> str:
    return str(low) if high == low + 1 else f"{low}–{high - 1}"


# ------------------------------------------------------------------------------------------------ schedule, spectrum


def cutoff_schedule(cutoffs: Sequence[int], palette: Palette = LIGHT) -> Chart:
    """The cutoff r_k of every prefix length k, beside that of an even schedule (alpha = 1)."""
    n, size = len(cutoffs), cutoffs[-1]
    k = np.arange(1, n + 1)
    low, high = zip(*bands(cutoffs), strict=True)
    columns = {
        "prefix_length": k.tolist(), "cutoff": list(cutoffs), "band_from": list(low), "band_to": list(high),
        "coefficients_opened": [b * b - a * a for a, b in zip(low, high, strict=True)],
    }  # fmt: skip
    chart = Chart(columns, palette, THIRD)
    axes = chart.plot_axes("prefix length k", f"cutoff, of {size}")
    axes.plot([0, n], [0, size], color=palette.muted, linewidth=1, linestyle=(0, (4, 3)), label="even schedule")
    axes.step(np.r_[0, k], np.r_[0, cutoffs], where="post", color=palette.series[0], linewidth=1.8, label="this model")
    axes.set_xlim(0, n)
    axes.set_ylim(0, size * 1.03)
    _whole_ticks(axes.xaxis)
    chart.legend_of(axes, loc="upper left")
    return chart


def nested_squares(log_magnitude: ArrayLike, cutoffs: Sequence[int], palette: Palette = LIGHT) -> Chart:
    """Where in the spectrum each prefix ends: the squares max(u, v) < r_k over the log magnitudes (H, H)."""
    values = _floats(log_magnitude)
    size = values.shape[0]
    v, u = np.meshgrid(np.arange(size), np.arange(size))
    token = np.searchsorted(cutoffs, np.maximum(u, v), side="right") + 1
    columns = {"u": u.ravel().tolist(), "v": v.ravel().tolist(), "log10_magnitude": values.ravel().tolist(),
               "opened_by_token": token.ravel().tolist()}  # fmt: skip
    chart = Chart(columns, palette, (4.9, 4.1))
    chart.set_layout_engine("compressed")
    axes = chart.plot_axes("horizontal frequency v", "vertical frequency u", grid=False)
    # Coefficients that are zero to rounding (flat images) would spend the colours on noise.
    top = values.max()
    picture = axes.imshow(
        values, cmap=palette.sequential, vmin=max(values.min(), top - 5), vmax=top, extent=(0, size, size, 0)
    )
    last = 0.0
    for k, r in enumerate(cutoffs, start=1):
        last_of_ties = k == len(cutoffs) or cutoffs[k] > r
        if last_of_ties and (r - last >= size / 11 or r == size):  # all squares would hide what is under them
            axes.add_patch(Rectangle((0, 0), r, r, facecolor="none", edgecolor="#ffffff", linewidth=1))
            axes.text(r - size / 60, r - size / 60, k, ha="right", va="bottom", fontsize=7.5, color="#ffffff",
                      bbox={"facecolor": "#000000", "alpha": 0.45, "linewidth": 0, "pad": 0.8})  # fmt: skip
            last = r
    axes.set_title("prefix length k at the corner of its square", fontsize=8.5, color=palette.muted, loc="left")
    axes.spines[["left", "bottom"]].set_visible(False)
    _whole_ticks(axes.xaxis, axes.yaxis, count=5)
    _colour_bar(chart, axes, picture, "log₁₀ magnitude")
    return chart


def _colour_bar(chart: Chart, axes: Axes, picture: Any, label: str) -> Colorbar:
    bar = chart.colorbar(picture, ax=axes, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=chart.palette.muted, labelsize=8, width=0.6)
    bar.ax.minorticks_off()
    bar.set_label(label, color=chart.palette.muted, fontsize=9)
    return bar


def band_energies(series: Mapping[str, ArrayLike], cutoffs: Sequence[int], palette: Palette = LIGHT) -> Chart:
    """Energy in the band that each token opens: named series (N,), such as of an image and its reconstruction.

    Tokens that open no band are left out.
    """
    pairs = bands(cutoffs)
    opening = [k for k, (low, high) in enumerate(pairs) if high > low]
    energies = {name: _floats(values)[opening] for name, values in series.items()}
    columns = {
        "token": [k + 1 for k in opening],
        "band_from": [pairs[k][0] for k in opening],
        "band_to": [pairs[k][1] for k in opening],
        **{f"energy_{name}": values.tolist() for name, values in energies.items()},
    }
    chart = Chart(columns, palette)
    axes = chart.plot_axes("band, by frequency max(u, v)", "energy")
    positions = np.arange(len(opening))
    for (name, values), colour, marker in zip(energies.items(), palette.series, "osD^v", strict=False):
        axes.plot(positions, _positive(values), marker=marker, markersize=3.5, linewidth=1.4, color=colour, label=name)
    step = math.ceil(len(opening) / 9)
    axes.set_xticks(positions[::step], [_band_name(*pairs[k]) for k in opening[::step]])
    _log_energy_axis(axes)
    chart.legend_of(axes)
    return chart


def radial_spectra(series: Mapping[str, ArrayLike], palette: Palette = LIGHT) -> Chart:
    """Radial power spectra on log axes, with the 1/f² line of natural images.

    Args:
        series: power (F,) at radial frequencies 0, 1, .., by name, as of `spectral.radial_power_spectrum`. The first
            is drawn apart from the others and the 1/f² line laid through it.
    """
    spectra = {name: _floats(values) for name, values in series.items()}
    reference, *others = spectra
    count = len(spectra[reference])
    frequency = np.arange(count)
    # Laid through the reference over the lowest octaves, where every image has power.
    low = slice(1, max(2, count // 4))
    anchor = np.exp(np.mean(np.log(np.maximum(spectra[reference][low], 1e-30) * frequency[low] ** 2.0)))
    line = np.r_[np.nan, anchor / frequency[1:] ** 2.0]
    columns = {"radial_frequency": frequency.tolist(), **{f"power_{name}": v.tolist() for name, v in spectra.items()},
               "one_over_f_squared": [None, *line[1:].tolist()]}  # fmt: skip
    chart = Chart(columns, palette)
    axes = chart.plot_axes("radial frequency, half-cycles an image", "mean power")
    shades = matplotlib.colormaps["viridis"](np.linspace(0.08, 0.85, len(others)))
    for name, shade in zip(others, shades, strict=True):
        axes.plot(frequency[1:], _positive(spectra[name])[1:], color=shade, linewidth=1.4, label=name)
    axes.plot(frequency[1:], _positive(spectra[reference])[1:], color=palette.ink, linewidth=1.6, label=reference)
    axes.plot(frequency[1:], line[1:], color=palette.muted, linewidth=1, linestyle=(0, (4, 3)), label="1/f²")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in range(int(math.log2(max(2, count - 1))) + 1)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda f, _: f"{f:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _log_energy_axis(axes)
    drawn = _positive(np.concatenate([line[1:], *(values[1:] for values in spectra.values())]))
    axes.set_ylim(max(np.nanmin(drawn), np.nanmax(drawn) * 1e-8) / 2, np.nanmax(drawn) * 2)
    chart.legend_of(axes, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1.2)
    return chart


# ------------------------------------------------------------------------------------------------ what tokens do


TILE, GAP, CAPTION = 1.0, 0.1, 0.3  # of sheets of images, in tiles


def _sheet(count: int, columns: Columns, palette: Palette, heading: float = 0.0) -> tuple[Chart, Axes, np.ndarray]:
    """A chart with room for images of one unit a side, and the top left corners of these (count, 2)."""
    across = min(8, count)
    width, height = across * (TILE + GAP) - GAP, math.ceil(count / across) * (TILE + CAPTION)
    chart = Chart(columns, palette, (5.6, heading + 0.1 + 5.5 * height / width))
    axes = chart.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    i = np.arange(count)
    return chart, axes, np.stack([i % across * (TILE + GAP), i // across * (TILE + CAPTION)], axis=1)


def _tile(axes: Axes, image: np.ndarray, corner: np.ndarray, caption: str, colour: str, **options: Any) -> None:
    x, y = corner
    limits = axes.axis()
    axes.imshow(image, extent=(x, x + TILE, y + TILE, y), **options)
    axes.axis(limits)  # imshow sets its own
    axes.text(x, y + TILE + 0.115, caption, fontsize=7, color=colour, va="center")


def contribution_gallery(
    differences: ArrayLike, refining: ArrayLike, opening: ArrayLike, cutoffs: Sequence[int], palette: Palette = LIGHT
) -> Chart:
    """What each token adds, as images, with the share of its energy that refines open bands and opens its own.

    Args:
        differences: delta_k (N, C, H, H); channels are averaged. Each is scaled to its own largest value.
        refining, opening: (N,), energies of the two parts.
        cutoffs: r_1 .. r_N.
    """
    images, refining, opening = _floats(differences).mean(axis=1), _floats(refining), _floats(opening)
    n = len(images)
    share = opening / np.maximum(refining + opening, 1e-30)
    columns = {
        "token": list(range(1, n + 1)),
        "band_from": [low for low, _ in bands(cutoffs[:n])], "band_to": list(cutoffs[:n]),
        "energy_refining": refining.tolist(), "energy_opening": opening.tolist(), "share_opening": share.tolist(),
    }  # fmt: skip
    chart, axes, corners = _sheet(n, columns, palette, heading=0.25)
    images /= np.maximum(np.abs(images).max(axis=(1, 2), keepdims=True), 1e-12)
    parts = {"opens its own band": [], "refines open bands": []}
    for i, (x, y) in enumerate(corners):
        _tile(axes, images[i], (x, y), f"{i + 1}", palette.muted, cmap=palette.diverging, vmin=-1, vmax=1)
        left, bottom, width = x + 0.3, y + TILE + 0.07, 0.7
        parts["opens its own band"].append(Rectangle((left, bottom), width * share[i], 0.09))
        parts["refines open bands"].append(Rectangle((left + width * share[i], bottom), width * (1 - share[i]), 0.09))
    for colour, bars in zip((palette.series[1], palette.series[0]), parts.values(), strict=True):
        axes.add_collection(PatchCollection(bars, facecolor=colour, linewidth=0))
    handles = [Rectangle((0, 0), 1, 1, facecolor=palette.series[i]) for i in (1, 0)]
    chart.legend(handles, list(parts), loc="outside upper left", ncols=2, frameon=False, fontsize=8.5,
                 labelcolor=palette.ink, handlelength=1)  # fmt: skip
    return chart


def image_strip(images: ArrayLike, captions: Sequence[str], columns: Columns, palette: Palette = LIGHT) -> Chart:
    """Images (B, H, H) or (B, H, H, 3) uint8 in a row, in several where they are many; `columns` is their table."""
    chart, axes, corners = _sheet(len(captions), columns, palette)
    for image, corner, caption in zip(np.asarray(images), corners, captions, strict=True):
        _tile(axes, image, corner, caption, palette.muted, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    return chart


def influence(matrix: ArrayLike, cutoffs: Sequence[int], palette: Palette = LIGHT) -> Chart:
    """Influence of each token on each radial frequency, (N, F) energies on a log colour scale, with the cutoffs."""
    values = _floats(matrix)
    n, count = values.shape
    token, frequency = np.meshgrid(np.arange(1, n + 1), np.arange(count), indexing="ij")
    columns = {"token": token.ravel().tolist(), "radial_frequency": frequency.ravel().tolist(),
               "influence": values.ravel().tolist()}  # fmt: skip
    chart = Chart(columns, palette, (5.6, 3.8))
    axes = chart.plot_axes("radial frequency, half-cycles an image", "token", grid=False)
    top = max(values.max(), 1e-12)
    picture = axes.imshow(
        np.maximum(values, top * 1e-6), cmap=palette.sequential, norm=LogNorm(top * 1e-5, top), aspect="auto",
        interpolation="nearest", extent=(-0.5, count - 0.5, n + 0.5, 0.5),
    )  # fmt: skip
    axes.stairs(_floats(cutoffs[:n]) - 0.5, np.arange(0.5, n + 1), orientation="horizontal", baseline=None,
                color="#38bdf8", linewidth=1.2, label="cutoff")  # fmt: skip
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(n + 0.5, 0.5)
    _whole_ticks(axes.yaxis)
    axes.legend(loc="upper right", fontsize=8.5, frameon=False, labelcolor="#38bdf8")
    bar = _colour_bar(chart, axes, picture, "mean energy that moves")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    return chart


# ------------------------------------------------------------------------------------------------ by prefix length


def quality(
    psnr: Mapping[str, Sequence[float | None]], ssim: Mapping[str, Sequence[float | None]], palette: Palette = LIGHT
) -> Chart:
    """PSNR in dB and SSIM over the prefix length: named series (N,), None where a codec cannot go so low."""
    n = len(next(iter(psnr.values())))
    k = np.arange(1, n + 1)
    columns: dict[str, Sequence[Any]] = {"prefix_length": k.tolist()}
    chart = Chart(columns, palette, (5.6, 4.2))
    names = list(dict.fromkeys([*psnr, *ssim]))
    colours = dict(zip(names, palette.series, strict=False))
    for row, (unit, group) in enumerate((("PSNR, dB", psnr), ("SSIM", ssim)), start=1):
        axes = chart.plot_axes("prefix length k" if row == 2 else "", unit, 2, 1, row)
        for name, values in group.items():
            columns[f"{unit[:4].lower()}_{name}"] = [None if v is None else float(v) for v in values]
            drawn = _floats([np.nan if v is None else v for v in values])
            # A low-pass that passes everything is the image itself: its 100 dB would flatten all others.
            drawn[drawn > 99] = np.nan
            label = name if np.isfinite(drawn).any() else f"{name}: cannot go this low"
            axes.plot(k, drawn, color=colours.get(name, palette.muted), linewidth=1.6, label=label)
        _whole_ticks(axes.xaxis)
        axes.set_xlim(1, max(2, n))
    handles, labels = chart.axes[0].get_legend_handles_labels()
    chart.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=8.5,
                 labelcolor=palette.ink)  # fmt: skip
    return chart


def prefix_psnr(psnr: ArrayLike, bound: ArrayLike, palette: Palette = LIGHT) -> Chart:
    """PSNR (N,) in dB of the mean error by prefix length, beside the Gaussian bound (N,) at as many bits."""
    series = {"this model": _floats(psnr), "Gaussian bound": _floats(bound)}
    n = len(series["this model"])
    k = np.arange(1, n + 1)
    columns = {"prefix_length": k.tolist(), "psnr": series["this model"].tolist(),
               "gaussian_bound": series["Gaussian bound"].tolist()}  # fmt: skip
    chart = Chart(columns, palette, THIRD)
    axes = chart.plot_axes("prefix length k", "PSNR of the mean error, dB")
    styles = ({"color": palette.series[0], "linewidth": 1.8}, {"color": palette.muted, "linestyle": (0, (4, 3))})
    for (name, values), style in zip(series.items(), styles, strict=True):
        axes.plot(k, values, label=name, **style)
    axes.set_xlim(1, max(2, n))
    _whole_ticks(axes.xaxis)
    chart.legend_of(axes, loc="lower right")
    return chart


def codebook_use(used: ArrayLike, perplexity: ArrayLike, codebook_size: int, palette: Palette = LIGHT) -> Chart:
    """Entries of the codebook that each position uses, and its perplexity, both (N,), beside its size K."""
    used, perplexity = _floats(used), _floats(perplexity)
    k = np.arange(1, len(used) + 1)
    columns = {"position": k.tolist(), "entries_used": used.astype(int).tolist(), "perplexity": perplexity.tolist()}
    chart = Chart(columns, palette, THIRD)
    axes = chart.plot_axes("position", "codebook entries")
    axes.axhline(codebook_size, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)), label=f"all {codebook_size}")
    axes.plot(k, used, color=palette.series[0], linewidth=1.6, marker="o", markersize=3, label="seen at least once")
    axes.plot(k, perplexity, color=palette.series[1], linewidth=1.6, marker="s", markersize=3, label="perplexity")
    axes.set_ylim(0, codebook_size * 1.06)
    _whole_ticks(axes.xaxis)
    chart.legend_of(axes, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return chart


def next_token_entropy(entropy: ArrayLike, codebook_size: int, palette: Palette = LIGHT) -> Chart:
    """Entropy of the model's next-token distribution by position, (N,) in nats, drawn in bits with log2 K."""
    bits = _floats(entropy) / math.log(2)
    k = np.arange(1, len(bits) + 1)
    columns = {"position": k.tolist(), "entropy_nats": _floats(entropy).tolist(), "entropy_bits": bits.tolist()}
    chart = Chart(columns, palette, THIRD)
    axes = chart.plot_axes("position", "entropy, bits a token")
    limit = math.log2(codebook_size)
    axes.axhline(limit, color=palette.muted, linewidth=1, linestyle=(0, (4, 3)), label=f"log₂ {codebook_size}")
    axes.plot(k, bits, color=palette.series[0], linewidth=1.6, marker="o", markersize=3, label="model")
    axes.set_ylim(0, limit * 1.06)
    _whole_ticks(axes.xaxis)
    chart.legend_of(axes, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return chart
