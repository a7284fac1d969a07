"""Ablations: short runs of a preset that differ in one choice each, at equal steps, side by side in tables.

    python -m train.ablate fashion-mnist-32 --tables nesting alpha --steps 1500 --transformer-steps 800

Each run is what the commands of a full one are, in a folder of its own: tokenizer, codes, transformer, and, if a
trained classifier is there, samples that it judges. What several tables have in common is trained once. Short runs
rank choices; they do not say how far each one gets. Interrupt it as you like: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NoReturn

import yaml

from .configs.config import Config
from .configs.reading import load_config
from .runs.command_line import check_output, clear_errors

# Levels of finite scalars, by the number of codes: those of Mentzer et al. (2023), table 1, and one for 2048.
FSQ_LEVELS = ([8, 6, 5], [8, 5, 5, 5], [8, 8, 6, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5])


def tables(config: Config) -> dict[str, dict[str, list[str]]]:
    """By table and name of the run: the settings in which it differs from the preset."""
    seeds = config.train_tokenizer.seed, config.train_transformer.seed
    late = f"adversarial=patchgan adversarial_from={config.train_tokenizer.steps // 2}"
    levels = min(FSQ_LEVELS, key=lambda x: abs(math.log(math.prod(x) / config.tokenizer.codebook_size)))
    grid = f"fsq_levels={json.dumps(levels, separators=(',', ':'))} codebook_size={math.prod(levels)}"
    # Both stand in the place of the plain codebook that a spectral shortcut needs.
    learned = "spectral_shortcut=false encoder_layers=4 " if config.tokenizer.spectral_shortcut else ""
    # By table and run: what it sets of the tokenizer, and of its training.
    choices = {
        "losses": {
            "squared error": ("", "perceptual= adversarial="),
            "with perceptual loss": ("", "perceptual=efficientnet-lite0 adversarial="),
            "with adversarial loss in the second half": ("", f"perceptual= {late}"),
            "with both": ("", f"perceptual=efficientnet-lite0 {late}"),
        },
        "quantizer": {
            "cosine codebook": ("", "rotation_trick=false"),
            "with the rotation trick": ("", "rotation_trick=true"),
            "nested codebooks from 2 entries": (f"{learned}codebook_sizes=[2]", "rotation_trick=false"),
            f"FSQ {levels}": (f"{learned}{grid} codebook_dim={len(levels)}", "rotation_trick=false quantize_from=0"),
        },
        "alpha": {f"alpha {alpha:g}": (f"cutoffs=[] alpha={alpha}", "") for alpha in (0.5, 1.0, 1.5, 2.0)},
        "seeds": {f"seed {seeds[0] + i}": ("", f"seed={seeds[0] + i}") for i in range(3)},
        "nesting": {
            "spectral targets": ("", ""),
            "spectral targets, short prefixes weighted up to 8 times": ("", "largest_boost=8"),
            "nested dropout without spectral targets": ("cutoffs=[] alpha=0", ""),
            "no nesting": ("", "prefixes_per_step=0"),
        },
        "prefixes": {
            "half uniform, half powers of two": ("", "prefix_law=mixed"),
            "uniform": ("", "prefix_law=uniform"),
            "powers of two": ("", "prefix_law=powers"),
            "short ones weighted up to 8 times": ("", "prefix_law=mixed largest_boost=8"),
            "two sampled a step": ("", "prefix_law=mixed prefixes_per_step=2"),
        },
    }
    runs = {}
    for title, table in choices.items():
        runs[title] = {}
        for i, (name, (shape, training)) in enumerate(table.items()):
            settings = [f"tokenizer.{s}" for s in shape.split()] + [f"train_tokenizer.{s}" for s in training.split()]
            if "codebook_dim" in shape:
                settings.append("transformer.codebook_dim=0")
            if "spectral_shortcut=false" in shape or "codebook_dim" in shape:
                settings.append("transformer.decoder_feedback=false")
            if title == "seeds":  # of both models
                settings.append(f"train_transformer.seed={seeds[1] + i}")
            runs[title][name] = [s for s in settings if _changes(config, s)]
    return runs


def _changes(config: Config, setting: str) -> bool:
    key, _, text = setting.partition("=")
    value = attrgetter(key)(config)
    return value != (text if isinstance(value, str) else yaml.safe_load(text))


TABLES = tuple(tables(Config()))
NOTES = {
    "alpha": "x_k is another target for each alpha: compare the PSNR against the image.",
    "nesting": "Without spectral targets x_k is the image, and all prefixes weigh the same. Without nesting only the "
    "full prefix is trained, by steps that take less time.",
    "seeds": "The spread is that of three runs: differences between runs of other tables that are no larger say "
    "nothing.",
}


@dataclass
class Stage:
    """One command of a run, and the file that is written anew when it has done all of its work."""

    module: str
    arguments: list[str]
    product: Path

    @property
    def command(self) -> str:
        return f"python -m train.{self.module} {shlex.join(self.arguments)}"


def stages(args: argparse.Namespace, settings: list[str], folder: Path) -> list[Stage]:
    """The commands of a run, in order."""
    run = [args.preset, *args.overrides, *settings, "--output", str(folder)]
    codes = load_config(args.preset, [*args.overrides, *settings]).train_transformer.codes
    result = [
        Stage("train_tokenizer", run, folder / "tokenizer" / "config.json"),
        Stage("encode_dataset", run, folder / "codes"),
        Stage("train_transformer", run, folder / "pipeline" / "model_index.json"),
    ]
    if codes != "stored":
        del result[1]
    if args.classifier:
        count = str(args.samples)
        judge = [str(folder / "pipeline"), *args.overrides, "--config", args.preset, "--classifier",
                 str(args.classifier), "--samples", count, "--images", count, "--prefix-images", "100",
                 "--perceptual", "none", "--guidance-scales", f"{args.guidance_scale:g}"]  # fmt: skip
        result.append(Stage("evaluate", judge, folder / "evaluation" / "results.json"))
    return result


def measurements(folder: Path, judged: bool) -> dict[str, float]:
    """What the stages of a finished run measured last, by the names that they gave it."""
    values: dict[str, float] = {}
    for stage in ("tokenizer", "transformer"):
        lines = [json.loads(line) for line in (folder / f"train_{stage}" / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            values |= {name: v for name, v in line.items() if name.startswith(("eval/", "loss/"))}
        values[f"images_per_second_{stage}"] = [line for line in lines if "lr" in line][-1]["time/images_per_second"]
    if judged:
        results = json.loads((folder / "evaluation" / "results.json").read_text())
        (samples,) = results["samples"]
        values["rfd"] = results["reconstruction"]["judged"]["classifier"]["fd"]
        values |= {name: samples["judged"]["classifier"][name] for name in ("fd", "accuracy")}
    return values


# ------------------------------------------------------------------------------------------------ running


def run_stage(stage: Stage, threads: int, minutes: float) -> bool:
    """Runs a command to its end; whether it has done all of its work, which it has not when time is over.

    Raises:
        SystemExit: if the command failed, with its exit code.
    """
    limit = []
    if math.isfinite(minutes) and stage.module.startswith("train_"):
        limit = ["--max-minutes", f"{max(0, minutes):.2f}"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    before = _identity(stage.product)
    process = subprocess.Popen([sys.executable, "-m", f"train.{stage.module}", *stage.arguments, *limit],
                               env=environment)  # fmt: skip
    try:
        code = process.wait()
    except BaseException:  # a signal: the command stops with a checkpoint
        process.terminate()
        process.wait()
        raise
    if code:
        print(f"{stage.command}\nended with exit code {code}. The same command goes on from there.", file=sys.stderr)
        raise SystemExit(code if code > 0 else 128 - code)
    if stage.module == "encode_dataset":  # codes that are there already are kept
        return True
    return _identity(stage.product) not in (None, before)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that it replaced; None if there is none.

    The time alone does not: two files made within one tick of the file system's clock have the same. They are two
    files, though, as a product is written beside the old one and then put in its place.
    """
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def run_all(args: argparse.Namespace, runs: dict[str, list[str]]) -> bool:
    """Runs what is not finished, by folder; False if time was over first."""
    started = time.monotonic()
    for number, (name, settings) in enumerate(runs.items(), start=1):
        folder = args.output / name
        commands = stages(args, settings, folder)
        record = {"settings": settings, "commands": [stage.command for stage in commands]}
        done = read_json(folder / "ablation.json")
        if done and done["commands"] == record["commands"]:
            continue
        for stage in commands:
            print(f"\n[{number}/{len(runs)}] {name}: {stage.module}", flush=True)
            if not run_stage(stage, args.threads, args.max_minutes - (time.monotonic() - started) / 60):
                return False
        write_text(folder / "ablation.json", json.dumps(record | {"measured": measurements(folder, args.classifier)}))
    return True


