"""Every mistake a visitor can make is answered in one sentence, on the page and through the API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

MAX_MESSAGE = 400  # characters
HUGE = 1e18  # above it is no number that anything here could mean


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
    if len(message) > MAX_MESSAGE:  # it quotes what the visitor sent
        message = f"{message[: MAX_MESSAGE // 2]} … {message[-MAX_MESSAGE // 2 :]}"
    if "_" not in message.split(" ")[0]:  # else it begins with an argument's name
        message = message[:1].upper() + message[1:]
    return gr.Error(message if message.endswith((".", "?")) else message + ".", title="", print_exception=False)


def number(value: Any, what: str) -> float:
    """`value`, if it is a number that floats can hold; ranges are checked where it is used.

    Raises:
        ValueError: if it is none; the message begins with `what`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= HUGE:
        raise ValueError(f"{what} must be a finite number.")
    return value


def whole_number(value: Any, what: str, low: int, high: int) -> int:
    """`value` as an int; browsers and JSON send whole numbers as floats, and sometimes something else.

    Raises:
        ValueError: if it is not a whole number from `low` to `high`; the message begins with `what`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= HUGE or value % 1:
        raise ValueError(f"{what} must be a whole number between {low} and {high}.")
    if not low <= value <= high:
        raise ValueError(f"{what} must be between {low} and {high}, got {int(value)}.")
    return int(value)
