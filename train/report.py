"""The results of an evaluation as Markdown tables and as figures. Knows no model: results in, files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

STYLE = {
    "figure.facecolor": "white", "figure.dpi": 130, "figure.constrained_layout.use": True, "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "lines.linewidth": 1.6, "lines.markersize": 4,
}  # fmt: skip

# ------------------------------------------------------------------------------------------- Markdown


def markdown(results: dict[str, Any]) -> str:
    """All tables, with the command, versions, seed, numbers of images and the judge's hash that they depend on."""
    r, best = results, results["best_guidance_scale"]
    sections = [
        f"## Evaluation of {r['model']['name']}",
        _how(r),
        f"### Reconstruction and codebook\n\n{_reconstruction(r)}",
        f"### Quality by prefix length\n\n{_prefixes(r)}",
        "![PSNR and SSIM by prefix length](figures/prefix-quality.png)",
        "![Reconstructions](figures/reconstructions.png)",
        f"### Samples\n\n{_samples(r)}",
        f"![Samples at guidance scale {best:g}](figures/samples-{best:g}.png)",
        "![Samples by guidance scale](figures/guidance.png)",
        f"### Generated prefixes, guidance scale {best:g}\n\n{_generated_prefixes(r)}",
        "![Generated prefixes](figures/generated-prefixes.png)",
        "![Samples, prefix by prefix](figures/sample-prefixes.png)",
        f"### By position\n\n{_positions(r)}",
        "![Next-token loss by position](figures/next-token-loss.png)",
        "![Codebook by position](figures/codebook.png)",
    ]
    return "\n\n".join(sections)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table: the first column as text, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _how(r: dict[str, Any]) -> str:
    data, judge, full = r["data"], r["classifier"], r["reconstruction"]
    # Of a folder only the name: where it lies says nothing to others.
    source = Path(data["source"]).name if Path(data["source"]).exists() else data["source"]
    versions = ", ".join(f"{name} {number}" for name, number in r["versions"].items())
    return (
        f"Made by `{r['command']}` ({versions}; {r['device']}; seed {r['seed']}).\n\n"
        f"Held-out images are the split {data['heldout']!r} of {source}, which neither the models nor the "
        "judge were trained on. Fréchet distance (FD), inception score (IS), class accuracy, precision, recall, "
        "density and coverage are taken in a classifier that was trained apart, on the training images alone "
        f"(accuracy {judge['accuracy']:.2%} on held-out images, weights' SHA-256 `{judge['sha256']}`): they compare "
        "with each other, not with numbers from Inception. All images are rounded to 8 bits before it sees them. FD "
        f"is between all {full['images']} held-out images and the set in question; precision and recall (k = 3), "
        f"density and coverage (k = 5) are on {full['manifold_images']} images of each set. PSNR and SSIM are per "
        "image on [0, 1], then averaged. Sampling: temperature 1, no top-k, no top-p; "
        f"image i has class i mod {len(judge['class_names'])} and generator seed {r['seed']} + i."
    )


def _reconstruction(r: dict[str, Any]) -> str:
    full, book, loss = r["reconstruction"], r["codebook"], r["next_token_loss"]
    return table(
        ["Measure", "Value", "Images"],
        [
            ["PSNR", f"{full['psnr']:.2f} dB", full["images"]],
            ["SSIM", f"{full['ssim']:.4f}", full["images"]],
            ["rFD", f"{full['fd']:.3f}", full["images"]],
            ["Class accuracy of reconstructions", f"{full['accuracy']:.2%}", full["images"]],
            ["Class accuracy of the images", f"{r['references']['heldout']['accuracy']:.2%}", full["images"]],
            [f"Codebook perplexity (of {book['codebook_size']})", f"{book['perplexity']:.0f}", book["images"]],
            ["Codebook entries in use", f"{book['usage']:.1%}", book["images"]],
            ["Next-token loss, training images", f"{loss['train']:.3f} nats", loss["train_images"]],
            ["Next-token loss, held-out images", f"{loss['heldout']:.3f} nats", loss["heldout_images"]],
        ],
    )


def _prefixes(r: dict[str, Any]) -> str:
    p = r["prefixes"]
    rows = []
    for judged in p["judged"]:
        i = judged["length"] - 1
        rows.append([
            judged["length"], p["cutoff"][i], f"{p['psnr_image'][i]:.2f}", f"{p['psnr_low_pass'][i]:.2f}",
            f"{p['ssim_image'][i]:.3f}", f"{p['ssim_low_pass'][i]:.3f}", f"{judged['accuracy']:.1%}",
            f"{judged['accuracy_low_pass']:.1%}",
        ])  # fmt: skip
    head = [
        "Tokens k", "Cutoff", "PSNR to image", "PSNR to x_k", "SSIM to image", "SSIM to x_k", "Class accuracy",
        "Class accuracy of x_k",
    ]  # fmt: skip
    return table(head, rows) + (
        f"\n\nOn {p['images']} held-out images. x_k is the ideal low-pass of the image at the prefix's cutoff. The "
        "judge has learnt from sharp images: its accuracy on x_k says how far it can be trusted on blurred ones."
    )


