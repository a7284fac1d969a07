"""Draws the figures of design.md, with the functions that it describes: python docs/draw.py

Writes to docs/figures, or to a folder that is named.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, nothing needs to be installed

from spectralar.interface.image import to_model_input
from spectralar.spectral import cutoff_schedule, dct2, nested_targets, square_mask
from spectralar.tokenizer import encoder_mask

FIGURES = Path(__file__).parent / "figures"
PHOTO = Path(__file__).parents[1] / "spectralar" / "demo" / "examples" / "cat.jpg"
SIZE, TOKENS, SHOWN = 128, 32, (1, 2, 4, 8, 16, 32)
PATCHES, QUERIES, PREFIX = 4, 5, 3  # of the masks: few enough to count
STYLE = {"font.size": 9, "axes.titlesize": 9, "svg.hashsalt": "design", "svg.fonttype": "none", "figure.dpi": 110}


def targets() -> plt.Figure:
    """x_k for some prefixes of one photograph, and below each the coefficients that its mask keeps."""
    image = to_model_input(Image.open(PHOTO), SIZE, 3)  # (1, 3, H, H)
    cutoffs = cutoff_schedule(SIZE, TOKENS, alpha=1.25)
    frames = nested_targets(image, [cutoffs[k - 1] for k in SHOWN])[0].numpy()  # (S, 3, H, H)
    spectrum = dct2(image)[0].square().mean(0).sqrt().clamp(min=1e-3).log10().numpy()  # (H, H)
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(9, 3.4), layout="constrained")
    for (above, below), k, frame in zip(axes.T, SHOWN, frames, strict=True):
        r = cutoffs[k - 1]
        above.imshow((np.moveaxis(frame, 0, -1).clip(-1, 1) + 1) / 2)
        above.set_title(f"$x_{{{k}}}$, cutoff {r}")
        below.imshow(np.ma.masked_where(~square_mask(SIZE, r).numpy(), spectrum), vmin=-2, vmax=2, cmap="magma",
                     interpolation="nearest")  # fmt: skip
        below.set_facecolor("0.92")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("target")
    axes[1, 0].set_ylabel("its DCT, log")
    return figure


def cutoffs() -> plt.Figure:
    """The law r_k = H (k / N)^alpha for some alpha."""
    figure, axis = plt.subplots(figsize=(4.6, 2.9), layout="constrained")
    k = np.arange(1, TOKENS + 1)
    for alpha in (0.5, 1, 1.25, 2):
        axis.step(k, cutoff_schedule(SIZE, TOKENS, alpha), where="mid", label=f"alpha = {alpha:g}")
    axis.set(xlabel="tokens k", ylabel=f"cutoff $r_k$ of {SIZE}", xlim=(1, TOKENS), ylim=(0, SIZE))
    axis.legend(frameon=False)
    return figure


def decoder_mask(patches: int, tokens: int, prefix: int) -> torch.Tensor:
    """Which inputs of the decoder look at which, for a prefix; as in `SpectralTokenizer._render`."""
    mask = torch.zeros(patches + tokens, patches + tokens, dtype=torch.bool)
    mask[:patches, : patches + prefix] = True
    mask[patches:, patches:] = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return mask


def masks() -> plt.Figure:
    """The two attention masks: rows look at columns."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.7), layout="constrained")
    encoder = encoder_mask(PATCHES, QUERIES, torch.device("cpu"))
    for axis, mask, title, first in (
        (axes[0], encoder, "Encoder", "patch"),
        (axes[1], decoder_mask(PATCHES, QUERIES, PREFIX), f"Decoder, prefix of {PREFIX} tokens", "mask token"),
    ):
        axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.4)
        names = [f"{first} {i + 1}" for i in range(PATCHES)] + [f"token {i + 1}" for i in range(QUERIES)]
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(np.arange(len(names)) + 0.5, minor=True)
        axis.set_yticks(np.arange(len(names)) + 0.5, minor=True)
        axis.grid(which="minor", color="white")
        axis.tick_params(which="both", length=0)
        axis.set_title(f"{title}: rows look at columns")
    return figure


def main(folder: Path = FIGURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        targets().savefig(folder / "targets.webp")
        for draw in (cutoffs, masks):
            draw().savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
    plt.close("all")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
