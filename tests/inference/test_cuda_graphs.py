"""Captured steps, on a CPU: graphs are played by a recorder that runs the same operations on the same tensors again.

As with a graph nothing of Python is left at a replay: numbers are those of the capture, addresses too.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectralar.inference import cuda_graphs
from spectralar.inference.batch import SamplingBatch
from spectralar.inference.cuda_graphs import KEPT, GraphedTokenGenerator, bucket, token_generator
from spectralar.inference.feedback import feedback_for
from spectralar.inference.generation import TokenGenerator
from tests.helpers import seed, tiny_pipeline, tiny_transformer
from tests.inference.test_batch import alone, request

N = 12
aten = torch.ops.aten
# What makes the host wait for a GPU.
SYNCHRONISING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default,
    aten.masked_select.default,
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """The operations that are run, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in SYNCHRONISING, f"{function} waits for the device"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.inference_mode():
            for function, args, kwargs, before in self.calls:
                after = function(*args, **kwargs)
                for new, old in zip(tree_leaves(after), tree_leaves(before), strict=True):
                    # Views and what is written in place are there already.
                    if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


@pytest.fixture
def captured(monkeypatch):
    """Recorders of all captures; graphs are taken to be available here, with none left from before."""
    recorders = []

    def capture(function, pool):
        with Recorder() as recorder:
            function()
        recorders.append(recorder)
        return recorder.replay

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "graph_pool", lambda: None)
    monkeypatch.setattr(cuda_graphs, "why_not", lambda transformer: None)
    monkeypatch.setattr(cuda_graphs, "_failed", [])
    cuda_graphs._unused.clear()
    return recorders


def generate(kind, model, labels, scales, given=None, seed_value=0, **settings):
    """Codes of one sample; `scales` has the guidance scale of each token."""
    codes = torch.zeros(len(labels), N, dtype=torch.int64)
    start = 0
    if given is not None:
        start = given.shape[1]
        codes[:, :start] = given
    uniforms = torch.rand(len(labels), N, generator=seed(seed_value))
    generator = kind(model, torch.tensor(labels), codes, uniforms, **settings)
    for index in range(start, N):
        generator.sample(index, scales[index])
    generator.close()
    assert generator.codes is codes
    return codes


def both(model, *args, **settings):
    """The same sample with graphs and without: equal, in float32, to the last code."""
    graphed = generate(GraphedTokenGenerator, model, *args, **settings)
    assert torch.equal(graphed, generate(TokenGenerator, model, *args, **settings))
    return graphed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_schedule": "linear", "temperature": 0.8, "top_k": 9},
        {"top_p": 0.8, "codebook_sizes": [4] * 6 + [32] * 6},
        {"temperature": 0.0},
    ],
)
def test_replays_are_the_steps(captured, settings):
    model = tiny_transformer()
    different = set()
    for number, (labels, scale) in enumerate([([0, 1, 2], 2.0), ([3, 3, 1], 4.0), ([1, 0, 3], 0.5)]):
        codes = both(model, labels, [scale] * N, seed_value=number, **settings)
        different.add(str(codes.tolist()))
        assert len(captured) == N  # the first sample captures, the others replay
    assert len(different) == 3


def test_replays_hear_the_decoder(captured):
    """What it expects is another number at each replay, of images beside spare rows, also behind given tokens."""
    pipe = tiny_pipeline(
        dtype=torch.float32, tokenizer={"spectral_shortcut": True, "encoder_layers": 0},
        transformer={"codebook_dim": 8, "decoder_feedback": True},
    )  # fmt: skip

    def sampled(kind, labels, scale, given=None):
        feedback = feedback_for(pipe.transformer, pipe.tokenizer, len(labels))
        return generate(kind, pipe.transformer, labels, [scale] * N, given, feedback=feedback)

    given = None
    for labels, scale in (([0, 1, 2], 2.0), ([3, 3, 1], 4.0), ([1, 0, 3], 1.0), ([2, 0, 1], 2.0)):
        codes = sampled(GraphedTokenGenerator, labels, scale, given)
        assert torch.equal(codes, sampled(TokenGenerator, labels, scale, given))
        given = codes[:, :5]


def test_batch_sizes_of_a_bucket_share_graphs(captured):
    model = tiny_transformer()
    for labels in ([0, 1, 2, 3], [1, 2, 3], [3, 2, 1, 0]):
        both(model, labels, [3.0] * N)
    assert len(captured) == N
    both(model, [2], [3.0] * N)
    assert len(captured) == 2 * N


def test_given_tokens_and_changing_scales(captured):
    model = tiny_transformer()
    scales = [1.0] * 4 + [3.0] * 4 + [1.0] * 4  # unconditional rows start late
    for number in range(3):
        codes = both(model, [0, 3], scales, seed_value=number)
        both(model, [1, 2], [2.0] * N, codes[:, :5], seed_value=number)


def test_tokens_changed_from_outside(captured):
    pipe = tiny_pipeline(dtype=torch.float32)

    def change(pipe, step, index, kwargs):
        if index == 5:
            kwargs["latents"][:, 2] = 7
        return kwargs

    arguments = {"output_type": "latent", "callback_on_step_end": change}
    runs = [pipe([0, 1, 2], generator=seed(), **arguments).codes for _ in range(3)]
    assert len(captured) >= N - 1 and (runs[0][:, 2] == 7).all()
    again = pipe([0, 1, 2], generator=seed(), prefix_codes=runs[0][:, :6], output_type="latent").codes
    for codes in runs:
        assert torch.equal(codes, again)


