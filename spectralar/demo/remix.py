"""The Remix tab: the first tokens of one image, the others from another image or from the model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from PIL import Image

from ..analysis.chart import Chart
from ..interface.image import to_model_input
from .cache import PictureOutput
from .errors import number, one_sentence, user_error, whole_number
from .export import sheet
from .figures import figure, listen_to_saves, shown
from .generate import NEW_SEED, QUIET, SAMPLERS
from .links import Link, Linked, from_query
from .mixing import VARIATIONS, Continuation, continuations, exchange, exchange_value, strip_chart
from .model import MAX_SEED, Model, Sampled, on_gpu
from .runs import MAX_IMAGES, SECONDS_A_MESSAGE, SECONDS_WITHOUT_NEWS
from .scrubber import scrubber
from .source import TOKENIZER, Origins, Picture, Source, pick_script, source
from .turns import ALWAYS, Turns
from .upload import PhotoInput

TITLE = "Remix"
TAIL, MODEL = "tail", "model"
MODES = [("the others of B", TAIL), ("new ones of the model", MODEL)]
NUM_EXAMPLES = 3
STRIP = (
    "The exchange point through the whole range",
    "The number says how many tokens are A's. Neighbours differ in a single token of A; the strip does not show how "
    "likely the model finds any of the pictures.",
)


# -------------------------------------------------------------------------------------------------- layout


def _examples(model: Model) -> list[tuple[str, list[Any]]]:
    """Pairs to try: a text, and values of A, B, what follows, and the class. Of samples: every model has them."""
    names, ids = model.class_names, model.examples
    pairs = []
    for i in range(NUM_EXAMPLES):
        a, b = ids[2 * i % len(ids)], ids[(2 * i + 1) % len(ids)]
        mode, by = ((TAIL, ""), (MODEL, " by the model"))[i % 2]
        pairs.append((f"{names[a]}, then {names[b]}{by}", [f"sample:{a}:{i}", f"sample:{b}:{i + 1}", mode, b]))
    return pairs


def build(model: Model) -> Linked:
    """Lays out the tab; returns what of it stands in the page's address."""
    origins = Origins(model)
    examples = _examples(model)
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3, min_width=300):
            with gr.Row(elem_classes="tight"):
                go = gr.Button("Remix", variant="primary", min_width=100, scale=3, elem_id="remix")
                stop = gr.Button("Stop", interactive=False, min_width=70, scale=1, elem_id="remix-stop")
            thumbnails = gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[[text] for text, _ in examples], type="index",
                label="Try", elem_id="remix-try",
            )  # fmt: skip
            a = source(origins, "Image A", "remix-a", height=170)
            mode = gr.Radio(MODES, value=TAIL, label="After the first k tokens of A come", elem_id="remix-mode")
            with gr.Column(visible=True) as of_b:
                b = source(origins, "Image B", "remix-b", height=170, example=1)
            with gr.Group(visible=False) as of_model:
                label, seed, scale = _sampling_controls(model)
        with gr.Column(scale=7, min_width=320):
            view = scrubber(
                hint="Choose two images, or an image and a class: the slider moves the point where one ends and the "
                "other begins, from coarse to fine.",
                actions=[{"name": "save", "label": "Save image {image} as shown"}],
                elem_id="remixed",
            )
            strip = figure(*STRIP, elem_id="remix-strip")

    mode.change(
        lambda chosen: (gr.Column(visible=chosen == TAIL), gr.Group(visible=chosen == MODEL)), mode, [of_b, of_model],
        **QUIET,
    )  # fmt: skip
    tab = _Tab(model, origins, (a, b), [mode, label, seed, scale], view, strip, go, stop, gr.State(None))
    links = tab.links()
    tab.listen(thumbnails, [values for _, values in examples], links)
    listen_to_saves({"remix": strip}, tab.charts_of, tab.mixed, "remix-file")
    _add_endpoints(model)
    return Linked(links, [go.click])


def _sampling_controls(model: Model) -> tuple[gr.Dropdown, gr.Number, gr.Slider]:
    names = model.all_names
    label = gr.Dropdown(
        list(zip(names, range(len(names)), strict=True)), value=model.examples[0], label="Class", filterable=True,
        elem_id="remix-class",
    )  # fmt: skip
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, elem_id="remix-seed"
        )  # fmt: skip
        dice = gr.Button("Random", size="sm", scale=0, min_width=76)
    dice.click(None, None, seed, js=f"() => {NEW_SEED}")
    return label, seed, gr.Slider(0, 10, model.guidance_scale, step=0.1, label="Guidance")


