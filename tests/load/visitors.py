"""What visitors do, how long they wait for it, and whether they get what their seed gives alone."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from spectralar.demo.model import Model
from spectralar.demo.runs import Settings
from spectralar.demo.source import EXAMPLE_FILES, Origins
from spectralar.interface.image import to_model_input

from .wire import FULL, STATE, Page, RefusedError, Session, result_of

STREAM = httpx.Timeout(60, read=600)  # a stream is quiet while its visitor waits for a turn
# What a visitor does next, and how often of a hundred times.
MIXED = {
    "generate": 40, "hurry": 5, "stop": 10, "leave": 10, "reconstruct": 12, "upload": 10, "remix": 5, "endpoint": 5,
    "open": 3,
}  # fmt: skip
SETTINGS = 40  # different pictures that are asked for; each is sampled once more afterwards, alone


@dataclass
class Wait:
    """What one generation took, in seconds since the click."""

    visitor: int
    count: int  # images
    first: float
    last: float


@dataclass
class Findings:
    """What all visitors saw."""

    waits: list[Wait] = field(default_factory=list)
    done: Counter = field(default_factory=Counter)  # actions that came to their end
    busy: int = 0  # times that a visitor was told that too many wait
    wrong: list[str] = field(default_factory=list)
    errors: Counter = field(default_factory=Counter)
    samples: list[tuple[Settings, list[list[int]], np.ndarray | None]] = field(default_factory=list)  # to be checked


def asked_for(model: Model, seed: int, images: int | None = None) -> list[Settings]:
    """Different settings of the Generate tab; `images` of each, or 1 to 4."""
    rng, n = random.Random(seed), model.num_tokens
    return [
        Settings(
            class_label=rng.choice(model.class_names),
            count=images or rng.choice((1, 2, 4)),
            seed=rng.randrange(10_000),
            guidance_scale=rng.choice((1.0, 2.0, 3.5)),
            guidance_schedule=rng.choice(("constant", "linear", "cosine")),
            temperature=rng.choice((1.0, 0.8)),
            top_k=rng.choice((0, 0, 50)),
            top_p=rng.choice((1.0, 0.9)),
            num_tokens=rng.choice((n, n, n, max(4, n // 2))),
            prefix_codes=[rng.randrange(model.codebook_size) for _ in range(rng.choice((0, 0, 0, 3)))],
        )
        for _ in range(SETTINGS)
    ]


def as_inputs(model: Model, settings: Settings) -> list[Any]:
    """The values of the Generate tab's controls."""
    label, *values, prefix = vars(settings).values()
    return [model.label(label), *values, " ".join(map(str, prefix))]


def last_tiles(value: dict[str, Any], count: int, channels: int) -> np.ndarray:
    """The images of the last strip of a scrubber's value: (B, H, H[, 3]) uint8."""
    strip = Image.open(io.BytesIO(base64.b64decode(value["frames"][-1].partition(",")[2])))
    strip = strip.convert("L" if channels == 1 else "RGB")  # WebP knows no grey
    return np.stack(np.split(np.asarray(strip), count, axis=1))


