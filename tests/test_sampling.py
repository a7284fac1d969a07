"""Sampling against slow plain references, exact distributions, and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from spectralar.sampling import (
    GUIDANCE_SCHEDULES,
    MAX_GUIDANCE,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    check_sampling_arguments,
    draw_uniforms,
    filter_logits,
    guidance_at,
    guidance_curve,
    guide,
    inverse_cdf,
    sample_tokens,
)

LARGEST_BELOW_ONE = 1 - 2**-24  # what torch.rand can return in float32


def reference_distribution(logits, temperature, top_k, top_p):
    """Probabilities after temperature, top-k and top-p of one row, written as the definitions read."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    if top_k:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 9, 0.6), (1.0, 1, 1.0), (1.0, 0, 1e-6)]


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_filter_is_the_definition(temperature, top_k, top_p):
    logits = 2 * torch.randn(50, 17, dtype=torch.float64)
    ours = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    for row, expected in zip(ours.tolist(), logits.tolist(), strict=True):
        assert row == pytest.approx(reference_distribution(expected, temperature, top_k, top_p), abs=1e-12)


def test_filter_with_everything_on_changes_nothing():
    logits = torch.randn(3, 8)
    assert filter_logits(logits) is logits
    assert filter_logits(logits, top_k=8) is logits


def test_top_k_keeps_exactly_k_even_where_logits_tie():
    kept = filter_logits(torch.zeros(4, 10), top_k=3).isfinite()
    assert kept.sum(-1).tolist() == [3] * 4


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    for top_p, count in [(0.01, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.874, 3), (0.876, 4)]:
        assert int(filter_logits(logits, top_p=top_p).isfinite().sum()) == count


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS[:5])
def test_tokens_follow_the_exact_distribution(temperature, top_k, top_p):
    draws = 100_000
    logits = 1.5 * torch.randn(12)
    expected = np.array(reference_distribution(logits.tolist(), temperature, top_k, top_p))
    tokens = sample_tokens(logits.expand(draws, -1), torch.rand(draws), temperature, top_k, top_p)
    counts = torch.bincount(tokens, minlength=12).numpy()
    inside = expected > 0
    assert counts[~inside].sum() == 0
    assert stats.chisquare(counts[inside], draws * expected[inside]).pvalue > 1e-3


def test_uniform_moves_through_the_codebook_in_proportion():
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, LARGEST_BELOW_ONE], dtype=torch.float64)
    assert sample_tokens(logits.expand(6, -1), uniforms).tolist() == [0, 0, 1, 1, 2, 2]


def test_temperature_zero_is_greedy():
    logits = torch.randn(20, 9)
    assert sample_tokens(logits, torch.rand(20), temperature=0).equal(logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_never_picks_a_token_that_is_out(dtype):
    """Impossible tokens at both ends and in the middle, and the extreme uniforms (1 too, which rounding can make)."""
    logits = torch.randn(2000, 400).to(dtype)
    logits[:, :5] = logits[:, 200:230] = logits[:, -5:] = -torch.inf
    for uniform in (0.0, LARGEST_BELOW_ONE, 1.0):
        uniforms = torch.full((2000,), uniform)
        for settings in [(1.0, 0, 1.0), (1.0, 50, 1.0), (1.0, 50, 0.9), (0.05, 0, 0.9)]:
            tokens = sample_tokens(logits, uniforms, *settings)
            possible = filter_logits(logits.float() / settings[0], *settings[1:]).isfinite()
            assert possible.gather(1, tokens[:, None]).all()


def test_parallel_cumsum_never_picks_a_token_that_is_out(monkeypatch):
    """On GPUs cumsum is a parallel scan: partial sums can rise by a rounding error at a token of probability 0."""

    def parallel_scan(x, dim):
        shift = 1
        while shift < x.shape[-1]:
            x = x + torch.nn.functional.pad(x[..., :-shift], (shift, 0))
            shift *= 2
        return x

    out = torch.rand(200, 128) < 0.5
    logits = torch.randn(200, 128).masked_fill(out, -torch.inf)
    cdf = parallel_scan(logits.softmax(-1), dim=-1)
    assert (out[:, 1:] & (cdf[:, 1:] > cdf[:, :-1])).any()  # else this would test nothing
    monkeypatch.setattr(torch.Tensor, "cumsum", parallel_scan)
    for uniforms in cdf.T:  # just where such a rise would be picked
        tokens = inverse_cdf(logits.softmax(-1), uniforms, summed_in_order=False)
        assert not out.gather(1, tokens[:, None]).any()


def test_both_searches_find_the_same_token():
    p = filter_logits(3 * torch.randn(500, 300), top_k=40).softmax(-1)
    for uniforms in (torch.rand(500), torch.zeros(500), torch.full((500,), LARGEST_BELOW_ONE)):
        assert inverse_cdf(p, uniforms, True).equal(inverse_cdf(p, uniforms, False))


def test_one_possible_token_is_always_picked():
    logits = torch.full((3, 6), -torch.inf)
    logits[:, 4] = 0
    assert sample_tokens(logits, torch.tensor([0.0, 0.5, LARGEST_BELOW_ONE])).tolist() == [4, 4, 4]


def test_token_does_not_depend_on_batch_mates():
    logits, uniforms = torch.randn(40, 300, dtype=torch.float64), torch.rand(40)
    for settings in [(1.0, 0, 1.0), (0.9, 20, 1.0), (1.0, 0, 0.7), (1.0, 30, 0.7)]:
        together = sample_tokens(logits, uniforms, *settings)
        alone = [sample_tokens(logits[i : i + 1], uniforms[i : i + 1], *settings) for i in range(40)]
        assert together.equal(torch.cat(alone))


@pytest.mark.parametrize("settings", [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.9, 20, 1.0), (1.0, 0, 0.7), (1.0, 30, 0.7)])
def test_nothing_waits_for_the_device(settings):
    """The meta device holds no values: reading one back, or a shape that depends on one, raises."""
    tokens = sample_tokens(torch.empty(4, 64, device="meta"), torch.empty(4, device="meta"), *settings)
    assert tokens.shape == (4,) and tokens.dtype == torch.int64


