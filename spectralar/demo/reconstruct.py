"""The Reconstruct tab: an image, its spectral tokens, and what each prefix of them brings back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from torch import Tensor

from ..analysis import SSIM_WINDOW, baselines, prefix_bits, psnr, ssim, token_contributions
from ..image import to_model_input
from ..spectral import dct2, nested_targets
from .errors import one_sentence, user_error
from .export import png_data_url
from .links import Link, Linked
from .model import Model, to_pixels
from .pictures import ERROR_GAIN, error_map, log_spectrum, signed_map
from .scrubber import StripEncoder, scrubber, scrubber_value
from .upload import PhotoInput, crop_figure

TITLE = "Reconstruct"
EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"
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


# -------------------------------------------------------------------------------------------------- pictures


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


# -------------------------------------------------------------------------------------------------- the tab


def values(model: Model, shown: Reconstruction) -> Iterator[dict[str, Any]]:
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


def build(model: Model) -> Linked:
    """Lays out the tab; returns what of it stands in the page's address."""
    state = gr.State(None)
    paths = {path.stem: path for path in sorted(EXAMPLES.glob("*")) if path.suffix in (".png", ".jpg", ".webp")}
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3, min_width=300, elem_classes="panel"):
            photo = PhotoInput(
                label="Image", sources=["upload", "clipboard", "webcam"], height=260, elem_id="photo",
                placeholder="Drop an image, paste one, or click to choose", buttons=[],
            )  # fmt: skip
            example = gr.Textbox("", label="Example", visible="hidden")
            if paths:
                thumbnails = gr.Dataset(
                    components=[gr.Image(render=False, visible=False)], samples=[[str(p)] for p in paths.values()],
                    type="index", label="Examples", elem_id="examples", samples_per_page=len(paths),
                )  # fmt: skip
            crop = gr.HTML("", padding=False)
            with gr.Accordion("Replace a code", open=False):
                with gr.Row(elem_classes="tight"):
                    token = gr.Number(1, label="Token", precision=0, minimum=1, maximum=model.num_tokens, min_width=80)
                    code = gr.Number(
                        0, label="Code", precision=0, minimum=0, maximum=model.codebook_size - 1, min_width=80
                    )
                with gr.Row(elem_classes="tight"):
                    put = gr.Button("Replace", size="sm", elem_id="replace-code", min_width=70)
                    draw = gr.Button("Random code", size="sm", elem_id="random-code", min_width=90)
                    undo = gr.Button("Undo all", size="sm", elem_id="undo-codes", min_width=70)
                gr.Markdown("A click on a token below the pictures chooses it.", elem_classes="note")
        with gr.Column(scale=7, min_width=320):
            view = scrubber(
                hint="Any image becomes a short list of spectral tokens. Every prefix of the list is a complete, "
                "blurrier image: drag the slider to see what each token brings.",
                elem_id="reconstructed",
            )

    def reconstruct(image: Image.Image | None) -> Iterator[list[Any]]:
        if image is None:
            yield [None, None, ""]
            return
        with one_sentence():
            shown = Reconstruction(model, to_model_input(image, model.image_size, model.channels)[0])
        figure = crop_figure(image, model.image_size, model.channels)
        for value in values(model, shown):
            yield [value, shown, figure]

    def edit(shown: Reconstruction | None, k: float | None, new: float | None) -> list[Any]:
        if shown is None:
            raise user_error("Choose an image first.")
        if k is None or new is None:
            raise user_error("Give the number of a token and its new code.")
        if not (1 <= k <= model.num_tokens and 0 <= new < model.codebook_size):
            raise user_error(
                f"Tokens are numbered from 1 to {model.num_tokens}, codes from 0 to {model.codebook_size - 1}."
            )
        codes = list(shown.codes)
        codes[int(k) - 1] = int(new)
        edited = Reconstruction(model, shown.image, codes, shown.unedited or shown)
        return [next(values(model, edited)), edited]

    def draw_code(shown: Reconstruction | None, k: float | None) -> list[Any]:
        new = random.randrange(model.codebook_size)
        return [*edit(shown, k, new), new]

    def undo_all(shown: Reconstruction | None) -> list[Any]:
        if shown is None or shown.unedited is None:
            return [gr.skip(), gr.skip()]
        *_, value = values(model, shown.unedited)
        return [value | {"keep_place": True}, shown.unedited]

    def choose(shown: Reconstruction | None, event: gr.EventData) -> list[Any]:
        k = int(event.k)
        return [k, shown.codes[k - 1]] if shown is not None and 1 <= k <= len(shown.codes) else [gr.skip()] * 2

    private = {"api_visibility": "private", "concurrency_id": "tokenizer", "concurrency_limit": 2}
    hidden = private | {"show_progress": "hidden"}
    photo.change(reconstruct, photo, [view, state, crop], show_progress_on=view, **private)
    put.click(edit, [state, token, code], [view, state], **hidden)
    draw.click(draw_code, [state, token], [view, state, code], **hidden)
    undo.click(undo_all, state, [view, state], **hidden)
    view.token(choose, state, [token, code], **hidden)
    if paths:
        names = list(paths)
        thumbnails.click(lambda i: names[i], thumbnails, example, **hidden)
        example.change(lambda name: str(paths[name]) if name in paths else gr.skip(), example, photo, **hidden)
        gr.on([photo.upload, photo.clear], lambda: "", None, example, **hidden)
    _add_endpoints(model)
    return Linked([Link("image", example)], [])


