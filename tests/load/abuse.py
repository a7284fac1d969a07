"""Bad input through everything that the page answers: python -m tests.load.abuse [--inputs 10000] [--seed 0] [MODEL]

Wrong types, ranges and sizes for every function that the page has, hidden ones too; broken images of every format;
paths of files that are nobody's business; requests that are none. Everything must be answered within ten seconds,
with a result or a sentence; no traceback in the log, no file outside the page's folder, no growth of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .__main__ import MODEL
from .payloads import SECRET, broken_image, strange_requests, value
from .server import serving
from .wire import API, Page, RefusedError, Session, result_of

PATIENCE = 10.0  # seconds within which everything is answered
AT_ONCE = 8


@dataclass
class Outcome:
    """What came of all inputs."""

    counts: Counter = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)  # what must not happen
    slowest: float = 0.0


# -------------------------------------------------------------------------------------------------- how it is sent


class Abuser:
    """Sends bad input, and looks at the answers."""

    def __init__(self, page: Page, client: httpx.AsyncClient, url: str, folder: Path, patience: float) -> None:
        self.page, self.client, self.url, self.folder, self.patience = page, client, url, folder, patience
        self.outcome = Outcome()

    async def send(self, rng: random.Random) -> None:
        """One bad input."""
        begin = time.monotonic()
        kind = rng.choices(("call", "image", "request", "slow"), (60, 30, 9, 1))[0]
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

    async def slow(self, rng: random.Random) -> None:
        """An upload that comes in drops, and sometimes not to its end."""
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + rng.randbytes(rng.choice((10, 300))) + rng.choice((b"\r\n--x--\r\n", b""))

        async def drops() -> AsyncIterator[bytes]:
            for at in range(0, len(body), 40):
                yield body[at : at + 40]
                await asyncio.sleep(0.3)

        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await self.client.post(f"{self.url}{API}upload", content=drops(), headers=headers)
        self.outcome.counts[f"slow: {answer.status_code // 100}xx"] += 1


async def trespass(url: str, secret: Path) -> list[str]:
    """Tries to reach what is not one's own with what a visitor knows; returns what could be read or done.

    A link to `secret` is laid beside an uploaded file: whoever can do that has the rights of the page already.
    """
    reached = []
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        page, alice, bob = Page((await client.get(url + "config")).json()), Session(client, url), Session(client, url)
        data = b"of another visitor" + random.randbytes(8)
        own = Path((await alice.upload("alice.png", data))["path"])
        link = own.parent / "link.png"
        link.symlink_to(secret)
        digest = hashlib.sha256(data).hexdigest()
        for path in (
            own.parent,
            own.parent.parent,
            own.parent.parent / digest / own.name,
            own.parent / "other.png",
            link,
        ):
            answer = await client.get(f"{url}{API}file={path}")
            if answer.status_code == 200:
                reached.append(f"file={path.name}: {answer.content[:40]!r}")
        for target in (link, secret):  # as an input
            with contextlib.suppress(RefusedError):
                photo = {"path": str(target), "meta": {"_type": "gradio.FileData"}}
                await bob.join(page.endpoint("reconstruct"), [photo, 4])
                async with bob.events() as events:
                    async for event in events:
                        if event.kind == "process_completed":
                            result_of(event)
                            reached.append(f"{target.name} as an image")
                            break
        link.unlink()
        # What another session waits for is neither seen nor stopped by who does not know its hash.
        for session_hash in ("", "*", "../" + alice.hash, alice.hash[:-1]):
            body = {"session_hash": session_hash, "fn_index": page.click("generate"), "event_id": "0" * 32}
            for path in ("cancel", "reset"):
                answer = await client.post(f"{url}{API}{path}", json=body)
                if answer.status_code >= 500:
                    reached.append(f"{path}: {answer.status_code}")
    return reached


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


def around(log: str, trouble: str, lines: int = 40) -> list[str]:
    """The log around the first place of a trouble."""
    all_lines = log.splitlines()
    at = next(i for i, line in enumerate(all_lines) if trouble in line)
    return all_lines[max(0, at - lines // 4) : at + lines]


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
            outcome.bad += asyncio.run(trespass(server.url, folder / "secret.txt"))
            after, troubles = server.use(), server.troubles()
            if troubles:
                print(*around(server.log(), troubles[0]), sep="\n", file=sys.stderr)
    print(f"{options.inputs} bad inputs: {json.dumps(dict(sorted(outcome.counts.items())))}")
    print(f"slowest     {outcome.slowest:.1f} s")
    print(f"memory      {before.memory / 2**20:.0f} MiB, {after.memory / 2**20:.0f} at the end")
    print(f"open files  {before.files}, {after.files}; threads {before.threads}, {after.threads}")
    print(f"server log  {len(troubles)} tracebacks and the like")
    print(f"must not be {len(outcome.bad)}", *Counter(outcome.bad).most_common(20), sep="\n  ")
    return int(bool(outcome.bad or troubles))


if __name__ == "__main__":
    sys.exit(main())
