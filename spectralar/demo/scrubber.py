"""The frame scrubber: all prefix frames of some images under one slider, drawn entirely in the browser.

Every tab shows its pictures through this component. The server sends one strip of tiles for each prefix length, once;
after that the slider, the keys, play and touch ask the server for nothing. While a model samples, strips are appended
to a list, so that only the new ones travel (Gradio sends differences of a value).
"""

from __future__ import annotations

import base64
import io
import json
import math
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

_FOLDER = Path(__file__).parent
TEMPLATE = (_FOLDER / "scrubber.html").read_text(encoding="utf-8")
SCRIPT = "\n".join((_FOLDER / name).read_text(encoding="utf-8") for name in ("charts.js", "scrubber.js"))
CSS = (_FOLDER / "scrubber.css").read_text(encoding="utf-8")

# A message with all strips must stay below 8 MB; base64 takes 4/3, the rest of the value little.
MAX_TOTAL_BYTES = 5_500_000
MAX_WIDTH = 16_383  # of WebP


class StripEncoder:
    """Encodes strips within a byte budget: lossless WebP, or PNG if grey, where it fits, then lossy, then smaller.

    Every strip may take an even share of what is left, so that the coarse ones, which are small, leave more to the
    others. A step down holds for all later strips: a picture does not change in quality back and forth.

    Args:
        num_strips: strips that will be sent in one value, N.
        max_total_bytes: for all of them together.
    """

    def __init__(self, num_strips: int, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        self.num_left, self.bytes_left = num_strips, max_total_bytes
        self.lossless = True
        self.reduction = 1  # a power of two

    def encode(self, tiles: Sequence[np.ndarray] | np.ndarray) -> str:
        """Tiles, each (H, H) or (H, H, 3) uint8 -> a data URL of one strip, tiles from left to right."""
        strip = _strip(tiles)
        budget = self.bytes_left // max(1, self.num_left)
        while strip.width // self.reduction > MAX_WIDTH:
            self.reduction *= 2
        while True:
            data = self._compress(strip)
            if len(data) <= budget or len(tiles[0]) // self.reduction <= 8:
                self.num_left, self.bytes_left = self.num_left - 1, self.bytes_left - len(data)
                kind = "png" if data.startswith(b"\x89PNG") else "webp"
                return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")
            if self.lossless:
                self.lossless = False
            else:
                self.reduction *= 2

    def _compress(self, strip: Image.Image) -> bytes:
        if self.reduction > 1:
            strip = strip.reduce(self.reduction)
        buffer = io.BytesIO()
        if not self.lossless:
            strip.save(buffer, "WEBP", quality=85, method=2)
        elif strip.mode == "L":  # WebP knows no grey: four times as slow, and larger
            strip.save(buffer, "PNG", compress_level=1)
        else:
            strip.save(buffer, "WEBP", lossless=True, quality=0, method=0)
        return buffer.getvalue()


def _strip(tiles: Sequence[np.ndarray] | np.ndarray) -> Image.Image:
    if any(tile.ndim == 3 for tile in tiles):
        tiles = [tile if tile.ndim == 3 else np.repeat(tile[..., None], 3, axis=2) for tile in tiles]
    return Image.fromarray(np.ascontiguousarray(np.concatenate(tiles, axis=1)))


def scrubber_value(
    groups: Sequence[dict[str, Any]],
    cutoffs: Sequence[int],
    image_size: int,
    codebook_size: int,
    *,
    num_tokens: int | None = None,
    keep_place: bool = False,
    selectable: bool = False,
    name: str = "image",
) -> dict[str, Any]:
    """A value of the scrubber without frames yet; append to its lists as they come.

    Args:
        groups: what one strip holds, from left to right: {"title": str, "captions": [str, ...]} for each row of
            pictures; with "of_token": True the row follows the token under the pointer, else the prefix length.
        cutoffs: the schedule r_1 .. r_N.
        image_size: H.
        codebook_size: K, for the bits.
        num_tokens: the slider's end (default N).
        keep_place: stay at the prefix length shown before; else go to the newest frame.
        selectable: pictures of the first group can be chosen; codes and actions belong to the chosen one.
        name: stem of saved files.

    Returns:
        A dict to send. Its lists grow by one entry a prefix length: "frames" (data URLs from `StripEncoder`),
        "codes" (one list of codes, an entry a selectable image) and, if rows of a token have scales of their own,
        "gains". "charts" holds {"title", "unit", "digits", "low",
        "high", "missing", "series": [{"name", "values"}]}, where "missing" is said of a value None; "status" is one
        line of text, "busy" whether more frames will come, "play" whether to play once when all are there, "rest" the
        prefix length to show when all are there and nobody has moved the slider (0: the last).
    """
    num_tokens = len(cutoffs) if num_tokens is None else num_tokens
    bits = math.log2(codebook_size)
    return {
        "id": uuid.uuid4().hex,
        "name": name,
        "keep_place": keep_place,
        "selectable": selectable,
        "groups": list(groups),
        "cutoffs": [int(r) for r in cutoffs[:num_tokens]],
        "image_size": image_size,
        "bits": [round((k + 1) * bits, 1) for k in range(num_tokens)],
        "frames": [],
        "codes": [],
        "gains": [],
        "charts": [],
        "status": "",
        "busy": False,
        "play": False,
        "rest": 0,
    }


# Which buttons can be pressed, by what is shown.
_ENABLED = """(value) => {
  const busy = Boolean(value?.busy), whole = !busy && value?.frames.length > 0;
  const now = { idle: !busy, busy, some: Boolean(value), whole };
  return %s.map((when) => ({ __type__: 'update', interactive: now[when] }));
}"""


def enable_buttons(view: gr.HTML, **buttons: Sequence[gr.Button]) -> None:
    """Lets buttons follow what a scrubber shows, in the browser: sent from here they cost more than the frames.

    Args:
        view: the scrubber.
        buttons: those that can be pressed while it is "idle" or "busy", once there is "some"thing in it, and once that
            is "whole".
    """
    pairs = [(when, button) for when, several in buttons.items() for button in several]
    view.change(None, view, [button for _, button in pairs], js=_ENABLED % json.dumps([when for when, _ in pairs]))


def scrubber(*, hint: str, elem_id: str, actions: Sequence[dict[str, Any]] = ()) -> gr.HTML:
    """The component, for values of `scrubber_value`. (A function: Gradio writes a stub file for every subclass.)

    The custom event `action` fires when one of `actions` is clicked; its `gr.EventData` has `name`, `image` (index of
    the chosen picture) and `k` (prefix length shown). The event `token` fires on a click on a token chip, with `k`.

    Args:
        hint: the sentence shown before there is anything to see.
        elem_id: id in the page.
        actions: {"name": ..., "label": ...} buttons; "{image}" and "{k}" in a label stand for the current numbers.
            The name "save" saves the chosen picture as it is shown, without asking the server. With "partial": True
            an action needs tokens after the k-th: at the slider's end its k is half of them.
    """
    # A prop must not be named as a string in the script: Gradio would take it for a custom event.
    return gr.HTML(
        html_template=TEMPLATE,
        js_on_load=SCRIPT,
        apply_default_css=False,
        elem_id=elem_id,
        hint=hint,
        actions=list(actions),
    )