def _add_endpoints(model: Model) -> None:
    n = model.num_tokens

    def reconstruct(image: Image.Image | None, num_tokens: float | None) -> tuple[Image.Image, dict[str, Any]]:
        """Encodes an image to spectral tokens and decodes a prefix of them.

        Returns the decoded image, and {"codes", "num_tokens", "cutoff", "bits", "psnr", "ssim"}: all N codes, and
        PSNR in dB and SSIM of the decoded prefix against the image as the model sees it.
        """
        if image is None:
            raise user_error("Send an image.")
        k = n if num_tokens is None else num_tokens
        if k != k or int(k) != k or not 1 <= k <= n:
            raise user_error(f"The number of tokens must be a whole number between 1 and {n}")
        k = int(k)
        with one_sentence():
            x = to_model_input(image, model.image_size, model.channels)
            codes = model.encode(x)[0]
            frame = model.decode_prefixes(codes)[k - 1 : k]
        numbers = {
            "codes": codes, "num_tokens": k, "cutoff": model.cutoffs[k - 1],
            "bits": prefix_bits(n, model.codebook_size)[k - 1], "psnr": float(psnr(frame, x)[0]),
            "ssim": float(ssim(frame, x)[0]) if model.image_size >= SSIM_WINDOW else None,
        }  # fmt: skip
        return Image.fromarray(to_pixels((frame[0] / 2 + 0.5).clamp(0, 1))), numbers

    def decode(codes: list[list[int]], num_tokens: list[int] | None = None) -> list[list[str]]:
        """Decodes spectral tokens.

        Args:
            codes: one list of up to N codes an image, all equally long.
            num_tokens: prefix lengths; default the whole lists.

        Returns:
            For each image a list of PNG data URLs, one a prefix length.
        """
        if not codes or not isinstance(codes[0], list):
            raise user_error("codes must be a list of lists of whole numbers, one for each image.")
        lengths = num_tokens or [len(codes[0])]
        if len(codes) * len(lengths) > 1024:
            raise user_error("At most 1024 images are decoded in a call.")
        with one_sentence():
            frames = model.decode(codes, lengths)
        return [[png_data_url(frame) for frame in image] for image in frames]

    with gr.Group(visible=False):
        image = PhotoInput(label="image")
        num_tokens = gr.Number(None, label="num_tokens", info=f"Prefix length, 1 to {n}; default all")
        output, numbers = gr.Image(label="reconstruction", format="png"), gr.JSON(label="numbers")
        gr.Button(visible=False).click(
            reconstruct, [image, num_tokens], [output, numbers], api_name="reconstruct",
            concurrency_id="tokenizer", concurrency_limit=2,
        )  # fmt: skip
    gr.api(decode, api_name="decode", concurrency_id="tokenizer", concurrency_limit=2)
