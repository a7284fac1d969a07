"""Engines in a process of their own: the same results, refusals as they are, and nobody waits for a dead one."""

import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch

from spectralar.inference.engine import Engine, EngineBusyError, Sampling
from spectralar.inference.process import LOST, EngineProcess
from tests.helpers import seed, tiny_pipeline
from tests.inference.test_engine import SHORTCUT, frames_of, wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipes():
    pipe = tiny_pipeline(dtype=torch.float32)
    return [pipe, tiny_pipeline(dtype=torch.float32, tokenizer=SHORTCUT), tiny_pipeline(dtype=torch.bfloat16)]


def started(*pipes, workers=1):
    apart = EngineProcess([(pipe.transformer, pipe.tokenizer) for pipe in pipes], workers, delay=0)
    apart.engines[0].sample(pipes[0].request(1)).close()
    wait_for(lambda: apart.ready)
    return apart


@pytest.fixture(scope="module")
def apart(pipes):
    apart = started(*pipes, workers=2)
    yield apart
    apart.process.kill()


@pytest.mark.parametrize("model", [0, 1, 2], ids=["plain", "shortcut", "bfloat16"])
def test_frames_are_those_of_an_engine_here(pipes, apart, model):
    pipe, there = pipes[model], apart.engines[model]
    here = Engine(pipe.transformer, pipe.tokenizer)
    for wanted in ("all", "last", "none"):
        for arguments in ({}, {"guidance_scale": 1.0, "num_tokens": 5}, {"prefix_codes": [[1, 2, 3]]}):
            arguments |= {"class_labels": 1, "num_images_per_prompt": 2}
            ours, theirs = (
                frames_of(engine.sample(pipe.request(generator=seed(5), **arguments), "somebody", wanted))
                for engine in (here, there)
            )
            assert len(ours) == len(theirs) > 0
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.codes, b.codes)
                assert (a.images is None) == (b.images is None) == (wanted == "none")
                if a.images is not None:
                    torch.testing.assert_close(a.images.float(), b.images)
    assert there.num_requests == 0


def test_many_at_a_time_of_both_models(pipes, apart):
    asked = [(i % 2, i % 3, 100 + i) for i in range(24)]
    got = {}

    def visit(model, label, number):
        request = pipes[model].request(label, generator=seed(number))
        got[model, label, number] = frames_of(apart.engines[model].sample(request, number % 5))[-1].codes

    threads = [threading.Thread(target=visit, args=key, daemon=True) for key in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for model, label, number in asked:
        alone = pipes[model](label, generator=seed(number), output_type="latent").codes
        assert torch.equal(got[model, label, number], alone)


def test_who_leaves_is_let_go_and_told(pipes, apart):
    engine = apart.engines[0]
    sampling = engine.sample(pipes[0].request(1, generator=seed()))
    assert engine.num_requests == 1
    sampling.close()
    assert engine.num_requests == 0
    assert len(frames_of(sampling)) <= pipes[0].transformer.config.num_tokens  # it ends
    assert len(frames_of(engine.sample(pipes[0].request(1, generator=seed()), wanted="last"))) == 1


def test_refusals_are_the_engines_own(pipes, apart):
    large = pipes[0].request(1, num_images_per_prompt=513, generator=seed())
    with pytest.raises(ValueError, match="at most 256 images can be sampled at once, got 513"):
        apart.engines[0].sample(large)
    waiting = []
    with pytest.raises(EngineBusyError, match="try again in a moment"):
        for _ in range(1000):
            waiting.append(apart.engines[0].sample(pipes[0].request(1, num_images_per_prompt=256)))
    there = psutil.Process(apart.process.pid)
    before = there.cpu_times().user
    for sampling in waiting:
        sampling.close()
    assert apart.engines[0].num_requests == 0

    def has_room():
        try:
            return frames_of(apart.engines[0].sample(pipes[0].request(1, generator=seed()), wanted="last"))
        except EngineBusyError:
            return False

    wait_for(has_room)  # after the token that was being sampled
    assert there.cpu_times().user - before < 10  # of the 47 s that all would have taken


@pytest.fixture
def broken():
    """A pipeline whose weights are not all numbers, and a process that has it."""
    pipe = tiny_pipeline(dtype=torch.float32)
    with torch.no_grad():
        pipe.transformer.head.weight.fill_(torch.nan)
    apart = started(pipe)
    yield pipe, apart
    apart.process.kill()


def test_errors_of_sampling_come_back(broken):
    pipe, apart = broken
    with pytest.raises(ValueError, match="not finite"):
        frames_of(apart.engines[0].sample(pipe.request(1, generator=seed())))
    request = pipe.request(1, generator=seed())
    request.uniforms = request.uniforms[:, :0]  # the engine stumbles over it
    with pytest.raises(RuntimeError, match=r"\w+Error at .*\.py:\d+: "):
        frames_of(apart.engines[0].sample(request))


def test_a_process_that_died_is_told_and_started_again(pipes):
    pipe = pipes[0]
    apart = started(pipe)
    engine, process = apart.engines[0], apart.process
    psutil.Process(process.pid).suspend()  # so that nothing is finished before it dies
    errors = []

    def visit():
        try:
            frames_of(engine.sample(pipe.request(1, generator=seed())))
        except EngineBusyError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=visit, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: engine.num_requests == 3)
    process.kill()
    for thread in threads:
        thread.join(60)
    assert errors == [LOST] * 3 and engine.num_requests == 0
    wait_for(lambda: apart._connection is None)
    assert frames_of(engine.sample(pipe.request(1, generator=seed())))  # which starts another
    wait_for(lambda: apart.ready)
    assert apart.process.pid != process.pid
    apart.process.kill()


