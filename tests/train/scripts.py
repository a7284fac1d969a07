"""Runs training scripts as a user does, each in a process of its own, and does not import torch for each anew.

    with ScriptServer() as server:
        run = server.start("train_tokenizer", [preset, "--output", folder])
        run.kill(signal.SIGKILL)
        code, output = run.wait()

The server is a process that has imported the scripts and forks for each run; 10 s of import become 0.1 s. (Forking
the tests' own process would not do: autograd refuses to run in a fork of a process that has used it.)
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from PIL import Image

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # seconds a run may take: a hung one is stopped, a slow machine is none


class ScriptRun:
    """A script that runs: `processes` processes with one log."""

    def __init__(self, server: ScriptServer, pids: list[int], log: Path) -> None:
        self._server, self.pids, self._log = server, pids, log

    def kill(self, number: int = signal.SIGKILL) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):  # it has ended, and has been waited for
                os.kill(pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit code as in subprocess (-9 after SIGKILL), the first that is not 0, and all that was printed."""
        timer = threading.Timer(TIMEOUT, self.kill)
        timer.start()
        codes = [self._server.ask(wait=pid)["code"] for pid in self.pids]
        timer.cancel()
        return next(filter(None, codes), 0), self._log.read_text()


class ScriptServer:
    """Starts scripts of the package `train` in forked processes."""

    def __enter__(self) -> ScriptServer:
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.scripts"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def ask(self, **request) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, script: str, argv: list, processes: int = 1, file_limit: int = 0) -> ScriptRun:
        """Starts a script; `file_limit`: no file may grow beyond so many bytes, as on a full disk."""
        self._count += 1
        log = Path(self._folder.name) / str(self._count)
        log.touch()  # it may be killed before it has opened it
        port = free_port() if processes > 1 else 0
        pids = []
        for rank in range(processes):
            torchrun = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }  # what torchrun sets
            env = {key: str(value) for key, value in torchrun.items()} if processes > 1 else {}
            request = {"script": script, "argv": [str(arg) for arg in argv], "env": env, "log": str(log)}
            pids.append(self.ask(**request, file_limit=file_limit)["pid"])
        return ScriptRun(self, pids, log)

    def run(self, script: str, argv: list, **options) -> tuple[int, str]:
        """Runs a script to its end: exit code and output."""
        return self.start(script, argv, **options).wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve() -> None:
    """The server: a request a line on stdin, an answer a line on stdout."""
    for module in ("train.train_tokenizer", "train.train_transformer", "train.encode_dataset", "train.evaluate",
                   "torch.utils.tensorboard", "multiprocessing.dummy", "omegaconf._impl"):  # fmt: skip
        importlib.import_module(module)
    Image.init()
    gc.collect()
    gc.freeze()  # or each child's garbage collector copies all of this
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                run_script(**request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def run_script(script: str, argv: list[str], env: dict[str, str], log: str, file_limit: int) -> NoReturn:
    """In the forked process: does as `python -m train.SCRIPT ARGV`, up to its end."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ.update(env)
    sys.argv = [script, *argv]
    code = 0
    try:
        importlib.import_module(f"train.{script}").main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # taking the interpreter down would cost more than the run


if __name__ == "__main__":
    serve()
