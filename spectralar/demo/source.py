"""Where a tab's picture comes from: a visitor's image, an example, or a sample of the model.

A hidden text names the origin, so that it can stand in the page's address: "example:NAME", "sample:CLASS_ID:SEED",
or nothing, for an image that the visitor has sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..interface.image import to_model_input
from .errors import one_sentence
from .generate import NEW_SEED
from .model import MAX_SEED, Model, on_gpu, to_pixels
from .turns import ALWAYS, Turns
from .upload import PhotoInput, open_photo

KEPT_SAMPLES = 64
# The tokenizer runs for a moment only, and on its own: nobody waits here for somebody else's samples.
TOKENIZER = {"concurrency_id": "tokenizer", "concurrency_limit": 2}
PREVIEW_SIDE = 256
THUMBNAIL_SIDE = 128
NUM_SAMPLE_EXAMPLES = 4
EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE_FILES = {path.stem: path for path in sorted(EXAMPLES.glob("*")) if path.suffix in (".png", ".jpg", ".webp")}


class Picture(NamedTuple):
    """An image and its spectral tokens."""

    image: Tensor  # (C, H, H) in [-1, 1]; that of a sample is its full reconstruction
    codes: list[int]


class Origins:
    """Makes pictures of origins. Samples depend on class and seed alone, so those asked for lately are kept."""

    def __init__(self, model: Model, examples: Mapping[str, Path] = EXAMPLE_FILES) -> None:
        self.model, self.examples = model, examples
        self._sample_codes = on_gpu(self._codes_of_class)
        self.sample = lru_cache(KEPT_SAMPLES)(self._sample)

    def picture(self, origin: str | None, photo: Image.Image | None, name: str = "an image") -> Picture:
        """The picture of an origin or, where there is none, of a photo.

        Raises:
            ValueError: one sentence, if there is neither, or the origin is none.
        """
        kind, _, rest = (origin or "").partition(":")
        if kind == "sample":
            class_id, _, seed = rest.partition(":")
            if not (class_id.isdecimal() and seed.isdecimal()) or int(seed) > MAX_SEED:
                raise ValueError(f"{origin!r} is no sample: it should be sample:CLASS_ID:SEED.")
            (class_id,) = self.model.pipe.get_label_ids(int(class_id))
            return self.sample(class_id, int(seed))
        photo = self.photo(origin, photo)
        if photo is None:
            raise ValueError(f"choose {name} first.")
        image = to_model_input(photo, self.model.image_size, self.model.channels)
        return Picture(image[0], self.model.encode(image)[0])

    def photo(self, origin: str | None, photo: Image.Image | None) -> Image.Image | None:
        """The photo that an origin names or, where there is none, `photo`; None for a sample.

        Raises:
            ValueError: one sentence, if the origin is none.
        """
        kind, _, name = (origin or "").partition(":")
        if kind == "sample":
            return None
        if kind == "example":
            if name not in self.examples:
                raise ValueError("there is no such example.")
            return open_photo(self.examples[name])
        if kind:
            raise ValueError(f"{origin!r} is neither an example nor a sample.")
        return photo

    def preview(self, origin: str) -> Image.Image:
        """What the image input shows for an origin."""
        photo = self.photo(origin, None)
        if photo is not None:
            return photo
        image = Image.fromarray(to_pixels(self.picture(origin, None).image / 2 + 0.5))
        factor = max(1, PREVIEW_SIDE // image.width)  # whole steps: browsers blur what they enlarge
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)

    def _sample(self, class_id: int, seed: int) -> Picture:
        codes = self._sample_codes([class_id], seed)[0]
        image = self.model.decode_prefixes(codes)[-1].clamp(-1, 1)
        return Picture(image, codes)

    def codes(self, class_ids: Sequence[int], seed: int) -> list[list[int]]:
        """Codes of images sampled from classes, one each."""
        return self._sample_codes(list(class_ids), seed)

    def _codes_of_class(self, class_ids: list[int], seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        how = {**self.model.sampling, "generator": generator, "output_type": "latent"}
        return self.model.pipe(class_ids, **how).codes.tolist()


def opening_origin(origins: Origins) -> str:
    """The origin that tabs open with: the first example, or a sample where there are none."""
    return next((f"example:{name}" for name in origins.examples), "sample:0:0")


def sample_examples(model: Model) -> tuple[list[str], list[str]]:
    """Origins of a few samples and what to call them. Every model has these, whatever examples there are."""
    names = model.class_names
    ids = model.examples[:NUM_SAMPLE_EXAMPLES]
    return [f"sample:{i}:0" for i in ids], [f"A sample: {names[i]}" for i in ids]


# -------------------------------------------------------------------------------------------------- components


@dataclass
class Source:
    """The components of one picture."""

    photo: PhotoInput
    origin: gr.Textbox
    named: gr.events.Dependency  # after which the photo shows the origin
    sent: gr.events.Dependency  # after which the photo is the visitor's own, and the origin empty
    turns: gr.State  # of what shows the picture

    def open_with(
        self, item: gr.Tab, link: str, handler: Callable[[], dict], outputs: list[Any], **options: Any
    ) -> None:
        """Shows `handler()` when the tab is opened for the first time, unless the address names an image.

        `handler` keeps its result. The image input stays free for the visitor's own, and whatever the visitor chooses
        comes before this.
        """

        def prepare(request: gr.Request) -> None:
            if link not in request.query_params:
                handler()

        def show(turns: Turns, request: gr.Request) -> dict:
            return gr.skip() if turns.last or link in request.query_params else handler()

        item.select(prepare, None, None, **options).success(show, self.turns, outputs, **options)

    def listen(self, handler: Callable[..., Generator], outputs: list[Any], **options: Any) -> None:
        """Calls a generator `handler(origin, photo)` whenever there is another picture, or none."""

        def show_origin(turns: Turns, origin: str) -> Iterator[dict]:
            if origin:
                yield from turns.shown(handler(origin, None))
            else:  # the visitor has sent a photo, and `sent` tells of it
                yield gr.skip()

        def show_photo(turns: Turns, photo: Image.Image | None) -> Iterator[dict]:
            yield from turns.shown(handler("", photo))

        self.named.success(show_origin, [self.turns, self.origin], outputs, **ALWAYS, **options)
        self.sent.success(show_photo, [self.turns, self.photo], outputs, **ALWAYS, **options)


def pick_script(values: Sequence[Any]) -> str:
    """JavaScript that gives the value of a `gr.Dataset`'s sample at once: asking the server may come too late."""
    return f"(i) => {json.dumps(values)}[i]"


