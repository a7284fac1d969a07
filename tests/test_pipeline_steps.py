"""The pipeline step by step: callbacks, interruption and streaming."""

from contextlib import closing

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback

from spectralar import SpectralARPipeline
from spectralar.inference import streaming
from spectralar.inference.frames import PrefixDecoder
from tests.helpers import seed, sharing_weights, tiny_tokenizer, tiny_transformer

N = 12  # tokens of the tiny models, 16x16 images, 4 classes
WAIT = 8  # tokens that a frame may wait for: fewer than N, so that streams come in several groups


@pytest.fixture(autouse=True)
def longest_wait(monkeypatch):
    monkeypatch.setattr(streaming, "LONGEST_WAIT", WAIT)


@pytest.fixture
def freed(monkeypatch):
    """Counts how often the offload hooks are freed."""
    calls = []
    real = SpectralARPipeline.maybe_free_model_hooks
    monkeypatch.setattr(SpectralARPipeline, "maybe_free_model_hooks", lambda self: (calls.append(1), real(self)))
    return calls


# Callbacks ------------------------------------------------------------------------------------------------


def test_callbacks_see_every_step(pipe):
    seen = []

    def callback(pipe, step, index, kwargs):
        assert set(kwargs) <= set(pipe._callback_tensor_inputs)
        seen.append((step, index, kwargs["latents"]))
        return kwargs

    whole = pipe([1, 2], generator=seed(), output_type="latent", callback_on_step_end=callback).codes
    assert [event[:2] for event in seen] == [(i, i) for i in range(N)]
    assert all(torch.equal(latents, whole[:, : i + 1]) for i, (_, _, latents) in enumerate(seen))
    seen.clear()
    arguments = {"prefix_codes": whole[:, :4], "output_type": "latent"}
    out = pipe([1, 2], generator=seed(), callback_on_step_end=callback, **arguments)
    assert [event[:2] for event in seen] == [(i, i + 4) for i in range(N - 4)] and pipe.num_timesteps == N - 4
    assert torch.equal(out.codes, whole)


def test_callbacks_may_ask_for_nothing_and_return_nothing(pipe):
    seen = []
    arguments = {"callback_on_step_end_tensor_inputs": [], "output_type": "latent"}
    out = pipe(1, generator=seed(), callback_on_step_end=lambda *given: seen.append(given[3]), **arguments)
    assert seen == [{}] * N
    assert torch.equal(out.codes, pipe(1, generator=seed(), output_type="latent").codes)


def test_latents_of_the_last_step_can_be_replaced(pipe):
    def callback(pipe, step, index, kwargs):
        if step == pipe.num_timesteps - 1:
            kwargs["latents"] = torch.zeros_like(kwargs["latents"])
        return kwargs

    assert pipe([1, 2], output_type="latent", callback_on_step_end=callback)[0].abs().sum() == 0


@pytest.mark.parametrize("token", [0, 2, 5])
def test_the_model_goes_on_from_what_a_callback_returns(pipe, token):
    """Token `token` is replaced after token 5 has been sampled: as if the changed six had been given."""
    changed = {}

    def callback(pipe, step, index, kwargs):
        if index == 5:
            kwargs["latents"][:, token] = (kwargs["latents"][:, token] + 1) % 32  # in place
            changed["codes"] = kwargs["latents"].clone()
        return kwargs

    arguments = {"guidance_scale": 4.0, "output_type": "pt"}
    out = pipe([0, 1, 2, 3], generator=seed(), callback_on_step_end=callback, **arguments)
    expected = pipe([0, 1, 2, 3], generator=seed(), prefix_codes=changed["codes"], **arguments)
    assert torch.equal(out.codes, expected.codes)
    assert not torch.equal(out.codes[:, 6:], pipe([0, 1, 2, 3], generator=seed(), **arguments).codes[:, 6:])
    for every in (1, 4):  # token 5 falls between two frames
        *_, last = pipe.stream([0, 1, 2, 3], generator=seed(), callback_on_step_end=callback, every=every, **arguments)
        assert torch.allclose(last.images, expected.images, atol=1e-10)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 9, dtype=torch.int64), r"latents of shape \(1, 1\)"),
        (torch.tensor([[32]]), "between 0 and 31"),
        (torch.tensor([[0.5]]), "between 0 and 31"),
        (None, "latents of callback_on_step_end must be a rectangular array"),
        ("codes", "latents of callback_on_step_end must be integers between 0 and 31, got 'codes'"),
    ],
)
def test_bad_latents_are_told(pipe, latents, message):
    with pytest.raises(ValueError, match=message):
        pipe(1, callback_on_step_end=lambda *_: {"latents": latents})


def test_callbacks_that_return_something_else_are_told(pipe):
    with pytest.raises(ValueError, match="callback_on_step_end must return the dict it is given, or None, got 5"):
        pipe(1, callback_on_step_end=lambda *_: 5)
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        pipe(1, callback_on_step_end=lambda pipe, *_: setattr(pipe, "_guidance_scale", float("nan")))
    latents = [[3]]
    for kind in (np.array(latents), latents, torch.tensor(latents, dtype=torch.int8)):
        out = pipe(1, num_tokens=1, output_type="latent", callback_on_step_end=lambda *_, kind=kind: {"latents": kind})
        assert out.codes.tolist() == latents


