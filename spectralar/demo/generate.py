"""The Generate tab: sample images of a class and watch them sharpen token by token."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from typing import Any

import gradio as gr
from PIL import Image

from ..sampling import GUIDANCE_SCHEDULES, guidance_curve
from .cache import PictureOutput
from .errors import one_sentence, user_error
from .export import EXPORTS, enlarged, export_file, png_data_url, sheet
from .links import Link, Linked
from .model import MAX_SEED, Model, Sampled
from .runs import MAX_IMAGES, Run, Settings, stream
from .scrubber import enable_buttons, scrubber
from .tiles import tiles
from .turns import ALWAYS, Turns

TITLE = "Generate"
# Visitors that are served at the same time: the engine lets them in. On ZeroGPU there is none.
SAMPLERS = 2 if os.environ.get("SPACES_ZERO_GPU") else 64
DEFAULTS = Settings(class_label="")
QUIET = {"api_visibility": "private", "show_progress": "hidden", "queue": False}  # for handlers that take no time


# -------------------------------------------------------------------------------------------------- guidance curve


def guidance_plot(model: Model, scale: float, schedule: str, num_tokens: int) -> str:
    """The guidance scale over the tokens as a small SVG."""
    if not isinstance(scale, int | float) or schedule not in GUIDANCE_SCHEDULES:
        return ""
    curve = guidance_curve(model.num_tokens, scale, schedule)[: int(num_tokens)]
    top = max(scale, 1.0) * 1.08
    width = max(1, model.num_tokens - 1)
    points = " ".join(f"{100 * i / width:.1f},{40 - 38 * w / top:.1f}" for i, w in enumerate(curve))
    text = f"Guidance by token: {curve[0]:.3g} at the first, {curve[-1]:.3g} at token {len(curve)}"
    return (
        f'<figure class="guidance-curve"><svg viewBox="0 0 100 40" preserveAspectRatio="none" role="img" '
        f'aria-label="{text}"><polyline points="{points}"/></svg><figcaption>{text}</figcaption></figure>'
    )


# -------------------------------------------------------------------------------------------------- layout


def _controls(model: Model) -> dict[str, gr.components.Component]:
    """The settings, by their names in the page's address and in the order of `Settings`."""
    n = model.num_tokens
    with gr.Group():
        choices = [(name, i) for i, name in enumerate(model.all_names)]
        label = gr.Dropdown(choices, value=model.examples[0], label="Class", filterable=True, elem_id="class")
        count = gr.Slider(1, MAX_IMAGES, DEFAULTS.count, step=1, label="Images", elem_id="count")
        with gr.Row(elem_classes="seed"):
            seed = gr.Number(
                DEFAULTS.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120, elem_id="seed"
            )
            dice = gr.Button("Random", size="sm", scale=0, min_width=76, elem_id="dice")
        scale = gr.Slider(
            0,
            10,
            model.guidance_scale,
            step=0.1,
            label="Guidance",
            info="Higher is more typical",
            elem_id="guidance",
        )
        curve = gr.HTML(guidance_plot(model, scale.value, DEFAULTS.guidance_schedule, n), elem_id="guidance-curve")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        schedule = gr.Dropdown(
            list(GUIDANCE_SCHEDULES), value=DEFAULTS.guidance_schedule, label="Guidance schedule", elem_id="schedule"
        )
        temperature = gr.Slider(
            0, 2, model.temperature, step=0.01, label="Temperature", info="0 takes the likeliest token"
        )
        top_k = gr.Slider(0, model.codebook_size, DEFAULTS.top_k, step=1, label="Top-k", info="0 is off")
        top_p = gr.Slider(0.01, 1, DEFAULTS.top_p, step=0.01, label="Top-p", info="1 is off")
        tokens = gr.Slider(1, n, n, step=1, label="Tokens", info="Stop after this many", elem_id="num-tokens")
        prefix = gr.Textbox("", label="Fixed first tokens", info="Codes to start from", max_length=8 * n)

    dice.click(None, None, seed, js=f"() => {NEW_SEED}")
    gr.on(
        [scale.change, schedule.change, tokens.change],
        lambda *values: guidance_plot(model, *values), [scale, schedule, tokens], curve,
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    label.input(None, None, prefix, js="() => ''")  # fixed tokens belong to a picture, not to a class
    return {
        "class": label, "count": count, "seed": seed, "guidance": scale, "schedule": schedule,
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "tokens": tokens, "prefix": prefix,
    }  # fmt: skip


def build(model: Model) -> Linked:
    """Lays out the tab; returns what of it stands in the page's address."""
    _add_endpoints(model)  # first: Gradio numbers later functions of the same name, the page's own handlers
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3, min_width=300):
            with gr.Row(elem_classes="tight"):
                go = gr.Button("Generate", variant="primary", min_width=100, scale=3, elem_id="generate")
                stop = gr.Button("Stop", interactive=False, min_width=70, scale=1, elem_id="stop")
            controls = _controls(model)
            examples = tiles(model, elem_id="try")
        with gr.Column(scale=7, min_width=320):
            view = scrubber(
                hint="Choose a class and generate: the images appear coarse and sharpen token by token.",
                actions=[
                    {"name": "more", "label": "More like image {image} from token {k}", "partial": True},
                    {"name": "save", "label": "Save image {image} as shown"},
                ],
                elem_id="generated",
            )
            with gr.Row(elem_classes="tight wrap"):
                small = {"size": "sm", "interactive": False, "min_width": 90}
                same = gr.Button("Same again", elem_id="same-again", **small)
                fresh = gr.Button("New seed", elem_id="new-seed", **small)
                downloads = {
                    name: gr.Button(title, elem_id=f"export-{name}", **small) for name, title in EXPORTS.items()
                }
            file = gr.DownloadButton(visible="hidden", elem_id="export-file")

    exports = list(downloads.values())
    enable_buttons(view, idle=[go], busy=[stop], some=[fresh], whole=[same, *exports])
    tab = _Tab(model, list(controls.values()), view, go, stop, same, fresh, downloads, gr.State(None))
    tab.listen(examples)
    tab.listen_to_downloads(file)
    return Linked([Link(name, component) for name, component in controls.items()], [go.click])


