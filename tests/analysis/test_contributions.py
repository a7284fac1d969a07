"""Quality, contributions, influence, statistics and rate-distortion, against closed forms and other libraries."""

import math

import pytest
import torch

from spectralar.analysis.contributions import energy, influence_matrix, influence_steps, token_contributions
from spectralar.analysis.statistics import (
    code_marginals,
)
from spectralar.spectral import band_energy, dct2, radial_frequency
from tests.helpers import tiny_tokenizer


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def tokenizer(request):
    return tiny_tokenizer(request.param).double()


def random_codes(tokenizer, count: int = 3, seed: int = 0) -> torch.Tensor:
    shape = (count, tokenizer.config.num_tokens)
    return torch.randint(tokenizer.config.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


def all_prefixes(tokenizer, codes):
    with torch.no_grad():
        return tokenizer.decode(codes, list(range(1, codes.shape[1] + 1)))


def test_contributions_add_up_to_the_frames(tokenizer):
    frames = all_prefixes(tokenizer, random_codes(tokenizer))
    parts = token_contributions(frames, tokenizer.cutoffs)
    assert parts.frames is frames and parts.refinement.shape == parts.opening.shape == frames.shape
    torch.testing.assert_close((parts.refinement + parts.opening).cumsum(dim=1), frames, rtol=0, atol=1e-12)
    assert parts.refinement[:, 0].abs().max() < 1e-12  # there is nothing to refine before the first token
    some = token_contributions(frames[:, :5], tokenizer.cutoffs)
    torch.testing.assert_close(some.refinement, parts.refinement[:, :5], rtol=0, atol=1e-12)


def test_each_part_stays_in_its_bands(tokenizer):
    cutoffs = tokenizer.cutoffs
    assert len(set(cutoffs)) < len(cutoffs)  # ties: tokens that open nothing
    frames = all_prefixes(tokenizer, random_codes(tokenizer))
    parts = token_contributions(frames, cutoffs)
    refining, opening = (band_energy(x, cutoffs) for x in (parts.refinement, parts.opening))  # (B, N, N)
    for k in range(1, len(cutoffs)):
        assert refining[:, k, k:].max() < 1e-20
        assert torch.cat([opening[:, k, :k], opening[:, k, k + 1 :]], dim=1).max() < 1e-20
        assert refining[:, k, :k].sum() > 1e-6
        assert (opening[:, k, k].sum() > 1e-6) == (cutoffs[k] > cutoffs[k - 1])
    # The parts are in different bands, so their energies add (Parseval).
    step = torch.cat([frames[:, :1], frames[:, 1:] - frames[:, :-1]], dim=1)
    torch.testing.assert_close(energy(parts.refinement) + energy(parts.opening), energy(step))
    torch.testing.assert_close(energy(step), dct2(step).square().sum(dim=(-3, -2, -1)))


def test_influence_is_zero_where_the_code_is_certain(tokenizer):
    codes = random_codes(tokenizer, 1).expand(2, -1)
    marginals = code_marginals(codes, tokenizer.config.codebook_size)
    marginals[4] = 1 / marginals.shape[1]
    matrix = influence_matrix(tokenizer, codes, marginals)
    certain = torch.arange(len(matrix)) != 4
    assert matrix[certain].max() < 1e-20
    assert matrix[4].sum() > 1e-6


def test_influence_by_hand(tokenizer):
    """With one other code that is certain to be drawn, a row is the spectrum of the exact difference."""
    codes, others = random_codes(tokenizer, 2), random_codes(tokenizer, 1, seed=1)
    matrix = influence_matrix(tokenizer, codes, code_marginals(others, tokenizer.config.codebook_size), draws=3)
    size = tokenizer.config.image_size
    assert matrix.shape == (tokenizer.config.num_tokens, round(math.sqrt(2) * (size - 1)) + 1)
    k = 7
    changed = codes.clone()
    changed[:, k - 1] = others[:, k - 1]
    with torch.no_grad():
        difference = tokenizer.decode(changed, k) - tokenizer.decode(codes, k)
    power = dct2(difference).square().sum(dim=1).mean(dim=0)  # (H, H)
    for f in (0, 1, 3, 5):
        expected = power[radial_frequency(size) == f].sum()
        torch.testing.assert_close(matrix[k - 1, f].double(), expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(matrix[k - 1].sum().double(), energy(difference).mean(), rtol=1e-4, atol=0)


def test_influence_stays_below_the_cutoff_and_follows_its_seed(tokenizer):
    codes = random_codes(tokenizer, 2)
    marginals = torch.ones(codes.shape[1], tokenizer.config.codebook_size)  # weights need not be normalised
    matrix = influence_matrix(tokenizer, codes, marginals, draws=2, seed=1)
    assert matrix.min() >= 0 and matrix.isfinite().all()
    for row, r in zip(matrix, tokenizer.cutoffs, strict=True):
        # Inside the square of r the largest radial frequency is that of its corner, sqrt(2) (r - 1).
        corner = round(math.sqrt(2) * (r - 1))
        assert row[corner + 1 :].sum() < 1e-10 < row[: corner + 1].sum()
    assert torch.equal(matrix, influence_matrix(tokenizer, codes, marginals, draws=2, seed=1))
    assert not torch.equal(matrix, influence_matrix(tokenizer, codes, marginals, draws=2, seed=2))


def test_influence_comes_one_token_at_a_time(tokenizer):
    codes = random_codes(tokenizer, 1)
    marginals = torch.ones(codes.shape[1], tokenizer.config.codebook_size)
    steps = influence_steps(tokenizer, codes, marginals)
    first = next(steps)
    steps.close()
    assert torch.equal(first, influence_matrix(tokenizer, codes[:, :1], marginals[:1])[0])


@pytest.mark.parametrize("marginals", [torch.ones(11, 32), torch.ones(12, 31), torch.zeros(12, 32)])
def test_unfit_marginals_are_refused_at_once(marginals):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"weights of shape \(12, 32\)"):
        influence_steps(tokenizer, random_codes(tokenizer), marginals)