def test_guidance_ends_and_shapes():
    assert guidance_curve(5, 3.0) == [3.0] * 5
    assert guidance_curve(5, 3.0, "linear") == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    cosine = guidance_curve(5, 3.0, "cosine")
    assert cosine == pytest.approx([2 - math.cos(math.pi * i / 4) for i in range(5)])
    for schedule in GUIDANCE_SCHEDULES:
        assert guidance_at(0, 1, 3.0, schedule) == 3.0  # a sequence of one token
        assert guidance_curve(9, 1.0, schedule) == [1.0] * 9  # off stays off
        assert guidance_at(63, 64, 1.7, schedule) == 1.7  # the end is met exactly


def test_guide_is_exact_at_its_fixed_points():
    cond, uncond = torch.randn(2, 3, 7, dtype=torch.float64).unbind(0)
    for one, zero in ((1.0, 0.0), torch.tensor([1.0, 0.0], dtype=torch.float64)):
        assert guide(cond, uncond, one).equal(cond)
        assert guide(cond, uncond, zero).equal(uncond)
    assert torch.allclose(guide(cond, uncond, 3.0), 3 * cond - 2 * uncond)


def test_uniforms_of_an_image_do_not_depend_on_the_batch():
    rows = [draw_uniforms(batch, 33, torch.Generator().manual_seed(7)) for batch in (1, 2, 5)]
    assert rows[2].shape == (5, 33) and rows[2].dtype == torch.float32
    assert rows[2][:1].equal(rows[0]) and rows[2][:2].equal(rows[1])
    assert rows[2].unique().numel() > 5 * 33 - 3  # rows differ
    assert 0 <= rows[2].min() and rows[2].max() < 1


def test_uniforms_from_one_generator_an_image():
    seeded = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    rows = draw_uniforms(2, 16, seeded)
    assert rows[1:].equal(draw_uniforms(1, 16, torch.Generator().manual_seed(4)))
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        draw_uniforms(3, 16, seeded)


def test_uniforms_without_generator_follow_the_global_seed():
    torch.manual_seed(1)
    first = draw_uniforms(2, 8)
    assert not draw_uniforms(2, 8).equal(first)
    torch.manual_seed(1)
    assert draw_uniforms(2, 8).equal(first)


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [-0.1, math.inf, math.nan, 1e-30, 5000.0]),
        ("top_k", [-1, 1025, 2.5, math.nan]),
        ("top_p", [0.0, -0.5, 1.01, math.nan]),
        ("guidance_scale", [-1.0, math.inf, math.nan, 2000.0]),
        ("guidance_schedule", ["quadratic", None]),
    ],
)
def test_bad_arguments_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must .*{value}") as error:
            check_sampling_arguments(1024, **{name: value})
        assert len(str(error.value)) < 120
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        check_sampling_arguments(1024, guidance_schedule="quadratic")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_whatever_passes_gives_a_token(dtype):
    cond, uncond = torch.tensor([[20.0, -20, 3]], dtype=dtype), torch.tensor([[-20.0, 20, 1]], dtype=dtype)
    logits = guide(cond, uncond, MAX_GUIDANCE)
    for temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE):
        p = (logits.float() / temperature).softmax(-1)
        assert p.isfinite().all()
        assert sample_tokens(logits, torch.tensor([0.3]), temperature).tolist() == [0]


def test_good_arguments_pass():
    check_sampling_arguments(1024)
    check_sampling_arguments(1024, 0, 1024, 1e-3, 0, "cosine")
    check_sampling_arguments(1024, top_k=np.int64(5), temperature=np.float32(0.5))


def test_the_smallest_top_p_leaves_the_most_likely_token():
    logits = torch.tensor([[0.1, 2.0, 1.9], [3.0, -1.0, 2.0]])
    for top_p in (1e-300, 1e-46, 5e-324):  # 0 in float32
        assert sample_tokens(logits, torch.tensor([0.99, 0.0]), top_p=top_p).tolist() == [1, 0]


def test_no_token_lies_beyond_the_codebook():
    for value in (math.nan, math.inf):  # what is sampled of these is told elsewhere, and must not fail before
        logits = torch.tensor([[0.0, value, 1.0]])
        assert 0 <= sample_tokens(logits, torch.tensor([0.9])).item() < 3
