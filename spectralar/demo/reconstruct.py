"""The Reconstruct tab: an image, its spectral tokens, and what each prefix of them brings back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..analysis import SSIM_WINDOW, prefix_bits, psnr, ssim
from ..image import to_model_input
from .errors import one_sentence, user_error, whole_number
from .export import png_data_url
from .links import Link, Linked
from .model import Model, to_pixels
from .reconstruction import Reconstruction, scrubber_values
from .scrubber import scrubber
from .upload import PhotoInput, crop_figure

TITLE = "Reconstruct"
EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"
MAX_DECODED = 1024  # images in one call of the endpoint
# The tokenizer runs for a moment only, and on its own: nobody waits here for somebody else's samples.
PRIVATE = {"api_visibility": "private", "concurrency_id": "tokenizer", "concurrency_limit": 2}
QUIET = PRIVATE | {"show_progress": "hidden"}


# -------------------------------------------------------------------------------------------------- layout


def build(model: Model) -> Linked:
    """Lays out the tab; returns what of it stands in the page's address."""
    _add_endpoints(model)  # first: Gradio numbers later functions of the same name, the page's own handlers
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3, min_width=300, elem_classes="panel"):
            photo = PhotoInput(
                label="Image", type="pil", image_mode=None, sources=["upload", "clipboard", "webcam"], height=260,
                placeholder="Drop an image, paste one, or click to choose", buttons=[], elem_id="photo",
            )  # fmt: skip
            example = _examples(photo)
            crop = gr.HTML("")
            with gr.Accordion("Replace a code", open=False, elem_id="edit"):
                with gr.Row(elem_classes="tight"):
                    token = gr.Number(1, label="Token", precision=0, min_width=80, elem_id="token")
                    code = gr.Number(0, label="Code", precision=0, min_width=80, elem_id="code")
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

    shown = gr.State(None)
    tab = _Tab(model)
    photo.change(tab.reconstruct, photo, [view, shown, crop], show_progress_on=view, **PRIVATE)
    put.click(tab.replace, [shown, token, code], [view, shown], **QUIET)
    draw.click(tab.draw, [shown, token], [view, shown, code], **QUIET)
    undo.click(tab.undo, shown, [view, shown], **QUIET)
    view.token(tab.choose, shown, [token, code], **QUIET)
    return Linked([Link("image", example)], [])


def _examples(photo: PhotoInput) -> gr.Textbox:
    """Pictures that one click puts into the input; the one chosen stands in the address by its name."""
    chosen = gr.Textbox("", label="Example", visible="hidden", elem_id="example")
    paths = {path.stem: path for path in sorted(EXAMPLES.glob("*")) if path.suffix in (".png", ".jpg", ".webp")}
    if paths:
        names = list(paths)
        gr.Dataset(
            components=[gr.Image(render=False)], samples=[[str(path)] for path in paths.values()], type="index",
            label="Examples", samples_per_page=len(paths), elem_id="examples",
        ).click(lambda i: names[i], None, chosen, **QUIET)  # fmt: skip
    chosen.change(lambda name: str(paths[name]) if name in paths else gr.skip(), chosen, photo, **QUIET)
    gr.on([photo.upload, photo.clear], lambda: "", None, chosen, **QUIET)
    return chosen


# -------------------------------------------------------------------------------------------------- behaviour


@dataclass
class _Tab:
    model: Model

    def reconstruct(self, photo: Image.Image | None) -> Iterator[list[Any]]:
        if photo is None:
            yield [gr.skip(), gr.skip(), ""]
            return
        size, channels = self.model.image_size, self.model.channels
        with one_sentence():
            shown = Reconstruction(self.model, to_model_input(photo, size, channels)[0])
        figure = crop_figure(photo, size, channels)
        for value in scrubber_values(self.model, shown):
            yield [value, shown, figure]

    def replace(self, shown: Reconstruction | None, token: float | None, code: float | None) -> list[Any]:
        """The reconstruction with one code replaced, compared with the one of the true codes."""
        if shown is None:
            raise user_error("Choose an image first.")
        with one_sentence():
            k = whole_number(token, "the token", 1, self.model.num_tokens)
            code = whole_number(code, "the code", 0, self.model.codebook_size - 1)
        codes = [*shown.codes[: k - 1], code, *shown.codes[k:]]
        edited = Reconstruction(self.model, shown.image, codes, shown.unedited or shown)
        return [next(scrubber_values(self.model, edited)), edited]

    def draw(self, shown: Reconstruction | None, token: float | None) -> list[Any]:
        code = random.randrange(self.model.codebook_size)
        return [*self.replace(shown, token, code), code]

    def undo(self, shown: Reconstruction | None) -> list[Any]:
        if shown is None or shown.unedited is None:
            return [gr.skip(), gr.skip()]
        *_, value = scrubber_values(self.model, shown.unedited)
        return [value | {"keep_place": True}, shown.unedited]

    def choose(self, shown: Reconstruction, event: gr.EventData) -> list[Any]:
        """The token a visitor has clicked, and its code."""
        with one_sentence():
            k = whole_number(event.k, "the token", 1, self.model.num_tokens)
        return [k, shown.codes[k - 1]]


# -------------------------------------------------------------------------------------------------- endpoints


def _add_endpoints(model: Model) -> None:
    n = model.num_tokens

    def reconstruct(image: Image.Image | None, num_tokens: float | None) -> tuple[Image.Image, dict[str, Any]]:
        """Encodes an image to spectral tokens and decodes a prefix of them.

        Returns the decoded image, and {"codes", "num_tokens", "cutoff", "bits", "psnr", "ssim"}: all N codes, and
        PSNR in dB and SSIM of the decoded prefix against the image as the model sees it.
        """
        if image is None:
            raise user_error("Send an image.")
        with one_sentence():
            k = whole_number(n if num_tokens is None else num_tokens, "the number of tokens", 1, n)
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
        if not isinstance(codes, list) or not codes or not isinstance(codes[0], list):
            raise user_error("codes must be a list of lists of whole numbers, one for each image.")
        lengths = num_tokens or [len(codes[0])]
        if len(codes) * len(lengths) > MAX_DECODED:
            raise user_error(f"At most {MAX_DECODED} images are decoded in a call.")
        with one_sentence():
            frames = model.decode(codes, lengths)
        return [[png_data_url(frame) for frame in image] for image in frames]

    with gr.Group(visible=False):
        image = PhotoInput(label="image", type="pil", image_mode=None)
        num_tokens = gr.Number(None, label="num_tokens", info=f"Prefix length, 1 to {n}; default all")
        output, numbers = gr.Image(label="reconstruction", format="png"), gr.JSON(label="numbers")
        gr.Button(visible=False).click(
            reconstruct, [image, num_tokens], [output, numbers], api_name="reconstruct",
            concurrency_id="tokenizer", concurrency_limit=2,
        )  # fmt: skip
    gr.api(decode, api_name="decode", concurrency_id="tokenizer", concurrency_limit=2)
