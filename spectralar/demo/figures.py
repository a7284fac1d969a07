"""Charts in the page: drawn once in light colours, shown in those of the page, saved as PNG, SVG and CSV."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import gradio as gr

from ..analysis.chart import LIGHT, Chart
from .cache import write_whole
from .errors import one_sentence, user_error

_FOLDER = Path(__file__).parent
TEMPLATE = Template((_FOLDER / "figures.html").read_text(encoding="utf-8"))
FORMATS = ("png", "svg", "csv")
# Colours of the light palette that the page has names for, so that a chart follows light and dark by itself.
PAGE_COLOURS = {
    LIGHT.ink: "var(--body-text-color)",
    LIGHT.muted: "var(--body-text-color-subdued)",
    LIGHT.grid: "var(--border-color-primary)",
    LIGHT.series[0]: "var(--color-accent)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(LIGHT.series[1:], start=1)},  # in style.css
}


def figure(title: str, text: str, *, elem_id: str, chart: Chart | None = None) -> gr.HTML:
    """A place for a chart with its title and a sentence on what it shows and what not; hidden while it is empty.

    The custom event `save` fires on a click on a format; its `gr.EventData` has `format`.
    """
    with gr.Column(min_width=300):  # side by side where there is room
        return gr.HTML(
            value=None if chart is None else shown(chart),
            # Filled in here, not by Gradio: a component that is mounted late knows its value only.
            html_template=TEMPLATE.substitute(heading=escape(title), explanation=escape(text)),
            css_template=(_FOLDER / "figures.css").read_text(encoding="utf-8"),
            js_on_load=(_FOLDER / "figures.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id=elem_id,
        )


def shown(chart: Chart) -> dict[str, str]:
    """The value of a `figure` that shows a chart."""
    svg = chart.svg()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(f"fill: {LIGHT.background}", "fill: none", 1)  # the figure's background, drawn first
    for colour, name in PAGE_COLOURS.items():
        svg = svg.replace(colour, name)
    return {"svg": svg}


def chart_bytes(chart: Chart, file_format: str) -> bytes:
    """The file of a chart in one of `FORMATS`.

    Raises:
        ValueError: for another format.
    """
    if file_format not in FORMATS:
        raise ValueError(f"a figure can be had as {', '.join(FORMATS)}, not as {file_format!r}.")
    data = getattr(chart, file_format)()
    return data if isinstance(data, bytes) else data.encode("utf-8")


def listen_to_saves(
    figures: Mapping[str, gr.HTML],
    charts_of: Callable[[Any], Mapping[str, Chart]],
    drawn_from: gr.State | None,
    elem_id: str,
) -> None:
    """Lets figures be saved. A visitor's own are drawn once more for that: each takes megabytes, a session should not.

    Args:
        figures: by the names that their files have.
        charts_of: the charts by the same names, those that there are, from what `drawn_from` holds.
        drawn_from: what a visitor's own figures were drawn from, None before; no state if all visitors have the same.
        elem_id: of the hidden button that hands over the file.
    """
    file = gr.DownloadButton(visible="hidden", elem_id=elem_id)

    def write(charts: Mapping[str, Chart], name: str, file_format: str) -> str:
        if name not in charts:
            raise user_error("This figure has not been drawn yet.")
        with one_sentence():
            data = chart_bytes(charts[name], file_format)
        return write_whole(data, f"{name.replace('_', '-')}.{file_format}", file.GRADIO_CACHE)

    for name, view in figures.items():

        def save_own(held: Any, event: gr.EventData, name: str = name) -> str:
            return write({} if held is None else charts_of(held), name, event.format)

        def save_shared(event: gr.EventData, name: str = name) -> str:
            return write(charts_of(None), name, event.format)

        save = save_shared if drawn_from is None else save_own
        view.save(save, drawn_from, file, api_visibility="private", show_progress="hidden").success(
            None, js=f"() => document.querySelector('#{elem_id}').click()"
        )


def tables(charts: Mapping[str, Chart]) -> dict[str, dict[str, Any]]:
    """The numbers of charts for a client: columns by chart."""
    return {name: {column: list(cells) for column, cells in chart.columns.items()} for name, chart in charts.items()}
