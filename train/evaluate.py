"""Measures a finished pipeline: reconstruction, codebook, next-token loss, samples, and all of it over prefixes.

    python -m train.evaluate runs/fashion-mnist-32/pipeline --config fashion-mnist-32
    accelerate launch -m train.evaluate ...                    # the same figures from several processes

Writes report.html (one file with all tables and pictures), report.md (the same for a model card), figures/ and
results.json to the output folder, where the codes of the samples are kept too: the same command goes on where it was
interrupted, and a larger --samples only adds to them.
Real images are those of the evaluation split, which neither the models nor the judges were trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spectralar import SpectralARPipeline, __version__
from spectralar.analysis.statistics import write_statistics
from spectralar.interface.labels import LabelNames
from spectralar.sampling import check_sampling_arguments
from spectralar.spectral import gaussian_psnr

from .configs.config import Config
from .configs.reading import load_config
from .data.codes import fingerprint
from .data.decoding import on_main
from .data.images import ImageSet, load_images
from .data.mixing import load_mixed
from .data.order import in_proportion, of_classes
from .data.sources import list_images
from .data.variances import dct_variances
from .evaluation.judges import JUDGES, Judge, make_judge
from .evaluation.measurements import (
    Evaluation,
    codebook_use,
    encode,
    entropy_by_position,
    measure_samples,
    next_token_loss,
    other_source,
    perceptual_distances,
    prefix_quality,
    reconstruct,
    references,
)
from .evaluation.metrics import LEAST_MANIFOLD, MANIFOLD
from .evaluation.neighbours import Looked, find_neighbours
from .evaluation.pictures import draw_neighbours, draw_reconstructions, draw_samples
from .evaluation.report import markdown
from .evaluation.report_figures import draw_charts, may_fail
from .evaluation.report_page import page
from .objectives.losses import PERCEPTUAL_LOSSES, make_perceptual_loss
from .runs.command_line import check_output, clear_errors, read
from .runs.engine import make_accelerator
from .runs.processes import Team

LEAST_IMAGES = 10  # neighbours have to be found among them
DRY_IMAGES = 20


def evaluate(
    args: argparse.Namespace, run: Evaluation, train: ImageSet, others: dict[str, ImageSet], results: dict[str, Any]
) -> None:
    """Fills `results`; the order is that of the report."""
    with timed(run, results, "encoding"):
        codes, train_codes = encode(run, run.images), encode(run, train.images)
    with timed(run, results, "reconstruction"):
        real = run.judge_pixels(run.images, "judging held-out images")
        results["reconstruction"], rebuilt = reconstruct(run, codes, real)
        results["codebook"] = codebook_use(run, codes)
    with timed(run, results, "prefixes"):
        prefixes, low_pass = prefix_quality(run, codes)
        bound = gaussian_psnr(dct_variances([train]), run.pipe.tokenizer.prefix_bits).tolist()
        results["prefixes"] = prefixes | {"gaussian_bound": bound}
    for name, images in others.items():
        with timed(run, results, f"reconstruction of {name}"):
            results["other_sources"][name] |= other_source(run, images.images, min(args.prefix_images, len(images)))
    if run.perceptual is not None:
        with timed(run, results, "perceptual distances"):
            results["perceptual"] |= perceptual_distances(run, codes)
    with timed(run, results, "next-token loss"):
        # With decoder feedback all prefixes of each image are decoded for it.
        feedback = run.pipe.transformer.config.decoder_feedback
        some = slice(args.prefix_images if feedback else None)
        results["next_token_loss"] = next_token_loss(run, codes[some], train_codes[some], train.labels)
        entropy = entropy_by_position(run, codes[some])
        if run.team.is_main:
            # For the page: what its counterfactuals draw from, and the curves of its Model tab.
            size, measured = run.pipe.tokenizer.config.codebook_size, prefixes["psnr_mean_error"]
            write_statistics(run.folder, codes, size, entropy, measured, bound)
    with timed(run, results, "references"):
        seen = run.judge_pixels(train.images, "judging training images")
        results["references"] = references(run, real, seen, train.labels)
    results["samples"], bank, samples = [], {}, {}
    for scale in args.guidance_scales:
        with timed(run, results, f"samples at guidance scale {scale:g}"):
            measured, bank[scale], samples[scale] = measure_samples(run, scale, real, low_pass, args.npz)
            results["samples"].append(measured)
    first = next(iter(run.judges))
    best = min(results["samples"], key=lambda s: s["judged"][first]["fd"])["guidance_scale"]
    results["best_guidance_scale"] = best
    if not run.team.is_main:
        return
    with timed(run, results, "nearest neighbours"):
        results["neighbours"], places = find_neighbours(
            samples[best].first(args.neighbours), Looked(run.images, real).first(args.neighbours),
            rebuilt.first(args.neighbours), Looked(train.images, seen),
        )  # fmt: skip
    write_results(results, run.folder)
    with timed(run, results, "figures"):
        with may_fail("neighbours"):
            draw_neighbours(
                run.pipe.class_names, run.folder, samples[best].pixels, run.sample_labels, train.images, places
            )
        with may_fail("samples"):
            draw_samples(run.pipe, run.folder, bank, run.sample_labels, best, run.shown_lengths)
        with may_fail("reconstructions"):
            draw_reconstructions(run.pipe, run.folder, run.images, run.labels, codes, run.shown_lengths)
        draw_charts(results, run.folder / "figures")


@contextmanager
def timed(run: Evaluation, results: dict[str, Any], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    results["seconds"][name] = round(time.perf_counter() - start, 1)
    if run.team.is_main:
        tqdm.write(f"{name}: {results['seconds'][name]:.1f} s")


def random_images(data: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` of the images, at most all of them, in a random order that depends on the seed alone."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed % 2**63))[:count]
    return ImageSet(data.images[order], data.labels[order], data.class_names, data.num_broken)


def shown_names(class_names: list[str]) -> list[str]:
    """Of each class the name that a pipeline shows."""
    return LabelNames(dict(enumerate(class_names)), len(class_names)).shown


def check_fit(pipe: SpectralARPipeline, judges: dict[str, Judge], data: ImageSet) -> None:
    """Ends the program if model, judges and data do not belong together."""
    channels, size = data.images.shape[1:3]
    config = pipe.tokenizer.config
    shapes = {"model": (config.image_size, config.in_channels)}
    known, expected = {"model": pipe.class_names}, shown_names(data.class_names)
    if "classifier" in judges:
        card = judges["classifier"].card
        shapes["classifier"] = card["architecture"]["image_size"], card["architecture"]["in_channels"]
        known["classifier"] = shown_names(card["class_names"])
    for name, shape in shapes.items():
        if shape != (size, channels):
            raise SystemExit(
                f"The {name} takes {shape[0]}-pixel images of {shape[1]} channels, and the data's have {size} pixels "
                f"and {channels} channels: take the --config that both were trained with."
            )
    for name, names in known.items():
        named = name == "classifier" or pipe.config.id2label
        if len(names) != len(expected) or named and names != expected:
            different = [f"{a!r} for {b!r}" for a, b in zip(names, expected, strict=False) if a != b][:3]
            raise SystemExit(
                f"The {name} knows {len(names)} classes and the data has {len(expected)}"
                f"{', with ' + ', '.join(different) if different and named else ''}: take the --config that it was "
                "trained with."
            )


def check_counts(args: argparse.Namespace, train: ImageSet, heldout: ImageSet) -> None:
    """Says what cannot be measured on so few images; ends the program if that is nearly all."""
    counts = f"{len(heldout)} held-out and {len(train)} training images"
    if min(len(train), len(heldout)) < 2:
        raise SystemExit(
            f"Fréchet distances take two images of each kind or more, and there are {counts}: add images."
        )
    if min(len(train), len(heldout), args.samples) < LEAST_MANIFOLD and on_main():
        print(f"{', '.join(MANIFOLD)} take {LEAST_MANIFOLD} images of each kind: with {counts} they are left out.")


def make_judges(args: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Judge]:
    """The judges asked for, by name; one sentence ends the program where one cannot be had."""
    # Of the source, not readable ones: those of WordNet ids may stand for two classes.
    names = list_images(config.data, "eval").class_names if "efficientnet-lite1" in args.judge else []
    try:
        return {
            name: make_judge(name, device=device, classifier=args.classifier, class_names=names)
            for name in dict.fromkeys(args.judge)
        }
    except (ImportError, ValueError) as error:
        raise SystemExit(str(error)) from error


def make_perceptual(name: str, device: torch.device) -> torch.nn.Module | None:
    try:
        return None if name == "none" else make_perceptual_loss(name).to(device)
    except ImportError as error:
        raise SystemExit(f"{error} Or take --perceptual none.") from error


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("model", type=Path, help="folder of a finished pipeline")
    add("overrides", nargs="*", metavar="key=value", help="settings, e.g. data.root=FOLDER")
    add("--config", required=True, metavar="PRESET", help="name or .yaml file; says which data to measure on")
    add("--judge", nargs="+", choices=JUDGES, default=["classifier"], metavar="NAME",
        help=f"one or more of {', '.join(JUDGES)}: networks whose features are compared; the first one picks the best "
        "guidance scale (default: classifier)")  # fmt: skip
    add("--classifier", type=Path, metavar="FOLDER", help="of that judge (default: classifier, beside the model)")
    add(
        "--perceptual",
        choices=[*PERCEPTUAL_LOSSES, "none"],
        default=PERCEPTUAL_LOSSES[0],
        metavar="NAME",
        help=f"network of perceptual distances, {', '.join(PERCEPTUAL_LOSSES)} or none (default: %(default)s)",
    )
    add("--output", type=Path, metavar="FOLDER", help="of the results (default: evaluation, beside the model)")
    add("--samples", type=_count, default=5000, metavar="N", help="at each guidance scale (default: %(default)s)")
    add("--images", type=_count, default=10000, metavar="N", help="held out, and of training (default: %(default)s)")
    add("--classes", choices=["heldout", "even"], default="heldout",
        help="of the samples: in the proportions of the held-out images, which they are held against, or all equally "
        "often (default: heldout)")  # fmt: skip
    add("--prefix-images", type=_count, default=2000, metavar="N",
        help="images, and samples, to measure at several prefix lengths (default: %(default)s)")  # fmt: skip
    add(
        "--neighbours",
        type=_count,
        default=1000,
        metavar="N",
        help="samples, and held-out images, whose nearest training images are found (default: %(default)s)",
    )
    add("--guidance-scales", type=_scale, nargs="+", default=[1.0, 1.5, 2.0, 3.0], metavar="W",
        help="one or more (default: 1 1.5 2 3)")  # fmt: skip
    add("--temperature", type=_temperature, default=1.0, metavar="T", help="of the samples (default: %(default)g)")
    add("--seed", type=int, default=0, metavar="N",
        help="of samples and of the choice of images (default: %(default)s)")  # fmt: skip
    add("--npz", action="store_true", help="also write the samples as the ADM evaluator reads them")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N",
        help="of the CPU, in each process (default: all)")  # fmt: skip
    add("--dry-run", action="store_true", help=f"all of it on {DRY_IMAGES} images and samples, and nothing written")
    args = parser.parse_intermixed_args(argv)
    args.classifier = args.classifier or args.model.parent / "classifier"
    args.output = args.output or args.model.parent / "evaluation"
    if args.dry_run:
        args.samples = args.images = args.prefix_images = args.neighbours = DRY_IMAGES
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, not {args.threads}.")
    if not args.dry_run:
        check_output(parser, args.output)
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


def _temperature(text: str) -> float:
    try:
        return check_sampling_arguments(1, float(text), 0, 1.0, 1.0, "constant")["temperature"]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def conditions(args: argparse.Namespace, config: Config, run: Evaluation, argv: list[str] | None) -> dict[str, Any]:
    """What the results depend on."""
    pipe, device = run.pipe, run.team.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(run.team.device)
    return {
        "model": {
            "name": config.name,
            "tokenizer_sha256": fingerprint(pipe.tokenizer), "transformer_sha256": fingerprint(pipe.transformer),
            "tokenizer_parameters": sum(p.numel() for p in pipe.tokenizer.parameters()),
            "transformer_parameters": sum(p.numel() for p in pipe.transformer.parameters()),
            "num_tokens": pipe.tokenizer.config.num_tokens, "num_classes": pipe.transformer.config.num_classes,
        },
        "judges": {name: judge.card for name, judge in run.judges.items()},
        "perceptual": {} if run.perceptual is None else {
            "network": args.perceptual, "trained_on_it": args.perceptual == config.train_tokenizer.perceptual,
        },
        "data": {
            "source": config.data.source, "train": config.data.train_split, "heldout": config.data.eval_split,
            "sampled_classes": args.classes,
        },
        "other_sources": {
            name: {"source": other.source, "heldout": other.eval_split} for name, other in config.data.mixed().items()
        },
        "command": "python -m train.evaluate " + shlex.join(sys.argv[1:] if argv is None else argv),
        "seed": args.seed, "temperature": args.temperature,
        "device": device, "threads": args.threads, "processes": run.team.size,
        "versions": {"python": platform.python_version()}
        | {"spectralar": __version__}
        | {name: version(name) for name in ("torch", "diffusers", "numpy")},
        "seconds": {},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    with clear_errors():
        team = Team(make_accelerator())
        splits = read(load_mixed, config.data, "eval")
        train = random_images(read(load_images, config.data, "train"), args.images, args.seed)
        others = {name: random_images(split, args.images, args.seed) for name, split in splits.items()}
        heldout = others.pop("")
        check_counts(args, train, heldout)
        counts = splits[""].labels.bincount(minlength=len(heldout.class_names))
        if args.classes == "even":
            counts.fill_(1)
        judges = make_judges(args, config, team.device)
        pipe = SpectralARPipeline.from_pretrained(args.model).to(team.device)
        pipe.set_progress_bar_config(disable=True)
        check_fit(pipe, judges, heldout)
        sample_labels = in_proportion(counts, args.samples)
        alike = of_classes(train.labels, sample_labels)
        alike = alike if len(alike) >= LEAST_MANIFOLD else torch.arange(len(train))
        run = Evaluation(
            pipe, judges, make_perceptual(args.perceptual, team.device), heldout.images, heldout.labels,
            sample_labels=sample_labels, train_alike=alike,
            prefix_images=min(args.prefix_images, len(heldout)),
            manifold_images=min(args.samples, len(heldout), len(alike)),
            seed=args.seed, temperature=args.temperature, folder=args.output, team=team,
        )  # fmt: skip
        results = conditions(args, config, run, argv)
        with output_folder(args, team) as run.folder:
            (run.folder / "figures").mkdir(parents=True, exist_ok=True)
            evaluate(args, run, train, others, results)
            if team.is_main:
                write_report(results, run.folder)
        if team.is_main:
            where = "Dry run: nothing was written" if args.dry_run else f"Results in {args.output / 'report.html'}"
            print(f"{where}.")


@contextmanager
def output_folder(args: argparse.Namespace, team: Team) -> Iterator[Path]:
    """The folder of the results; in a dry run one that all processes share and that is gone afterwards."""
    if not args.dry_run:
        yield args.output
        return
    with tempfile.TemporaryDirectory() if team.is_main else nullcontext() as folder:
        yield Path(team.broadcast(folder))
        team.wait()


def write_results(results: dict[str, Any], folder: Path) -> None:
    _write(folder / "results.json", json.dumps(results, indent=1))


def write_report(results: dict[str, Any], folder: Path) -> None:
    """results.json, report.md and report.html, each whole or not at all."""
    write_results(results, folder)
    _write(folder / "report.md", markdown(results))
    _write(folder / "report.html", page(results, folder))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    # Paths and names may hold bytes that are no UTF-8.
    partial.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


if __name__ == "__main__":
    main()
