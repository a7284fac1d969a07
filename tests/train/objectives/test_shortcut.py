"""Fitting a spectral shortcut: what it finds in images of a known make, and what it leaves over."""

import pytest
import torch

from spectralar import SpectralTokenizer
from spectralar.spectral import dct2, idct2
from tests.helpers import tiny_tokenizer
from train.data.images import to_float
from train.objectives.shortcut import _kmeans, fit, images_to_fit

SHAPE = {"spectral_shortcut": True, "encoder_layers": 0, "alpha": 0.5, "codebook_dim": 6, "num_tokens": 6}


def correlated(count: int, channels: int = 1, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Random images whose spectrum falls with frequency, (n, C, H, H) uint8."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.arange(size)
    envelope = 1 / (1 + n[:, None] + n[None, :]).float() ** 1.5
    images = idct2(torch.randn(count, channels, size, size, generator=generator) * envelope * size / 4)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fitted(images: torch.Tensor, **shape) -> SpectralTokenizer:
    tokenizer = tiny_tokenizer(images.shape[1], image_size=images.shape[-1], **{**SHAPE, **shape})
    fit(tokenizer, images, show=False)
    return tokenizer.eval()


def left_over(tokenizer: SpectralTokenizer, images: torch.Tensor) -> torch.Tensor:
    """Squared error (N,) of the shortcut's prefixes against the images, a number a pixel."""
    x = to_float(images)
    entries = tokenizer.quantizer.lookup(tokenizer.encode(x))
    n = tokenizer.config.num_tokens
    visible = torch.arange(n) < torch.arange(1, n + 1)[:, None]
    spectra = tokenizer.shortcut.prefixes(entries, visible.expand(len(x), -1, -1))
    return (spectra - dct2(x)[:, None]).square().mean(dim=(0, 2, 3, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_token_lessens_what_is_left_over_also_of_images_not_fitted_to(channels):
    tokenizer = fitted(correlated(3000, channels))
    held_out = correlated(500, channels, seed=1)
    errors = left_over(tokenizer, held_out)
    mean = to_float(held_out).var(dim=0).mean()
    assert errors[0] < 0.8 * mean
    assert (errors[1:] < errors[:-1]).all()


def test_the_first_basis_is_that_of_the_principal_components():
    images = correlated(3000)
    tokenizer = fitted(images)
    r = tokenizer.cutoffs[0]
    spectra = dct2(to_float(images))[:, :, :r, :r].flatten(1)
    _, vectors = torch.linalg.eigh((spectra - spectra.mean(dim=0)).T.cov())
    best = vectors.flip(1)[:, :5]
    # As subspaces: the singular values of the product are the cosines of the angles between them.
    cosines = torch.linalg.svdvals(best.T @ tokenizer.shortcut.part(0))
    assert cosines.min() > 0.97
    expected = (spectra - spectra.mean(dim=0)) @ tokenizer.shortcut.part(0)
    torch.testing.assert_close(tokenizer.shortcut.scale[0], expected.square().mean().sqrt(), rtol=1e-2, atol=0)


def test_images_of_few_kinds_come_back_exactly():
    """Fewer images than entries: every one of them has an entry of its own at the first token, in their subspace."""
    images = correlated(5)
    tokenizer = fitted(images.repeat(40, 1, 1, 1), cutoffs=[16] * 6, codebook_size=64)
    assert left_over(tokenizer, images)[-1] < 0.02 * to_float(images).var(dim=0).mean()


def test_a_fit_is_a_function_of_the_images_and_the_seed():
    images = correlated(400)
    first, again = fitted(images).state_dict(), fitted(images).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = tiny_tokenizer(**SHAPE)
    fit(other, images, seed=1, show=False)
    assert not torch.equal(other.quantizer.codebook, first["quantizer.codebook"])


def test_what_is_fitted_is_as_it_ships():
    tokenizer = fitted(correlated(400))
    images = to_float(correlated(100, seed=1))
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.half().float().encode(images), codes)


def test_entries_are_unit_vectors_and_no_two_are_alike():
    codebook = fitted(correlated(60), codebook_size=256).quantizer.codebook
    torch.testing.assert_close(codebook.norm(dim=1), torch.ones(256), atol=1e-3, rtol=0)
    assert len(codebook.unique(dim=0)) == 256


def test_k_means_finds_clusters_and_moves_entries_that_none_uses():
    centres = torch.nn.functional.normalize(torch.randn(4, 5), dim=1)
    latents = torch.nn.functional.normalize(centres.repeat(100, 1) + 0.01 * torch.randn(400, 5), dim=1)
    codebook = -centres[:1].repeat(16, 1)  # all on one spot, far off
    for _ in range(4):
        _kmeans(codebook, latents, False, torch.Generator().manual_seed(0))
    assert ((centres @ codebook.T).amax(dim=1) > 0.99).all()


def test_a_band_of_fewer_coefficients_than_components():
    tokenizer = fitted(correlated(300), cutoffs=[1, 1, 2, 4, 8, 16])
    assert (tokenizer.shortcut.part(0)[:, 1:] == 0).all()
    assert left_over(tokenizer, correlated(50, seed=1)).isfinite().all()


def test_images_that_are_all_alike():
    images = correlated(1).repeat(10, 1, 1, 1)
    tokenizer = fitted(images)
    assert left_over(tokenizer, images).max() < 1e-4


def test_a_fit_needs_two_images():
    with pytest.raises(ValueError, match="at least two images, there are 1"):
        fitted(correlated(1))


@pytest.mark.parametrize("size, channels, count", [(32, 1, 20_000), (64, 3, 20_000), (256, 3, 1365)])
def test_no_more_images_than_fit_into_memory(size, channels, count):
    assert images_to_fit(size, channels) == count