# -------------------------------------------------------------------------------------------------- behaviour


def new_seed() -> int:
    return random.randint(0, MAX_SEED)


# The same in the browser: from the server it might come after the click that is to use it.
NEW_SEED = f"Math.floor(Math.random() * {MAX_SEED + 1})"


@dataclass
class _Tab:
    """The tab's components, and what happens between them."""

    model: Model
    controls: list[gr.components.Component]
    view: gr.HTML
    go: gr.Button
    stop: gr.Button
    same: gr.Button
    fresh: gr.Button
    downloads: dict[str, gr.Button]
    run: gr.State
    turns: gr.State = field(default_factory=lambda: gr.State(Turns()))

    def __post_init__(self) -> None:
        self.opening = cache(self._opening)

    def listen(self, examples: gr.HTML) -> None:
        outputs = [self.view, self.run]
        options = {
            "concurrency_id": "sample", "concurrency_limit": SAMPLERS, "show_progress": "hidden",
            "api_visibility": "private",
            "preprocess": False,  # `Settings` checks all values; Gradio would wait for a thread with each
        }  # fmt: skip
        label, _, seed, *_, prefix = self.controls
        runs = [
            event(handler, [self.turns, *inputs], [*outputs, *changed], **ALWAYS, **options)
            for event, handler, inputs, changed in (
                (self.go.click, self.generate, self.controls, []),
                (self.same.click, self.again, [self.run], self.controls),
                (self.fresh.click, self.afresh, self.controls, [seed]),
                (self.view.action, self.more, [self.run], self.controls),
                (examples.chosen, self.example, self.controls, [label, prefix]),
            )
        ]
        # The token that is being sampled is finished, no other begun; a visitor who leaves has the same effect.
        self.stop.click(self.stopped, self.run, outputs, cancels=runs, **QUIET)
        gr.on(None, self.prepare, None, None, **options).success(self.open, self.turns, outputs, **options)

    def listen_to_downloads(self, file: gr.DownloadButton) -> None:
        for name, button in self.downloads.items():
            written = button.click(
                partial(export_file, name=name, cache_folder=file.GRADIO_CACHE), self.run, file,
                api_visibility="private", show_progress="minimal", show_progress_on=button,
            )  # fmt: skip
            written.success(None, js="() => document.querySelector('#export-file').click()")

    def generate(
        self, turns: Turns, *values: Any, new: Mapping[gr.components.Component, Any] | None = None
    ) -> Iterator:
        """A run with the controls' values, some of them `new`: the page is told these."""
        new = new or {}
        values = [new.get(control, value) for control, value in zip(self.controls, values, strict=True)]
        yield from turns.shown(self._runs(values, new))

    def again(self, turns: Turns, run: Run) -> Iterator[dict]:
        values = self.settings_of(run)
        yield from self.generate(turns, *values, new=dict(zip(self.controls, values, strict=True)))

    def afresh(self, turns: Turns, *values: Any) -> Iterator[dict]:
        _, _, seed, *_ = self.controls
        yield from self.generate(turns, *values, new={seed: new_seed()})

    def example(self, turns: Turns, event: gr.EventData, *values: Any) -> Iterator[dict]:
        """A run of a class to try: without fixed tokens, which belong to another picture."""
        label, *_, prefix = self.controls
        yield from self.generate(turns, *values, new={label: self.model.label(int(event.class_id)), prefix: ""})

    def more(self, turns: Turns, run: Run, event: gr.EventData) -> Iterator[dict]:
        """Variations of one picture: its first k tokens, a new seed for the rest."""
        image, k = int(event.image), int(event.k)
        if not (0 <= image < len(run.codes) and 0 < k < run.settings.num_tokens):
            raise user_error("All tokens of this image would be kept: move the slider to an earlier token first.")
        label, count, _, *rest, _ = self.settings_of(run)
        values = [label, count, new_seed(), *rest, " ".join(map(str, run.codes[image][:k]))]
        yield from self.generate(turns, *values, new=dict(zip(self.controls, values, strict=True)))

    def _runs(self, values: Sequence[Any], new: Mapping[gr.components.Component, Any]) -> Iterator[dict]:
        with one_sentence():
            settings = Settings.checked(self.model, *values)
        with closing(stream(self.model, settings)) as runs:
            for i, run in enumerate(runs):
                yield {self.view: run.snapshot()} | ({} if i else {self.run: run, **new})
            run.let_go()

    def stopped(self, run: Run | None) -> dict:
        if run is None or run.value is None:  # stopped while waiting for its turn, or when all was there
            return {self.view: gr.skip()}
        run.finish(stopped=True)
        return {self.view: run.snapshot()}

    def settings_of(self, run: Run) -> list[Any]:
        """The controls' values that made a run."""
        values = asdict(run.settings) | {"prefix_codes": " ".join(map(str, run.settings.prefix_codes))}
        values["class_label"] = self.model.label(run.settings.class_label)
        return [values[field.name] for field in fields(Settings)]

    def _opening(self) -> Run:
        """What a visitor sees first: the default settings, sampled once for all visitors."""
        values = [control.value for control in self.controls]
        *_, run = stream(self.model, Settings.checked(self.model, *values))
        run.value["play"] = True
        return run

    def open(self, turns: Turns, request: gr.Request) -> dict:
        """The opening picture, unless the visitor's link or the visitor asks for another one."""
        if turns.last or "seed" in request.query_params:
            return gr.skip()
        run = self.opening()
        return {self.view: run.snapshot(), self.run: run}

    def prepare(self, request: gr.Request) -> None:
        """Samples the opening picture, if nobody has needed it before: meanwhile the visitor may ask for another."""
        if "seed" not in request.query_params:
            self.opening()


