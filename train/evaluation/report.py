"""The results of an evaluation as Markdown tables. Knows no model: results in, text out."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .metrics import INTERVAL
from .pictures import ROWS

TOP5_FROM = 20  # classes; among fewer, five guesses say little
FORMATS = {  # of a measure: its column's head, digits, and whether it is a share in per cent
    "fd": ("FD", 3, False), "sfd": ("sFD", 3, False), "inception_score": ("IS", 2, False),
    "accuracy": ("Class accuracy", 2, True), "accuracy_top5": ("Top-5 accuracy", 2, True),
    "precision": ("Precision", 3, False), "recall": ("Recall", 3, False), "density": ("Density", 3, False),
    "coverage": ("Coverage", 3, False),
}  # fmt: skip


def _by_judge(r: dict[str, Any], table: Callable[[dict[str, Any], str], str], title: str, figure: str) -> list[str]:
    """A table and a figure for each judge, under its name where there are several."""
    sections = []
    for i, judge in enumerate(r["judges"]):
        named = f"**Judge: {judge}**\n\n" if len(r["judges"]) > 1 else ""
        sections += [f"{named}{table(r, judge)}", f"![{title}](figures/{figure}{f'-{judge}' if i else ''}.png)"]
    return sections


def markdown(results: dict[str, Any]) -> str:
    """All tables, with the command, versions, seed, numbers of images and the judges' hashes that they depend on."""
    r, best = results, results["best_guidance_scale"]
    sections = [
        f"## Evaluation of {plain(r['model']['name'])}",
        _how(r),
        f"### Reconstruction and codebook\n\n{_reconstruction(r)}",
        f"### Quality by prefix length\n\n{_prefixes(r)}",
        "![PSNR and SSIM by prefix length](figures/prefix-quality.png)",
        "![Reconstructions](figures/reconstructions.png)",
        *(_other_source(name, m) for name, m in r["other_sources"].items()),
        "### Samples",
    ]
    sections += _by_judge(r, _samples, "Samples by guidance scale", "guidance")
    sections += [
        f"![Samples at guidance scale {best:g}](figures/samples-{best:g}.png)",
        *(["![A sample of every class](figures/classes.png)"] if r["model"]["num_classes"] > ROWS else []),
        f"### Generated prefixes, guidance scale {best:g}",
    ]
    sections += _by_judge(r, _generated_prefixes, "Generated prefixes", "generated-prefixes")
    sections += [
        "![Samples, prefix by prefix](figures/sample-prefixes.png)",
        f"### Nearest training images, guidance scale {best:g}\n\n{_neighbours(r)}",
        "![Distance to the nearest training image, by share of the images](figures/neighbour-distances.png)",
        "The first sample of each class, and its nearest training images:",
        "![Samples and their nearest training images](figures/neighbours.png)",
        "The samples that lie closest of all to a training image, first in pixels, then to the judge:",
        "![The samples closest to training images](figures/closest.png)",
        f"### By position\n\n{_positions(r)}",
        "![Next-token loss by position](figures/next-token-loss.png)",
        "![Codebook by position](figures/codebook.png)",
    ]
    return "\n\n".join(sections)


