"""Files in the folder that Gradio serves and clears, each put there whole.

Equal results have one name, that of their content. Gradio writes such a file again in place, so that whoever downloads
it at that moment gets a part of it. Here a new file takes the place of the old one, which its readers keep.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import hash_bytes
from PIL import Image


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_whole(data: bytes, name: str, cache_folder: str) -> str:
    """Writes a file into a component's cache folder; returns its path, which is the same for the same bytes."""
    folder = Path(cache_folder) / hash_bytes(data)  # with a secret of the process: nobody can guess the name
    folder.mkdir(parents=True, exist_ok=True)
    handle, new = tempfile.mkstemp(dir=folder, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(new, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    return str(folder.resolve() / name)


def postprocess_whole(self: gr.Image, value: Image.Image | None) -> Any:
    """In place of `gr.Image.postprocess`: PIL images are PNG files that are written whole."""
    if value is not None:
        value = write_whole(png_bytes(value), "image.png", self.GRADIO_CACHE)
    return gr.Image.postprocess(self, value)


class PictureOutput(gr.Image):
    """`gr.Image` for results."""

    # Drawn by gr.Image's front end, which knows only its direct subclasses. No __init__ here: Gradio sends the browser
    # what stands in its signature.
    is_template = True
    postprocess = postprocess_whole
