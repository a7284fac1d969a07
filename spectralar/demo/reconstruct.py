"""The Reconstruct tab: an image, its spectral tokens, and what each prefix of them brings back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import gradio as gr
from PIL import Image

from ..analysis.codecs import prefix_bits
from ..analysis.quality import SSIM_WINDOW, psnr, ssim
from ..interface.image import to_model_input
from .cache import PictureOutput
from .errors import one_sentence, user_error, whole_number
from .export import png_data_url
from .links import Link, Linked
from .model import Model, to_pixels
from .reconstruction import Reconstruction, scrubber_values
from .scrubber import scrubber
from .source import TOKENIZER, Origins, opening_origin, source
from .turns import ALWAYS, Turns
from .upload import PhotoInput, crop_figure

TITLE = "Reconstruct"
MAX_DECODED = 1024  # images in one call of the endpoint
PRIVATE = {"api_visibility": "private", **TOKENIZER}
QUIET = PRIVATE | {"show_progress": "hidden"}
EDIT = QUIET | ALWAYS
CHOICE = EDIT | {"concurrency_id": "choice", "concurrency_limit": 1}  # one after the other: the last click counts


# -------------------------------------------------------------------------------------------------- layout


def build(model: Model) -> Linked:
    """Lays out the tab; returns what of it stands in the page's address."""
    _add_endpoints(model)  # first: Gradio numbers later functions of the same name, the page's own handlers
    origins = Origins(model)
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3, min_width=300):
            picture = source(origins, "Image", "photo", height=240)
            crop = gr.HTML("")
            with gr.Accordion("Replace a code", open=False, elem_id="edit") as edit:
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
            if model.trained_on:
                gr.Markdown(f"The tokenizer was trained on {model.trained_on}.", elem_classes="note")

    shown = gr.State(None)
    tab = _Tab(model, origins, view, shown, crop)
    picture.listen(tab.reconstruct, [view, shown, crop], show_progress_on=view, **PRIVATE)
    turns = picture.turns
    put.click(tab.replace, [turns, shown, token, code], [view, shown], **EDIT)
    draw.click(tab.draw, [turns, shown, token], [view, shown, code], **EDIT)
    undo.click(tab.undo, [turns, shown], [view, shown], **EDIT)
    view.token(tab.choose, shown, [token, code, edit], **CHOICE)

    def open_with_example(item: gr.Tab) -> None:
        picture.open_with(item, "image", tab.opening, [view, shown, crop], **QUIET)

    return Linked([Link("image", picture.origin)], [], open_with_example)


# -------------------------------------------------------------------------------------------------- behaviour


@dataclass
class _Tab:
    model: Model
    origins: Origins
    view: gr.HTML
    shown: gr.State
    crop: gr.HTML

    def __post_init__(self) -> None:
        self.opening = cache(self._opening)

    def _opening(self) -> dict:
        """What a visitor sees first: an example, reconstructed once for all visitors."""
        *_, last = self.reconstruct(opening_origin(self.origins), None)
        return last

    def reconstruct(self, origin: str, photo: Image.Image | None) -> Iterator[dict]:
        if not origin and photo is None:
            yield {self.view: None, self.shown: None, self.crop: ""}
            return
        with one_sentence():
            picture = self.origins.picture(origin, photo)
            shown = Reconstruction(self.model, picture.image)
            photo = self.origins.photo(origin, photo)
        crop = "" if photo is None else crop_figure(photo, self.model.image_size, self.model.channels)
        for value in scrubber_values(self.model, shown):
            yield {self.view: value, self.shown: shown, self.crop: crop}

    def replace(
        self, turns: Turns, shown: Reconstruction | None, token: float | None, code: float | None
    ) -> list[Any]:
        """The reconstruction with one code replaced, compared with the one of the true codes.

        Nothing, if another image has begun to take the place of the one that the visitor sees.
        """
        if turns.coming:
            return [gr.skip(), gr.skip()]
        if shown is None:
            raise user_error("Choose an image first.")
        with one_sentence():
            k = whole_number(token, "the token", 1, self.model.num_tokens)
            code = whole_number(code, "the code", 0, self.model.codebook_size - 1)
        turns.begin()
        codes = [*shown.codes[: k - 1], code, *shown.codes[k:]]
        edited = Reconstruction(self.model, shown.image, codes, shown.unedited or shown)
        return [next(scrubber_values(self.model, edited)), edited]

    def draw(self, turns: Turns, shown: Reconstruction | None, token: float | None) -> list[Any]:
        code = random.randrange(self.model.codebook_size)
        return [*self.replace(turns, shown, token, code), gr.skip() if turns.coming else code]

    def undo(self, turns: Turns, shown: Reconstruction | None) -> list[Any]:
        if turns.coming or shown is None or shown.unedited is None:
            return [gr.skip(), gr.skip()]
        turns.begin()
        *_, value = scrubber_values(self.model, shown.unedited)
        return [value | {"keep_place": True}, shown.unedited]

    def choose(self, shown: Reconstruction | None, event: gr.EventData) -> list[Any]:
        """The token a visitor has clicked, its code, and the controls that replace it."""
        if shown is None:  # it has been taken away meanwhile
            raise user_error("Choose an image first.")
        with one_sentence():
            k = whole_number(event.k, "the token", 1, self.model.num_tokens)
        return [k, shown.codes[k - 1], gr.Accordion(open=True)]


# -------------------------------------------------------------------------------------------------- endpoints


def _add_endpoints(model: Model) -> None:
    n = model.num_tokens

    def reconstruct(image: Image.Image | None, num_tokens: float | None) -> tuple[Image.Image, dict[str, Any]]:
        """Encodes an image to spectral tokens and decodes a prefix of them.

        Args:
            image: any photo; its middle square is taken.
            num_tokens: prefix length, 1 to N.

        Returns:
            The decoded image, and {"codes", "num_tokens", "cutoff", "bits", "psnr", "ssim"}: all N codes, and PSNR in
            dB and SSIM of the decoded prefix against the image as the model sees it.
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
        num_tokens = gr.Number(n, label="num_tokens", info=f"1 to {n}")
        output, numbers = PictureOutput(label="reconstruction", format="png"), gr.JSON(label="numbers")
        gr.Button(visible=False).click(
            reconstruct, [image, num_tokens], [output, numbers], api_name="reconstruct", **TOKENIZER
        )  # fmt: skip
    gr.api(decode, api_name="decode", **TOKENIZER)
