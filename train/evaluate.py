"""Measures a finished pipeline: reconstruction, codebook, next-token loss, samples, and all of it over prefixes.

    python -m train.evaluate runs/fashion-mnist-32/pipeline --config fashion-mnist-32

Writes results.json, results.md (tables for a model card) and figures/ to the output folder, where the codes of the
samples are kept too: the same command goes on where it was interrupted, and a larger --samples only adds to them.
Real images are those of the evaluation split, which neither the models nor the judge were trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from spectralar import SpectralARPipeline
from spectralar.analysis import next_token_entropy, psnr, ssim, write_statistics
from spectralar.quantizer import codebook_statistics
from spectralar.spectral import nested_targets

from . import report
from .classifier import load_classifier
from .codes import fingerprint
from .command_line import clear_errors, read_split
from .config import Config, load_config
from .data import ImageSet, to_float
from .encode_dataset import encode_images
from .judges import Judge, Judged, compare, join
from .metrics import frechet_distance, inception_score
from .pictures import draw_reconstructions, draw_samples
from .sample_bank import sample_bank
from .train_transformer import evaluate as next_token_losses

DECODE_BATCH, PREFIX_BATCH = 128, 16  # images; of the latter all prefixes are decoded
LEAST_IMAGES = 10  # neighbours have to be found among them


@dataclass
class Evaluation:
    """What every measurement looks at: the models, and images in a random order that depends on the seed alone."""

    pipe: SpectralARPipeline
    judge: Judge
    images: Tensor  # (n, C, H, H) uint8, held out
    labels: Tensor  # (n,)
    prefix_images: int  # how many of the images, and of the samples, are measured at several prefix lengths
    manifold_images: int  # how many of a set precision, recall, density and coverage are measured on
    seed: int
    folder: Path

    @property
    def shown_lengths(self) -> list[int]:
        """Prefix lengths 1, 2, 4, .., N."""
        n = self.pipe.tokenizer.config.num_tokens
        return sorted({2**i for i in range(n.bit_length())} | {n})


# ------------------------------------------------------------------------------------------- tokenizer


@torch.no_grad()
def reconstruct(run: Evaluation, codes: Tensor, real: Judged) -> dict[str, float]:
    """All held-out images from all their tokens: PSNR and SSIM averaged over images, rFD and the other measures."""
    tokenizer, parts, values = run.pipe.tokenizer, [], []
    for batch, tokens in batches(DECODE_BATCH, "reconstructing", run.images, codes):
        x = to_float(batch).to(tokenizer.device)
        decoded = tokenizer.decode(tokens.long().to(tokenizer.device)).float()
        values.append(torch.stack([psnr(decoded, x), ssim(decoded, x)]).cpu())
        parts.append(run.judge(decoded))
    mean = torch.cat(values, dim=1).double().mean(dim=1)
    judged = compare(real, join(parts), run.labels, run.manifold_images)
    return {"psnr": float(mean[0]), "ssim": float(mean[1]), **judged}


@torch.no_grad()
def prefix_quality(run: Evaluation, codes: Tensor) -> tuple[dict[str, Any], dict[int, Judged]]:
    """Every prefix length of the first held-out images, against the image and against its ideal low-pass x_k.

    Returns the measurements by prefix length, and the judge's view of the real x_k, for `shown_lengths`.
    """
    tokenizer, n = run.pipe.tokenizer, run.prefix_images
    lengths, shown = list(range(1, tokenizer.config.num_tokens + 1)), run.shown_lengths
    columns = [k - 1 for k in shown]
    values, ideal, decoded = [], [], []
    for batch, tokens in batches(PREFIX_BATCH, "decoding all prefixes", run.images[:n], codes[:n]):
        x = to_float(batch).to(tokenizer.device)
        frames = tokenizer.decode(tokens.long().to(tokenizer.device), lengths).float()  # (b, N, C, H, H)
        targets = nested_targets(x, tokenizer.cutoffs)
        image = x.unsqueeze(1)
        rows = [psnr(frames, image), psnr(frames, targets), ssim(frames, image), ssim(frames, targets)]
        values.append(torch.stack(rows).cpu())  # (4, b, N)
        for views, images in ((ideal, targets), (decoded, frames)):
            views.append([run.judge(images[:, column]) for column in columns])
    names = ("psnr_image", "psnr_low_pass", "ssim_image", "ssim_low_pass")
    mean = torch.cat(values, dim=1).double().mean(dim=1)  # (4, N)
    low_pass = {k: join(list(parts)) for k, parts in zip(shown, zip(*ideal, strict=True), strict=True)}
    rebuilt = {k: join(list(parts)) for k, parts in zip(shown, zip(*decoded, strict=True), strict=True)}
    labels = run.labels[:n]
    return {
        "images": n, "length": lengths, "cutoff": list(tokenizer.cutoffs),
        **{name: row.tolist() for name, row in zip(names, mean, strict=True)},
        "judged": [
            {
                "length": k,
                "accuracy_low_pass": low_pass[k].accuracy(labels),
                "accuracy": rebuilt[k].accuracy(labels),
                "fd": frechet_distance(low_pass[k].features, rebuilt[k].features),
            }
            for k in shown
        ],
    }, low_pass  # fmt: skip


def codebook_use(run: Evaluation, codes: Tensor) -> dict[str, Any]:
    """Perplexity and share of entries in use, over all positions together and at each one alone."""
    size = run.pipe.tokenizer.config.codebook_size
    each = [codebook_statistics(column.long(), size) for column in codes.T]
    return {
        "images": len(codes), "codebook_size": size, **codebook_statistics(codes.long(), size),
        "perplexity_by_position": [s["perplexity"] for s in each], "usage_by_position": [s["usage"] for s in each],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- transformer


def next_token_loss(run: Evaluation, codes: Tensor, train_codes: Tensor, train_labels: Tensor) -> dict[str, Any]:
    """Next-token cross-entropy in nats by position, on images trained on and on held-out ones."""
    transformer = run.pipe.transformer
    result: dict[str, Any] = {"train_images": len(train_codes), "heldout_images": len(codes)}
    for name, c, y in (("train", train_codes, train_labels), ("heldout", codes, run.labels)):
        values = next_token_losses(transformer, c.long(), y, transformer.device).double()
        result |= {name: float(values.mean()), f"{name}_by_position": values.tolist()}
    transformer.eval()
    return result


@torch.no_grad()
def measure_samples(
    run: Evaluation, samples: int, guidance_scale: float, real: Judged, low_pass: dict[int, Judged], npz: bool
) -> dict[str, Any]:
    """Samples at one guidance scale: in full against the held-out images, as prefixes against their x_k."""
    tokenizer, shown = run.pipe.tokenizer, run.shown_lengths
    codes, labels = sample_bank(run.pipe, run.folder / "samples", samples, guidance_scale, run.seed)
    prefixes: dict[int, list[Judged]] = {k: [] for k in shown}
    pixels = []
    several = min(run.prefix_images, samples)
    for part, lengths in ((codes[:several], shown), (codes[several:], shown[-1:])):
        for (tokens,) in batches(DECODE_BATCH // len(lengths) + 1, "decoding samples", part):
            frames = tokenizer.decode(tokens.to(tokenizer.device), lengths).float()  # (b, S, C, H, H)
            for column, k in enumerate(lengths):
                prefixes[k].append(run.judge(frames[:, column]))
            if npz:
                pixels.append(((frames[:, -1].clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    if npz:
        write_npz(run.folder / f"samples-{guidance_scale:g}.npz", torch.cat(pixels))
    views = {k: join(parts) for k, parts in prefixes.items()}
    return {
        "guidance_scale": guidance_scale,
        **compare(real, views[shown[-1]], labels, run.manifold_images),
        "prefixes": [
            {
                "length": k,
                "images": several,
                "accuracy": views[k].first(several).accuracy(labels[:several]),
                "fd": frechet_distance(low_pass[k].features, views[k].first(several).features),
            }
            for k in shown
        ],
    }


def write_npz(path: Path, images: Tensor) -> None:
    """uint8 images (n, C, H, H) as the ADM evaluator reads them: arr_0, (n, H, H, 3)."""
    np.savez(path, arr_0=images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


# ------------------------------------------------------------------------------------------- all of it


def evaluate(args: argparse.Namespace, run: Evaluation, train: ImageSet, results: dict[str, Any]) -> None:
    """Fills `results`; the order is that of the report."""
    with timed(results, "encoding"):
        codes = encode_images(run.pipe.tokenizer, run.images, [], 0)
        train_codes = encode_images(run.pipe.tokenizer, train.images, [], 0)
    with timed(results, "reconstruction"):
        real = run.judge(to_float(run.images))
        results["reconstruction"] = reconstruct(run, codes, real)
        results["codebook"] = codebook_use(run, codes)
    with timed(results, "prefixes"):
        results["prefixes"], low_pass = prefix_quality(run, codes)
    with timed(results, "next-token loss"):
        results["next_token_loss"] = next_token_loss(run, codes, train_codes, train.labels)
        device = run.pipe.device
        entropy = next_token_entropy(run.pipe.transformer, codes.long().to(device), run.labels.to(device))
        # For the page: what its counterfactuals draw from, and the curves of its Model tab.
        write_statistics(run.folder, codes, run.pipe.tokenizer.config.codebook_size, entropy)
    with timed(results, "references"):
        some = slice(0, args.samples)
        seen = run.judge(to_float(train.images[some]))
        results["references"] = {
            "heldout": {
                "images": len(real), "accuracy": real.accuracy(run.labels),
                "inception_score": inception_score(real.probabilities),
            },
            "train": compare(real, seen, train.labels[some], run.manifold_images),
        }  # fmt: skip
    results["samples"] = []
    for scale in args.guidance_scales:
        with timed(results, f"samples at guidance scale {scale:g}"):
            results["samples"].append(measure_samples(run, args.samples, scale, real, low_pass, args.npz))
    best = min(results["samples"], key=lambda s: s["fd"])["guidance_scale"]
    results["best_guidance_scale"] = best
    with timed(results, "figures"):
        draw_samples(run.pipe, run.folder, run.seed, args.guidance_scales, best, run.shown_lengths)
        draw_reconstructions(run.pipe, run.folder, run.images, run.labels, codes, run.shown_lengths)
        report.draw_figures(results, run.folder / "figures")


def batches(size: int, description: str, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of equally long tensors, with a progress bar."""
    with tqdm(total=len(tensors[0]), desc=description, unit="img", leave=False) as bar:
        for parts in zip(*(t.split(size) for t in tensors), strict=True):
            if len(parts[0]):
                yield parts
            bar.update(len(parts[0]))


