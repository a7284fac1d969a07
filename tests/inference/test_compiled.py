"""The compiled sampling step: equal to the plain one, and what happens where it cannot be compiled."""

import copy
import logging

import pytest
import torch

from spectralar import layers
from spectralar.inference import compiled
from spectralar.inference.generation import TokenGenerator
from tests.helpers import tiny_transformer

N = 12
needs_compiler = pytest.mark.skipif(not compiled.has_compiler(), reason="torch.compile needs a C++ compiler")


def steps(model, rows, codes):
    """Logits of all tokens (B, N, K), the first three from a given prefix."""
    labels = torch.arange(rows) % 4
    conditioning, cache = model.condition(labels), model.make_cache(rows)
    logits = [model.step(codes[:, :3], 0, conditioning, cache)]
    logits += [model.step(codes[:, i - 1 : i], i, conditioning, cache) for i in range(4, N)]
    fresh = model.make_cache(rows)
    return torch.stack([model.step(None, 0, conditioning, fresh), *logits], dim=1)


@pytest.mark.parametrize("codebook_dim", [0, 8])
@pytest.mark.parametrize("large", [False, True])
def test_fixed_shapes_give_the_same_logits(large, codebook_dim, monkeypatch):
    """Not compiled: the function that is."""
    if large:  # weights in blocks, too
        monkeypatch.setattr(layers, "LARGE_WEIGHT", 0)
        monkeypatch.setattr(layers, "BLOCK_WIDTH", 8)
    model = tiny_transformer(num_tokens=N, codebook_dim=codebook_dim).float()
    codes = torch.randint(model.config.codebook_size, (3, N))
    expected = steps(model, 3, codes)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model._compiled_step = compiled.CompiledStep()
    torch.testing.assert_close(steps(model, 3, codes), expected, rtol=1e-4, atol=1e-4)
    assert model._compiled_step._step is compiled.step_at, "it did not fail"


@needs_compiler
def test_compiled_sampling_gives_the_same_codes():
    model = tiny_transformer(num_tokens=N, num_layers=1).float()
    labels, uniforms = torch.tensor([0, 3]), torch.rand(2, N)

    def sample():
        codes = torch.zeros(2, N, dtype=torch.long)
        generator = TokenGenerator(model, labels, codes, uniforms)
        for i in range(N):
            generator.sample(i, 2.0)
        return codes

    expected = sample()
    torch._dynamo.reset()  # else what an earlier test compiled for these shapes serves here, and nothing is counted
    model.compile()
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    assert torch.equal(sample(), expected)
    assert frames["ok"] > before and model._compiled_step._step is not None


@pytest.mark.parametrize(("text", "said"), [("No working compiler\nand much more", "No working compiler"), ("", "")])
def test_without_a_compiler_sampling_goes_on(monkeypatch, caplog, text, said):
    def broken(function, **_):
        def fail(*_):
            raise RuntimeError(text)

        return fail

    model = tiny_transformer(num_tokens=N).float()
    codes = torch.randint(model.config.codebook_size, (2, N))
    expected = steps(model, 2, codes)
    monkeypatch.setattr(torch, "compile", broken)
    model._compiled_step = compiled.CompiledStep()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(steps(model, 2, codes), expected)
    assert [r.message for r in caplog.records] == [f"sampling without torch.compile: RuntimeError: {said}"]


def test_copies_compile_anew():
    model = tiny_transformer()
    model.compile()
    model._compiled_step._step = None
    assert copy.deepcopy(model)._compiled_step._step is not None
