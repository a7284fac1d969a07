"""Classes to try, each one a button with its name and a picture that was sampled once for all visitors.

Without an engine, on ZeroGPU, they stay words: pictures would be taken from a visitor's share of a GPU.
"""

from __future__ import annotations

import html
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import gradio as gr

from ..inference.engine import EngineBusyError
from .export import png_data_url
from .model import Model

SCRIPT = """
element.addEventListener('click', (event) => {
  const tile = event.target.closest('button');
  if (tile) trigger('chosen', { class_id: Number(tile.dataset.id) });
});
"""
SEED = 9  # of which the embedded models have handsome samples
AT_ONCE = 2  # pictures: a visitor's own, which begin at the same time, come first


def tiles(model: Model, elem_id: str) -> gr.HTML:
    """The row, at first in words alone. Its event `chosen` has the class id in `gr.EventData.class_id`."""
    row = gr.HTML(markup(model, {}), js_on_load=SCRIPT, apply_default_css=False, elem_id=elem_id)
    sampled = cache(lambda: markup(model, samples(model)))

    def fill() -> Any:
        try:
            return sampled()
        except EngineBusyError:  # the next visitor will have them
            return gr.skip()

    if model.engine is not None:
        gr.on(None, fill, None, row, api_visibility="private", show_progress="hidden", concurrency_id="tiles")
    return row


def markup(model: Model, pictures: dict[int, str]) -> str:
    """The row's HTML; `pictures` are addresses of images by class id, as far as there are any."""
    buttons = []
    for i in model.examples:
        name, side = html.escape(model.class_names[i]), model.image_size
        src = f'src="{pictures[i]}" ' if i in pictures else ""
        picture = f'<img {src}alt="" width="{side}" height="{side}">'
        buttons.append(f'<button type="button" data-id="{i}">{picture}<span>{name}</span></button>')
    return f'<div class="tiles" role="group" aria-label="Classes to try">{"".join(buttons)}</div>'


def samples(model: Model) -> dict[int, str]:
    """One sample of each class to try, as the page samples by itself: class id -> data URL."""

    def sample(class_id: int) -> str:
        _, images = model.last(class_id, 1, SEED, **model.sampling)
        return png_data_url(images[0])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(model.examples, pool.map(sample, model.examples), strict=True))