def _samples(r: dict[str, Any]) -> str:
    def row(name: str, m: dict[str, Any]) -> list[str]:
        shares = [f"{m[key]:.3f}" for key in ("precision", "recall", "density", "coverage")]
        return [name, m["images"], f"{m['fd']:.3f}", f"{m['inception_score']:.2f}", f"{m['accuracy']:.2%}", *shares]

    held = r["references"]["heldout"]
    rows = [row(f"Samples, guidance scale {m['guidance_scale']:g}", m) for m in r["samples"]]
    rows.append(row("Reconstructions of held-out images", r["reconstruction"]))
    rows.append(row("Training images (the floor)", r["references"]["train"]))
    score, accuracy = f"{held['inception_score']:.2f}", f"{held['accuracy']:.2%}"
    rows.append(["Held-out images", held["images"], "0", score, accuracy, *["-"] * 4])
    head = ["Set", "Images", "FD", "IS", "Class accuracy", "Precision", "Recall", "Density", "Coverage"]
    return table(head, rows) + (
        "\n\nReal training images, as many as there are samples, are what a perfect model would come to; the judge "
        "has seen them with their labels, so their accuracy is too high to compare with."
    )


def _generated_prefixes(r: dict[str, Any]) -> str:
    best = next(m for m in r["samples"] if m["guidance_scale"] == r["best_guidance_scale"])
    rows = []
    for generated, rebuilt in zip(best["prefixes"], r["prefixes"]["judged"], strict=True):
        accuracies = [f"{x:.1%}" for x in (generated["accuracy"], rebuilt["accuracy_low_pass"])]
        rows.append([generated["length"], f"{generated['fd']:.3f}", f"{rebuilt['fd']:.3f}", *accuracies])
    head = ["Tokens k", "FD, generated", "FD, reconstructed", "Class accuracy, generated", "Class accuracy of x_k"]
    return table(head, rows) + (
        f"\n\nPrefixes of {best['prefixes'][0]['images']} samples, and of the reconstructions, against the x_k of "
        f"{r['prefixes']['images']} held-out images, at the guidance scale with the lowest FD above. FD grows as the "
        "numbers of images fall: the last row is not the FD of the table above."
    )


def _positions(r: dict[str, Any]) -> str:
    loss, book = r["next_token_loss"], r["codebook"]["perplexity_by_position"]
    shown = [m["length"] for m in r["prefixes"]["judged"]]
    train, heldout = loss["train_by_position"], loss["heldout_by_position"]
    rows = [[k, f"{train[k - 1]:.3f}", f"{heldout[k - 1]:.3f}", f"{book[k - 1]:.0f}"] for k in shown]
    return table(["Position", "Loss, training (nats)", "Loss, held out (nats)", "Codebook perplexity"], rows) + (
        "\n\nA loss far lower on training images than on held-out ones is memorising."
    )


# ------------------------------------------------------------------------------------------- figures


def draw_figures(results: dict[str, Any], folder: Path) -> None:
    """All curves as PNG files."""
    with plt.rc_context(STYLE):
        _draw_prefix_quality(results["prefixes"], folder / "prefix-quality.png")
        _draw_codebook(results["codebook"], folder / "codebook.png")
        _draw_loss(results["next_token_loss"], folder / "next-token-loss.png")
        _draw_guidance(results, folder / "guidance.png")
        _draw_generated_prefixes(results, folder / "generated-prefixes.png")


def draw_grid(images: Tensor, rows: list[str], columns: list[str], path: Path) -> None:
    """Images (R, S, C, H, H) in [-1, 1] as a table of R rows and S columns with their names, every pixel a square."""
    scale = max(1, round(64 / images.shape[-1]))  # small images are enlarged
    pixels = (images.clamp(-1, 1) / 2 + 0.5).movedim(2, -1).expand(*images.shape[:2], -1, -1, 3).numpy()
    pixels = pixels.repeat(scale, axis=2).repeat(scale, axis=3)  # (R, S, h, h, 3)
    side, gap = pixels.shape[2], 4
    canvas = np.ones((len(rows) * (side + gap), len(columns) * (side + gap), 3), np.float32)
    for i, row in enumerate(pixels):
        for j, image in enumerate(row):
            top, left = i * (side + gap), j * (side + gap)
            canvas[top : top + side, left : left + side] = image
    dpi, names, header = 100, 100, 24  # pixels left and above
    width, height = canvas.shape[1] + names, canvas.shape[0] + header
    with plt.rc_context({"font.size": 8}):
        figure = plt.figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
        # One pixel of the canvas is one of the file.
        figure.figimage(canvas, xo=names, yo=0)
        for i, name in enumerate(rows):
            y = 1 - (header + i * (side + gap) + side / 2) / height
            figure.text((names - 6) / width, y, name[:18], ha="right", va="center")
        for j, name in enumerate(columns):
            x = (names + j * (side + gap) + side / 2) / width
            figure.text(x, 1 - header / 2 / height, name, ha="center", va="center")
        figure.savefig(path, dpi=dpi)
        plt.close(figure)


