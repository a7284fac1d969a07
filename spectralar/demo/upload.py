"""An image input that answers a bad file with a sentence instead of an exception, before it decodes anything."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..interface.image import to_8_bit
from .cache import postprocess_whole
from .errors import user_error

MAX_FILE_MB = 40
MAX_MEGAPIXELS = 64  # a phone's 48 megapixels and an A4 page at 600 dpi fit
PIL.Image.init()
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP") if name in PIL.Image.OPEN]
FORMAT_NAMES = "JPEG, PNG, WebP, AVIF, GIF, TIFF or BMP"

# Pillow itself refuses above twice this: the second line of defence, for every way an image may come in.
PIL.Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 1_000_000


def open_photo(file: str | Path | bytes) -> Image.Image:
    """An image a visitor sent, as a file or its bytes, decoded; its first frame if there are several.

    Size and format are read from the header and checked before a pixel is decoded. Large JPEGs are decoded at
    reduced size: the models need far less.

    Raises:
        gr.Error: one sentence, if the file is no image, of another format, broken, or too large.
    """
    if not isinstance(file, bytes) and not Path(file).is_file():
        raise user_error("The image did not arrive; please send it again.")
    if (len(file) if isinstance(file, bytes) else Path(file).stat().st_size) > MAX_FILE_MB * 2**20:
        raise user_error(f"The file is larger than {MAX_FILE_MB} MB; please send a smaller image.")
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
    except UnidentifiedImageError:
        raise user_error(f"This file is not an image that can be read: please send {FORMAT_NAMES}.") from None
    except Image.DecompressionBombError:
        raise _too_large("far too many pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError):
        raise _damaged() from None
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise _too_large(f"{width} x {height} pixels")
    try:
        image.draft(None, (1024, 1024))
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError):
        raise _damaged() from None
    image.info["full_size"] = (width, height)
    return image


def _damaged() -> gr.Error:
    return user_error("The image file is damaged or incomplete; please send it again or another one.")


def _too_large(what: str) -> gr.Error:
    return user_error(f"The image has {what}; please send one of at most {MAX_MEGAPIXELS} megapixels.")


class PhotoInput(gr.Image):
    """`gr.Image` for any photo; handlers get the PIL image of `open_photo`, as it is in the file, or None."""

    # Drawn by gr.Image's front end. No __init__ here: Gradio sends the browser what stands in its signature.
    is_template = True
    postprocess = postprocess_whole

    def preprocess(self, payload: Any) -> Image.Image | None:
        if payload is None:
            return None
        if payload.url and payload.url.startswith("data:"):
            try:
                return open_photo(base64.b64decode(payload.url.partition(",")[2], validate=True))
            except binascii.Error:
                raise user_error("The image's data URL cannot be read; please send the image as a file.") from None
        return open_photo(payload.path or "")


def crop_figure(photo: Image.Image, image_size: int, channels: int) -> str:
    """What a model takes of a photo, as HTML: the photo small, with everything outside the crop faded.

    Of a square photo, where nothing is cropped, only a sentence.
    """
    width, height = photo.info.get("full_size", photo.size)
    if photo.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # a quarter turn
        width, height = height, width
    seen = f"seen as {image_size} × {image_size} in {'grey' if channels == 1 else 'colour'}."
    if width == height:
        return f'<figure class="crop"><figcaption>All of {width} × {height} pixels, {seen}</figcaption></figure>'
    small = _preview(ImageOps.exif_transpose(photo))
    side = min(small.size)
    box = (left := (small.width - side) // 2, top := (small.height - side) // 2, left + side, top + side)
    faded = Image.blend(small, Image.new("RGB", small.size, "white"), 0.7)
    faded.paste(small.crop(box), box)
    buffer = io.BytesIO()
    faded.save(buffer, "JPEG", quality=85)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    side = min(width, height)
    text = f"The middle {side} × {side} of {width} × {height} pixels, {seen}"
    return f'<figure class="crop"><img src="{url}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _preview(image: Image.Image) -> Image.Image:
    """Any image in RGB on white, at most 320 pixels a side."""
    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits
        image = to_8_bit(image)
    image = ImageOps.contain(image.convert("RGBA"), (320, 320))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
