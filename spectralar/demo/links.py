"""Settings in the page's address: a link opens the page as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr

MAX_LENGTH = 2000


class Link(NamedTuple):
    """A component whose value stands in the address as `name`."""

    name: str
    component: gr.components.Component


class Linked(NamedTuple):
    """What of a tab stands in the address: written when one of the components changes, and on these events."""

    links: list[Link]
    events: list[Any]
    open: Callable[[gr.Tab], None] | None = None  # lets the tab show something when it is opened


def from_query(component: gr.components.Component, text: str) -> Any:
    """The value that `text` means for a component, or None if it is none: an address is typed by anybody."""
    if len(text) > MAX_LENGTH:
        return None
    if isinstance(component, gr.Dropdown | gr.Radio):
        by_value = [value for _, value in component.choices if str(value) == text]
        # A link written by hand says the name that is shown, or the first of several.
        names = [(name.casefold(), value) for name, value in component.choices]
        by_name = [value for name, value in names if text.casefold() in (name, name.partition(",")[0])]
        return next((found[0] for found in (by_value, by_name) if len(found) == 1), None)
    if isinstance(component, gr.Slider | gr.Number):
        try:
            number = float(text)
        except ValueError:
            return None
        low, high = component.minimum, component.maximum
        if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
            return None
        return int(number) if number == int(number) else number
    return text


def restore(links: Sequence[Link], query: Mapping[str, str]) -> list[Any]:
    """Updates for the components of all links from the query of a request; what is not valid is left alone."""
    values = [from_query(component, query[name]) if name in query else None for name, component in links]
    return [gr.skip() if value is None else value for value in values]


def write_script(names: Sequence[str]) -> str:
    """JavaScript that puts the values it is called with into the address, without asking the server.

    Not before the page has read its own link: tabs and components report themselves while they are put up.
    """
    return (
        "(...values) => { if (!window.spectralarOpened) return; const query = new URLSearchParams(location.search); "
        f"{json.dumps(list(names))}.forEach((name, i) => {{ "
        "const v = values[i]; if (v === null || v === undefined || v === '') query.delete(name); "
        "else query.set(name, v); }); "
        "history.replaceState(history.state, '', location.pathname + '?' + query + location.hash); }"
    )
