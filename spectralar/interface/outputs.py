"""What the pipeline gives: images in the form that is asked for, and their codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from diffusers.utils import BaseOutput, numpy_to_pil
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Images = list[Image.Image] | np.ndarray | Tensor


@dataclass
class SpectralARPipelineOutput(BaseOutput):
    """What a call of the pipeline returns.

    Args:
        images: a list of B PIL images, an array (B, H, H, C) or a tensor (B, C, H, H) in [0, 1], or the codes.
        codes: (B, n) int64.
    """

    images: Images
    codes: Tensor


@dataclass
class SpectralARStep:
    """One event of `SpectralARPipeline.stream`: the images of the prefix so far."""

    index: int  # number of tokens so far
    images: Images
    codes: Tensor  # (B, index) int64


def to_output(x: Tensor, output_type: str) -> Images | list[list[Image.Image]]:
    """Images (..., C, H, H) in [-1, 1] as the caller wants them: "pt", "np" or "pil"."""
    return as_output((x / 2 + 0.5).clamp(0, 1), output_type)


def as_output(x: Tensor, output_type: str) -> Images | list[list[Image.Image]]:
    """The same of images in [0, 1]."""
    if output_type == "pt":
        return x
    array = x.movedim(-3, -1).float().cpu().numpy()  # (..., H, H, C)
    if not np.isfinite(array).all():  # as 8-bit numbers they would be black
        raise ValueError("the images are not finite: the tokenizer's weights hold NaN or infinity, or overflow.")
    if output_type == "np":
        return array
    return numpy_to_pil(array) if array.ndim == 4 else [numpy_to_pil(frames) for frames in array]
