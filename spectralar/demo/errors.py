"""Every mistake a visitor can make is answered in one sentence, on the page and through the API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns the ValueErrors of checked arguments into `gr.Error`s, which Gradio shows as they are."""
    try:
        yield
    except ValueError as error:
        raise user_error(str(error)) from error


def user_error(message: str) -> gr.Error:
    """An error the visitor can mend: shown without a traceback in the log."""
    message = message[:1].upper() + message[1:]
    return gr.Error(message if message.endswith((".", "?")) else message + ".", title="", print_exception=False)
