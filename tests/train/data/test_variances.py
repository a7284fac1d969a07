"""Variances of a data set's DCT coefficients."""

import torch

from spectralar.spectral import idct2
from train.data.images import ImageSet, to_float
from train.data.variances import dct_variances


def image_set(pixels: torch.Tensor) -> ImageSet:
    return ImageSet(pixels, torch.zeros(len(pixels), dtype=torch.long), ["all"], 0)


def rounded(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def test_variances_are_those_that_images_were_drawn_with():
    """Coefficients of known variance in each of three colour axes, which are turned against red, green and blue."""
    generator = torch.Generator().manual_seed(0)
    deviations = 0.6 * 2.0 ** -torch.arange(3 * 16.0).view(3, 4, 4).div(12)  # far above what 8 bits round away
    axes = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    drawn = 0.3 * torch.randn(3000, 3, 4, 4, generator=generator) * deviations
    images = idct2(torch.einsum("ac,bcuv->bauv", axes, drawn)) + torch.tensor([0.2, -0.1, 0.0]).view(3, 1, 1)
    found = dct_variances([image_set(rounded(images))])
    wanted = (0.3 * deviations).square().sort(dim=0).values.double()  # (3, 4, 4)
    torch.testing.assert_close(found, wanted, rtol=0.12, atol=2e-5)


def test_variances_of_grey_images_are_plain_ones(monkeypatch):
    pixels = torch.randint(256, (700, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = idct2(torch.eye(16).view(16, 1, 4, 4)).flatten(1)  # rows: the basis images
    coefficients = to_float(pixels).flatten(1) @ expected.T
    found = dct_variances([image_set(pixels)])
    torch.testing.assert_close(found.flatten(), coefficients.double().var(dim=0, correction=0), rtol=1e-4, atol=0)
    some = dct_variances([image_set(pixels)], count=100)
    assert not torch.equal(some, found)
    torch.testing.assert_close(some, found, rtol=1.0, atol=0)


def test_sources_count_by_their_share():
    generator = torch.Generator().manual_seed(2)
    dark = torch.randint(0, 100, (60, 1, 4, 4), dtype=torch.uint8, generator=generator)
    light = torch.randint(100, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=generator)
    together = dct_variances([image_set(torch.cat([dark, dark, dark, light]))])  # 180 to 40
    torch.testing.assert_close(dct_variances([image_set(dark), image_set(light)], [18, 4]), together)
    assert not torch.allclose(dct_variances([image_set(dark), image_set(light)], [1, 1]), together)