def test_it_waits_until_the_first_requests_are_served(pipes):
    apart = EngineProcess([(pipes[0].transformer, pipes[0].tokenizer)], delay=3600)
    assert frames_of(apart.engines[0].sample(pipes[0].request(1)))
    assert apart._coming and apart._connection is None


def test_requests_do_not_wait_for_the_start(pipes, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def start(_):
        begun.set()
        go_on.wait()
        raise OSError("no memory")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", start)
    apart = EngineProcess([(pipes[0].transformer, pipes[0].tokenizer)], delay=0)
    visit = lambda: frames_of(apart.engines[0].sample(pipes[0].request(1)))  # noqa: E731
    visit()
    begun.wait(60)
    thread = threading.Thread(target=visit, daemon=True)
    thread.start()
    thread.join(60)
    waits = thread.is_alive()
    go_on.set()
    assert not waits


def test_while_it_starts_and_where_it_cannot_requests_are_served_here(pipes, monkeypatch):
    pipe = pipes[0]
    alone = pipe(1, generator=seed(), output_type="latent").codes
    before = set(threading.enumerate())
    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.process.BaseProcess.start", Mock(side_effect=OSError("no memory")))
        patch.setattr("threading.excepthook", tracebacks := Mock())
        apart = EngineProcess([(pipe.transformer, pipe.tokenizer)], delay=0)
        for _ in range(2):
            sampling = apart.engines[0].sample(pipe.request(1, generator=seed()))
            assert isinstance(sampling, Sampling) and apart._connection is None
            assert torch.equal(frames_of(sampling)[-1].codes, alone)
            wait_for(lambda: not apart._coming)  # it was tried
        wait_for(lambda: set(threading.enumerate()) <= before)
        assert not tracebacks.called
    wait_for(lambda: apart.engines[0].num_requests == 0)
    assert isinstance(apart.engines[0].sample(pipe.request(1, generator=seed())), Sampling)  # which starts it
    wait_for(lambda: apart.ready)
    sampling = apart.engines[0].sample(pipe.request(1, generator=seed()))
    assert not isinstance(sampling, Sampling)
    assert torch.equal(frames_of(sampling)[-1].codes, alone)
    apart.process.kill()


PROGRAM = """
import time
import torch
from spectralar.inference.process import EngineProcess
from tests.helpers import tiny_pipeline
if __name__ == "__main__":
    pipe = tiny_pipeline(dtype=torch.float32)
    apart = EngineProcess([(pipe.transformer, pipe.tokenizer)], delay=0)
    apart.engines[0].sample(pipe.request(1))
    while apart._connection is None:
        time.sleep(0.01)
    print(apart.process.pid, flush=True)
    time.sleep(300)
"""


def test_it_ends_with_who_started_it(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/bin"}
    ) as starter:
        process = psutil.Process(int(starter.stdout.readline()))
        starter.kill()  # no chance to tidy up
    process.wait(120)
