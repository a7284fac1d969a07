"""The Generate tab: sample images of a class and watch them sharpen token by token."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import gradio as gr
import numpy as np

from ..sampling import GUIDANCE_SCHEDULES, guidance_curve
from .errors import one_sentence, user_error
from .export import EXPORTS, export_file, png_data_url
from .links import Link
from .model import MAX_SEED, Frame, Model
from .scrubber import StripEncoder, scrubber, scrubber_value

TITLE = "Generate"
MAX_IMAGES = 16
# Between two messages to the browser: at least this long, and long enough for the browser to take in what it has.
SECONDS_A_MESSAGE = 0.05
BYTES_A_SECOND = 20e6
SAMPLERS = 2  # visitors that are served at the same time


@dataclass
class Settings:
    """What determines a picture, together with the model."""

    class_label: str
    count: int = 4
    seed: int = 0
    guidance_scale: float = 2.0
    guidance_schedule: str = "constant"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_tokens: int | None = None
    prefix_codes: list[int] = field(default_factory=list)

    @classmethod
    def checked(cls, model: Model, class_label: Any, count: Any, seed: Any, *rest: Any) -> Settings:
        """Settings from the page or a client, where the pipeline does not check them itself.

        Raises:
            ValueError: one sentence about the first setting that is wrong.
        """
        *sampling, num_tokens, prefix = rest
        if class_label is None or not str(class_label).strip():
            raise ValueError("choose a class first.")
        count = _whole(count, "the number of images", 1, MAX_IMAGES)
        seed = _whole(seed, "the seed", 0, MAX_SEED)
        num_tokens = model.num_tokens if num_tokens is None else num_tokens
        num_tokens = _whole(num_tokens, "the number of tokens", 1, model.num_tokens)
        if isinstance(prefix, str):
            prefix = parse_codes(prefix)
        prefix = [_whole(code, "each fixed token", 0, model.codebook_size - 1) for code in prefix or []]
        if len(prefix) >= num_tokens:
            raise ValueError(f"{len(prefix)} tokens are fixed and {num_tokens} wanted, so nothing is left to sample.")
        guidance_scale, schedule, temperature, top_k, top_p = sampling
        for name, number in (("guidance", guidance_scale), ("temperature", temperature), ("top-p", top_p)):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{name} must be a number.")
        top_k = _whole(top_k, "top-k", 0, model.codebook_size)
        return cls(
            str(class_label), count, seed, guidance_scale, schedule, temperature, top_k, top_p, num_tokens, prefix
        )

    def arguments(self) -> dict[str, Any]:
        """Those of `SpectralARPipeline.stream` besides class, count and seed."""
        names = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p", "num_tokens")
        return {name: getattr(self, name) for name in names} | {
            "prefix_codes": [self.prefix_codes] if self.prefix_codes else None
        }


def _whole(value: Any, what: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or int(value) != value:
        raise ValueError(f"{what} must be a whole number between {low} and {high}.")
    if not low <= value <= high:
        raise ValueError(f"{what} must be between {low} and {high}, got {int(value)}.")
    return int(value)


def parse_codes(text: str) -> list[int]:
    """Codes written with spaces, commas or dots between them."""
    words = text.replace(",", " ").replace(".", " ").split()
    if not all(word.isdecimal() for word in words):
        raise ValueError("fixed tokens are codes, whole numbers with spaces between them.")
    return [int(word) for word in words]


class Run:
    """One click: its settings, and what has been sampled so far. Kept in the visitor's session for the buttons."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.frames: list[np.ndarray] = []  # (B, H, H[, 3]) uint8, one a prefix length
        self.codes: list[list[int]] = []  # B lists
        count, total = settings.count, settings.num_tokens
        name = f"{settings.class_label.split(',')[0].lower().replace(' ', '-')}-seed{settings.seed}"
        self.encoder = StripEncoder(total)
        self.value = scrubber_value(
            [{"title": settings.class_label, "captions": [""] * count}],
            model.cutoffs, model.image_size, model.codebook_size, num_tokens=total, selectable=True, name=name,
        )  # fmt: skip
        self.value |= {"busy": True, "status": "Waiting for its turn"}
        self.sent_bytes = 0

    def add(self, frame: Frame) -> None:
        self.frames.append(frame.images)
        self.codes = frame.codes
        strip = self.encoder.encode(frame.images)
        self.sent_bytes += len(strip)
        self.value["frames"].append(strip)
        self.value["codes"].append([codes[-1] for codes in frame.codes])
        left = self.settings.num_tokens - frame.k
        if frame.sampled:
            rate = frame.sampled / max(frame.seconds, 1e-6)
            self.value["status"] = (
                f"{rate:.3g} tokens/s · {left / rate:.1f} s left"
                if left
                else f"{frame.seconds:.1f} s · {rate:.3g} tokens/s"
            )

    def finish(self, stopped: bool = False) -> None:
        self.value["busy"] = False
        if stopped:
            self.value["status"] = f"Stopped after {len(self.frames)} of {self.settings.num_tokens} tokens"

    def snapshot(self) -> dict[str, Any]:
        """The value as it is now: Gradio keeps what it sent to find the difference, so lists must be copies."""
        return {key: list(item) if isinstance(item, list) else item for key, item in self.value.items()}


