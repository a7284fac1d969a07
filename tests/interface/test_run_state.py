"""Runs of one pipeline side by side: each has its own guidance, interruption and steps, and the codes it has alone."""

import asyncio
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spectralar.inference import compiled
from spectralar.interface import run_state
from spectralar.interface.run_state import Runs, RunState
from tests.helpers import seed, tiny_pipeline

N = 12  # tokens of the tiny models
SCALES = (1.0, 1.5, 6.0)  # one without unconditional rows


@pytest.fixture
def pipe():
    return tiny_pipeline()


@functools.cache
def alone(scale, **arguments):
    """Codes of one run of a pipeline that has no other."""
    return tiny_pipeline()([0, 3], generator=seed(), guidance_scale=scale, output_type="latent", **arguments).codes


def together(pipe, run, arguments):
    """run(pipe, argument) in a thread for each, all begun before any goes on."""
    barrier = threading.Barrier(len(arguments))

    def wait_and_run(argument):
        barrier.wait(60)
        return run(pipe, argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(wait_and_run, arguments))


# Side by side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latent", "pt"])
def test_streams_that_take_turns(pipe, kind):
    arguments = {"output_type": kind, "guidance_schedule": "linear"}
    streams = [pipe.stream([0, 3], generator=seed(), guidance_scale=scale, **arguments) for scale in SCALES]
    for events in zip(*streams, strict=True):
        for scale, event in zip(SCALES, events, strict=True):
            assert torch.equal(event.codes, alone(scale, guidance_schedule="linear")[:, : event.index])
            if kind == "pt":
                assert torch.allclose(event.images, pipe.decode(event.codes), atol=1e-10)
    assert len({str(alone(scale).tolist()) for scale in SCALES}) == len(SCALES)


def test_threads(pipe):
    def run(pipe, scale):
        return pipe([0, 3], generator=seed(), guidance_scale=scale, output_type="latent").codes, pipe.guidance_scale

    for _ in range(3):
        for scale, (codes, seen) in zip(SCALES * 2, together(pipe, run, SCALES * 2), strict=True):
            assert torch.equal(codes, alone(scale))
            assert seen == scale  # of the run that this thread made


def test_threads_under_model_offloading(pipe):
    def run(pipe, scale):
        out = [pipe([0, 3], generator=seed(), guidance_scale=scale, output_type="pt") for _ in range(3)]
        assert torch.equal(pipe.encode(out[0].images), expected_codes[scale])
        return out

    outputs = {scale: pipe([0, 3], generator=seed(), guidance_scale=scale, output_type="pt") for scale in SCALES}
    expected_codes = {scale: pipe.encode(out.images) for scale, out in outputs.items()}
    pipe.enable_model_cpu_offload(device="cpu")
    for scale, outs in zip(SCALES, together(pipe, run, SCALES), strict=True):
        assert all(torch.equal(out.images, outputs[scale].images) for out in outs)
    assert all(hasattr(model, "_hf_hook") for model in pipe.components.values())


def test_components_stay_where_they_are_while_a_run_uses_them(pipe):
    """Offloading moves weights; a run that ends must not take them from one in the middle of a step."""
    pipe.enable_model_cpu_offload(device="cpu")
    inside, ended, real = threading.Event(), threading.Event(), pipe.transformer.step
    hooked = []

    def step(*arguments):
        if not inside.is_set():
            inside.set()
            ended.wait(0.5)  # the other run ends now, if it may
            hooked.append(not ended.is_set())
        return real(*arguments)

    pipe.transformer.step = step
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(pipe, 1, output_type="latent")
        assert inside.wait(60)
        pipe.maybe_free_model_hooks()
        ended.set()
        run.result()
    assert hooked == [True]


@pytest.mark.skipif(not compiled.has_compiler(), reason="torch.compile needs a C++ compiler")
def test_threads_with_a_compiled_step():
    pipe = tiny_pipeline(dtype=torch.float32, transformer={"num_layers": 1})

    def run(pipe, scale):
        return pipe([0, 3], generator=seed(), guidance_scale=scale, output_type="latent").codes

    scales = SCALES[1:]  # of one number of rows: each is compiled for
    expected = [run(pipe, scale) for scale in scales]
    pipe.transformer.compile()
    for codes, right in zip(together(pipe, run, scales), expected, strict=True):
        assert torch.equal(codes, right)
    assert pipe.transformer._compiled_step._step is not None


# Callbacks ------------------------------------------------------------------------------------------------