# ------------------------------------------------------------------------------------------------ tables


def markdown(table: dict[str, dict[str, float]], lengths: list[int], note: str, spread: bool) -> str:
    """Two tables, reconstruction and generation, a run a line; with the standard deviation over runs if wanted."""
    rows = dict(table)
    if spread and len(table) > 1:
        columns = {key: [values[key] for values in table.values()] for key in next(iter(table.values()))}
        rows |= {"mean": {k: mean(v) for k, v in columns.items()}, "standard deviation": {
            k: stdev(v) for k, v in columns.items()}}  # fmt: skip
    judged = all("fd" in values for values in rows.values())
    head = ["run", *(f"k = {k}" for k in lengths), "perplexity", "codes used", "images/s"] + ["rFD"] * judged
    lines = ["PSNR in dB, against the image / against x_k:", "", *header(head)]
    for name, v in rows.items():
        psnr = [f"{v[f'eval/psnr_{k}']:.2f} / {v[f'eval/psnr_low_pass_{k}']:.2f}" for k in lengths]
        use = [f"{v['eval/perplexity']:.0f}", f"{v['eval/usage']:.0%}", f"{v['images_per_second_tokenizer']:.0f}"]
        lines.append(line([name, *psnr, *use, *([f"{v['rfd']:.2f}"] if judged else [])]))
    head = ["run", "trained on", "held out", "difference", *(f"k = {k}" for k in lengths)]
    head += ["class accuracy", "FD"] * judged
    lines += ["", "Next-token loss in nats: mean, and held out at position k:", "", *header(head)]
    for name, v in rows.items():
        losses = [v["loss/seen"], v["loss/heldout"], v["loss/heldout"] - v["loss/seen"]]
        cells = [f"{x:.3f}" for x in (*losses, *(v[f"loss/heldout_{k}"] for k in lengths))]
        lines.append(line([name, *cells, *([f"{v['accuracy']:.1%}", f"{v['fd']:.2f}"] if judged else [])]))
    return "\n".join([*lines, "", note]).rstrip() + "\n"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def header(cells: list[str]) -> list[str]:
    return [line(cells), line(["---", *["---:"] * (len(cells) - 1)])]


