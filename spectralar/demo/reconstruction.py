"""An image, its codes and every prefix of them: what the Reconstruct tab shows, as numbers and pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..analysis.codecs import BASELINES, baselines, prefix_bits
from ..analysis.contributions import token_contributions
from ..analysis.quality import SSIM_WINDOW, psnr, ssim
from ..spectral import dct2, nested_targets
from .model import Model, to_pixels
from .pictures import ERROR_GAIN, error_map, log_spectrum, own_gains, signed_map
from .scrubber import StripEncoder, scrubber_value

PICTURES = ("Original", "Ideal low-pass", "Reconstruction")


MEASURES = (("PSNR", psnr, 99.9, {"unit": "dB", "digits": 1}), ("SSIM", ssim, 1 - 1e-6, {"unit": "", "digits": 3}))


class Reconstruction:
    """An image with its codes, and what plain codecs reach.

    It lies in the visitor's session, for edits of the codes, until somebody else's takes its place. So what is large,
    the decoded prefixes, is made anew for each edit.

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
        self._bits = prefix_bits(model.num_tokens, model.codebook_size)

    @cached_property
    def coded(self) -> dict[str, dict[str, list[float | None]]]:
        """What plain codecs reach at the bits of each prefix length, see `codecs.baselines`: by measure and codec."""
        if self.unedited is not None:
            return self.unedited.coded
        images = baselines(self.image, self._bits)
        return {
            title: {
                name: [None if x is None else round(float(measure(x, self.image)), 4) for x in row]
                for name, row in images.items()
            }
            for title, measure, *_ in measures_of(self.image)
        }  # fmt: skip


def measures_of(image: Tensor) -> list[tuple[Any, ...]]:
    """Those of `MEASURES` that an image is large enough for."""
    return [measure for measure in MEASURES if measure[0] != "SSIM" or image.shape[-1] >= SSIM_WINDOW]


def strips(
    model: Model, shown: Reconstruction, frames: Tensor
) -> tuple[list[dict[str, Any]], list[str], Iterator[list[np.ndarray]]]:
    """The rows of pictures, by how much each token's own are enlarged, and the tiles for each prefix length.

    frames: all prefixes (N, C, H, H).
    """
    image = shown.image
    targets = nested_targets(image[None], model.cutoffs)[0]  # (N, C, H, H)
    compared = image if shown.unedited is None else model.decode_prefixes(shown.unedited.codes)
    error = frames.clamp(-1, 1) - compared.clamp(-1, 1)
    parts = token_contributions(frames[None], model.cutoffs)
    refinement, opening = parts.refinement[0], parts.opening[0]
    delta = refinement + opening
    gain = own_gains(delta, refinement, opening)
    peak = float(dct2(image).abs().mean(dim=-3).max().clamp(min=1e-6))

    error_name = f"Error, {ERROR_GAIN} times" if shown.unedited is None else f"Change, {ERROR_GAIN} times"
    groups = [
        {"title": "Image", "captions": [*PICTURES, error_name]},
        {"title": "Spectrum", "captions": ["Spectrum, log scale", "", "", ""]},
        {
            "title": "Token",
            "of_token": True,
            "captions": ["delta, all of it", "in open bands", "in its new band", "spectrum"],
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

    return groups, [f"{g:.2g}" for g in gain.flatten().tolist()], tiles()


def quality(model: Model, shown: Reconstruction, frames: Tensor, codecs: bool = True) -> list[dict[str, Any]]:
    """PSNR and SSIM over the prefix length as charts of the scrubber; beside them what plain codecs reach.

    Args:
        model: the model.
        shown: the image.
        frames: its prefixes (N, C, H, H).
        codecs: whether to wait for the plain codecs; without them their charts have empty places.
    """
    coded, missing = (shown.coded, "cannot go this low") if codecs else ({}, "…")
    unknown = dict.fromkeys(BASELINES, [None] * model.num_tokens)
    image = shown.image
    targets = nested_targets(image[None], model.cutoffs)[0]
    own, others = [], []
    for title, measure, best, axis in measures_of(image):
        measured = {
            "reconstruction to image": measure(frames, image),
            "reconstruction to low-pass": measure(frames, targets),
            "low-pass to image": measure(targets, image),
        }
        series = [
            {"name": name, "values": [round(v, 4) if v < best else None for v in values.tolist()]}
            for name, values in measured.items()
        ]
        own.append(_with_range({"title": title, "missing": "exact", "series": series, **axis}))
        reached = [{"name": name, "values": values} for name, values in coded.get(title, unknown).items()]
        title = f"{title} of others at the same number of bits"
        others.append(_with_range({"title": title, "missing": missing, "series": [series[0], *reached], **axis}))
    return [*own, *others]


def _with_range(chart: dict[str, Any]) -> dict[str, Any]:
    known = [v for series in chart["series"] for v in series["values"] if v is not None]
    return chart | {"low": min(known, default=0.0), "high": max(known, default=1.0)}


def scrubber_values(model: Model, shown: Reconstruction) -> Iterator[dict[str, Any]]:
    """The scrubber's value, first without and then with the plain codecs, which take longer."""
    frames = model.decode_prefixes(shown.codes)  # (N, C, H, H), not clamped
    groups, gains, tiles = strips(model, shown, frames)
    edited = shown.unedited is not None
    value = scrubber_value(
        groups, model.cutoffs, model.image_size, model.codebook_size, keep_place=edited, name="reconstruction"
    )
    encoder = StripEncoder(model.num_tokens)
    value["frames"] = [encoder.encode(tile) for tile in tiles]
    value["codes"], value["gains"] = [[code] for code in shown.codes], gains
    value["charts"] = quality(model, shown, frames, codecs=edited)
    changed = sum(a != b for a, b in zip(shown.codes, shown.unedited.codes, strict=True)) if edited else 0
    value["status"] = (
        f"{changed} of {model.num_tokens} codes replaced; the fourth picture shows what moved" if edited else ""
    )
    yield value
    if not edited:
        yield value | {"charts": quality(model, shown, frames)}