def test_an_interruption_stops_its_own_run_only(pipe):
    def run(pipe, stop_at):
        def stop(pipe, step, index, kwargs):
            pipe._interrupt = index == stop_at
            return kwargs

        return pipe(1, generator=seed(), output_type="latent", callback_on_step_end=stop).codes, pipe.interrupt

    for (codes, seen), stop_at in zip(together(pipe, run, [2, 5, None]), [2, 5, None], strict=True):
        assert codes.shape[1] == (N if stop_at is None else stop_at + 1)
        assert seen == (stop_at is not None)


def test_callbacks_see_and_change_their_own_run(pipe):
    seen = {}

    def watch(scale):
        def callback(given, step, index, kwargs):
            assert given is pipe
            seen.setdefault(scale, []).append((pipe.guidance_scale, pipe.num_timesteps))
            pipe._guidance_scale += 1
            return kwargs

        return callback

    streams = [
        pipe.stream(1, generator=seed(), guidance_scale=scale, prefix_codes=[[3] * k], output_type="latent",
                    callback_on_step_end=watch(scale))
        for scale, k in ((2.0, 1), (5.0, 4))
    ]  # fmt: skip
    for _ in zip(*streams, strict=False):
        pass
    assert seen[2.0] == [(2.0 + i, N - 1) for i in range(len(seen[2.0]))]
    assert seen[5.0] == [(5.0 + i, N - 4) for i in range(N - 4)]


def test_a_callback_may_run_the_pipeline_itself(pipe):
    seen = []

    def preview(pipe, step, index, kwargs):
        inner = pipe(2, generator=seed(), guidance_scale=9.0, num_tokens=3, output_type="latent")
        assert torch.equal(inner.codes, expected)
        seen.append((pipe.guidance_scale, pipe.num_timesteps))
        return kwargs

    expected = tiny_pipeline()(2, generator=seed(), guidance_scale=9.0, num_tokens=3, output_type="latent").codes
    codes = pipe([0, 3], generator=seed(), guidance_scale=6.0, output_type="latent", callback_on_step_end=preview)
    assert torch.equal(codes.codes, alone(6.0))
    assert seen == [(6.0, N)] * N


# From outside ---------------------------------------------------------------------------------------------


def test_before_any_run(pipe):
    assert not pipe.interrupt and pipe.num_timesteps == 0 and pipe.guidance_scale == 1.0
    pipe._interrupt = True
    assert pipe(1, output_type="latent").codes.shape == (1, N)  # each run begins anew


def test_the_loop_over_a_stream_stops_that_stream(pipe):
    stopped, other = (pipe.stream(1, generator=seed(), output_type="latent") for _ in range(2))
    indices = []
    for a, b in zip(other, stopped, strict=False):  # `stopped` is the one that goes on last
        pipe._interrupt = b.index == 3
        indices.append((a.index, b.index))
    assert indices == [(1, 1), (2, 2), (3, 3)]
    assert [event.index for event in other] == list(range(5, N + 1))  # the fourth was taken by `zip`


def test_that_stream_is_the_one_of_the_last_event(pipe):
    a, b = (pipe.stream(1, generator=seed(), output_type="pt") for _ in range(2))
    for stream in (a, b, a, b):  # with the second event the tokens of the next ones are sampled, too
        next(stream)
    next(a)
    pipe._interrupt = True
    assert list(a) == [] and [event.index for event in b] == list(range(3, N + 1))


def test_another_thread_stops_what_goes_on(pipe):
    assert pipe(1, output_type="latent").codes.shape[1] == N  # this thread has a run of its own, which is over
    first_step, stopped = threading.Event(), threading.Event()

    def wait(pipe, step, index, kwargs):
        first_step.set()
        assert stopped.wait(60)
        return kwargs

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(pipe, 2, output_type="latent", callback_on_step_end=wait)
        assert first_step.wait(60)
        pipe._interrupt = True
        assert pipe.interrupt
        stopped.set()
        assert run.result().codes.shape[1] == 1


def test_tasks_of_one_thread_are_told_apart(pipe):
    async def consume(stop_at):
        indices = []
        for event in pipe.stream(1, output_type="latent"):
            indices.append(event.index)
            await asyncio.sleep(0)
            pipe._interrupt = event.index == stop_at
        return indices

    async def both():
        return await asyncio.gather(consume(3), consume(7))

    assert asyncio.run(both()) == [[1, 2, 3], list(range(1, 8))]


def test_states_are_forgotten_with_their_pipeline():
    runs = Runs()
    with runs.going_on(RunState(2.0)):
        pass
    before = len(run_state._current.get())
    del runs
    assert len(run_state._current.get()) == before - 1
