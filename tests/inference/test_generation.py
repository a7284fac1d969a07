"""The token loop with cache and joined rows, against one that has neither."""

import pytest
import torch

from spectralar.inference.generation import TokenGenerator
from spectralar.sampling import guidance_at, guide, sample_tokens
from tests.helpers import tiny_transformer

B, N = 3, 12


@pytest.fixture(scope="module", params=[0, 8], ids=["numbers", "entries"])
def model(request):
    return tiny_transformer(codebook_dim=request.param).double()


@pytest.fixture
def labels():
    return torch.tensor([0, 3, 1])


@pytest.fixture
def uniforms():
    return torch.rand(B, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reference(model, labels, codes, uniforms, scales, schedule="constant", **filters):
    """Two full passes a token; `scales` has the guidance scale of each."""
    codes = codes.clone()
    for index in range(codes.shape[1]):
        cond = model(codes[:, :index], labels)[:, -1]
        uncond = model(codes[:, :index], torch.full_like(labels, model.null_label))[:, -1]
        logits = guide(cond, uncond, guidance_at(index, N, scales[index], schedule))
        codes[:, index] = sample_tokens(logits, uniforms[:, index], **filters)
    return codes


def generate(generator, scales, start=0):
    for index in range(start, len(scales)):
        generator.sample(index, scales[index])
    return generator.codes


@pytest.mark.parametrize(
    ("scale", "schedule", "filters"),
    [
        (1.0, "constant", {}),
        (3.0, "constant", {}),
        (0.0, "constant", {}),
        (4.0, "linear", {"temperature": 0.7, "top_k": 9}),
        (4.0, "cosine", {"top_p": 0.8}),
        (2.0, "constant", {"temperature": 0.0}),
    ],
)
@torch.no_grad()
def test_tokens_are_those_of_full_passes(model, labels, uniforms, scale, schedule, filters):
    codes = torch.zeros(B, N, dtype=torch.int64)
    expected = reference(model, labels, codes, uniforms, [scale] * N, schedule, **filters)
    generator = TokenGenerator(model, labels, codes, uniforms, schedule, **filters)
    assert torch.equal(generate(generator, [scale] * N), expected)
    assert generator.codes is codes  # in place
    assert codes.unique().numel() > 5


@pytest.mark.parametrize("batch", [1, 2, 3])
@torch.no_grad()
def test_tokens_are_those_of_full_passes_in_float32(labels, uniforms, batch):
    model, codes = tiny_transformer(), torch.zeros(batch, N, dtype=torch.int64)
    labels, uniforms = labels[:batch], uniforms[:batch].float()
    for scale in (1.0, 3.0):
        expected = reference(model, labels, codes, uniforms, [scale] * N)
        assert torch.equal(generate(TokenGenerator(model, labels, codes.clone(), uniforms), [scale] * N), expected)


@torch.no_grad()
def test_scale_may_change_from_token_to_token(model, labels, uniforms):
    scales = [1.0] * 4 + [3.0] * 4 + [1.0] * 4  # unconditional rows start late, and are not used at the end
    codes = torch.zeros(B, N, dtype=torch.int64)
    expected = reference(model, labels, codes, uniforms, scales)
    assert not torch.equal(expected, reference(model, labels, codes, uniforms, [1.0] * N))
    assert torch.equal(generate(TokenGenerator(model, labels, codes, uniforms), scales), expected)


@torch.no_grad()
def test_given_tokens_are_continued(model, labels, uniforms):
    codes = torch.zeros(B, N, dtype=torch.int64)
    whole = generate(TokenGenerator(model, labels, codes, uniforms), [2.0] * N).clone()
    for start in (1, 5, N - 1):
        codes = torch.zeros(B, N, dtype=torch.int64)
        codes[:, :start] = whole[:, :start]
        assert torch.equal(generate(TokenGenerator(model, labels, codes, uniforms), [2.0] * N, start), whole)


@torch.no_grad()
def test_restart_takes_changed_tokens_in(model, labels, uniforms):
    def run(restart):
        generator = TokenGenerator(model, labels, torch.zeros(B, N, dtype=torch.int64), uniforms)
        generate(generator, [2.0] * 6)
        generator.codes[:, 1] = 7
        if restart:
            generator.restart()
        return generate(generator, [2.0] * N, 6).clone()

    changed = run(restart=True)
    fresh = changed.clone()
    generate(TokenGenerator(model, labels, fresh, uniforms), [2.0] * N, 6)
    assert torch.equal(changed, fresh)
    assert not torch.equal(run(restart=False), changed)


@torch.no_grad()
def test_nested_codebooks_bound_each_position(model, labels, uniforms):
    sizes = [1, 2, 3, 4, 6, 8, 8, 16, 16, 16, 31, 32]
    codes = torch.zeros(B, N, dtype=torch.int64)
    generate(TokenGenerator(model, labels, codes, uniforms, codebook_sizes=sizes), [2.0] * N)
    assert (codes < torch.tensor(sizes)).all()
    free = torch.zeros_like(codes)
    generate(TokenGenerator(model, labels, free, uniforms), [2.0] * N)
    assert not (free < torch.tensor(sizes)).all()
