"""Files to take away: sheets, animations, codes, and the code that makes the same picture again."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import asdict

import numpy as np
from PIL import Image

from .. import __version__
from .cache import png_bytes, write_whole
from .runs import Run

EXPORTS = {"png": "PNG sheet", "webp": "Animated WebP", "gif": "GIF", "json": "Codes (JSON)", "py": "Python code"}
POSTED_SIDE = 256  # small pictures are enlarged to at least this, in whole steps
ANIMATION_SECONDS = 4.0
LAST_FRAME_SECONDS = 1.5


def sheet(images: np.ndarray) -> Image.Image:
    """Images (B, H, H[, 3]) uint8 side by side in a near-square grid, without gaps; empty places are white."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1:3]
    out = np.full((rows * height, columns * width, *images.shape[3:]), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = height * (i // columns), width * (i % columns)
        out[y : y + height, x : x + width] = image
    return Image.fromarray(out)


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture in whole steps, at least `POSTED_SIDE` pixels wide or high."""
    factor = max(1, math.ceil(POSTED_SIDE / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def animation(frames: np.ndarray, file_format: str) -> bytes:
    """An endless animation, coarse to fine, of frames (k, B, H, H[, 3]) uint8; the last one stays longest."""
    pictures = [enlarged(sheet(images)) for images in frames]
    duration = [round(1000 * ANIMATION_SECONDS / len(pictures))] * len(pictures)
    duration[-1] = round(1000 * LAST_FRAME_SECONDS)
    options = {"lossless": True, "quality": 0, "method": 0} if file_format == "WEBP" else {"optimize": False}
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, file_format, save_all=True, append_images=pictures[1:], duration=duration, loop=0, **options
    )
    return buffer.getvalue()


def png_data_url(image: np.ndarray) -> str:
    """An image (H, H[, 3]) uint8 as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(Image.fromarray(image))).decode("ascii")


def record(run: Run) -> str:
    """Codes, settings and model as JSON."""
    model = run.model
    return json.dumps(
        {
            "model": model.name,
            "spectralar_version": __version__,
            "settings": asdict(run.settings),
            "tokenizer": {
                "image_size": model.image_size,
                "in_channels": model.channels,
                "num_tokens": model.num_tokens,
                "codebook_size": model.codebook_size,
                "cutoffs": list(model.cutoffs),
            },
            "codes": run.codes,
        },
        indent=1,
    )


def snippet(run: Run) -> str:
    """A Python program that writes the images of the run as PNG files, image-1.png and so on."""
    s, model = run.settings, run.model
    class_id = model.label(s.class_label)
    arguments = {
        "num_images_per_prompt": s.count,
        "guidance_scale": s.guidance_scale,
        "guidance_schedule": s.guidance_schedule,
        "num_tokens": run.num_frames,
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
    }
    if s.prefix_codes:
        arguments["prefix_codes"] = [s.prefix_codes]
    lines = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
    return (
        "import torch\n\n"
        "from spectralar import SpectralARPipeline\n\n"
        f"pipe = SpectralARPipeline.from_pretrained({model.source!r})\n"
        "steps = pipe.stream(\n"
        f"    {class_id},  # {model.class_names[class_id]}\n"
        f"{lines}"
        f"    generator=torch.Generator().manual_seed({s.seed}),\n"
        ")\n"
        "for step in steps:  # the images sharpen from token to token\n"
        "    pass\n"
        "for i, image in enumerate(step.images, start=1):\n"
        '    image.save(f"image-{i}.png")\n'
    )


def export_bytes(run: Run, name: str) -> bytes:
    """The file of one of `EXPORTS`."""
    if name == "png":
        return png_bytes(sheet(run.model.decode(run.codes, [run.num_frames])[:, 0]))
    if name in ("webp", "gif"):
        return animation(run.frames(), name.upper())
    return (record(run) if name == "json" else snippet(run)).encode("utf-8")


def export_file(run: Run, name: str, cache_folder: str) -> str:
    """Writes one of `EXPORTS` into the folder that Gradio serves and clears; returns the path."""
    return write_whole(export_bytes(run, name), f"{run.name}.{name}", cache_folder)
