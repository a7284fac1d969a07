"""The page's HTTP interface as a browser speaks it: joins, streams of server-sent events, cancels, uploads, files."""

from __future__ import annotations

import json
import random
import string
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

API = "gradio_api/"
FULL = "busy"  # what a visitor is told while too many others wait


class RefusedError(Exception):
    """What the page says instead of a result: one sentence."""


STATE = None  # among what a function takes: the page keeps the value itself


class Page:
    """What of the page's configuration a browser uses to know what calls what."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.states = {c["id"] for c in config["components"] if c["type"] == "state"}
        self.components = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
        self.functions: list[dict[str, Any]] = config["dependencies"]

    def endpoint(self, name: str) -> int:
        """Id of a public endpoint."""
        return self._only(f for f in self.functions if f["api_name"] == name and f["api_visibility"] == "public")

    def click(self, elem_id: str) -> int:
        """Id of what a click on a component calls first."""
        target = [self.components[elem_id], "click"]
        return next(f["id"] for f in self.functions if target in [list(t) for t in f["targets"]] and f["backend_fn"])

    def updating(self, shown: str, taken: str | None = None) -> int:
        """Id of the last function in a queue that shows its result in one component and takes another, or none."""
        wanted = {self.components[taken]} if taken else set()
        shows = [f for f in self.functions if self.components[shown] in f["outputs"] and f["queue"] is not False]
        return [f["id"] for f in shows if set(f["inputs"]) - self.states == wanted][-1]

    @staticmethod
    def _only(found: Iterator[dict[str, Any]]) -> int:
        (function,) = found
        return function["id"]


@dataclass
class Event:
    """One message of a stream: its kind, its text, and the message itself once it is looked at."""

    text: str
    kind: str

    @property
    def message(self) -> dict[str, Any]:
        return json.loads(self.text)

    def ends(self, event_id: str) -> bool:
        """Whether it is the last one of what was asked for; one that was cancelled before may still have to say so."""
        return self.kind == "process_completed" and self.message["event_id"] == event_id


def event_of(text: str) -> Event:
    """The event of a line's text. Its kind stands at the beginning: most messages are large, and need no parsing."""
    begin = text.index('"msg":') + 7
    return Event(text, text[begin : text.index('"', begin)])


@dataclass
class Session:
    """A visitor's session with the page."""

    client: httpx.AsyncClient
    url: str
    hash: str = field(default_factory=lambda: "".join(random.choices(string.ascii_lowercase + string.digits, k=11)))

    async def join(self, function: int, data: list[Any], event_data: Any = None, query: str = "") -> str:
        """Asks for a function, from a page whose address has a query; returns the event's id.

        Raises:
            RefusedError: if the page does not take it.
        """
        body = {"data": data, "fn_index": function, "session_hash": self.hash, "event_data": event_data}
        answer = await self._post("queue/join" + query, body)
        if answer.status_code == 503:
            raise RefusedError(FULL)
        if answer.status_code != 200:
            raise _refusal(answer)
        return answer.json()["event_id"]

    async def run(self, function: int, data: list[Any], event_data: Any = None) -> list[Any]:
        """Calls a function that does not wait in the queue."""
        body = {"data": data, "fn_index": function, "session_hash": self.hash, "event_data": event_data}
        answer = await self._post("run/predict", body)
        if answer.status_code != 200:
            raise _refusal(answer)
        return answer.json()["data"]

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        # Not httpx's own way to JSON, which refuses what is no JSON, such as NaN.
        headers = {"content-type": "application/json"}
        return await self.client.post(self.url + API + path, content=json.dumps(body), headers=headers)

    async def cancel(self, function: int, event_id: str) -> None:
        body = {"session_hash": self.hash, "fn_index": function, "event_id": event_id}
        await self.client.post(self.url + API + "cancel", json=body)

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        """The session's events, from now until all that it has asked for is done."""
        async with self.client.stream(
            "GET", self.url + API + "queue/data", params={"session_hash": self.hash}
        ) as response:

            async def events() -> AsyncIterator[Event]:
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        yield event_of(line[5:].strip())

            yield events()

    @asynccontextmanager
    async def open_tab(self) -> AsyncIterator[None]:
        """A tab that is open: the page forgets the session some time after it is closed."""
        async with self.client.stream("GET", self.url + API + "heartbeat/" + self.hash):
            yield

    async def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """Sends a file; returns what stands for it among a function's inputs.

        Raises:
            RefusedError: if the page does not take it.
        """
        answer = await self.client.post(self.url + API + "upload", files={"files": (name, data)})
        if answer.status_code != 200:
            raise _refusal(answer)
        return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    async def download(self, file: dict[str, Any]) -> bytes:
        """The bytes of a file among a function's outputs; httpx raises if fewer come than were announced."""
        answer = await self.client.get(self.url + API + "file=" + file["path"])
        if answer.status_code != 200:
            raise RefusedError(f"a result's file: {answer.status_code}")
        return answer.content


def _refusal(answer: httpx.Response) -> RefusedError:
    """The sentence in an answer that is none: Gradio has it in one of two places, and some in the text itself."""
    try:
        said = answer.json()
        text = said["error"] if "error" in said else said["detail"]
    except (ValueError, TypeError, KeyError):
        text = f"{answer.status_code}: {answer.text[:200]}"
    return RefusedError(str(text))


def result_of(event: Event) -> list[Any]:
    """The outputs in a `process_completed` event.

    Raises:
        RefusedError: with the page's sentence, if it is that of an error.
    """
    message = event.message
    if not message["success"]:
        raise RefusedError(str(message["output"].get("error")))
    return message["output"].get("data", [])
