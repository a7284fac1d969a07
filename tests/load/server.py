"""The page in a process of its own, and what it takes: memory, open files, threads, temporary files."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

ROOT = Path(__file__).parents[2]
PATIENCE = 1200  # seconds until the page answers; a busy machine is slow
TROUBLE = re.compile(r"^(?:Traceback \(most recent|.*Too little data|.*Exception in ASGI|\w*Error\b).*", re.MULTILINE)


class Use(NamedTuple):
    """What a server takes at one moment, with the process that samples."""

    memory: int  # resident, bytes; what processes share counts for each
    files: int  # open, sockets included
    threads: int
    temporary: int  # bytes in its temporary folder


@dataclass
class Server:
    """A page that is served; `folder` holds its log and, as the system's temporary folder, all that it writes."""

    url: str
    process: subprocess.Popen
    folder: Path

    def use(self) -> Use:
        page = psutil.Process(self.process.pid)
        processes = [page, *page.children(recursive=True)]
        columns = zip(*((p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes), strict=True)
        return Use(*map(sum, columns), folder_size(self.temporary))

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def troubles(self) -> list[str]:
        """What the log holds of tracebacks and the like."""
        return TROUBLE.findall(self.log())


def folder_size(folder: Path) -> int:
    """Bytes of the files below a folder; those that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(
    folder: Path, arguments: Sequence[str | Path] = (), before: Sequence[str] = (), **environment: str
) -> Iterator[Server]:
    """Starts `python app.py` with arguments, and with a command `before` it that starts it; waits until it answers.

    Stops it at the end.

    Raises:
        RuntimeError: if it ends before it answers, with its log.
    """
    port = free_port()
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    command = [*before, sys.executable, "app.py", "--port", str(port), *map(str, arguments)]
    variables = {**os.environ, "TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1", **environment}
    variables.pop("GRADIO_TEMP_DIR", None)
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}/", process, folder)
    try:
        _wait_for(server)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        process.kill()
        process.wait()


def _wait_for(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(server.url + "config", timeout=30).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the page did not start:\n{server.log()}")
