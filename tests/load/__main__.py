"""Visitors on the page: python -m tests.load [--visitors 50] [--minutes 20] [--seed 0] [--what generate] [MODEL]

Starts the page and lets one visitor warm it up. Then visitors come and go, and it prints how many pictures they got,
how long they waited for the first and for the whole picture, what went wrong, and what the server took. Afterwards
every picture is sampled once more, alone, and must be the same: codes to the bit, pixels within 1 of 255. Exit status
1 if anything was wrong.

`--what generate` has visitors generate without a pause, which measures the sampler; without it they also stop, leave,
upload, reconstruct, remix and use the endpoints, with pauses, as people do.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np

from spectralar.demo.model import Model
from spectralar.demo.threads import limit_threads

from .server import Server, Use, serving
from .visitors import MIXED, STREAM, Findings, Visitor, asked_for, check
from .wire import Page

SETTLED = 120.0  # seconds after which memory, files and threads should not grow
WARM_UP = 25.0  # seconds: the page's sampling process comes ten after its first request
MODEL = Path(__file__).parents[2] / "assets" / "models" / "fashion-mnist-32"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=MODEL, help="folder of a saved pipeline")
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="of what visitors do; the order they are served in varies")
    parser.add_argument("--what", choices=["all", *MIXED], default="all", help="let visitors do one thing only")
    parser.add_argument("--images", type=int, help="of each generation (default: 1, 2 or 4)")
    parser.add_argument("--pause", type=float, help="mean seconds between two things (default: 2; 0 with --what)")
    return parser.parse_args(arguments)


async def visit(
    url: str, model: Model, num_visitors: int, seconds: float, *, seed: int = 0, actions: dict[str, int] = MIXED,
    images: int | None = None, pause: float = 0.0, first: Sequence[str] = (),
    watch: Server | None = None,
) -> tuple[Findings, list[tuple[float, Use]]]:  # fmt: skip
    """Lets visitors onto the page of `model` at `url`; what they found, and the server's use over time.

    Each does what is in `first`, then what `actions` says and how often it says it, until the time is over.
    """
    findings, settings = Findings(), asked_for(model, seed, images)
    uses: list[tuple[float, Use]] = []
    # A new connection each time: the server may close an idle one just as it is used, and httpx does not retry.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=STREAM, limits=limits, trust_env=False) as client:
        page = Page((await client.get(url + "config")).json())
        begin = time.monotonic()
        visitors = [Visitor(i, page, client, url, model, settings, findings, seed) for i in range(num_visitors)]

        async def look() -> None:
            while True:
                uses.append((time.monotonic() - begin, await asyncio.to_thread(watch.use)))
                await asyncio.sleep(1)

        looking = asyncio.create_task(look()) if watch else None
        await asyncio.gather(*(visitor.stay(begin + seconds, actions, pause, first) for visitor in visitors))
        if looking:
            looking.cancel()
    return findings, uses


# -------------------------------------------------------------------------------------------------- report


def report(findings: Findings, uses: list[tuple[float, Use]], seconds: float) -> str:
    """What was found, as lines of text."""
    waits = findings.waits
    lines = [
        "done        " + ", ".join(f"{name} {n}" for name, n in sorted(findings.done.items())),
        f"busy        {findings.busy} times told that too many wait",
        f"errors      {sum(findings.errors.values())}",
        *(f"  {n} x {error}" for error, n in findings.errors.items()),
        f"wrong       {len(findings.wrong)} of {len(findings.samples)} compared",
        *(f"  {what}" for what in findings.wrong[:9]),
    ]
    if waits:
        pictures, generations = sum(wait.count for wait in waits) / seconds, len(waits) / seconds
        lines.append(f"pictures    {pictures:.2f} a second, in {generations:.2f} generations a second")
        for name in ("first", "last"):
            p50, p95, worst = np.percentile([getattr(wait, name) for wait in waits], (50, 95, 100))
            lines.append(f"{name + ' picture':<15} p50 {p50:.2f} s, p95 {p95:.2f} s, longest {worst:.2f} s")
        lines.append(f"fairness    the visitor who waited longest: {unfairness(findings):.2f} of the mean of all")
    if uses:
        start = min(SETTLED, uses[-1][0] / 2)
        before, after = (typical(uses, at) for at in (start, uses[-1][0]))
        lines += [
            f"memory      {before.memory / 2**20:.0f} MiB after {start:.0f} s, {after.memory / 2**20:.0f} at the end "
            f"({100 * (after.memory / before.memory - 1):+.1f} %), most {max(u.memory for _, u in uses) / 2**20:.0f}",
            f"open files  {before.files}, {after.files} at the end, most {max(u.files for _, u in uses)}",
            f"threads     {before.threads}, {after.threads} at the end, most {max(u.threads for _, u in uses)}",
            f"temporary   {before.temporary / 2**20:.1f} MiB, {after.temporary / 2**20:.1f} at the end",
        ]
    return "\n".join(lines)


def unfairness(findings: Findings) -> float:
    """Mean wait for the first picture of the visitor with the longest, as a multiple of that of all."""
    by_visitor = defaultdict(list)
    for wait in findings.waits:
        by_visitor[wait.visitor].append(wait.first)
    return max(map(np.mean, by_visitor.values())) / np.mean([wait.first for wait in findings.waits])


def typical(uses: list[tuple[float, Use]], at: float, window: float = 20.0) -> Use:
    """The median use in the seconds before a moment: single values jump with what is being done."""
    near = [use for t, use in uses if at - window <= t <= at] or [uses[0][1]]
    return Use(*(int(np.median(column)) for column in zip(*near, strict=True)))


def main() -> int:
    options = parse_arguments()
    model = Model.load(options.model, "cpu")
    limit_threads(model.pipe.transformer)  # as the page, whose sums come in this order
    actions = MIXED if options.what == "all" else {options.what: 1}
    pause = options.pause if options.pause is not None else 2.0 if options.what == "all" else 0.0
    seconds = 60 * options.minutes
    arguments = ["--model", options.model.resolve()]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), arguments) as server:
        asyncio.run(visit(server.url, model, 1, WARM_UP, actions={"generate": 1}, images=1, pause=2.0))
        findings, uses = asyncio.run(
            visit(
                server.url, model, options.visitors, seconds, seed=options.seed, actions=actions,
                images=options.images, pause=pause, watch=server,
            )
        )  # fmt: skip
        troubles, took = server.troubles(), uses[-1][0]
        if troubles:
            print(server.log()[-5000:], file=sys.stderr)
    check(model, findings)
    print(f"{options.visitors} visitors for {took / 60:.1f} minutes, {options.what}, model {model.name}")
    print(report(findings, uses, took))
    print(f"server log  {len(troubles)} tracebacks and the like")
    return int(bool(findings.wrong or findings.errors or troubles))


if __name__ == "__main__":
    sys.exit(main())