# -------------------------------------------------------------------------------------------------- behaviour


@dataclass
class _Tab:
    """The tab's components, and what happens between them."""

    model: Model
    origins: Origins
    sources: tuple[Source, Source]
    controls: list[gr.components.Component]  # what follows A's tokens; class, seed and guidance of the model
    view: gr.HTML
    strip: gr.HTML
    go: gr.Button
    stop: gr.Button
    run: gr.State  # the `Continuation` that is under way
    turns: gr.State = field(default_factory=lambda: gr.State(Turns()))
    mixed: gr.State = field(default_factory=lambda: gr.State(None))  # the codes that the strip shows

    def __post_init__(self) -> None:
        self.continuations = on_gpu(self._continuations)

    def links(self) -> list[Link]:
        names = ("a", "b", "then", "as", "remix_seed", "remix_guidance")
        components = [self.sources[0].origin, self.sources[1].origin, *self.controls]
        return [Link(name, component) for name, component in zip(names, components, strict=True)]

    def listen(self, thumbnails: gr.Dataset, examples: list[list[Any]], links: list[Link]) -> None:
        outputs = [self.view, self.strip, self.go, self.stop, self.run, self.mixed]
        options = {
            "outputs": outputs, "concurrency_id": "sample", "concurrency_limit": SAMPLERS, "show_progress": "hidden",
            "api_visibility": "private",
        }  # fmt: skip
        settings = [link.component for link in links]
        inputs = [self.turns, *(source.photo for source in self.sources), *settings]
        chosen = thumbnails.click(None, thumbnails, settings[:4], js=pick_script(examples))
        runs = [event(self.remix, inputs, **ALWAYS, **options) for event in (self.go.click, chosen.success)]
        self.stop.click(self.stopped, self.run, outputs, cancels=runs, **QUIET)

        def open_link(turns: Turns, request: gr.Request) -> Iterator[dict]:
            """What the visitor's link asks for, if it names its pictures."""
            query = request.query_params
            if query.get("tab") == "remix" and query.get("a") and (query.get("b") or query.get("then") == MODEL):
                values = [from_query(component, query.get(name, "")) for name, component in links]
                values = [link.component.value if v is None else v for link, v in zip(links, values, strict=True)]
                yield from self.remix(turns, None, None, *values)
            else:
                yield gr.skip()

        gr.on(None, open_link, self.turns, **options)

    def remix(self, turns: Turns, *inputs: Any) -> Iterator[dict]:
        yield from turns.shown(self._remix(*inputs))

    def _remix(self, photo_a: Any, photo_b: Any, origin_a: str, origin_b: str, mode: str, *sampling: Any) -> Iterator:
        with one_sentence():
            a = self.origins.picture(origin_a, photo_a, "image A")
            if mode == TAIL:
                b = self.origins.picture(origin_b, photo_b, "image B")
        if mode == TAIL:
            codes, images = exchange(self.model, a, b)
            value = exchange_value(self.model, a, b, images)
            yield {self.view: value, self.strip: shown(strip_chart(codes, images)), self.mixed: codes} | self.idle()
        else:
            yield from self.continue_as(a, *sampling)

    def continue_as(self, a: Picture, class_id: int | None, seed: Any, guidance_scale: float) -> Iterator[dict]:
        if class_id is None:
            raise user_error("Choose a class first.")
        with one_sentence():
            seed = whole_number(seed, "the seed", 0, MAX_SEED)
            guidance_scale = number(guidance_scale, "guidance")
        run = Continuation(self.model)
        yield self.show(run)
        begin = sent = time.perf_counter()
        with closing(self.continuations(class_id, a.codes, seed, guidance_scale)) as steps:
            for news in steps:
                if not run.value["busy"]:  # stopped
                    break
                now = time.perf_counter()
                if news is not None:
                    run.add(*news, now - begin)
                if now - sent >= (SECONDS_WITHOUT_NEWS if news is None else SECONDS_A_MESSAGE):
                    yield {self.view: run.snapshot()}
                    sent = time.perf_counter()
        if run.value["busy"]:
            run.finish()
        yield self.show(run)

    def _continuations(self, *arguments: Any) -> Iterator[Sampled | None]:
        with one_sentence():
            yield from continuations(self.model, *arguments)

    def show(self, run: Continuation) -> dict:
        """Everything as it should be at the beginning or at the end of a run."""
        busy = run.value["busy"]
        codes = None if busy else run.codes or None
        return {
            self.view: run.snapshot(),
            self.strip: None if codes is None else shown(run.chart()),
            self.mixed: codes,
        } | (self.busy(run) if busy else self.idle())

    def busy(self, run: Continuation) -> dict:
        return {self.run: run, self.go: gr.Button(interactive=False), self.stop: gr.Button(interactive=True)}

    def idle(self) -> dict:
        return {self.run: None, self.go: gr.Button(interactive=True), self.stop: gr.Button(interactive=False)}

    def charts_of(self, codes: list[list[int]]) -> dict[str, Chart]:
        return {"remix": strip_chart(codes, self.model.decode(codes, [self.model.num_tokens])[:, 0])}

    def stopped(self, run: Continuation | None) -> dict:
        if run is None:
            return self.idle()
        run.finish(stopped=True)
        return self.show(run)


