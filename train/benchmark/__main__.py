"""Measures the speed of everything, each figure against a baseline of the same run and against the machine's limits.

    python -m train.benchmark --quick                      some minutes on a CPU
    python -m train.benchmark --output benchmark.json      all of it, on the CPU and on a GPU if there is one
    python -m train.benchmark --only sampling streaming    figures with these words in their names

Weights are random unless the embedded model is in assets/models; speed does not depend on them. Baselines are
timed in turns with what they are compared to, medians are reported. Run it on an otherwise idle machine; where there
is none, `--threads 1 --cpu-time` counts the seconds that the process had a core to itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from . import decoding, diffusion, program, sampling, training
from .measure import Result, describe_run, not_measured
from .suite import Figure, Suite

PARTS = (sampling, diffusion, decoding, training)
DEVICES = ("cpu", "cuda")


def plan(suite: Suite, app: Path = program.APP) -> list[Figure]:
    """All figures for the suite's device; imports and the page are measured once, on the CPU."""
    figures = [figure for part in PARTS for figure in part.figures(suite)]
    return figures + (program.figures(suite, app) if suite.device.type == "cpu" else [])


def run(suite: Suite, figures: list[Figure]) -> dict:
    """Measures the figures, in order: {"device": ..., "figures": [...]} as it stands in the JSON file."""
    entries = []
    for figure in figures:
        result = figure.run()
        entries.append({"figure": figure.name, "setting": figure.setting, **result.as_dict()})
    return {"device": suite.machine.describe(), "figures": entries}


def without_device(suite: Suite, name: str, figures: list[Figure]) -> dict:
    """The same rows for a device that is not there."""
    result: Result = not_measured(f"no {name.upper()} device")
    entries = [{"figure": f.name, "setting": f.setting, **result.as_dict()} for f in figures]
    return {"device": {"device": name, "name": None}, "figures": entries}


# ------------------------------------------------------------------------------------------------ table


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def compared(comparison: dict) -> str:
    """One comparison in words: "4.3 times faster than X (12 ms; target 4: met)"."""
    ratio = number(comparison["ratio"])
    words = f"{ratio} times faster than" if comparison["kind"] == "faster" else f"{ratio} of"
    target = ""
    if comparison["target"] is not None:
        target = f"; target {comparison['target']:g}: {'met' if comparison['met'] else 'MISSED'}"
    return f"{words} {comparison['baseline']} ({number(comparison['baseline_value'])}{target})"


def table(report: dict) -> str:
    """The report as Markdown, one table a device."""
    lines = [", ".join(f"{key} {value}" for key, value in report["run"].items()), ""]
    for part in report["devices"]:
        lines += [" ".join(f"{key}={value}" for key, value in part["device"].items()), ""]
        lines += ["| figure | setting | value | against | floor | note |", "| --- | --- | --- | --- | --- | --- |"]
        for entry in part["figures"]:
            value = "" if entry["value"] is None else f"{number(entry['value'])} {entry['unit']}"
            against = "; ".join(map(compared, entry["comparisons"]))
            floor = "" if not entry["floor"] else f"{number(entry['floor'])} ({number(entry['over_floor'])} times)"
            cells = (entry["figure"], entry["setting"], value, against, floor, entry["note"])
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer repeats, no figure of minutes")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only figures with one of these words in the name")
    parser.add_argument("--threads", type=int, help="of the CPU (default: OMP_NUM_THREADS, else all cores)")
    parser.add_argument("--cpu-time", action="store_true", help="for a CPU that others use too; takes --threads 1")
    parser.add_argument("--output", type=Path, help="JSON file with everything, every single timing too")
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time adds up the threads' seconds: it takes --threads 1.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the page's process, too
    clock = "cpu" if args.cpu_time else "wall"
    report = {"run": describe_run() | {"quick": args.quick, "clock": clock}, "devices": []}
    for name in DEVICES:
        settings = {"quick": args.quick, "budget_s": 3.0 if args.quick else 20.0}
        suite = Suite(torch.device(name), clock=clock if name == "cpu" else "wall", **settings)
        figures = [f for f in plan(suite) if not args.only or any(word in f.name for word in args.only)]
        present = name == "cpu" or torch.cuda.is_available()
        print(f"{name}:" if present else f"{name}: not there", file=sys.stderr)
        report["devices"].append(run(suite, figures) if present else without_device(suite, name, figures))
    print(table(report))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
