"""One click on a sampling button: what it asks for, and what has come of it so far."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import number, one_sentence, whole_number
from .model import MAX_SEED, Frame, Model
from .scrubber import StripEncoder, scrubber_value

MAX_IMAGES = 16
# Between two messages to the browser: at least this long, and long enough for the browser to take in what it has.
SECONDS_A_MESSAGE = 0.05
SECONDS_A_VISITOR = 0.025
SECONDS_WITHOUT_NEWS = 1.0  # then there is a message all the same: with it a visitor who has left is noticed
BYTES_A_SECOND = 20e6


@dataclass
class Settings:
    """What determines a picture, together with the model."""

    class_label: str  # the name that the page shows
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
        if class_label is None or class_label == "":
            raise ValueError("choose a class first.")
        if isinstance(class_label, bool) or not isinstance(class_label, int | str):
            raise ValueError("the class must be one of the names or ids.")
        if isinstance(class_label, int):
            class_label = model.class_names[model.label(class_label)]
        count = whole_number(count, "the number of images", 1, MAX_IMAGES)
        seed = whole_number(seed, "the seed", 0, MAX_SEED)
        num_tokens = model.num_tokens if num_tokens is None else num_tokens
        num_tokens = whole_number(num_tokens, "the number of tokens", 1, model.num_tokens)
        if isinstance(prefix, str):
            prefix = parse_codes(prefix)
        prefix = [whole_number(code, "each fixed token", 0, model.codebook_size - 1) for code in prefix or []]
        if len(prefix) >= num_tokens:
            raise ValueError(f"{len(prefix)} tokens are fixed and {num_tokens} wanted, so nothing is left to sample.")
        guidance_scale, schedule, temperature, top_k, top_p = sampling
        for name, value in (("guidance", guidance_scale), ("temperature", temperature), ("top-p", top_p)):
            number(value, name)
        top_k = whole_number(top_k, "top-k", 0, model.codebook_size)
        return cls(class_label, count, seed, guidance_scale, schedule, temperature, top_k, top_p, num_tokens, prefix)

    def arguments(self) -> dict[str, Any]:
        """Those of `SpectralARPipeline.stream` besides class, count and seed."""
        names = ("guidance_scale", "guidance_schedule", "temperature", "top_k", "top_p", "num_tokens")
        return {name: getattr(self, name) for name in names} | {
            "prefix_codes": [self.prefix_codes] if self.prefix_codes else None
        }


def parse_codes(text: str) -> list[int]:
    """Codes written with spaces, commas or dots between them."""
    words = text.replace(",", " ").replace(".", " ").split()
    if not all(word.isdecimal() for word in words):
        raise ValueError("fixed tokens are codes, whole numbers with spaces between them.")
    return [int(word) for word in words]


class Run:
    """One click: its settings, and what has been sampled so far.

    It lies in the visitor's session, for the buttons and the exports, until somebody else's takes its place. So it has
    no pixels: strips are let go of when all have been sent, and frames are decoded again for an export.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.codes: list[list[int]] = []  # B lists
        count, total = settings.count, settings.num_tokens
        self.name = f"{re.sub(r'[^0-9a-z]+', '-', settings.class_label.lower()).strip('-')}-seed{settings.seed}"
        self.encoder = StripEncoder(total)
        self.value = scrubber_value(
            [{"title": settings.class_label, "captions": [""] * count}],
            model.cutoffs, model.image_size, model.codebook_size, num_tokens=total, selectable=True, name=self.name,
        )  # fmt: skip
        self.value |= {"busy": True, "status": "Waiting for its turn"}
        self.sent_bytes = 0
        self._stop: Callable[[], None] | None = None

    @property
    def num_frames(self) -> int:
        """Prefix lengths that have been decoded, k."""
        return len(self.codes[0]) if self.codes else 0

    def frames(self) -> np.ndarray:
        """Pixels of all prefixes: (k, B, H, H[, 3]) uint8."""
        return self.model.decode(self.codes, list(range(1, self.num_frames + 1))).swapaxes(0, 1)

    def add(self, frame: Frame) -> None:
        """Takes a frame; its strip is encoded here, beside the model, which samples on in a thread of its own."""
        self.codes = frame.codes
        self._show(self.encoder.encode(frame.images), frame)

    def _show(self, strip: str, frame: Frame) -> None:
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

    def interval(self) -> float:
        """Seconds that should lie between two messages: each costs the server as much as some tokens."""
        visitors = self.model.engine.num_requests if self.model.engine else 1
        return max(SECONDS_A_MESSAGE, SECONDS_A_VISITOR * visitors, self.sent_bytes / BYTES_A_SECOND)

    def begins(self, stop: Callable[[], None]) -> None:
        """Takes the function that stops the sampling."""
        self._stop = stop
        if not self.value["busy"]:  # stopped before
            stop()

    def finish(self, stopped: bool = False) -> None:
        self.value["busy"] = False
        if stopped:
            if self._stop is not None:
                self._stop()
            self.value["status"] = f"Stopped after {self.num_frames} of {self.settings.num_tokens} tokens"

    def let_go(self) -> None:
        """Of what has been sent. Afterwards there is no snapshot."""
        self.value, self._stop = None, None

    def snapshot(self) -> dict[str, Any]:
        """The value as it is now: Gradio keeps what it sent to find the difference, so lists must be copies."""
        return {key: list(item) if isinstance(item, list) else item for key, item in self.value.items()}


def stream(model: Model, settings: Settings) -> Iterator[Run]:
    """The run, each time there is something to send: at once, at the first token, then as often as is useful."""
    run = Run(model, settings)
    with one_sentence():
        class_id = model.label(settings.class_label)
        hook = {"on_start": run.begins} if model.engine else {}
        frames = model.frames(class_id, settings.count, settings.seed, **settings.arguments(), **hook)
        yield run
        sent, news = time.perf_counter(), False
        with closing(frames):
            for frame in frames:
                if frame:
                    run.add(frame)
                    news = True
                due = run.interval() if news else SECONDS_WITHOUT_NEWS
                if (frame and run.num_frames == 1) or time.perf_counter() - sent >= due:
                    yield run
                    sent, news = time.perf_counter(), False
        if run.value["busy"]:  # not stopped
            run.finish()
        yield run  # also if stopped: the last message is the one that stays on the page
