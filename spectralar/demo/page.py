"""The page: tabs, address, theme, and the options it is launched with."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import gradio as gr
from starlette.middleware import Middleware

from . import bands, card, generate, reconstruct, remix
from .guard import Guard, GuardedBlocks
from .links import restore, write_script
from .model import Model
from .scrubber import CSS as SCRUBBER_CSS

# One module a tab: TITLE, and build(model), which lays it out and returns what of it stands in the address.
TABS: Sequence[ModuleType] = (generate, reconstruct, bands, remix, card)

PAPER = "https://arxiv.org/abs/2506.10962"
# In the page itself: without one a browser asks for /favicon.ico, which behind a sub-path is somebody else's.
ICON = "data:image/svg+xml," + quote(
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#e0e7ff"/>'
    '<path d="M0 3a3 3 0 0 1 3-3h8v11H0z" fill="#818cf8"/><path d="M0 3a3 3 0 0 1 3-3h3v6H0z" fill="#4338ca"/></svg>'
)
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
HOUR = 3600
# Gradio's statistics of its functions are shown nowhere here. It makes them anew, of 10,000 events, at each event.
STATISTICS = {"GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9), "GRADIO_ANALYTICS_MAX_EVENTS": "1"}

# The address has been read. What the visitor's link asked for is run as if it had been clicked.
OPENED = (
    "() => { window.spectralarOpened = true; const query = new URLSearchParams(location.search); "
    "const tab = document.getElementById(`tab-${query.get('tab')}-button`) || { id: 'tab-generate-button' }; "
    "if (query.has('seed') && tab.id === 'tab-generate-button') document.querySelector('#generate')?.click(); }"
)


def build(model: Model, *others: Model) -> gr.Blocks:
    """The page of a model and, where there are others, a page for each of them behind a bar to choose from.

    An endpoint of another model has the model's name behind its own: generate_tiny_imagenet_64.
    """
    with GuardedBlocks(title="SpectralAR", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as demo:
        if others:
            gr.Navbar(main_page_name=model.name)
        _lay_out(demo, model)
    for other in others:
        with demo.route(other.name, re.sub(r"[^a-zA-Z0-9]+", "-", other.name)) as page:
            gr.Navbar(main_page_name=model.name)
            _lay_out(demo, other)
        for function in demo.fns.values():
            if function.page == page.current_page and function.api_visibility == "public":
                # Gradio has counted equal names, among them those of handlers: generate_6.
                name = re.sub(r"_\d+$", "", function.api_name)
                function.api_name = f"{name}_{page.current_page.replace('-', '_')}"
    os.environ.update(STATISTICS)
    return demo.queue(max_size=64, api_open=False)


def _lay_out(demo: gr.Blocks, model: Model) -> None:
    """Everything of one model's page."""
    gr.HTML(
        '<header class="masthead"><h1>SpectralAR</h1><p>Images generated from low to high frequency, one spectral '
        f'token at a time. Unofficial implementation of <a href="{PAPER}" target="_blank" rel="noopener">arXiv '
        f"2506.10962</a>; model {_escaped(model.name)}.</p></header>",
        padding=False,
    )
    slugs = [tab.__name__.rpartition(".")[2] for tab in TABS]
    links = []
    with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:  # all to be seen, on a phone too
        for slug, tab in zip(slugs, TABS, strict=True):
            with gr.Tab(tab.TITLE, id=slug, elem_id=f"tab-{slug}") as item:
                tab_links, events, opened = tab.build(model)
            links += tab_links
            if opened:
                opened(item)
            # The slider's place, k, is that of the tab before.
            item.select(None, js=f"() => {{ ({write_script(['tab', 'k'])})('{slug}', '') }}")
            components = [link.component for link in tab_links]
            if tab_links:
                gr.on(
                    [*(component.change for component in components), *events], None, components,
                    js=write_script([link.name for link in tab_links]),
                )  # fmt: skip

    def open_link(request: gr.Request) -> list[Any]:
        query = dict(request.query_params)
        slug = query.get("tab")
        return [gr.Tabs(selected=slug) if slug in slugs else gr.skip(), *restore(links, query)]

    demo.load(
        open_link, None, [tabs, *(link.component for link in links)],
        api_visibility="private", show_progress="hidden", queue=False,
    ).success(None, js=OPENED)  # fmt: skip


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def launch_options(mcp: bool = False) -> dict[str, Any]:
    """Arguments of `Blocks.launch`: the look, and nothing stored, watched or fetched from elsewhere.

    Args:
        mcp: whether agents may use the endpoints as tools; needs the packages of gradio[mcp].
    """
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=list(SYSTEM_FONTS),
        font_mono=list(SYSTEM_MONO),
    ).set(
        block_shadow="none",
        button_primary_shadow="none",
        button_secondary_shadow="none",
        body_background_fill="white",
        body_background_fill_dark="*neutral_950",
        block_border_width="1px",
    )
    return {
        "theme": theme,
        "css": SCRUBBER_CSS + (Path(__file__).parent / "style.css").read_text(encoding="utf-8"),
        "head": f'<link rel="icon" href="{ICON}">',
        "footer_links": ["api"],
        "app_kwargs": {"middleware": [Middleware(Guard)]},
        "run_history": False,
        "enable_monitoring": False,
        "max_file_size": "40mb",
        "max_threads": generate.SAMPLERS + 40,  # one for each who is served
        "state_session_capacity": 128,  # who is served and who waits; each takes about a megabyte
        "ssr_mode": False,
        "mcp_server": mcp,
    }