def plain(text: str) -> str:
    """Text that somebody chose, as Markdown and HTML that show it as it is."""
    text = re.sub(r"([\\`*_\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    return re.sub(r"[|$~]", lambda match: f"&#{ord(match[0])};", text)


def code(text: str) -> str:
    """The same as code, which may hold backticks."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table: the first column as text, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shown(value: float | None, digits: int, percent: bool = False, error: float | None = None) -> str:
    """A figure, with half the width of its 95 % interval where its standard error is known; "-" for None."""
    if value is None:
        return "-"
    factor, sign = (100, " %") if percent else (1, "")
    text = f"{factor * value:.{digits}f}"
    return text + ("" if error is None else f" ± {factor * INTERVAL * error:.{digits}f}") + sign


def source_name(source: str) -> str:
    """Of a folder only the name: where it lies says nothing to others."""
    return Path(source).name if Path(source).exists() else source


def _how(r: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in r["versions"].items())
    full = r["reconstruction"]
    manifold = next(iter(full["judged"].values()))["manifold_images"]
    judges = "\n".join(f"- {_judge(name, card)}" for name, card in r["judges"].items())
    perceptual = ""
    if r["perceptual"]:
        trained = ", which the tokenizer was trained on" if r["perceptual"]["trained_on_it"] else ""
        network = f"`{r['perceptual']['network']}`{trained}"
        perceptual = f" Perceptual distances are in features of {network}; lower is better."
    classes = {
        "heldout": "classes in the proportions of the held-out images", "even": "every class equally often",
    }[r["data"]["sampled_classes"]]  # fmt: skip
    several = f"; {r['processes']} processes" if r["processes"] > 1 else ""
    return (
        f"Made by {code(r['command'])} ({versions}; {r['device']}{several}; seed {r['seed']}).\n\n"
        f"Held-out images are the split {plain(repr(r['data']['heldout']))} of "
        f"{plain(source_name(r['data']['source']))}, which neither the models nor the judges were trained on. "
        "Fréchet distance (FD), the same of a map's positions (sFD), "
        "inception score (IS), class accuracy, precision, recall, density and coverage are taken in the features of a "
        f"fixed network:\n\n{judges}\n\n"
        "Figures of one judge compare with each other, and only those of Inception-V3 with published ones. All images "
        f"are rounded to 8 bits before a judge sees them. FD is between all {full['images']} held-out images and the "
        f"set in question; precision and recall (k = 3), density and coverage (k = 5) are on {manifold} images of "
        "each set. PSNR and SSIM are per image on [0, 1], then averaged. Intervals (±) are 95 % over draws of images, "
        f"by the infinitesimal jackknife.{perceptual} Sampling: temperature {r['temperature']:g}, no top-k, no "
        f"top-p; {classes}; image i has the generator seed {r['seed']} + i."
    )


def _judge(name: str, card: dict[str, Any]) -> str:
    known = ""
    if name == "classifier":
        known = f", accuracy {shown(card['accuracy'], 2, True)} on held-out images"
    elif card["known_classes"]:
        known = f", accuracy among the {card['known_classes']} classes of the data"
    return f"`{name}`: {card['title']}{known}; weights' SHA-256 `{card['sha256']}`"


def _reconstruction(r: dict[str, Any]) -> str:
    full, book, loss = r["reconstruction"], r["codebook"], r["next_token_loss"]
    n, errors = full["images"], full["errors"]
    rows = [
        ["PSNR", shown(full["psnr"], 2, error=errors["psnr"]) + " dB", n],
        ["SSIM", shown(full["ssim"], 4, error=errors["ssim"]), n],
    ]
    for judge, m in full["judged"].items():
        named = f", {judge}" if len(full["judged"]) > 1 else ""
        rows.append([f"rFD{named}", shown(m["fd"], 3, error=m["errors"]["fd"]), n])
        if m["sfd"] is not None:
            rows.append([f"rsFD{named}", shown(m["sfd"], 3, error=m["errors"]["sfd"]), n])
        if m["accuracy"] is not None:
            held = r["references"]["heldout"][judge]
            of = f"Class accuracy of reconstructions{named}"
            rows.append([of, shown(m["accuracy"], 2, True, m["errors"]["accuracy"]), n])
            rows.append([f"Class accuracy of the images{named}", shown(held["accuracy"], 2, True), n])
    rows += [
        [f"Codebook perplexity (of {book['codebook_size']})", f"{book['perplexity']:.0f}", book["images"]],
        ["Codebook entries in use", shown(book["usage"], 1, True), book["images"]],
        ["Next-token loss, training images", f"{loss['train']:.3f} nats", loss["train_images"]],
        ["Next-token loss, held-out images", f"{loss['heldout']:.3f} nats", loss["heldout_images"]],
    ]
    return table(["Measure", "Value", "Images"], rows)


def _prefixes(r: dict[str, Any]) -> str:
    p = r["prefixes"]
    head = ["Tokens k", "Cutoff", "PSNR of the mean error", "Gaussian bound"]
    head += ["PSNR to image", "PSNR to x_k", "SSIM to image", "SSIM to x_k"]
    columns = [(p["psnr_mean_error"], 2), (p["gaussian_bound"], 2)]
    columns += [(p[f"{name}_{to}"], d) for name, d in (("psnr", 2), ("ssim", 3)) for to in ("image", "low_pass")]
    rows = [[k, p["cutoff"][k - 1], *(shown(values[k - 1], d) for values, d in columns)] for k in p["shown"]]
    perceptual = r["perceptual"]
    if perceptual:
        head += ["Perceptual to image", "Perceptual to x_k"]
        for i, row in enumerate(rows):
            row += [shown(perceptual[to][i], 4, error=perceptual[f"{to}_errors"][i]) for to in ("image", "low_pass")]
    for judge, judged in p["judged"].items():
        if judged[0]["accuracy"] is None:
            continue
        named = f", {judge}" if len(p["judged"]) > 1 else ""
        head += [f"Class accuracy{named}", f"Class accuracy of x_k{named}"]
        for row, m in zip(rows, judged, strict=True):
            row += [shown(m[name], 1, True) for name in ("accuracy", "accuracy_low_pass")]
    few = f", perceptual distances on {perceptual['images']} of them" if perceptual else ""
    return table(head, rows) + (
        f"\n\nOn {p['images']} held-out images{few}. x_k is the ideal low-pass of the image at the prefix's cutoff. "
        "The Gaussian bound is the PSNR of the mean squared error that no code of as many bits can pass on Gaussian "
        "images with the variances of the training images (reverse water-filling); real ones are not Gaussian. "
        "Judges have learnt from sharp images: their accuracy on x_k says how far they can be trusted on blurred ones."
    )


def _other_source(name: str, m: dict[str, Any]) -> str:
    """What the tokenizer makes of held-out images of another source that it learnt from."""
    full, book, p = m["reconstruction"], m["codebook"], m["prefixes"]
    columns = {
        "PSNR to image": ("psnr_image", 2), "PSNR to x_k": ("psnr_low_pass", 2),
        "SSIM to image": ("ssim_image", 3), "SSIM to x_k": ("ssim_low_pass", 3),
    }  # fmt: skip
    rows = [[k, *(shown(p[key][k - 1], digits) for key, digits in columns.values())] for k in p["shown"]]
    few = f"; by prefix length, {p['images']} of them" if p["images"] < full["images"] else ""
    return (
        f"### Also learnt by the tokenizer: {name}\n\nOn {full['images']} held-out images of the split "
        f"{m['heldout']!r} of {source_name(m['source'])}{few}: PSNR "
        f"{shown(full['psnr'], 2, error=full['errors']['psnr'])} dB, SSIM "
        f"{shown(full['ssim'], 4, error=full['errors']['ssim'])}, codebook perplexity {book['perplexity']:.0f} of "
        f"{book['codebook_size']}, {shown(book['usage'], 1, True)} of the entries in use.\n\n"
        + table(["Tokens k", *columns], rows)
    )


def _samples(r: dict[str, Any], judge: str) -> str:
    train, held = r["references"]["train"][judge], r["references"]["heldout"][judge]
    few = r["model"]["num_classes"] <= TOP5_FROM
    columns = [name for name in FORMATS if train[name] is not None and not (name == "accuracy_top5" and few)]

    def row(name: str, m: dict[str, Any]) -> list[Any]:
        cells = [shown(m[column], *FORMATS[column][1:], m["errors"][column]) for column in columns]
        return [name, m["images"], *cells]

    rows = [row(f"Samples, guidance scale {m['guidance_scale']:g}", m["judged"][judge]) for m in r["samples"]]
    rows.append(row("Reconstructions of held-out images", r["reconstruction"]["judged"][judge]))
    rows.append(row("Training images (the floor)", train))
    held = {"fd": 0.0, "sfd": 0.0, **held}
    cells = [shown(held.get(column), *FORMATS[column][1:]) for column in columns]
    rows.append(["Held-out images", held["images"], *cells])
    note = "\n\nReal training images of the samples' classes are what a perfect model would come to."
    if judge == "classifier":
        note += " This judge has seen them with their labels, so their accuracy is too high to compare with."
    if held["accuracy"]:
        best = next(m for m in r["samples"] if m["guidance_scale"] == r["best_guidance_scale"])["judged"][judge]
        rebuilt = r["reconstruction"]["judged"][judge]
        ratios = [(best, "samples at the best guidance scale"), (rebuilt, "reconstructions")]
        texts = [f"{text} have {shown(m['accuracy'] / held['accuracy'], 1, True)}" for m, text in ratios]
        note += f" Of the class accuracy of held-out images, {' and '.join(texts)}."
    return table(["Set", "Images", *(FORMATS[column][0] for column in columns)], rows) + note


def _generated_prefixes(r: dict[str, Any], judge: str) -> str:
    best = next(m for m in r["samples"] if m["guidance_scale"] == r["best_guidance_scale"])["prefixes"][judge]
    head, rows = ["Tokens k", "FD, generated", "FD, reconstructed"], []
    accurate = best[0]["accuracy"] is not None
    if accurate:
        head += ["Class accuracy, generated", "Class accuracy of x_k"]
    for generated, rebuilt in zip(best, r["prefixes"]["judged"][judge], strict=True):
        accuracies = [shown(x, 1, True) for x in (generated["accuracy"], rebuilt["accuracy_low_pass"])]
        cells = [f"{generated['fd']:.3f}", f"{rebuilt['fd']:.3f}", *(accuracies if accurate else [])]
        rows.append([generated["length"], *cells])
    return table(head, rows) + (
        f"\n\nPrefixes of {best[0]['images']} samples, and of the reconstructions, against the x_k of "
        f"{r['prefixes']['images']} held-out images, at the guidance scale with the lowest FD"
        f"{' of the first judge' if len(r['judges']) > 1 else ''} above. FD grows as the numbers of images fall: the "
        "last row is not the FD of the table above."
    )


def _neighbours(r: dict[str, Any]) -> str:
    found, rows = r["neighbours"], []
    names = {"samples": "samples", "reconstructions": "reconstructions", "heldout": "held-out images"}
    for space, sets in found["spaces"].items():
        digits = 4 if space == "pixels" else 3
        for name, text in names.items():
            quantiles = [f"{sets[name][q]:.{digits}f}" for q in (1, 5, 50)]
            closer = shown(sets["closer"][name], 1, True) if name in sets["closer"] else "-"
            rows.append([f"{space}: {text}", *quantiles, closer])
    head = ["Distance to the nearest", "1 % of images", "5 %", "Median", "Samples nearer than 99 % of these"]
    n = found["images"]
    return table(head, rows) + (
        f"\n\nOf {n['samples']} samples and {n['heldout']} held-out images to {n['train']} training images; in pixels "
        "the root mean square on [0, 1]. A model that copies has samples that lie nearer to training images than "
        "held-out images do: the last column is then far above 1 %. Blurred images are near to everything in pixels, "
        "and guidance draws samples to what is typical, so reconstructions are the fairer measure of the two."
    )


def _positions(r: dict[str, Any]) -> str:
    loss, book = r["next_token_loss"], r["codebook"]["perplexity_by_position"]
    train, heldout = loss["train_by_position"], loss["heldout_by_position"]
    rows = [[k, f"{train[k - 1]:.3f}", f"{heldout[k - 1]:.3f}", f"{book[k - 1]:.0f}"] for k in r["prefixes"]["shown"]]
    return table(["Position", "Loss, training (nats)", "Loss, held out (nats)", "Codebook perplexity"], rows) + (
        "\n\nA loss far lower on training images than on held-out ones is memorising."
    )
