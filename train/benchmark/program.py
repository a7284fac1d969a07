"""Figures of the whole program: imports, the page, its first image, its memory."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from .measure import Result, not_measured, share
from .suite import Figure, Suite

ROOT = Path(__file__).parents[2]
APP = ROOT / "app.py"
START_LIMIT_S = 180
REPEATS = 3


def figures(suite: Suite, app: Path = APP) -> list[Figure]:
    page = Page(app, suite)
    return [
        Figure("import", "spectralar", lambda: imports(suite)),
        Figure("page", "start to ready", lambda: page.result("ready")),
        Figure("page", "first image of 4 through the API", lambda: page.result("first image")),
        Figure("page", "all tokens of 4 images through the API", lambda: page.result("all tokens")),
        Figure("page", "peak memory", lambda: page.result("peak memory")),
    ]


def imports(suite: Suite) -> Result:
    """A fresh interpreter that imports the library, against one that imports what it stands on."""
    repeats = 1 if suite.quick else REPEATS  # half a minute of the quick run as it is
    statements = {"spectralar": "import spectralar", "base": "import torch, diffusers.pipelines.pipeline_utils"}
    samples: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(1 + repeats):  # the first round warms the disk's cache
        for name, statement in statements.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)
            samples[name].append(time.perf_counter() - start)
    samples = {name: values[1:] for name, values in samples.items()}
    time_of = {name: statistics.median(values) for name, values in samples.items()}
    return Result(
        time_of["spectralar"],
        "s",
        [share(time_of["spectralar"], "importing torch and diffusers alone", time_of["base"])],
        samples=samples,
    )


@dataclass
class Page:
    """The demo in a process of its own, started once; four figures come from it."""

    app: Path
    suite: Suite
    measured: dict[str, Result] | None = None

    def result(self, name: str) -> Result:
        if not self.app.exists():
            return not_measured(f"there is no {self.app.name}")
        if find_spec("gradio_client") is None:
            return not_measured("gradio is not installed")
        self.measured = self.measured or self._measure()
        return self.measured[name]

    def _measure(self) -> dict[str, Result]:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            self.suite.models[self.suite.small].save_pretrained(folder)
            command = [sys.executable, str(self.app), "--model", folder, "--port", str(port), "--device", "cpu"]
            started = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            try:
                ready = wait_until_served(f"http://127.0.0.1:{port}/", process) - started
                requests = self._requests(f"http://127.0.0.1:{port}/")
            finally:
                peak = stop(process)
        return {"ready": Result(ready, "s"), **requests, "peak memory": Result(peak / 1e6, "MB")}

    def _requests(self, url: str) -> dict[str, Result]:
        """Requests for the first token and for all, against the same work without a page."""
        from gradio_client import Client

        client = Client(url, verbose=False)
        pipeline = self.suite.models[self.suite.small]
        results = {}
        for name, num_tokens in (("first image", 1), ("all tokens", None)):
            samples: dict[str, list[float]] = {"page": [], "pipeline": []}
            for seed in range(1 + REPEATS):
                start = time.perf_counter()
                client.predict("0", 4, seed, num_tokens=num_tokens, api_name="/generate")
                asked = time.perf_counter()
                for _ in pipeline.stream(0, num_images_per_prompt=4, num_tokens=num_tokens):
                    pass
                samples["page"].append(asked - start)
                samples["pipeline"].append(time.perf_counter() - asked)
            page, alone = (statistics.median(samples[key][1:]) * 1e3 for key in ("page", "pipeline"))
            comparison = share(page, "the pipeline's stream in this process", alone)
            results[name] = Result(page, "ms", [comparison], samples=samples)
        return results


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_served(url: str, process: subprocess.Popen) -> float:
    """The moment at which the page answers."""
    opener = build_opener(ProxyHandler({}))
    deadline = time.perf_counter() + START_LIMIT_S
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the page ended with status {process.returncode} before it was ready.")
        try:
            with opener.open(url, timeout=5) as answer:
                answer.read()
            return time.perf_counter()
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.02)
    raise RuntimeError(f"the page was not ready after {START_LIMIT_S} seconds.")


def stop(process: subprocess.Popen) -> int:
    """Ends the process; the most memory that it ever held, in bytes (0 if it had ended by itself)."""
    if process.returncode is not None:
        return 0
    process.send_signal(signal.SIGTERM)
    # The process's own usage, which Popen.wait would throw away.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
