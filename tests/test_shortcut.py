"""The spectral shortcut: what a token describes, and what the spectrum is behind it."""

import pytest
import torch
import torch.nn.functional as F

from spectralar.shortcut import RunningSpectrum, SpectralShortcut
from spectralar.spectral import dct2

CUTOFFS, H, C, D = (2, 3, 3, 5, 8), 8, 3, 6


@pytest.fixture
def shortcut() -> SpectralShortcut:
    shortcut = SpectralShortcut(CUTOFFS, H, C, D).double()
    generator = torch.Generator().manual_seed(0)
    for buffer in (shortcut.mean, shortcut.gain):
        buffer.add_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return shortcut


def directions(latents: torch.Tensor) -> torch.Tensor:
    """The entries of an endless codebook."""
    return F.normalize(latents, dim=-1)


def test_columns_of_a_basis_are_orthonormal_and_random_without_data(shortcut):
    for k, cutoff in enumerate(CUTOFFS):
        part = shortcut.part(k)
        assert part.shape == (C * cutoff**2, D - 1)
        torch.testing.assert_close(part.T @ part, torch.eye(D - 1, dtype=torch.float64), atol=1e-6, rtol=0)
    other = SpectralShortcut(CUTOFFS, H, C, D).double()
    assert torch.equal(other.basis, shortcut.basis)


def test_an_analysis_reads_its_band_of_the_residual_alone(shortcut):
    spectrum, so_far = torch.randn(2, 4, C, H, H, dtype=torch.float64)
    z = shortcut.analyse(spectrum, so_far, 2)
    r = CUTOFFS[2]
    expected = (spectrum - so_far)[:, :, :r, :r].reshape(4, -1) @ shortcut.part(2) / shortcut.scale[2]
    torch.testing.assert_close(z[:, :-1], expected)
    assert (z[:, -1] == shortcut.lift).all()
    spectrum[:, :, r:], spectrum[:, :, :, r:] = 9, 9
    assert torch.equal(shortcut.analyse(spectrum, so_far, 2), z)


def test_each_token_describes_what_those_before_it_left_over(shortcut):
    images = torch.rand(4, C, H, H, dtype=torch.float64) * 2 - 1
    latents = shortcut.latents(images, None, len(CUTOFFS), directions)
    spectrum, so_far = dct2(images), shortcut.mean.expand(4, -1, -1, -1).clone()
    for k, r in enumerate(CUTOFFS):
        torch.testing.assert_close(latents[:, k], shortcut.analyse(spectrum, so_far, k))
        shortcut.add(so_far, directions(latents[:, k]), k)
        assert not (so_far - shortcut.mean)[:, :, r:].any()
    for n in range(1, len(CUTOFFS)):
        torch.testing.assert_close(shortcut.latents(images, None, n, directions), latents[:, :n])


def test_what_a_network_adds_moves_later_latents_too(shortcut):
    images, extra = torch.rand(4, C, H, H, dtype=torch.float64), torch.zeros(4, 5, D, dtype=torch.float64)
    plain = shortcut.latents(images, None, 5, directions)
    torch.testing.assert_close(shortcut.latents(images, extra, 5, directions), plain)
    extra[:, 1] = 1
    moved = (shortcut.latents(images, extra, 5, directions) - plain).abs().amax(dim=(0, 2))
    assert moved[0] == 0
    torch.testing.assert_close(moved[1], torch.tensor(1.0, dtype=torch.float64))
    assert moved[2:].max() > 1e-3


def test_all_ways_to_a_prefix_agree(shortcut):
    entries = directions(torch.randn(3, 5, D, dtype=torch.float64))
    lengths = [4, 1, 5, 1, 2]
    visible = (torch.arange(5) < torch.tensor(lengths)[:, None]).expand(3, -1, -1)
    together = shortcut.prefixes(entries, visible)  # (3, 5, C, H, H)
    running = RunningSpectrum(shortcut)
    torch.testing.assert_close(running.at(entries, lengths), together)
    grown = RunningSpectrum(shortcut)
    for n in range(1, 6):  # tokens as they arrive
        frame = grown.at(entries[:, :n], [n])
        if n in lengths:
            torch.testing.assert_close(frame[:, 0], together[:, lengths.index(n)])
    for s, k in enumerate(lengths):
        alone = shortcut.begin(3)
        for i in range(k):
            alone[:, :, : CUTOFFS[i], : CUTOFFS[i]] += shortcut.synthesise(entries[:, i], i)
        torch.testing.assert_close(together[:, s], alone)


def test_prefixes_are_differentiable_in_the_entries(shortcut):
    entries = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    visible = torch.arange(5) < torch.tensor([[5, 2], [3, 1]])[..., None]
    assert torch.autograd.gradcheck(lambda x: shortcut.prefixes(x, visible), entries, fast_mode=True)


def test_a_codebook_of_one_dimension_has_no_room_for_a_direction():
    with pytest.raises(ValueError, match="codebook_dim of at least 2, got 1"):
        SpectralShortcut(CUTOFFS, H, C, 1)
