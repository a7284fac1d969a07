"""Bad input through everything that the page answers: python -m tests.load.abuse [--inputs 10000] [--seed 0] [MODEL]

Wrong types, ranges and sizes for every function that the page has, hidden ones too; broken images of every format;
paths of files that are nobody's business; requests that are none. Everything must be answered within ten seconds,
with a result or a sentence; no traceback in the log, no file outside the page's folder, no growth of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import random
import re
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from .__main__ import MODEL
from .server import serving
from .wire import API, Page, RefusedError, Session, result_of

PATIENCE = 10.0  # seconds within which everything is answered
AT_ONCE = 8
SECRET = b"no page may show this"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

JSON = {"content-type": "application/json"}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
HTML = b"<!doctype html><script>alert(1)</script>"
TEXTS = (
    "", " ", "\0", "'; DROP TABLE x; --", "<script>alert(1)</script>", "../../../etc/passwd", "file:///etc/passwd",
    "/proc/self/environ", "sample:0:0", "sample:99999999999999999999:1", "sample:1:-1", "sample::", "example:../../x",
    "example:cat", "NaN", "1e999", "٣٤", "9" * 5000, "𝕊𝕡𝕖𝕔𝕥𝕣𝕒𝕝" * 50, "😀\u202e", "\ud83d", "tail", "model", "Bag",
    "1 2 3", "1 " * 3000, "{}", "[]", "data:image/png;base64,AAAA", "http://127.0.0.1:1/x.png", "{image}", "%00%2e/",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3.5, 1e30, -1e30, 1e308, 5e-324, 2**31, 2**63, -(2**63), 10**30, 10**400, math.nan, math.inf,
    -math.inf,
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [[[[[]]]]], [None], [1, 2, 3], [[1, 2], [3]], {"a": 1}, ["Bag"], [[1e30]])


@dataclass
class Outcome:
    """What came of all inputs."""

    counts: Counter = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)  # what must not happen
    slowest: float = 0.0


# -------------------------------------------------------------------------------------------------- what is sent


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that a function may not expect."""
    kind = rng.randrange(20)
    if kind == 0 and depth < 3:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 1 and depth < 3:
        return {rng.choice(("path", "url", "meta", "__type__", "a")): value(rng, depth + 1) for _ in range(2)}
    if kind == 2:
        return file_path(
            rng.choice(("/etc/passwd", "/proc/self/environ", "../secret.txt", "http://127.0.0.1:1/a.png"))
        )
    if kind == 3 and rng.random() < 0.05:
        return "x" * 10_000_000
    return rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS)))