# -------------------------------------------------------------------------------------------------- endpoints


def _add_endpoints(model: Model) -> None:
    def sampled(settings: Settings) -> Sampled:
        class_id = model.label(settings.class_label)
        return model.last(class_id, settings.count, settings.seed, **settings.arguments())

    def generate(
        class_label: str,
        count: int = 4,
        seed: int = 0,
        guidance_scale: float = model.guidance_scale,
        guidance_schedule: str = "constant",
        temperature: float = model.temperature,
        top_k: int = 0,
        top_p: float = 1.0,
        num_tokens: int | None = None,
        prefix_codes: list[int] | None = None,
    ) -> dict:
        """Generates images of a class.

        Args:
            class_label: a class name or its id.
            count: number of images, 1 to 16.
            seed: of the random numbers; the same seed gives the same images.
            guidance_scale: classifier-free guidance, 1 is off. Default, as of the temperature: the page's.
            guidance_schedule: "constant", or "linear" or "cosine" from 1 at the first token to the scale at the last.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among the k most likely tokens; 0 is off.
            top_p: sample among the most likely tokens of this probability together; 1 is off.
            num_tokens: sample only the first n tokens (default all).
            prefix_codes: codes to begin with instead of sampling them.

        Returns:
            {"images": PNG data URLs, "codes": one list an image, "settings": all of them, "model": its name}.
        """
        with one_sentence():
            settings = Settings.checked(
                model, class_label, count, seed, guidance_scale, guidance_schedule, temperature, top_k, top_p,
                num_tokens, prefix_codes,
            )  # fmt: skip
            codes, images = sampled(settings)
        return {
            "images": [png_data_url(image) for image in images],
            "codes": codes,
            "settings": asdict(settings),
            "model": model.name,
        }

    def generate_sheet(
        class_label: str, count: float, seed: float, guidance_scale: float, num_tokens: float
    ) -> tuple[Image.Image, dict[str, Any]]:
        """Generates images of a class and returns them as one picture, side by side.

        Args:
            class_label: a class name or its id.
            count: number of images, 1 to 16.
            seed: of the random numbers; the same seed gives the same images.
            guidance_scale: classifier-free guidance, 1 is off.
            num_tokens: sample only the first n tokens: fewer give blurrier images.

        Returns:
            The picture, and {"codes": one list an image, "settings": all of them, "model": its name}.
        """
        with one_sentence():
            defaults = (DEFAULTS.guidance_schedule, model.temperature, DEFAULTS.top_k, DEFAULTS.top_p)
            settings = Settings.checked(model, class_label, count, seed, guidance_scale, *defaults, num_tokens, [])
            codes, images = sampled(settings)
        return enlarged(sheet(images)), {"codes": codes, "settings": asdict(settings), "model": model.name}

    options = {"concurrency_id": "sample", "concurrency_limit": SAMPLERS}
    gr.api(generate, api_name="generate", **options)
    n = model.num_tokens
    with gr.Group(visible=False):
        inputs = [
            gr.Textbox(model.class_names[model.examples[0]], label="class_label"),
            gr.Number(DEFAULTS.count, label="count"),
            gr.Number(DEFAULTS.seed, label="seed"),
            gr.Number(model.guidance_scale, label="guidance_scale"),
            gr.Number(n, label="num_tokens", info=f"1 to {n}"),
        ]
        outputs = [PictureOutput(label="sheet", format="png"), gr.JSON(label="numbers")]
        gr.Button(visible=False).click(generate_sheet, inputs, outputs, api_name="generate_sheet", **options)
