"""The engine: many at a time, in threads; frames, departures, fairness, bounds, errors."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spectralar.inference import engine as module
from spectralar.inference.engine import Engine, EngineBusyError, Sampling, rows_that_fit
from spectralar.transformer import PRESETS, SpectralARTransformer
from tests.helpers import seed, tiny_pipeline, tiny_transformer
from tests.inference.test_batch import N, request

SHORTCUT = {"spectral_shortcut": True, "encoder_layers": 0}


@pytest.fixture(scope="module", params=[{}, SHORTCUT], ids=["plain", "shortcut"])
def pipe(request):
    return tiny_pipeline(dtype=torch.float32, tokenizer=request.param)


@pytest.fixture
def engine(pipe):
    engine = Engine(pipe.transformer, pipe.tokenizer, max_rows=16, max_waiting=3)
    yield engine
    wait_for(lambda: engine._thread is None)  # it ends with the last request


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def held(monkeypatch):
    """The model waits until `let` is called; `let(n)` lets n steps through."""
    steps = threading.Semaphore(0)
    real = SpectralARTransformer.step

    def step(self, *arguments):
        assert steps.acquire(timeout=60)
        return real(self, *arguments)

    monkeypatch.setattr(SpectralARTransformer, "step", step)
    try:
        yield steps.release
    finally:
        steps.release(100_000)


def frames_of(sampling):
    return [frame for frame in sampling if frame is not None]


def pipeline_steps(pipe, batch, label, number, **options):
    return list(
        pipe.stream(label, num_images_per_prompt=batch, generator=seed(number), output_type="pt", **options)
    )  # fmt: skip


def test_frames_are_those_of_the_pipelines_stream(pipe, engine):
    for batch, options in ((1, {}), (2, {"prefix": (3, 4, 5)}), (3, {"num_tokens": 7})):
        frames = frames_of(engine.sample(request(batch, 2, 9, guidance_scale=2.0, **options)))
        given = options.pop("prefix", None)
        steps = pipeline_steps(pipe, batch, 2, 9, prefix_codes=[list(given)] if given else None, **options)
        assert [frame.codes.shape[1] for frame in frames] == [step.index for step in steps]
        for frame, step in zip(frames, steps, strict=True):
            assert torch.equal(frame.codes, step.codes)
            assert torch.allclose(frame.images, step.images, atol=1e-5)


def test_only_the_last_frame_or_none(pipe, engine):
    *_, step = pipeline_steps(pipe, 2, 1, 4)
    (last,) = frames_of(engine.sample(request(2, 1, 4, guidance_scale=2.0), wanted="last"))
    (none,) = frames_of(engine.sample(request(2, 1, 4, guidance_scale=2.0), wanted="none"))
    assert engine._batch.free_rows == 16
    assert torch.equal(last.codes, step.codes) and torch.equal(none.codes, step.codes) and none.images is None
    assert torch.allclose(last.images, step.images, atol=1e-5)


def test_many_threads_get_each_their_own(pipe):
    engine = Engine(pipe.transformer, pipe.tokenizer, max_rows=16)
    wanted = [
        {"batch": 1 + i % 3, "label": i % 4, "number": i, "guidance_scale": 1.0 + i % 2, "top_k": 9 * (i % 2)}
        for i in range(12)
    ]
    got = [None] * len(wanted)

    def visit(i):
        got[i] = frames_of(engine.sample(request(**wanted[i]), visitor=i % 5))

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for options, frames in zip(wanted, got, strict=True):
        options = {**options}
        *_, step = pipeline_steps(pipe, options.pop("batch"), options.pop("label"), options.pop("number"), **options)
        assert [frame.codes.shape[1] for frame in frames] == list(range(1, N + 1))
        assert torch.equal(frames[-1].codes, step.codes)
        assert torch.allclose(frames[-1].images, step.images, atol=1e-5)
    wait_for(lambda: engine._thread is None)
    assert engine._batch.free_rows == 16 and not engine._running and not engine._waiting and not engine._given


def test_the_first_frame_comes_with_the_first_token(engine, monkeypatch):
    with held(monkeypatch) as let:
        frames = iter(engine.sample(request(1)))
        assert next(frames) is None  # it waits, and can be left
        let(1)
        first = next(frame for frame in frames if frame is not None)
        assert first.codes.shape == (1, 1) and engine._running[0].request.length == 1
        frames.close()


def test_who_leaves_is_out_after_the_token_that_is_being_sampled(engine, monkeypatch):
    stays, leaves = request(1, number=1), request(2, number=2)
    with held(monkeypatch) as let:
        staying, leaving = engine.sample(stays), engine.sample(leaves)
        let(1)
        wait_for(lambda: len(engine._running) == 2 and min(stays.length, leaves.length) >= 0 and stays.length == 1)
        leaving.close()
        let(2)
        wait_for(lambda: engine._batch.free_rows == 15)
        assert leaves.length <= 3
    assert len(frames_of(staying)) == N
    assert len(frames_of(leaving)) < N or not leaves.done


def test_a_small_request_finds_room_beside_large_ones(engine, monkeypatch):
    with held(monkeypatch) as let:
        large = [engine.sample(request(5, number=i), visitor="many") for i in range(3)]  # 16 rows, 5 each
        wait_for(lambda: len(engine._running) >= 1)
        small = engine.sample(request(1, number=7), visitor="one")
        let(2)
        wait_for(lambda: small in engine._running)
        assert large[2] in engine._waiting
    for sampling, batch in ((small, 1), *((sampling, 5) for sampling in large)):
        assert frames_of(sampling)[-1].codes.shape == (batch, N)  # nobody waits for ever


@pytest.mark.parametrize(
    ("free", "rounds", "let_in"),
    [
        (16, 0, [5, 5, 1]),  # nobody is there: who comes first may have all, the next half of what is left
        (12, 0, [5, 1]),  # half are 6, then 3
        (8, 0, [1]),
        (8, N, [5, 1]),  # who has waited long may have all
        (4, N, []),  # what becomes free is kept for who has waited long
    ],
)
def test_who_is_let_in(pipe, free, rounds, let_in):
    engine = Engine(pipe.transformer, pipe.tokenizer, max_rows=16)
    engine._batch = SimpleNamespace(free_rows=free)
    waiting = [Sampling(request(batch), visitor, "none", None, 1) for visitor, batch in enumerate((5, 5, 1))]
    waiting[0].rounds = rounds
    engine._waiting = list(waiting)
    entered = [len(sampling.request.codes) for sampling in engine._next_in()]
    assert entered == let_in
    assert len(engine._waiting) == 3 - len(let_in)
    assert all(sampling.rounds for sampling in engine._waiting)


def test_visitors_who_have_least_come_first(pipe):
    engine = Engine(pipe.transformer, pipe.tokenizer, max_rows=16)
    engine._batch = SimpleNamespace(free_rows=12)
    engine._running = [Sampling(request(4), "a", "none", None, 1)]
    engine._waiting = [Sampling(request(2), visitor, "none", None, 1) for visitor in "aabc"]
    assert [sampling.visitor for sampling in engine._next_in()] == ["b", "c", "a", "a"]


def test_bounds_are_told_in_a_sentence(engine, monkeypatch):
    with pytest.raises(ValueError, match="at most 8 images can be sampled at once, got 9"):
        engine.sample(request(9, guidance_scale=2.0))
    with held(monkeypatch):
        first = engine.sample(request(16))
        wait_for(lambda: len(engine._running) == 1)
        others = [engine.sample(request(1, number=i)) for i in range(3)]
        with pytest.raises(EngineBusyError, match="try again in a moment"):
            engine.sample(request(1))
    for sampling in (first, *others):
        assert frames_of(sampling)[-1].codes.shape[1] == N


def test_an_error_is_told_to_those_who_are_in_and_the_engine_goes_on(engine, monkeypatch):
    real = module.frames_of_several

    def fail(wanted):
        monkeypatch.setattr(module, "frames_of_several", real)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "frames_of_several", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        frames_of(engine.sample(request(1)))
    assert len(frames_of(engine.sample(request(1)))) == N


def test_rows_by_the_size_of_the_model():
    assert rows_that_fit(tiny_transformer()) == module.MOST_ROWS
    with torch.device("meta"):
        assert rows_that_fit(SpectralARTransformer(**PRESETS["d16"])) == module.FEWEST_ROWS


@pytest.mark.parametrize("wanted", ["all", "last", "none"])
def test_logits_that_are_not_finite_are_told_to_whom_they_concern(wanted):
    pipe = tiny_pipeline(dtype=torch.float32)
    pipe.transformer.class_embed.weight.data[1] = torch.nan
    engine = Engine(pipe.transformer, pipe.tokenizer, max_rows=16)
    good, bad = (engine.sample(request(1, label), wanted=wanted) for label in (0, 1))
    with pytest.raises(ValueError, match="the logits are not finite, .* weights hold NaN or infinity"):
        list(islice(bad, 1000))  # in the end there would be no news but that
    assert frames_of(good)[-1].codes.shape == (1, N)
    wait_for(lambda: engine._thread is None)
    assert engine._batch.free_rows == 16


ENDS = """
from spectralar.inference.engine import Engine
from tests.helpers import tiny_pipeline
pipe = tiny_pipeline()
engine = Engine(pipe.transformer, pipe.tokenizer)
first, *_ = [engine.sample(pipe.request(1)) for _ in range(30)]
next(iter(first))
"""


def test_a_program_may_end_while_there_is_something_to_do():
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, "terminate" in done.stderr) == (0, False), done.stderr