def stream(model: Model, settings: Settings) -> Iterator[Run]:
    """The run, each time there is something to send: at once, at the first token, then as often as is useful."""
    run = Run(model, settings)
    with one_sentence():
        class_id = model.label(settings.class_label)
        frames = model.frames(class_id, settings.count, settings.seed, **settings.arguments())
        yield run
        sent = 0.0
        with closing(frames):
            for frame in frames:
                run.add(frame)
                interval = max(SECONDS_A_MESSAGE, run.sent_bytes / BYTES_A_SECOND)
                if frame.sampled == 1 or (frame.sampled and time.perf_counter() - sent >= interval):
                    yield run
                    sent = time.perf_counter()
        run.finish()
        yield run


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


# -------------------------------------------------------------------------------------------------- the tab


def build(model: Model) -> list[Link]:
    """Lays out the tab; returns what of it stands in the page's address."""
    n = model.num_tokens
    run_state = gr.State(None)
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=3, min_width=300, elem_classes="panel"):
            names = model.class_names
            with gr.Group():
                label = gr.Dropdown(names, value=names[0], label="Class", filterable=True, elem_id="class")
                count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images", elem_id="count")
                with gr.Row(elem_classes="seed"):
                    seed = gr.Number(
                        0,
                        label="Seed",
                        precision=0,
                        minimum=0,
                        maximum=MAX_SEED,
                        elem_id="seed",
                        scale=4,
                        min_width=120,
                    )
                    dice = gr.Button("Random", size="sm", elem_id="dice", scale=0, min_width=76)
                guidance = gr.Slider(
                    0, 10, 2.0, step=0.1, label="Guidance", elem_id="guidance", info="Higher is more typical"
                )
                curve = gr.HTML(guidance_plot(model, 2.0, "constant", n), elem_id="guidance-curve", padding=True)
            with gr.Row(elem_classes="tight"):
                go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=100, scale=3)
                stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=70, scale=1)
            with gr.Accordion("Advanced", open=False):
                schedule = gr.Dropdown(list(GUIDANCE_SCHEDULES), value="constant", label="Guidance schedule")
                temperature = gr.Slider(0, 2, 1.0, step=0.01, label="Temperature", info="0 takes the likeliest token")
                top_k = gr.Slider(0, model.codebook_size, 0, step=1, label="Top-k", info="0 is off")
                top_p = gr.Slider(0.01, 1, 1.0, step=0.01, label="Top-p", info="1 is off")
                tokens = gr.Slider(1, n, n, step=1, label="Tokens", info="Stop after this many")
                prefix = gr.Textbox("", label="Fixed first tokens", info="Codes to start from", max_length=8 * n)
        with gr.Column(scale=7, min_width=320):
            view = scrubber(
                hint="Choose a class and generate: the images appear coarse and sharpen token by token.",
                actions=[
                    {"name": "more", "label": "More like image {image} from token {k}"},
                    {"name": "save", "label": "Save image {image} as shown"},
                ],
                elem_id="generated",
            )
            with gr.Row(elem_classes="tight wrap after"):
                same = gr.Button("Same again", size="sm", elem_id="same-again", interactive=False, min_width=90)
                fresh = gr.Button("New seed", size="sm", elem_id="new-seed", interactive=False, min_width=90)
                downloads = [
                    gr.Button(title, size="sm", elem_id=f"export-{name}", interactive=False, min_width=90)
                    for name, title in EXPORTS.items()
                ]
            file = gr.DownloadButton(visible="hidden", elem_id="export-file")

    controls = [label, count, seed, guidance, schedule, temperature, top_k, top_p, tokens, prefix]
    after = [same, fresh, *downloads]
    outputs = [view, run_state, go, stop, *after]

    def show(run: Run, first: bool) -> list[Any]:
        """Outputs for a moment of a run; buttons change at its beginning and its end only."""
        busy = run.value["busy"]
        if busy and not first:
            return [run.snapshot(), *[gr.skip()] * (len(outputs) - 1)]
        has_frames = bool(run.frames)
        return [
            run.snapshot(), run, gr.Button(interactive=not busy), gr.Button(interactive=busy),
            gr.Button(interactive=has_frames), gr.Button(interactive=True),
            *[gr.Button(interactive=has_frames and not busy)] * len(downloads),
        ]  # fmt: skip

    def generate(*values: Any) -> Iterator[list[Any]]:
        with one_sentence():
            settings = Settings.checked(model, *values)
        first = True
        with closing(stream(model, settings)) as runs:
            for run in runs:
                yield show(run, first)
                first = False

    def stopped(run: Run | None) -> list[Any]:
        if run is None:
            return [
                gr.skip(),
                gr.skip(),
                gr.Button(interactive=True),
                gr.Button(interactive=False),
                *[gr.skip()] * len(after),
            ]
        run.finish(stopped=True)
        return show(run, True)

    options = {
        "inputs": controls, "outputs": outputs, "concurrency_id": "sample", "concurrency_limit": SAMPLERS,
        "show_progress": "hidden", "api_visibility": "private",
    }  # fmt: skip
    private = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    runs = [go.click(generate, **options)]

    def new_seed() -> int:
        return random.randint(0, MAX_SEED)

    def restore(run: Run) -> list[Any]:
        values = asdict(run.settings) | {"prefix_codes": " ".join(map(str, run.settings.prefix_codes))}
        return [values[f.name] for f in fields(Settings)]

    def more(run: Run, event: gr.EventData) -> list[Any]:
        if event.name != "more":
            return [gr.skip()] * len(controls)
        image, k = int(event.image), int(event.k)
        if not (0 <= image < len(run.codes) and 0 < k < run.settings.num_tokens):
            raise user_error("All tokens of this image would be kept: move the slider to an earlier token first.")
        values = restore(run)
        values[2] = new_seed()
        values[-1] = " ".join(map(str, run.codes[image][:k]))
        return values

    def clear_prefix() -> str:
        return ""

    for trigger, change, inputs, changed in (
        (same.click, restore, [run_state], controls),
        (fresh.click, new_seed, None, [seed]),
        (view.action, more, [run_state], controls),
    ):
        runs.append(trigger(change, inputs, changed, **private).success(generate, **options))
    stop.click(stopped, [run_state], outputs, cancels=runs, **private)
    dice.click(new_seed, None, seed, **private)
    gr.on(
        [guidance.change, schedule.change, tokens.change],
        lambda *values: guidance_plot(model, *values), [guidance, schedule, tokens], curve,
        trigger_mode="always_last", **private,
    )  # fmt: skip
    label.input(clear_prefix, None, prefix, **private)  # a prefix belongs to a picture, not to a class
    for button, name in zip(downloads, EXPORTS, strict=True):
        written = button.click(
            lambda run, name=name: export_file(run, name, file.GRADIO_CACHE), run_state, file,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        written.success(None, js="() => document.querySelector('#export-file').click()")

    _add_endpoint(model)
    names = ("class", "count", "seed", "guidance", "schedule", "temperature", "top_k", "top_p", "tokens", "prefix")
    return [Link(name, component) for name, component in zip(names, controls, strict=True)]


def _add_endpoint(model: Model) -> None:
    def generate(
        class_label: str,
        count: int = 4,
        seed: int = 0,
        guidance_scale: float = 2.0,
        guidance_schedule: str = "constant",
        temperature: float = 1.0,
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
            guidance_scale: classifier-free guidance, 1 is off.
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
            arguments = settings.arguments()
            class_id = model.label(settings.class_label)
            *_, frame = model.frames(class_id, settings.count, settings.seed, **arguments)
        return {
            "images": [png_data_url(image) for image in frame.images],
            "codes": frame.codes,
            "settings": asdict(settings),
            "model": model.name,
        }

    gr.api(generate, api_name="generate", concurrency_id="sample", concurrency_limit=SAMPLERS)
