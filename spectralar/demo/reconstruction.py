"""An image, its codes, and every prefix of them decoded: what the Reconstruct tab shows, as numbers and pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from ..analysis import SSIM_WINDOW, baselines, prefix_bits, psnr, ssim, token_contributions
from ..spectral import dct2, nested_targets
from .model import Model, to_pixels
from .pictures import ERROR_GAIN, error_map, log_spectrum, signed_map
from .scrubber import StripEncoder, scrubber_value

PICTURES = ("Original", "Ideal low-pass", "Reconstruction")


class Reconstruction:
    """An image with its codes and all its decoded prefixes. Kept in the visitor's session for edits of the codes.

    Args:
        model: the model.
        image: (C, H, H) in [-1, 1].
        codes: N codes; those of the image itself, or edited.
        unedited: the reconstruction that the codes were edited from.
    """

    def __init__(
        self, model: Model, image: Tensor, codes: list[int] | None = None, unedited: Reconstruction | None = None
    ) -> None:
        self.image, self.unedited = image, unedited
        self.codes = model.encode(image[None])[0] if codes is None else codes
        self.frames: Tensor = model.decode_prefixes(self.codes)  # (N, C, H, H), not clamped


def strips(model: Model, shown: Reconstruction) -> tuple[list[dict[str, Any]], Iterator[list[np.ndarray]]]:
    """The rows of pictures, and their tiles for each prefix length."""
    image, frames = shown.image, shown.frames
    targets = nested_targets(image[None], model.cutoffs)[0]  # (N, C, H, H)
    compared = image if shown.unedited is None else shown.unedited.frames
    error = frames.clamp(-1, 1) - compared.clamp(-1, 1)
    parts = token_contributions(frames[None], model.cutoffs)
    refinement, opening = parts.refinement[0], parts.opening[0]
    delta = refinement + opening
    gain = 0.9 / max(float(delta[1:].abs().max() if len(delta) > 1 else delta.abs().max()), 1e-3)
    peak = float(dct2(image).abs().mean(dim=-3).max().clamp(min=1e-6))

    error_name = f"Error, {ERROR_GAIN} times" if shown.unedited is None else f"Change, {ERROR_GAIN} times"
    groups = [
        {"title": "Image", "captions": [*PICTURES, error_name]},
        {"title": "Spectrum", "captions": ["Spectrum, log scale", "", "", ""]},
        {
            "title": "Token",
            "of_token": True,
            "captions": [f"all, {gain:.2g} times", "in open bands", "in its new band", "spectrum"],
        },
    ]

    def tiles() -> Iterator[list[np.ndarray]]:
        original, original_spectrum = to_pixels((image / 2 + 0.5).clamp(0, 1)), log_spectrum(image, peak)
        columns = [
            to_pixels((targets / 2 + 0.5).clamp(0, 1)),
            to_pixels((frames / 2 + 0.5).clamp(0, 1)),
            error_map(error),
            log_spectrum(targets, peak),
            log_spectrum(frames, peak),
            log_spectrum(error, peak),
            signed_map(delta, gain),
            signed_map(refinement, gain),
            signed_map(opening, gain),
            log_spectrum(delta, peak),
        ]
        for k in range(model.num_tokens):
            rest = [column[k] for column in columns]
            yield [original, *rest[:3], original_spectrum, *rest[3:]]

    return groups, tiles()


def quality(model: Model, shown: Reconstruction, codecs: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """PSNR and SSIM over the prefix length as charts of the scrubber."""
    image, frames = shown.image, shown.frames
    targets = nested_targets(image[None], model.cutoffs)[0]

    def chart(title: str, measure: Any, best: float, **axis: Any) -> dict[str, Any]:
        measured = {
            "reconstruction to image": measure(frames, image),
            "reconstruction to low-pass": measure(frames, targets),
            "low-pass to image": measure(targets, image),
        }
        series = [
            {"name": name, "values": [round(v, 4) if v < best else None for v in values.tolist()]}
            for name, values in measured.items()
        ]
        return _with_range({"title": title, "missing": "exact", "series": series, **axis})

    charts = [chart("PSNR", psnr, 99.9, unit="dB", digits=1)]
    if model.image_size >= SSIM_WINDOW:
        charts.append(chart("SSIM", ssim, 1 - 1e-6, unit="", digits=3))
    if codecs:
        series = [charts[0]["series"][0], *({"name": name, "values": row} for name, row in codecs.items())]
        title = "PSNR of others at the same number of bits"
        charts.append(
            _with_range({"title": title, "missing": "cannot go this low", "unit": "dB", "digits": 1, "series": series})
        )
    return charts


def _with_range(chart: dict[str, Any]) -> dict[str, Any]:
    known = [v for series in chart["series"] for v in series["values"] if v is not None]
    return chart | {"low": min(known, default=0.0), "high": max(known, default=1.0)}


def codec_psnr(model: Model, image: Tensor) -> dict[str, list[float | None]]:
    """PSNR of plain codecs at the bits of each prefix length; None where a codec cannot go this low."""
    coded = baselines(image, prefix_bits(model.num_tokens, model.codebook_size))
    return {name: [None if x is None else float(psnr(x, image)) for x in row] for name, row in coded.items()}


def scrubber_values(model: Model, shown: Reconstruction) -> Iterator[dict[str, Any]]:
    """The scrubber's value, first without and then with the plain codecs, which take longer."""
    groups, tiles = strips(model, shown)
    edited = shown.unedited is not None
    value = scrubber_value(
        groups, model.cutoffs, model.image_size, model.codebook_size, keep_place=edited, name="reconstruction"
    )
    encoder = StripEncoder(model.num_tokens)
    value["frames"] = [encoder.encode(tile) for tile in tiles]
    value["codes"] = [[code] for code in shown.codes]
    value["charts"] = quality(model, shown, {})
    changed = sum(a != b for a, b in zip(shown.codes, shown.unedited.codes, strict=True)) if edited else 0
    value["status"] = (
        f"{changed} of {model.num_tokens} codes replaced; the fourth picture shows what moved" if edited else ""
    )
    yield value
    if not edited:
        yield value | {"charts": quality(model, shown, codec_psnr(model, shown.image))}
