"""What a request may do wrong is answered in a sentence, and noted in one line of the log.

Gradio answers a wrong type, an unknown function or a session without a state with a traceback in the log and no word
to the visitor.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import gradio as gr

from .errors import user_error
from .turns import check_logins_in_order, one_at_a_time

logger = logging.getLogger(__name__)

MAX_BODY_MB = 16  # of a request that is no upload: Gradio keeps what a session sent; photos as data URLs fit
MISUNDERSTOOD = "this request cannot be understood: see the page's API for what its functions take."

Message = MutableMapping[str, Any]


class GuardedBlocks(gr.Blocks):
    """`gr.Blocks` whose functions answer whatever they are sent: a result, or a `gr.Error` of one sentence."""

    async def preprocess_data(self, block_fn: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().preprocess_data(block_fn, *args, **kwargs)
        except gr.Error as error:  # gr.Error is what the page's own inputs say; Gradio's own say it with a traceback
            error.print_exception = False
            raise
        except Exception as error:
            note(block_fn.api_name, error)
            raise user_error("this input cannot be used: it is not of the kind that the function takes.") from None

    def run_startup_events(self) -> None:
        check_logins_in_order(self.app)
        super().run_startup_events()

    async def process_api(self, block_fn: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            async with one_at_a_time(block_fn, kwargs.get("state")):
                return await super().process_api(block_fn, *args, **kwargs)
        except gr.Error as error:  # as above: one of Gradio's own may be of what an event came with
            error.print_exception = False
            raise
        except (StopIteration, StopAsyncIteration):
            raise
        except Exception as error:
            note(getattr(block_fn, "api_name", "a function"), error)
            raise user_error("this did not work: please reload the page and try again.") from None


class Guard:
    """ASGI middleware: an exception that reaches it becomes an answer, and bodies have a bound."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        is_upload = scope["path"].rstrip("/").endswith("/upload")  # which Gradio bounds while it reads
        if not is_upload and length.isdigit() and int(length) > MAX_BODY_MB * 2**20:
            return await _answer(send, 413, f"a request may have at most {MAX_BODY_MB} MB.")
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            note(scope["path"][:200], error)
            if not started:
                await _answer(send, 400, MISUNDERSTOOD)


async def _answer(send: Callable, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence[:1].upper() + sentence[1:]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def note(what: str | None, error: Exception) -> None:
    """One line on an exception and where it was raised; all of it for who sets the level to DEBUG."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())[:200]
    logger.warning("%s: %s%s: %s", what, type(error).__name__, where, text)
    logger.debug("%s", what, exc_info=error)
