"""Every mistake a visitor can make is answered in one sentence, on the page and through the API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns the ValueErrors of checked arguments into `gr.Error`s, which Gradio shows as they are."""
    try:
        yield
    except gr.Error:  # is a ValueError, and says it already
        raise
    except ValueError as error:
        raise user_error(str(error)) from error


def user_error(message: str) -> gr.Error:
    """An error the visitor can mend: shown without a traceback in the log."""
    if "_" not in message.split(" ")[0]:  # else it begins with an argument's name
        message = message[:1].upper() + message[1:]
    return gr.Error(message if message.endswith((".", "?")) else message + ".", title="", print_exception=False)


def whole_number(value: Any, what: str, low: int, high: int) -> int:
    """`value` as an int; browsers and JSON send whole numbers as floats, and sometimes something else.

    Raises:
        ValueError: if it is not a whole number from `low` to `high`; the message begins with `what`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"{what} must be a whole number between {low} and {high}.")
    if not low <= value <= high:
        raise ValueError(f"{what} must be between {low} and {high}, got {int(value)}.")
    return int(value)