@contextmanager
def timed(results: dict[str, Any], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    results["seconds"][name] = round(time.perf_counter() - start, 1)
    tqdm.write(f"{name}: {results['seconds'][name]:.1f} s")


def random_images(data: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` of the images, at most all of them, in a random order that depends on the seed alone."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed % 2**63))[:count]
    return ImageSet(data.images[order], data.labels[order], data.class_names, data.num_broken)


def check_fit(pipe: SpectralARPipeline, card: dict[str, Any], data: ImageSet) -> None:
    """Ends the program if model, judge and data do not belong together."""
    architecture, (channels, size) = card["architecture"], data.images.shape[1:3]
    config = pipe.tokenizer.config
    for name, shape in (
        ("model", (config.image_size, config.in_channels)),
        ("classifier", (architecture["image_size"], architecture["in_channels"])),
    ):
        if shape != (size, channels):
            raise SystemExit(
                f"The {name} takes {shape[0]}-pixel images of {shape[1]} channels, and the data's have {size} pixels "
                f"and {channels} channels: take the --config that both were trained with."
            )
    for name, names in (("model", pipe.class_names), ("classifier", card["class_names"])):
        named = name == "classifier" or pipe.config.id2label
        if len(names) != len(data.class_names) or named and names != data.class_names:
            different = [f"{a!r} for {b!r}" for a, b in zip(names, data.class_names, strict=False) if a != b][:3]
            raise SystemExit(
                f"The {name} knows {len(names)} classes and the data has {len(data.class_names)}"
                f"{', with ' + ', '.join(different) if different and named else ''}: take the --config that it was "
                "trained with."
            )


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("model", type=Path, help="folder of a finished pipeline")
    add("overrides", nargs="*", metavar="key=value", help="settings, e.g. data.root=FOLDER")
    add("--config", required=True, metavar="PRESET", help="name or .yaml file; says which data to measure on")
    add("--classifier", type=Path, metavar="FOLDER", help="of the judge (default: classifier, beside the model)")
    add("--output", type=Path, metavar="FOLDER", help="of the results (default: evaluation, beside the model)")
    add("--samples", type=_count, default=5000, metavar="N", help="at each guidance scale (default: 5000)")
    add("--images", type=_count, default=10000, metavar="N", help="held out, and of training (default: 10000)")
    add("--prefix-images", type=_count, default=2000, metavar="N",
        help="images, and samples, to measure at several prefix lengths (default: 2000)")  # fmt: skip
    add("--guidance-scales", type=_scale, nargs="+", default=[1.0, 1.5, 2.0, 3.0], metavar="W",
        help="one or more (default: 1 1.5 2 3)")  # fmt: skip
    add("--seed", type=int, default=0, help="of samples and of the choice of images (default: 0)")
    add("--npz", action="store_true", help="also write the samples as the ADM evaluator reads them")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of the CPU (default: all)")
    args = parser.parse_intermixed_args(argv)
    args.classifier = args.classifier or args.model.parent / "classifier"
    args.output = args.output or args.model.parent / "evaluation"
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, not {args.threads}.")
    if not (args.model / "model_index.json").is_file():
        parser.error(f"{args.model} holds no pipeline: give the folder that train.train_transformer wrote.")
    try:
        return args, load_config(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < LEAST_IMAGES:
        raise argparse.ArgumentTypeError(f"must be a number of at least {LEAST_IMAGES}, not {text!r}")
    return int(text)


def _scale(text: str) -> float:
    try:
        if 0 <= (number := float(text)) < math.inf:
            return number
    except ValueError:
        pass
    hint = "; settings come before --guidance-scales" if "=" in text else ""
    raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}{hint}")


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    with clear_errors():
        try:
            classifier, card = load_classifier(args.classifier)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        device = Accelerator().device
        pipe = SpectralARPipeline.from_pretrained(args.model).to(device)
        pipe.set_progress_bar_config(disable=True)
        heldout = random_images(read_split(config, "eval"), args.images, args.seed)
        check_fit(pipe, card, heldout)
        train = random_images(read_split(config, "train"), args.images, args.seed)
        run = Evaluation(
            pipe, Judge(classifier, device), heldout.images, heldout.labels,
            prefix_images=min(args.prefix_images, len(heldout)),
            manifold_images=min(args.samples, len(heldout), len(train)),
            seed=args.seed, folder=args.output,
        )  # fmt: skip
        results = {
            "model": {
                "name": config.name,
                "tokenizer_sha256": fingerprint(pipe.tokenizer), "transformer_sha256": fingerprint(pipe.transformer),
                "tokenizer_parameters": sum(p.numel() for p in pipe.tokenizer.parameters()),
                "transformer_parameters": sum(p.numel() for p in pipe.transformer.parameters()),
                "num_tokens": pipe.tokenizer.config.num_tokens,
            },
            "classifier": card,
            "data": {
                "source": config.data.source, "train": config.data.train_split, "heldout": config.data.eval_split,
            },
            "command": "python -m train.evaluate " + shlex.join(sys.argv[1:] if argv is None else argv),
            "seed": args.seed, "device": str(device), "threads": args.threads,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "diffusers", "numpy")},
            "seconds": {},
        }  # fmt: skip
        (args.output / "figures").mkdir(parents=True, exist_ok=True)
        evaluate(args, run, train, results)
        for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", report.markdown(results))):
            partial = args.output / f"{name}.partial"
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, args.output / name)
        print(f"Results in {args.output / 'results.md'}.")


if __name__ == "__main__":
    main()
