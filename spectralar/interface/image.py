"""Images of any kind -> what the models take: one preprocessing for training, the pipeline and the demo.

Every image is turned upright (EXIF), laid on white where it is transparent, made grey or RGB, centre-cropped to a
square and resized with Lanczos, which filters before it samples: high frequencies must not fold into low ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..checks import odd_kind

# What `to_model_input` takes.
ImageInput = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as PIL has it
ROUNDING = 1e-3  # how far float images may lie outside [0, 1], or the same share of another range
# A picture that does not reach this share of a wider range is not taken to be in it: one value above 1 or 255 would
# make all others black.
LEAST_REACH = 1 / 16


def preprocess_pil(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Any PIL image as uint8 (channels, size, size), channels 1 (grey) or 3 (RGB).

    Grey of more than 8 bits is scaled to 8, not clipped; of several frames the current one is taken.

    Raises:
        ValueError: if the numbers of mode "F" are neither in [0, 1] nor in 0..255, those of "I" neither in 0..255 nor
            in 0..65535, or it cannot be told which; the message names the range found.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bit(image)
    if image.mode in ("La", "LAB"):  # PIL converts these to few others
        image = image.convert("LA" if image.mode == "La" else "RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        # Cropped first, as resize(box=...) would let the filter look over the edge.
        image = image.crop(_centre_square(*image.size)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.array(image)  # (H, W) or (H, W, C), a copy: PIL's own memory is read-only
    return np.ascontiguousarray(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))


def to_model_input(images: ImageInput, size: int, channels: int) -> Tensor:
    """Images of any size and kind -> (B, channels, size, size) float32 in [-1, 1].

    Args:
        images: one of these, or a list of any of them; sizes and kinds may differ:
            a PIL image of any mode, "F" in [0, 1] or 0..255, "I" in 0..255 or 0..65535;
            a numpy array (B, H, W, C), (H, W, C) or (H, W);
            a torch tensor (B, C, H, W) or (C, H, W), which keeps its device.
            C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA). Numbers are uint8 in 0..255, uint16 in 0..65535 or
            floats in [0, 1]. Floats, and they alone, are never rounded to 8 bits on the way.
        size, channels: of the model.

    Raises:
        ValueError: if there is no image, one cannot be decoded, or shape, type or range is none of these.
    """
    if isinstance(images, list | tuple):
        if not images:
            raise ValueError("at least one image is needed.")
        return torch.cat([to_model_input(image, size, channels) for image in images])
    if isinstance(images, Image.Image):
        return _from_uint8(_decoded(images, size, channels)[None])
    if not isinstance(images, np.ndarray | Tensor):
        raise ValueError(
            f"images must be PIL images, numpy arrays, torch tensors or a list of these, got {type(images).__name__}."
        )
    x = _channels_first(images)  # (B, C, H, W)
    if x.dtype == torch.uint8:
        planes = x.cpu().permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        pil = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in planes]
        return _from_uint8(np.stack([_decoded(image, size, channels) for image in pil])).to(x.device)
    if x.dtype == torch.uint16:
        x = x.to(torch.float32) / 65535
    return _preprocess_floats(x, size, channels) * 2 - 1


def _decoded(image: Image.Image, size: int, channels: int) -> np.ndarray:
    if 0 in image.size:
        raise ValueError("an image has no pixels.")
    try:
        return preprocess_pil(image, size, channels)
    except Image.DecompressionBombError as error:
        size = f"{image.width} x {image.height}"
        raise ValueError(f"an image of {size} pixels is too large: make it smaller first.") from error
    except (OSError, SyntaxError) as error:  # PIL decodes when the pixels are first asked for
        raise ValueError(f"an image cannot be decoded: {error}.") from error


def _from_uint8(pixels: np.ndarray) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def _channels_first(images: np.ndarray | Tensor) -> Tensor:
    """Either layout as (B, C, H, W), the same numbers: float, uint8 or uint16."""
    if isinstance(images, np.ma.MaskedArray):
        raise ValueError("images must not be masked arrays: fill what is masked, as with `images.filled(0)`.")
    if isinstance(images, Tensor) and (kind := odd_kind(images)):
        raise ValueError(f"torch images must be ordinary tensors, got a {kind} one.")
    dtype = str(images.dtype).removeprefix("torch.")
    if dtype not in ("uint8", "uint16") and "float" not in dtype:
        raise ValueError(f"pixels must be uint8 in 0..255, uint16 in 0..65535 or floats in [0, 1], got {dtype}.")
    if isinstance(images, Tensor):
        layouts = "torch images must have shape (B, C, H, W) or (C, H, W)"
        x = images.detach()
        x = x.float() if x.is_floating_point() and x.itemsize == 1 else x  # there is no arithmetic in 8 bits
    else:
        layouts = "numpy images must have shape (B, H, W, C), (H, W, C) or (H, W)"
        x = torch.from_numpy(images.astype(np.float32) if "float" in dtype else images.copy())
        x = x.unsqueeze(-1) if x.ndim == 2 else x
        x = x.movedim(-1, -3) if x.ndim >= 3 else x
    x = x.unsqueeze(0) if x.ndim == 3 else x
    if x.ndim != 4 or not 1 <= x.shape[1] <= 4 or 0 in x.shape:
        raise ValueError(f"{layouts} with 1 to 4 channels and no empty axis, got {tuple(images.shape)}.")
    return x


def _preprocess_floats(x: Tensor, size: int, channels: int) -> Tensor:
    """`preprocess_pil` on floats: (B, C, H, W) in [0, 1] -> (B, channels, size, size) float32 in [0, 1]."""
    low, high = float(x.min()), float(x.max())  # both are NaN if any pixel is
    if not (-ROUNDING <= low and high <= 1 + ROUNDING):
        raise ValueError(
            f"float images must lie in [0, 1], these reach from {low:.4g} to {high:.4g}: divide by 255 what lies in "
            "0..255, and take x / 2 + 0.5 of what lies in [-1, 1]."
        )
    x = x.float().clamp(0, 1)
    if x.shape[1] in (2, 4):
        colour, alpha = x[:, :-1], x[:, -1:]
        x = colour * alpha + (1 - alpha)
    if channels == 1 and x.shape[1] == 3:
        x = torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMA)).unsqueeze(1)
    if x.shape[-2:] != (size, size):
        left, top, right, bottom = _centre_square(x.shape[3], x.shape[2])
        planes = x[:, :, top:bottom, left:right].cpu().flatten(0, 1)  # (B C, side, side)
        resized = [
            np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.LANCZOS))
            for plane in planes.contiguous().numpy()
        ]
        x = torch.from_numpy(np.stack(resized)).to(x).unflatten(0, (x.shape[0], x.shape[1])).clamp(0, 1)
    return x.expand(-1, channels, -1, -1)


def _centre_square(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the largest square in the middle."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as "L"; PIL itself would clip instead of scaling. Raises as `preprocess_pil`."""
    pixels = np.asarray(image).astype(np.float64)  # holds 32-bit integers
    white = 65535 if image.mode.startswith("I;") else _white(image.mode, pixels)
    return Image.fromarray((pixels * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _white(mode: str, pixels: np.ndarray) -> int:
    """The number that stands for white in an image of mode "I" or "F": modes that do not say so."""
    low, high = float(pixels.min()), float(pixels.max())  # both are NaN if any pixel is
    narrow, wide = (1, 255) if mode == "F" else (255, 65535)
    rounding = ROUNDING if mode == "F" else 0
    if -rounding * narrow <= low and high <= narrow * (1 + rounding):
        return narrow
    inside = -rounding * wide <= low and high <= wide * (1 + rounding)
    if inside and (high >= LEAST_REACH * wide or (mode == "F" and np.array_equal(pixels, pixels.round()))):
        return wide
    raise ValueError(
        f"a PIL image of mode {mode} must lie in 0..{narrow} or, and then reach {LEAST_REACH * wide:.0f} at least, "
        f"in 0..{wide}; this one reaches from {low:.4g} to {high:.4g}."
    )