def write_report(args: argparse.Namespace, config: Config, chosen: dict[str, dict[str, str]], command: str) -> None:
    """ablation.json and ablation.md of the finished runs; chosen: by table and name of the run, its folder."""
    n = config.tokenizer.num_tokens
    lengths = sorted({2**i for i in range(n.bit_length())} | {n})
    results: dict[str, Any] = {"command": command, "tables": {}}
    parts = [
        f"# Ablations of {config.name}", "",
        f"`{command}`", "",
        f"Short runs at equal steps: {config.train_tokenizer.steps} of the tokenizer and "
        f"{config.train_transformer.steps} of the transformer. They rank choices, no more.",
    ]  # fmt: skip
    if args.classifier:
        parts[-1] += (f" rFD, FD and class accuracy: {args.samples} images each, guidance scale "
                      f"{args.guidance_scale:g}, judged by the classifier.")  # fmt: skip
    for title, runs in chosen.items():
        records = {name: read_json(args.output / folder / "ablation.json") for name, folder in runs.items()}
        finished = {name: record for name, record in records.items() if record}
        results["tables"][title] = finished
        measured = {name: record["measured"] for name, record in finished.items()}
        if measured:
            parts += ["", f"## {title}", "", markdown(measured, lengths, NOTES.get(title, ""), title == "seeds")]
    write_text(args.output / "ablation.json", json.dumps(results, indent=1))
    write_text(args.output / "ablation.md", "\n".join(parts).rstrip() + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """None if there is no such file, or it was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ------------------------------------------------------------------------------------------------ command line


def folder_name(settings: list[str]) -> str:
    """Of a run, by what it changes: equal settings are one run, whatever tables call it."""
    short = [setting.partition(".")[2] for setting in settings]
    return re.sub(r"[^\w.=,+-]+", "", "+".join(short)) or "preset"


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("preset", help="a name in train/configs, or the path of a .yaml file")
    add("overrides", nargs="*", metavar="key=value", help="settings of all runs, e.g. data.limit=10000")
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="which ones (default: all)")
    add("--steps", type=_positive, metavar="N", help="of each tokenizer (default: the preset's)")
    add("--transformer-steps", type=_positive, metavar="N", help="of each transformer (default: the preset's)")
    add("--classifier", type=Path, metavar="FOLDER",
        help="of the judge of samples, from train.train_classifier (default: none, and no samples)")  # fmt: skip
    add("--samples", type=_positive, default=2000, metavar="N", help="that it judges, of each run (default: 2000)")
    add("--guidance-scale", type=float, default=1.5, metavar="W", help="of the samples (default: 1.5)")
    add("--output", type=Path, metavar="FOLDER", help="of runs and tables (default: runs/ablate-NAME)")
    add("--threads", type=_positive, default=0, metavar="N", help="of the CPU (default: as many as torch takes)")
    add("--max-minutes", type=float, default=math.inf, metavar="MINUTES",
        help="stop after so many minutes; the same command goes on from there (default: no limit)")  # fmt: skip
    add("--dry-run", action="store_true", help="print the commands, and run none")
    args = parser.parse_intermixed_args(argv)
    for steps, stage in ((args.steps, "train_tokenizer"), (args.transformer_steps, "train_transformer")):
        if steps:  # one measurement, at the end
            args.overrides += [f"{stage}.steps={steps}", f"{stage}.eval_every={steps}"]
    if args.classifier and not (args.classifier / "classifier.json").is_file():
        parser.error(f"There is no trained classifier in {args.classifier}: run train.train_classifier first.")
    try:
        config = load_config(args.preset, args.overrides)
        for table in args.tables:
            for settings in tables(config)[table].values():
                load_config(args.preset, [*args.overrides, *settings])
    except ValueError as error:
        parser.error(str(error))
    args.output = args.output or Path("runs") / f"ablate-{config.name}"
    check_output(parser, args.output)
    return args, config


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, not {text!r}")
    return int(text)


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    chosen = {title: tables(config)[title] for title in args.tables}
    runs = {folder_name(settings): settings for table in chosen.values() for settings in table.values()}
    if args.dry_run:
        for name, settings in runs.items():
            print("\n".join(stage.command for stage in stages(args, settings, args.output / name)))
        print(f"Dry run: {len(runs)} runs, nothing was written.")
        return
    folders = {title: {name: folder_name(s) for name, s in table.items()} for title, table in chosen.items()}
    with clear_errors():
        args.output.mkdir(parents=True, exist_ok=True)
        command = "python -m train.ablate " + shlex.join(sys.argv[1:] if argv is None else argv)
        complete = False
        try:
            complete = run_all(args, runs)
        finally:
            write_report(args, config, folders, command)
        print(f"{'All' if complete else 'Time is over, the same command goes on; the finished'} runs in "
              f"{args.output / 'ablation.md'}.")  # fmt: skip


if __name__ == "__main__":
    main()