def test_a_stream_begun_in_inference_mode_goes_on_outside(pipe):
    expected = pipe(1, generator=seed(), output_type="pt")
    with torch.inference_mode():
        stream = pipe.stream(1, generator=seed(), output_type="pt", prefix_codes=expected.codes[:, :2])
        next(stream)
    *_, last = stream
    assert torch.equal(last.codes, expected.codes) and not last.codes.is_inference()


def test_a_run_keeps_the_models_that_it_began_with(shared):
    expected = shared(1, generator=seed(), output_type="pt")
    pipe = sharing_weights(shared)

    def unload(pipe, step, index, kwargs):
        pipe.transformer, pipe.tokenizer = None, None
        return kwargs

    out = pipe(1, generator=seed(), output_type="pt", callback_on_step_end=unload)
    assert torch.equal(out.codes, expected.codes) and torch.equal(out.images, expected.images)
    with pytest.raises(ValueError, match="no transformer"):
        pipe(1)
    pipe = sharing_weights(shared)
    stream = pipe.stream(1, generator=seed(), output_type="pt")
    next(stream)
    pipe.transformer, pipe.tokenizer = tiny_transformer(codebook_size=16), tiny_tokenizer(codebook_size=16)
    *_, last = stream
    assert torch.equal(last.codes, expected.codes) and torch.allclose(last.images, expected.images, atol=1e-10)