# -------------------------------------------------------------------------------------------------- endpoints


def _add_endpoints(model: Model) -> None:
    n = model.num_tokens

    def picture(image: Image.Image | None, name: str) -> Picture:
        if image is None:
            raise user_error(f"Send {name}.")
        x = to_model_input(image, model.image_size, model.channels)
        return Picture(x[0], model.encode(x)[0])

    def mix(
        image_a: Image.Image | None, image_b: Image.Image | None, num_tokens: float
    ) -> tuple[Image.Image, dict[str, Any]]:
        """The first tokens of image A followed by the other tokens of image B.

        Args:
            image_a: any photo; its middle square is taken.
            image_b: another one.
            num_tokens: how many tokens are of image A, 0 to N.

        Returns:
            The image, and {"codes": its codes}.
        """
        with one_sentence():
            k = whole_number(num_tokens, "the number of tokens", 0, n)
            codes = picture(image_a, "image A").codes[:k] + picture(image_b, "image B").codes[k:]
        return Image.fromarray(model.decode([codes], [n])[0, 0]), {"codes": codes}

    def continue_as(
        image: Image.Image | None,
        class_label: str,
        num_tokens: float,
        count: float,
        seed: float,
        guidance_scale: float,
    ) -> tuple[Image.Image, dict[str, Any]]:
        """The first tokens of an image, continued by the model as a class, in several variations.

        Args:
            image: any photo; its middle square is taken.
            class_label: a class name or its id.
            num_tokens: how many tokens are of the image, 1 to N - 1.
            count: number of variations, 1 to 16.
            seed: of the random numbers; the same seed gives the same images.
            guidance_scale: classifier-free guidance, 1 is off.

        Returns:
            The variations as one picture, side by side, and {"codes": one list a variation}.
        """
        with one_sentence():
            k = whole_number(num_tokens, "the number of tokens", 1, n - 1)
            count = whole_number(count, "the number of variations", 1, MAX_IMAGES)
            seed = whole_number(seed, "the seed", 0, MAX_SEED)
            guidance_scale = number(guidance_scale, "guidance")
            class_id, prefix = model.label(class_label or ""), picture(image, "an image").codes[:k]
            how = {"guidance_scale": guidance_scale, "temperature": model.temperature}
            codes, images = model.last(class_id, count, seed, **how, prefix_codes=[prefix])
        return sheet(images), {"codes": codes}

    with gr.Group(visible=False):
        a, b = PhotoInput(label="image_a"), PhotoInput(label="image_b")
        outputs = [PictureOutput(label="picture", format="png"), gr.JSON(label="numbers")]
        tokens = gr.Number(n // 2, label="num_tokens")
        gr.Button(visible=False).click(mix, [a, b, tokens], outputs, api_name="mix", **TOKENIZER)
        label = gr.Textbox(model.class_names[model.examples[0]], label="class_label")
        count, seed = gr.Number(VARIATIONS, label="count"), gr.Number(0, label="seed")
        scale = gr.Number(model.guidance_scale, label="guidance_scale")
        gr.Button(visible=False).click(
            continue_as, [a, label, tokens, count, seed, scale], outputs, api_name="continue_as",
            concurrency_id="sample", concurrency_limit=SAMPLERS,
        )  # fmt: skip
