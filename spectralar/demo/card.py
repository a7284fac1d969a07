"""The Model tab: what is loaded and where it runs, its schedule, its codes, and what its model card says."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
import torch

from .. import __version__
from ..analysis import plots
from ..analysis.chart import Chart
from ..analysis.statistics import code_use
from ..spectral import dct2, low_pass, square_frequency
from .figures import figure, listen_to_saves, tables
from .folder import beside_the_bound, cutoff_law, model_card, model_folder, model_statistics
from .links import Linked
from .model import Model, to_pixels
from .pictures import log_spectrum
from .scrubber import StripEncoder, scrubber, scrubber_value

TITLE = "Model"
FACTS_CSS = """
dl { display: grid; grid-template-columns: auto 1fr; gap: 6px 20px; margin: 0; font-size: 14px; line-height: 20px; }
dt { color: var(--body-text-color-subdued); }
dd { margin: 0; color: var(--body-text-color); }
"""
FIGURES = {
    "cutoff_schedule": (
        "Cutoff schedule",
        "How far up the spectrum each prefix reaches, beside an even schedule. Below the line more tokens serve the "
        "low frequencies. It says where tokens may draw, not what they do there.",
    ),
    "prefix_psnr": (
        "PSNR and its bound",
        "PSNR of the mean squared error on held-out images. The bound is the best that any code of as many bits can "
        "do on Gaussian images with the variances of the training images; real images are not Gaussian, so a model "
        "may pass it. The model card averages the PSNR of each image, which is a little higher.",
    ),
    "codebook_use": (
        "Codebook use by position",
        "Entries of the codebook that held-out images use at each position, and as how many equally frequent ones "
        "they count (perplexity). The number seen cannot exceed the number of images.",
    ),
    "next_token_entropy": (
        "Next-token entropy by position",
        "How open the next token is to the model on held-out images, given those before it. A low value can mean a "
        "token that is easy to foresee or a model that is too sure of itself.",
    ),
}


# -------------------------------------------------------------------------------------------------- content


def facts(model: Model) -> dict[str, str]:
    """What is loaded, as lines of a table."""
    tokenizer, transformer = model.pipe.tokenizer, model.pipe.transformer
    config = tokenizer.config
    bits = tokenizer.prefix_bits[-1]
    colours = "grey" if model.channels == 1 else "colour"
    device = model.pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return {
        "Model": model.name,
        "Runs on": f"{name}, {str(model.pipe.dtype).removeprefix('torch.')}",
        "Images": f"{model.image_size} × {model.image_size}, {colours}",
        "Spectral tokens": f"{model.num_tokens} of {model.codebook_size} codes, {bits:.0f} bits an image",
        "Cutoffs": cutoff_law(model),
        **({"PSNR / Gaussian bound": bound} if (bound := beside_the_bound(model)) else {}),
        "Tokenizer": f"{_millions(tokenizer)} parameters, patches of {config.patch_size} × {config.patch_size}",
        "Transformer": f"{_millions(transformer)} parameters, {transformer.config.num_layers} layers, "
        f"{transformer.config.num_classes} classes",
        "Code": f"spectralar {__version__}, torch {torch.__version__}",
    }


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.3g}M"


def charts(model: Model) -> dict[str, Chart]:
    """The figures of the model by name; without stored statistics the schedule alone."""
    result = {"cutoff_schedule": plots.cutoff_schedule(model.cutoffs)}
    if statistics := model_statistics(model):
        if statistics.psnr is not None and statistics.gaussian_psnr is not None:
            result["prefix_psnr"] = plots.prefix_psnr(statistics.psnr, statistics.gaussian_psnr)
        use = code_use(statistics.code_counts)
        result["codebook_use"] = plots.codebook_use(use.used, use.perplexity, model.codebook_size)
        result["next_token_entropy"] = plots.next_token_entropy(statistics.next_token_entropy, model.codebook_size)
    return result


def mask_value(model: Model) -> dict[str, Any]:
    """The scrubber's: which coefficients are open to each prefix, and what that leaves of an edge and of a point."""
    size, cutoffs = model.image_size, model.cutoffs
    frequency = square_frequency(size)
    point = torch.full((1, size, size), -1.0, dtype=torch.float32, device="cpu")
    point[:, size // 2, size // 2] = 1.0
    n = torch.arange(size, dtype=torch.float32, device="cpu") - (size - 1) / 2
    disc = 2 * ((n[:, None] ** 2 + n**2).sqrt() < size * 0.3).float()[None] - 1  # (1, H, H)
    peak = float(dct2(disc).abs().max())
    value = scrubber_value(
        [{"title": "Mask", "captions": ["Open coefficients", "A disc", "its spectrum, log scale", "A point"]}],
        cutoffs, size, model.codebook_size, name="mask",
    )  # fmt: skip
    encoder = StripEncoder(model.num_tokens)
    before = 0
    for r in cutoffs:
        mask = 0.08 + 0.92 * (frequency < r).float() - 0.45 * (frequency < before).float()
        soft, blob = low_pass(disc, r), low_pass(point + 1, r)
        tiles = [to_pixels(mask[None]), to_pixels((soft / 2 + 0.5).clamp(0, 1)), log_spectrum(soft, peak)]
        value["frames"].append(encoder.encode([*tiles, to_pixels((blob / blob.max().clamp(min=1e-6)).clamp(0, 1))]))
        before = r
    status = "Bright: what token k opens. Grey: open before it"
    return value | {"status": status, "rest": len(cutoffs) // 2}


# -------------------------------------------------------------------------------------------------- the tab


def build(model: Model) -> Linked:
    """Lays out the tab; nothing of it stands in the page's address."""
    drawn = charts(model)
    card = model_card(model_folder(model))
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=4, min_width=300):
            rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(model).items())
            gr.HTML(f"<dl>{rows}</dl>", css_template=FACTS_CSS, elem_id="facts")
        with gr.Column(scale=7, min_width=320):
            view = scrubber(hint="", elem_id="mask")
            view.value = mask_value(model)
    figures = {}
    names = list(drawn)
    width = 2 if len(names) == 4 else 3  # in a row: none is left over
    for row in (names[start : start + width] for start in range(0, len(names), width)):
        with gr.Row(elem_classes="split"):
            for name in row:
                figures[name] = figure(*FIGURES[name], elem_id=f"figure-{name.replace('_', '-')}", chart=drawn[name])
    if len(drawn) == 1:
        gr.Markdown("This model comes without statistics of its codes: they are written when it is evaluated.",
                    elem_classes="note")  # fmt: skip
    if card is None:
        gr.Markdown("This model comes without a model card.", elem_classes="note")
    else:
        gr.Markdown(card, elem_id="model-card")
    listen_to_saves(figures, lambda _: drawn, None, "model-file")

    def describe() -> dict[str, Any]:
        """What model the page runs, its schedule, and its codes on held-out images.

        Returns:
            {"facts": lines of text, "cutoffs": r_1 .. r_N, "classes": names in the order of the ids, "figures": the
            numbers of each figure as columns by name}.
        """
        return {
            "facts": facts(model),
            "cutoffs": list(model.cutoffs),
            "classes": model.class_names,
            "figures": tables(drawn),
        }

    gr.api(describe, api_name="model", queue=False)
    return Linked([], [])