def test_guidance_scale_is_read_in_every_step(pipe, steps):
    def raise_it(pipe, step, index, kwargs):
        pipe._guidance_scale += 1.0
        return kwargs

    pipe(1, guidance_scale=2.0, callback_on_step_end=raise_it)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    pipe(1, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0

    def switch_on(pipe, step, index, kwargs):
        if index == 4:
            pipe._guidance_scale = 5.0
        return kwargs

    steps.clear()
    arguments = {"guidance_scale": 1.0, "callback_on_step_end": switch_on, "output_type": "latent"}
    codes = pipe([0, 1, 2, 3], generator=seed(), **arguments).codes
    assert steps == [(4, 0)] + [(4, 1)] * 4 + [(8, 5)] + [(8, 1)] * 6
    arguments = {"prefix_codes": codes[:, :5], "guidance_scale": 5.0, "output_type": "latent"}
    assert torch.equal(pipe([0, 1, 2, 3], generator=seed(), **arguments).codes, codes)


def test_interruption_keeps_what_is_there(pipe, steps):
    def stop(pipe, step, index, kwargs):
        pipe._interrupt = index == 4
        return kwargs

    whole = pipe([1, 2], generator=seed(), output_type="pt")
    steps.clear()
    out = pipe([1, 2], generator=seed(), output_type="pt", callback_on_step_end=stop)
    assert pipe.interrupt and len(steps) == 5
    assert torch.equal(out.codes, whole.codes[:, :5])
    assert torch.allclose(out.images, pipe.decode(whole.codes, 5), atol=1e-10)
    *_, last = pipe.stream([1, 2], generator=seed(), output_type="pt", callback_on_step_end=stop, every=4)
    assert last.index == 5 and torch.allclose(last.images, out.images, atol=1e-10)
    assert pipe(1, output_type="latent").codes.shape == (1, N)  # the next call is not interrupted


@pytest.mark.parametrize("stop_at", [3, 5])
def test_interruption_between_frames(pipe, steps, stop_at):
    """As a Stop button does it, from outside; also before any token is sampled."""
    seen = []
    for event in pipe.stream([1, 2], prefix_codes=[[4, 5, 6]]):
        seen.append(event.index)
        pipe._interrupt = event.index == stop_at
    assert seen == list(range(3, stop_at + 1)) and len(steps) in (stop_at - 3, WAIT)  # a group is sampled before


def test_an_image_takes_one_token_at_least(pipe, monkeypatch):
    real = pipe.progress_bar

    def progress_bar(total):
        pipe._interrupt = True  # from another thread, before the first token
        return real(total=total)

    monkeypatch.setattr(pipe, "progress_bar", progress_bar)
    assert pipe([1, 2], output_type="pt").codes.shape == (2, 1)


def test_diffusers_callback_objects(pipe):
    class ZeroAtTheEnd(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == pipeline.num_timesteps - 1:
                callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
            return callback_kwargs

    arguments = {"callback_on_step_end_tensor_inputs": ["nothing"], "output_type": "latent"}  # it knows itself
    out = pipe(1, callback_on_step_end=ZeroAtTheEnd(), **arguments)
    assert out.codes.abs().sum() == 0


# Streaming ------------------------------------------------------------------------------------------------


def test_frames_are_the_decoded_prefixes(pipe):
    arguments = {"num_images_per_prompt": 2, "output_type": "pt"}
    whole = pipe(["bag", 3], generator=seed(), **arguments)
    frames = pipe.decode(whole.codes, list(range(1, N + 1)))  # (B, N, C, H, H)
    events = list(pipe.stream(["bag", 3], generator=seed(), **arguments))
    assert [event.index for event in events] == list(range(1, N + 1))
    for event in events:
        assert torch.equal(event.codes, whole.codes[:, : event.index])
        assert torch.allclose(event.images, frames[:, event.index - 1], atol=1e-10)


@pytest.mark.parametrize(
    ("k", "n", "every", "expected"),
    [
        (0, None, 5, [5, 10, 12]),
        (0, None, 12, [12]),
        (0, 7, 100, [7]),
        (4, None, 1, [4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (4, None, 5, [4, 5, 10, 12]),
        (4, 6, 4, [4, 6]),
        (N, None, 3, [N]),
    ],
)
def test_which_frames_come(pipe, k, n, every, expected):
    codes = pipe([1, 2], generator=seed(), output_type="latent").codes
    arguments = {"prefix_codes": codes[:, :k], "num_tokens": n, "every": every, "output_type": "pt"}
    events = list(pipe.stream([1, 2], generator=seed(), **arguments))
    assert [event.index for event in events] == expected
    for event in events:
        assert torch.allclose(event.images, pipe.decode(codes, event.index), atol=1e-10)


def test_stream_output_types(pipe):
    kinds = ("pil", "np", "latent")
    last = {kind: list(pipe.stream([1, 2], generator=seed(), output_type=kind))[-1] for kind in kinds}
    assert [image.size for image in last["pil"].images] == [(16, 16)] * 2
    assert np.array_equal(np.stack(last["pil"].images), (last["np"].images[..., 0] * 255).round())
    assert torch.equal(last["latent"].images, last["np"].codes)


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, list[int]]]:
    """Number of tokens and prefix lengths of each call of the decoder from now on."""
    seen = []
    append, frames = PrefixDecoder.append, PrefixDecoder.frames

    def record(self, lengths):
        seen.append((self.length, list(lengths)))
        return frames(self, lengths)

    monkeypatch.setattr(PrefixDecoder, "append", lambda self, c: (seen.append(c.shape[1]), append(self, c)))
    monkeypatch.setattr(PrefixDecoder, "frames", record)
    return seen


def test_each_token_is_decoded_once(pipe, decoded):
    list(pipe.stream(1))
    assert decoded == [1, (1, [1]), 8, (9, list(range(2, 10))), 3, (12, [10, 11, 12])]
    decoded.clear()
    list(pipe.stream(1, every=5, prefix_codes=[[1, 2]]))
    assert decoded == [2, (2, [2]), 3, (5, [5]), 5, (10, [10]), 2, (12, [12])]  # ten tokens are too long to wait
    decoded.clear()
    list(pipe.stream(1, every=3))
    assert decoded == [3, (3, [3]), 6, (9, [6, 9]), 3, (12, [12])]
    decoded.clear()
    list(pipe.stream(1, output_type="latent"))
    assert not decoded


def test_large_frames_are_decoded_one_by_one(pipe, decoded):
    list(pipe.stream([1] * 33, output_type="pt"))  # of 16 mask tokens each: two would be 1056
    assert decoded == [entry for k in range(1, N + 1) for entry in (1, (k, [k]))]


def test_closing_stops_the_computation(pipe, steps, freed):
    with closing(pipe.stream([1, 2], output_type="pt")) as stream:
        assert not steps  # nothing runs before the first event is asked for
        for event in stream:
            if event.index == 3:
                break
    assert len(steps) == 1 + WAIT < N and len(freed) == 1
    assert pipe(1, output_type="latent").codes.shape == (1, N)


def test_pipelines_that_share_weights_run_side_by_side(pipe):
    other = sharing_weights(pipe)
    assert other.labels == pipe.labels and other.transformer is pipe.transformer
    runs = [(pipe, {"class_labels": 1, "guidance_scale": 1.0}), (other, {"class_labels": 2, "guidance_scale": 5.0})]
    streams = [p.stream(generator=seed(), output_type="latent", **arguments) for p, arguments in runs]
    *_, together = zip(*streams, strict=True)
    for (p, arguments), event in zip(runs, together, strict=True):
        assert torch.equal(event.codes, p(generator=seed(), output_type="latent", **arguments).codes)


@pytest.mark.parametrize("every", [0, -1, 1.5, None])
def test_every_must_be_a_positive_integer(pipe, every):
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        pipe.stream(1, every=every)


def test_hooks_are_freed_after_an_error_too(pipe, freed):
    def fail(*_):
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        pipe(1, callback_on_step_end=fail)
    with pytest.raises(RuntimeError, match="from the callback"):
        list(pipe.stream(1, callback_on_step_end=fail))
    with pytest.raises(ValueError, match="between 0 and 31"):
        pipe.decode([[99]])
    assert len(freed) == 3