def _draw_prefix_quality(p: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    for axis, name, unit in ((axes[0], "psnr", "PSNR (dB)"), (axes[1], "ssim", "SSIM")):
        axis.plot(p["length"], p[f"{name}_low_pass"], label="against the low-pass $x_k$")
        axis.plot(p["length"], p[f"{name}_image"], label="against the image")
        axis.set(xlabel="prefix length k (tokens)", ylabel=unit)
        axis.legend()
    _save(figure, path, f"{p['images']} held-out images")


def _draw_codebook(book: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5, 3))
    values = book["perplexity_by_position"]
    axis.bar(range(1, len(values) + 1), values, width=0.8, label="at one position")
    axis.axhline(book["perplexity"], color="C1", label="all positions")
    axis.axhline(book["codebook_size"], color="0.4", linestyle="--", label="codebook size")
    axis.set(xlabel="position", ylabel=f"codebook perplexity, {book['images']} images", yscale="log")
    figure.legend(loc="outside upper center", ncols=3, fontsize=7)
    _save(figure, path)


def _draw_loss(loss: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5, 3))
    for name, text in (("train", "training images"), ("heldout", "held-out images")):
        values = loss[f"{name}_by_position"]
        axis.plot(range(1, len(values) + 1), values, marker="o", label=f"{text}, mean {loss[name]:.3f}")
    axis.set(xlabel="position", ylabel="next-token loss (nats)")
    figure.legend(loc="outside upper center", ncols=2, fontsize=7)
    _save(figure, path)


def _draw_guidance(r: dict[str, Any], path: Path) -> None:
    samples = sorted(r["samples"], key=lambda m: m["guidance_scale"])
    scales = [m["guidance_scale"] for m in samples]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3))
    axes[0].plot(scales, [m["fd"] for m in samples], marker="o", label="samples")
    _level(axes[0], r["reconstruction"]["fd"], "reconstructions", "C2")
    _level(axes[0], r["references"]["train"]["fd"], "training images", "0.4")
    axes[0].set(ylabel="Fréchet distance", ylim=(0, None))
    for name, color in (("precision", "C0"), ("recall", "C1"), ("coverage", "C2")):
        axes[1].plot(scales, [m[name] for m in samples], marker="o", label=name, color=color)
    axes[1].set(ylabel="share", ylim=(0, 1.02))
    axes[2].plot(scales, [m["accuracy"] for m in samples], marker="o", label="samples")
    _level(axes[2], r["references"]["heldout"]["accuracy"], "held-out images", "0.4")
    axes[2].set(ylabel="class accuracy")
    for axis in axes:
        axis.set(xlabel="guidance scale")
        axis.legend(fontsize=7)
    _save(figure, path)


def _draw_generated_prefixes(r: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    judged = r["prefixes"]["judged"]
    lengths = [m["length"] for m in judged]
    for m in r["samples"]:
        label = f"guidance scale {m['guidance_scale']:g}"
        axes[0].plot(lengths, [p["fd"] for p in m["prefixes"]], marker="o", label=label)
        axes[1].plot(lengths, [p["accuracy"] for p in m["prefixes"]], marker="o", label=label)
    axes[0].plot(lengths, [p["fd"] for p in judged], color="0.4", linestyle="--", label="reconstructions")
    axes[1].plot(lengths, [p["accuracy_low_pass"] for p in judged], color="0.4", linestyle="--", label="real $x_k$")
    axes[0].set(ylabel="Fréchet distance to real $x_k$", yscale="log")
    axes[1].set(ylabel="class accuracy")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(k) for k in lengths])
        axis.minorticks_off()
        axis.set(xlabel="prefix length k (tokens)")
        axis.legend(fontsize=7)
    _save(figure, path)


def _level(axis: Axes, value: float, label: str, color: str) -> None:
    axis.axhline(value, color=color, linestyle="--", label=label)


def _save(figure: plt.Figure, path: Path, title: str = "") -> None:
    for axis in figure.axes:
        if axis.get_xscale() == "linear" and "position" in axis.get_xlabel():
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title:
        figure.suptitle(title, fontsize=8, color="0.4")
    figure.savefig(path)
    plt.close(figure)