class Visitor:
    """Somebody with a tab open, or a program, who goes from one thing to the next."""

    def __init__(
        self, number: int, page: Page, client: httpx.AsyncClient, url: str, model: Model, settings: list[Settings],
        findings: Findings, seed: int,
    ) -> None:  # fmt: skip
        self.number, self.page, self.client, self.url = number, page, client, url
        self.model, self.settings, self.findings = model, settings, findings
        self.rng = random.Random(seed * 1000 + number)
        self.session = Session(client, url)

    async def stay(self, until: float, actions: dict[str, int], pause: float, first: Sequence[str] = ()) -> None:
        """Does what is in `first`, then one thing after another until the clock says so, `pause` seconds between."""
        names, shares = list(actions), list(actions.values())
        left = list(first)
        while left or time.monotonic() < until:
            self.session = Session(self.client, self.url)
            try:
                async with self.session.open_tab():
                    for _ in range(self.rng.randint(3, 10)):  # then the tab is closed and a new one opened
                        if not left and time.monotonic() > until:
                            break
                        name = left.pop(0) if left else self.rng.choices(names, shares)[0]
                        await self._act(name)
                        if name == "leave":
                            break
                        await asyncio.sleep(self.rng.uniform(0, 2 * pause))
            except httpx.HTTPError as error:
                self.findings.errors[f"the tab itself: {type(error).__name__}: {error}"] += 1
                await asyncio.sleep(1)

    async def _act(self, name: str) -> None:
        try:
            await getattr(self, name)()
            self.findings.done[name] += 1
        except RefusedError as refusal:
            if FULL in str(refusal):
                self.findings.busy += 1
                await asyncio.sleep(1)
            else:
                self.findings.errors[f"{name}: {refusal}"] += 1
        except (httpx.HTTPError, OSError, ValueError, KeyError, StopIteration) as error:
            self.findings.errors[f"{name}: {type(error).__name__}: {str(error)[:200]}"] += 1

    # ---------------------------------------------------------------------------------------------- Generate

    async def generate(self, until: Callable[[float], bool] | None = None) -> str | None:
        """A click on Generate, followed to its end or, with `until`, to a moment after the first picture.

        Returns:
            The event's id where it was left before its end.
        """
        settings, begin, first = self.rng.choice(self.settings), time.monotonic(), 0.0
        inputs = [STATE, *as_inputs(self.model, settings)]
        event_id = await self.session.join(self.page.click("generate"), inputs)
        async with self.session.events() as events:
            async for event in events:
                now = time.monotonic() - begin
                if not first and "data:image/" in event.text:
                    first = now
                if first and until and until(now - first):
                    return event_id
                if event.ends(event_id):
                    value = result_of(event)[0]
                    self.findings.waits.append(Wait(self.number, settings.count, first or now, now))
                    self._compare(settings, value)
                    return None
        raise RefusedError("the stream ended before the picture was there")

    async def hurry(self) -> None:
        """Generate, and again with other settings before an answer: what is asked for last must be shown whole."""
        asked = self.rng.sample(self.settings, 2)
        function, answers = self.page.click("generate"), {}
        ids = [await self.session.join(function, [STATE, *as_inputs(self.model, settings)]) for settings in asked]
        async with self.session.events() as events:
            async for event in events:
                for event_id, settings in zip(ids, asked, strict=True):
                    if event.ends(event_id):
                        answers[event_id] = result_of(event)[0]
                        if event_id == ids[1] or "frames" in answers[event_id]:  # the first may have been faster
                            self._compare(settings, answers[event_id])
                if len(answers) == len(ids):
                    return
        raise RefusedError("the stream ended before the picture was there")

    def _compare(self, settings: Settings, value: dict[str, Any]) -> None:
        codes = np.transpose(value["codes"]).tolist()
        self.findings.samples.append((settings, codes, last_tiles(value, settings.count, self.model.channels)))

    async def stop(self) -> None:
        """Generate, then Stop in the middle: as the page does, a cancel and a call of what tidies up."""
        after = self.rng.uniform(0, 0.5)
        event_id = await self.generate(until=lambda seconds: seconds >= after)
        if event_id is not None:
            await self.session.cancel(self.page.click("generate"), event_id)
            await self.session.run(self.page.click("stop"), [None])

    async def leave(self) -> None:
        """Generate, then close the tab in the middle."""
        after = self.rng.uniform(0, 0.5)
        await self.generate(until=lambda seconds: seconds >= after)

    # ---------------------------------------------------------------------------------------------- other tabs

    async def _result(self, function: int, data: list[Any]) -> list[Any]:
        event_id = await self.session.join(function, data)
        async with self.session.events() as events:
            async for event in events:
                if event.ends(event_id):
                    return result_of(event)
        raise RefusedError("the stream ended without a result")

    async def open(self) -> None:
        """The page itself, and the picture that it opens with."""
        answer = await self.client.get(self.url)
        answer.raise_for_status()
        await self._result(self.page.updating("generated"), [STATE])

    async def reconstruct(self) -> None:
        """An example through the endpoint, with the download of the result: many visitors ask for the same."""
        name = self.rng.choice(list(EXAMPLE_FILES))
        photo = await self.session.upload(f"{name}.png", EXAMPLE_FILES[name].read_bytes())
        k = self.rng.choice((self.model.num_tokens // 2, self.model.num_tokens))
        file, numbers = await self._result(self.page.endpoint("reconstruct"), [photo, k])
        pixels = np.asarray(Image.open(io.BytesIO(await self.session.download(file))))
        expected = expected_reconstruction(self.model, name, k)
        if numbers["codes"] != expected[0] or np.abs(pixels.astype(int) - expected[1]).max() > 1:
            self.findings.wrong.append(f"reconstruction of {name} from {k} tokens")

    async def upload(self) -> None:
        """A photo of one's own on the Reconstruct tab."""
        pixels = np.random.default_rng(self.rng.randrange(2**32)).integers(0, 256, (60, 80, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        photo = await self.session.upload("photo.png", buffer.getvalue())
        value = (await self._result(self.page.updating("reconstructed", "photo"), [STATE, photo]))[0]
        if len(value["frames"]) != self.model.num_tokens or value["busy"]:
            self.findings.wrong.append("reconstruction of a photo: frames are missing")

    async def remix(self) -> None:
        """Two samples, the first tokens of one and the others of the other."""
        a, b = (f"sample:{self.rng.randrange(len(self.model.class_names))}:{self.rng.randrange(9)}" for _ in "ab")
        value = (await self._result(self.page.click("remix"), [STATE, None, None, a, b, "tail", 0, 0, 2.0]))[0]
        if len(value["frames"]) != self.model.num_tokens:
            self.findings.wrong.append("remix: frames are missing")

    async def endpoint(self) -> None:
        """The public endpoint through gradio_client."""
        settings = self.rng.choice(self.settings)
        try:
            answer = await asyncio.to_thread(self._predict, settings)
        except AppError as error:
            raise RefusedError(FULL if "queue is full" in str(error).lower() else str(error)) from None
        self.findings.samples.append((settings, answer["codes"], None))

    def _predict(self, settings: Settings) -> dict[str, Any]:
        client = Client(self.url, verbose=False, httpx_kwargs={"timeout": STREAM})
        try:
            return client.predict(*vars(settings).values(), api_name="/generate")
        finally:
            client.close()


_RECONSTRUCTED: dict[tuple[str, int], tuple[list[int], np.ndarray]] = {}


def expected_reconstruction(model: Model, name: str, k: int) -> tuple[list[int], np.ndarray]:
    """Codes and pixels of an example, computed here."""
    if (name, k) not in _RECONSTRUCTED:
        photo = Origins(model).photo(f"example:{name}", None)
        codes = model.encode(to_model_input(photo, model.image_size, model.channels))
        _RECONSTRUCTED[name, k] = codes[0], model.decode(codes, [k])[0, 0].astype(int)
    return _RECONSTRUCTED[name, k]


def check(model: Model, findings: Findings) -> None:
    """Compares all samples with those of the same settings alone; adds to `findings.wrong`."""
    alone: dict[str, tuple[list[list[int]], np.ndarray]] = {}
    for settings, codes, tiles in findings.samples:
        key = repr(settings)
        if key not in alone:
            class_id, arguments = model.label(settings.class_label), settings.arguments()
            frame = [f for f in model.frames(class_id, settings.count, settings.seed, **arguments) if f][-1]
            alone[key] = frame.codes, frame.images.astype(int)
        expected, images = alone[key]
        if codes != expected:
            findings.wrong.append(f"codes of {key}")
        elif tiles is not None and np.abs(tiles - images).max() > 1:
            findings.wrong.append(f"pixels of {key}")