def _thumbnail(path: Path) -> Image.Image:
    return ImageOps.contain(Image.open(path), (THUMBNAIL_SIDE, THUMBNAIL_SIDE))


def source(origins: Origins, label: str, elem_id: str, *, height: int = 200, example: int = 0) -> Source:
    """Lays out the choice of a picture: an image input, a sample of a class, and thumbnails of the examples.

    example: which of the classes to try the choice of a class begins with.
    """
    names, ids = origins.model.all_names, origins.model.examples
    photo = PhotoInput(
        label=label, sources=["upload", "clipboard", "webcam"], format="png", height=height, buttons=[],
        elem_id=elem_id, placeholder="Drop an image, paste one, or click to choose",
    )  # fmt: skip
    origin = gr.Textbox("", label=f"{label}: origin", visible="hidden")
    if origins.examples:
        thumbnails = gr.Dataset(
            components=[gr.Image(render=False, visible=False)], type="index", label="Examples",
            samples=[[_thumbnail(path)] for path in origins.examples.values()],
            samples_per_page=len(origins.examples), elem_id=f"{elem_id}-examples",
        )  # fmt: skip
        keys = [f"example:{name}" for name in origins.examples]
        thumbnails.click(None, thumbnails, origin, js=pick_script(keys))
    with gr.Row(elem_classes="tight"):
        classes = gr.Dropdown(
            list(zip(names, range(len(names)), strict=True)), value=ids[example % len(ids)], label="or a sample of",
            filterable=True, min_width=120, scale=3, elem_id=f"{elem_id}-class",
        )  # fmt: skip
        draw = gr.Button("Sample", size="sm", min_width=70, scale=1, elem_id=f"{elem_id}-sample")

    def preview(name: str) -> Any:
        if not name:
            return gr.skip()
        with one_sentence():
            return origins.preview(name), name

    draw.click(None, classes, origin, js=f"(chosen) => `sample:${{chosen}}:${{{NEW_SEED}}}`")
    # Of a sample it takes a while, in which the visitor may send a photo: it must not take the photo's place.
    made, made_of = PhotoInput(visible=False), gr.Textbox(visible=False)
    shown = origin.change(
        preview, origin, [made, made_of], concurrency_id="preview", concurrency_limit=2, api_visibility="private",
        show_progress="hidden",
    ).success(
        None, [origin, made_of, made, photo], photo,
        js="(origin, of, made, photo) => origin && origin === of ? made : photo",
    )  # fmt: skip
    # Emptied before the tab is told, so that it never takes a new photo for the picture of the origin before it.
    sent = gr.on([photo.input, photo.clear], None, None, origin, js="() => ''")
    return Source(photo, origin, shown, sent, gr.State(Turns()))