def file_path(path: str) -> dict[str, Any]:
    return {"path": path, "url": None, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


def broken_image(rng: random.Random) -> tuple[str, bytes]:
    """A file that says it is an image, of any format; cut short, with flipped bits, of another kind, or a bomb."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((("a.svg", SVG), ("a.png", SVG), ("a.html", HTML), ("a.png", HTML), ("a.png", b"")))
    if kind == 1:  # says that it is huge, and may hold some of it
        side = rng.choice((20_000, 60_000, 2**31 - 1))
        chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        pixels = b"IDAT" + zlib.compress(bytes(300_000))
        chunks = (chunk, pixels, b"IEND")
        parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
        return "bomb.png", b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    file_format = rng.choice(FORMATS)
    side = rng.choice((1, 7, 40, 200))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    data = bytearray(buffer.getvalue())
    if kind in (2, 3):
        data = data[: rng.randrange(len(data))]
    elif kind in (4, 5):
        for _ in range(rng.choice((1, 3, 50))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 6:
        data = bytearray(b"GIF89a" + HTML) + data  # a polyglot
    names = ("a.png", f"a.{file_format.lower()}", "a.html", "../a.png", "a" * 300 + ".png", "a\0.png", "é.png")
    return rng.choice(names), bytes(data)


def strange_requests(rng: random.Random, url: str, folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, address and options of requests that no browser makes."""
    target = rng.choice(
        ("/etc/passwd", str(folder / "secret.txt"), "/proc/self/environ", "/proc/self/cmdline", "app.py",
         str(folder / "tmp" / "link.txt"), "requirements.txt", "spectralar/demo/page.py", "~/.bashrc",
         "C:/Windows/win.ini")
    )  # fmt: skip
    for way in ("{}", "../../../../..{}", "//{}", "..%2f..%2f..%2f..{}", "%00{}", "file://{}", "./{}", "\\\\host{}"):
        yield "GET", f"{url}{API}file={way.format(target)}", {}
    yield "GET", f"{url}static/../../../../../..{target}", {}
    yield "GET", f"{url}assets/%2e%2e/%2e%2e/%2e%2e{target}", {}
    yield "GET", f"{url}{API}proxy=http://127.0.0.1:1/x", {}
    for path in ("queue/join", "run/predict", "cancel", "upload", "reset", "component_server", "call/generate"):
        body = rng.choice((b"", b"{", b"[]", b"null", b'{"data": [' * 2000, b"\xff\xfe", b'{"data": null}', b'"x"'))
        yield "POST", url + API + path, {"content": body, "headers": JSON}
    for number in (-1, 10**6, 1.5, "x", None):
        body = json.dumps({"data": [], "fn_index": number, "session_hash": rng.choice(("x", "", "../x", "x" * 5000))})
        yield "POST", url + API + rng.choice(("queue/join", "run/predict")), {"content": body, "headers": JSON}
    yield "GET", url + API + "queue/data?session_hash=" + "nobody", {}
    yield rng.choice(("PUT", "DELETE", "PATCH", "OPTIONS")), url + rng.choice(("", "config", API + "upload")), {}
    yield "GET", f"{url}?seed=x&tab=<script>alert(1)</script>&class={'9' * 900}&k=-1", {}
    yield "POST", url + API + "upload", {"content": b"x" * 1000, "headers": {"content-type": "multipart/form-data"}}


# -------------------------------------------------------------------------------------------------- how it is sent


class Abuser:
    """Sends bad input, and looks at the answers."""

    def __init__(self, page: Page, client: httpx.AsyncClient, url: str, folder: Path, patience: float) -> None:
        self.page, self.client, self.url, self.folder, self.patience = page, client, url, folder, patience
        self.outcome = Outcome()

    async def send(self, rng: random.Random) -> None:
        """One bad input."""
        begin = time.monotonic()
        kind = rng.choices(("call", "image", "request"), (6, 3, 1))[0]
        try:
            await asyncio.wait_for(getattr(self, kind)(rng), self.patience)
        except TimeoutError:
            self.outcome.bad.append(f"{kind}: no answer within {self.patience:.0f} s")
        except RefusedError as refusal:
            self.outcome.counts[f"{kind}: a sentence"] += 1
            self._look(kind, str(refusal))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self.outcome.counts[f"{kind}: {type(error).__name__}"] += 1
        self.outcome.slowest = max(self.outcome.slowest, time.monotonic() - begin)

    def _look(self, what: str, text: str) -> None:
        if text == "None" or "Traceback" in text or re.match(r"5\d\d: ", text):
            self.outcome.bad.append(f"{what}: answered {text[:200]!r}")

    async def call(self, rng: random.Random) -> None:
        """A function of the page with values that it does not expect."""
        function = rng.choice([f for f in self.page.functions if f["backend_fn"] and f["inputs"]])
        count = len(function["inputs"]) + rng.choice((0, 0, 0, 0, -1, 1))
        data = [value(rng) for _ in range(max(0, count))]
        await self._call(f"call of {function['api_name']}", function, data, rng)

    async def image(self, rng: random.Random) -> None:
        """A broken file to a function that takes images."""
        session = Session(self.client, self.url)
        photo = await session.upload(*broken_image(rng))
        names = ("reconstruct", "bands", "mix", "continue_as")
        function = self.page.functions[self.page.endpoint(rng.choice(names))]
        data = [photo if n == 0 else value(rng) for n in range(len(function["inputs"]))]
        await self._call("image", function, data, rng)

    async def _call(self, what: str, function: dict[str, Any], data: list[Any], rng: random.Random) -> None:
        session = Session(self.client, self.url)
        event_data = rng.choice((None, None, value(rng)))
        if function["queue"] is False:
            await session.run(function["id"], data, event_data)
        else:
            await session.join(function["id"], data, event_data)
            async with session.events() as events:
                async for event in events:
                    if event.kind == "process_completed":
                        result_of(event)
                        break
                else:
                    self.outcome.bad.append(f"{what}: the stream ended without an answer")
        self.outcome.counts[f"{what.partition(' of')[0]}: a result"] += 1

    async def request(self, rng: random.Random) -> None:
        """A request that no browser makes."""
        method, url, options = rng.choice(list(strange_requests(rng, self.url, self.folder)))
        answer = await self.client.request(method, url, **options)
        self.outcome.counts[f"request: {answer.status_code // 100}xx"] += 1
        if answer.status_code >= 500:
            self.outcome.bad.append(f"{method} {url[:200]}: {answer.status_code} {answer.text[:200]}")
        leaks = (SECRET, b"root:", b"PATH=", b"torch==", b"import gradio", b"app.py\0")
        if "file=" in url and any(leak in answer.content for leak in leaks):
            self.outcome.bad.append(f"readable: {url[:200]}")


async def abuse(url: str, folder: Path, num_inputs: int, seed: int = 0, patience: float = PATIENCE) -> Outcome:
    """Sends bad inputs, a few at once. `folder` is one that the page must not show, with `SECRET` in secret.txt."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        page = Page((await client.get(url + "config")).json())
        abuser = Abuser(page, client, url, folder, patience)
        numbers = iter(range(num_inputs))

        async def work() -> None:
            for number in numbers:
                await abuser.send(random.Random(f"{seed} {number}"))

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return abuser.outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.abuse", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=MODEL, help="folder of a saved pipeline")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds within which all is answered")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "secret.txt").write_bytes(SECRET)
        with serving(folder, ["--model", options.model.resolve()]) as server:
            asyncio.run(abuse(server.url, folder, max(100, options.inputs // 10), options.seed + 1, options.patience))
            before = server.use()  # after a tenth of as many
            outcome = asyncio.run(abuse(server.url, folder, options.inputs, options.seed, options.patience))
            after, troubles = server.use(), server.troubles()
            if troubles:
                print(server.log()[-5000:], file=sys.stderr)
    print(f"{options.inputs} bad inputs: {json.dumps(dict(sorted(outcome.counts.items())))}")
    print(f"slowest     {outcome.slowest:.1f} s")
    print(f"memory      {before.memory / 2**20:.0f} MiB, {after.memory / 2**20:.0f} at the end")
    print(f"open files  {before.files}, {after.files}; threads {before.threads}, {after.threads}")
    print(f"server log  {len(troubles)} tracebacks and the like")
    print(f"must not be {len(outcome.bad)}", *Counter(outcome.bad).most_common(20), sep="\n  ")
    return int(bool(outcome.bad or troubles))


if __name__ == "__main__":
    sys.exit(main())