def test_a_step_changes_no_address(captured):
    model = tiny_transformer()
    labels, uniforms = torch.tensor([0, 1]), torch.rand(2, N)
    generator = GraphedTokenGenerator(model, labels, torch.zeros(2, N, dtype=torch.int64), uniforms)

    def addresses():
        cache = [*generator._cache.keys, *generator._cache.values]
        own = [generator.codes, generator.uniforms, generator._scales, *generator._conditioning]
        return [t.data_ptr() for t in own + cache]

    generator.sample(0, 2.0)
    before = addresses()
    for index in range(1, N):
        generator.sample(index, 1.0 + index)
        assert addresses() == before
    written = {args[0].data_ptr() for r in captured for f, args, _, _ in r.calls if f is aten.copy_.default}
    assert written  # keys, values and codes


def test_graphs_of_two_samples_at_once_are_apart(captured):
    model = tiny_transformer()
    uniforms = [torch.rand(2, N, generator=seed(i)) for i in range(2)]
    labels = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    expected = [generate(TokenGenerator, model, labels[i].tolist(), [2.0] * N, seed_value=i) for i in range(2)]
    for _ in range(2):
        codes = [torch.zeros(2, N, dtype=torch.int64) for _ in range(2)]
        pair = [GraphedTokenGenerator(model, *each) for each in zip(labels, codes, uniforms, strict=True)]
        for index in range(N):
            for generator in pair:
                generator.sample(index, 2.0)
        for generator, one, other in zip(pair, codes, expected, strict=True):
            generator.close()
            assert torch.equal(one, other)
    assert len(captured) == 2 * N


def test_threads_do_not_share_or_lose_graphs(captured, monkeypatch):
    class Slow(WeakKeyDictionary):
        def get(self, *args):
            found = super().get(*args)
            time.sleep(0.05)  # for the other thread to look as well
            return found

    monkeypatch.setattr(cuda_graphs, "_unused", Slow())
    model = tiny_transformer()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):  # the first round captures, the second takes what is there
            barrier = threading.Barrier(2)

            def run(i, barrier=barrier):
                barrier.wait(60)
                return generate(GraphedTokenGenerator, model, [i, 3], [2.0] * N, seed_value=i)

            for i, codes in enumerate(pool.map(run, range(2))):
                assert torch.equal(codes, generate(TokenGenerator, model, [i, 3], [2.0] * N, seed_value=i))
            assert len(cuda_graphs._unused[model]) == 2
    assert len(captured) == 2 * N


def test_weights_that_have_moved_are_captured_again(captured):
    model = tiny_transformer()
    both(model, [0], [2.0] * N)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.05 * torch.rand_like(parameter)
    both(model, [0], [2.0] * N)
    assert len(captured) == 2 * N and len(cuda_graphs._unused[model]) == 1


def test_few_sets_of_graphs_are_kept(captured):
    model = tiny_transformer()
    for top_k in range(1, KEPT + 3):
        both(model, [0], [2.0] * N, top_k=top_k)
    assert len(cuda_graphs._unused[model]) == KEPT


def test_without_capture_it_goes_on_with_one_line(captured, monkeypatch, caplog):
    def fail(function, pool):
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(cuda_graphs, "capture", fail)
    cuda_graphs._log_once.cache_clear()
    model = tiny_transformer()
    for _ in range(2):
        both(model, [0, 1], [2.0] * N)
    assert [r.getMessage() for r in caplog.records] == [
        "sampling without CUDA graphs: capture failed: operation not permitted"
    ]


def test_which_generator(monkeypatch, caplog):
    arguments = (torch.tensor([0]), torch.zeros(1, N, dtype=torch.int64), torch.rand(1, N))
    model = tiny_transformer()
    assert type(token_generator(model, *arguments)) is TokenGenerator
    assert not caplog.records  # on a CPU there is nothing to say
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert type(token_generator(model, *arguments)) is GraphedTokenGenerator
    cuda_graphs._log_once.cache_clear()
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    for _ in range(2):
        assert type(token_generator(model, *arguments)) is TokenGenerator
    assert len(caplog.records) == 1 and "ZeroGPU" in caplog.text


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 5, 33, 64, 65, 128, 200)] == [1, 2, 4, 8, 64, 64, 128, 128, 256]


def test_a_batch_is_captured_for_each_bucket(captured, monkeypatch):
    """Requests come and go between replays, with other labels, numbers, scales and positions."""
    batch = SamplingBatch(tiny_transformer(), 32)
    record = cuda_graphs.capture

    def capture(function, pool):  # a graph is captured without being run, which the recorder cannot do
        buffers = (batch._tokens, batch._positions, batch._codes)
        before = [buffer.clone() for buffer in buffers]
        replay = record(function, pool)
        for buffer, was in zip(buffers, before, strict=True):
            buffer.copy_(was)
        return replay

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    wanted = [request(1 + i % 2, i % 4, number=i, guidance_scale=1.5 + i, prefix=(3,) * (i % 3)) for i in range(6)]
    expected = [alone(batch.transformer, each) for each in wanted]
    for each in wanted:
        batch.add(each)
        for _ in range(4):
            batch.step()
    while not all(each.done for each in wanted):
        batch.step()
    for each, codes in zip(wanted, expected, strict=True):
        assert torch.equal(each.codes, codes)
    assert len(batch._graphs) == len(captured) <= 4  # 4 to 16 rows
