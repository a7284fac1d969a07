"""Which prefixes a step decodes, and what the nested loss is."""

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch

from spectralar.spectral import cutoff_schedule
from train.objectives.nested import nested_loss, sample_lengths


def test_prefix_lengths_are_half_uniform_and_half_powers_of_two():
    n, count = 12, 40_000
    lengths = sample_lengths(count // 2, 2, n, torch.Generator().manual_seed(0))
    assert lengths.shape == (count // 2, 3)
    assert (lengths[:, 0] == n).all()
    expected = np.full(n, 0.5 / n)
    expected[[0, 1, 3, 7]] += 0.5 / 4  # 1, 2, 4, 8
    counts = torch.bincount(lengths[:, 1:].flatten(), minlength=n + 1)[1:]
    assert scipy.stats.chisquare(counts.numpy(), expected * count).pvalue > 1e-3
    assert sample_lengths(3, 0, n, torch.Generator()).tolist() == [[n]] * 3


@pytest.mark.parametrize("law, values", [("uniform", range(1, 13)), ("powers", (1, 2, 4, 8))])
def test_other_laws_of_prefix_lengths(law, values):
    lengths = sample_lengths(6000, 2, 12, torch.Generator().manual_seed(0), law)[:, 1:].flatten()
    counts = torch.bincount(lengths, minlength=13)
    assert set(counts.nonzero().flatten().tolist()) == set(values)
    assert scipy.stats.chisquare(counts[list(values)].numpy()).pvalue > 1e-3


def test_the_full_length_is_among_the_powers_where_it_is_one():
    lengths = sample_lengths(20_000, 1, 8, torch.Generator().manual_seed(0))[:, 1]
    assert (lengths == 8).double().mean() == pytest.approx(0.5 / 8 + 0.5 / 4, abs=0.02)


@pytest.mark.parametrize("weight, boost", [(0.5, 8), (2.0, 1)])
def test_nested_loss_is_the_weighted_error_against_low_passes(weight, boost):
    size, n = 16, 8
    cutoffs = torch.tensor((1, *cutoff_schedule(size, n, 1.5)))
    images, frames = torch.randn(3, 2, size, size), torch.randn(3, 3, 2, size, size)
    lengths = torch.tensor([[n, 1, 4], [n, 8, 2], [n, 6, 6]])
    losses = nested_loss(frames, images, lengths, cutoffs, weight, boost)
    full, prefix = [], []
    for i in range(3):
        for s in range(3):
            r = int(cutoffs[lengths[i, s]])
            spectrum = scipy.fft.dctn(images[i].double().numpy(), axes=(1, 2), norm="ortho")
            spectrum[:, r:] = spectrum[:, :, r:] = 0
            target = scipy.fft.idctn(spectrum, axes=(1, 2), norm="ortho")
            error = np.square(frames[i, s].double().numpy() - target).mean()
            full.append(error) if s == 0 else prefix.append(weight * min(boost, size / r) * error)
    assert float(losses["full"]) == pytest.approx(np.mean(full), rel=1e-5)
    assert float(losses["prefix"]) == pytest.approx(np.sum(prefix) / 3, rel=1e-5)  # a sum over prefixes, not a mean


def test_without_cutoffs_every_prefix_is_held_against_the_image():
    """The baseline of nested dropout without spectral targets."""
    images, frames = torch.randn(3, 2, 16, 16), torch.randn(3, 2, 2, 16, 16)
    lengths, cutoffs = torch.tensor([[8, 1], [8, 3], [8, 8]]), torch.tensor((1, *cutoff_schedule(16, 8, 0.0)))
    losses = nested_loss(frames, images, lengths, cutoffs)
    torch.testing.assert_close(losses["prefix"], 0.5 * (frames[:, 1] - images).square().mean())
