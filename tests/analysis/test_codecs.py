"""Rate-distortion of plain codecs: nothing beyond the budget, nothing left of it."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.analysis.codecs import baselines, dct_truncation, file_codec, prefix_bits
from spectralar.analysis.quality import psnr
from spectralar.spectral import dct2, square_frequency
from tests.analysis.photos import photo


def test_bits_of_prefixes():
    assert prefix_bits(4, 1024) == [10, 20, 30, 40]


@pytest.mark.parametrize("channels", [1, 3])
def test_dct_truncation_keeps_to_its_budget(channels):
    size = 32
    image = photo(channels, size)
    frequency = square_frequency(size)
    bound = size / (1.0 + frequency)
    last = 0.0
    for bits in (2 * channels, 40, 200, 352, 2000, 30000):
        coded = dct_truncation(image, bits)
        coefficients = dct2(coded)
        side = max([0, *(frequency[(coefficients.abs() > 1e-4).any(dim=0)] + 1).tolist()])
        # Levels of some depth that fits the budget: whole steps within the range, as many as the depth has.
        depths = [d for d in range(2, 9) if channels * side**2 * d <= bits]
        levels = [coefficients / (2 * bound / 2**d) for d in depths]
        assert any(
            (x - x.round()).abs().max() < 1e-2 and x.min() > -(2 ** (d - 1)) - 0.1 and x.max() < 2 ** (d - 1) - 0.9
            for d, x in zip(depths, levels, strict=True)
        )
        quality = float(psnr(coded, image))
        assert quality >= last
        last = quality
    assert last > 35
    assert dct_truncation(image, 2 * channels - 1) is None


def test_dct_truncation_spends_its_bits_on_levels():
    """In a budget of 3 bits one coefficient of 3 bits is all there is: the mean in steps of H / 4."""
    image = torch.full((1, 8, 8), 0.24)  # mean coefficient 8 * 0.24 = 1.92, one step of 2
    torch.testing.assert_close(dct_truncation(image, 3), torch.full((1, 8, 8), 0.25))
    torch.testing.assert_close(dct_truncation(image, 2), torch.zeros(1, 8, 8))  # steps of 4: nearer to none


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_a_file_is_the_best_that_fits(file_format, channels):
    image = photo(channels, 32)
    pixels = ((image + 1) * 127.5).round().byte()
    picture = Image.fromarray(pixels[0].numpy() if channels == 1 else pixels.movedim(0, -1).numpy())
    options = {"optimize": True} if file_format == "JPEG" else {"method": 4}
    files = []  # of every quality: bits, picture, PSNR
    for quality in range(96):
        buffer = BytesIO()
        picture.save(buffer, file_format, quality=quality, **options)
        decoded = np.array(Image.open(buffer).convert(picture.mode), dtype=np.float32) / 127.5 - 1
        decoded = torch.from_numpy(decoded).view(32, 32, channels).movedim(-1, 0)
        files.append((8 * len(buffer.getvalue()), decoded, float(psnr(decoded, image))))
    smallest = files[0][0]
    budgets = [64, smallest - 1, smallest, files[30][0], files[70][0] + 5, 10**6]
    coded = file_codec(image, budgets, file_format)
    assert coded[:2] == [None, None]
    for bits, x in zip(budgets[2:], coded[2:], strict=True):
        fitting = [(decoded, quality) for size, decoded, quality in files if size <= bits]
        assert any(torch.equal(x, decoded) for decoded, _ in fitting)
        # Sizes do not quite grow with quality, so that the search may miss the best by a little.
        assert float(psnr(x, image)) >= max(quality for _, quality in fitting) - 0.5


def test_baselines():
    image = photo(3, 32)
    bits = prefix_bits(4, 2048)
    coded = baselines(image.double(), bits)
    assert list(coded) == ["DCT truncation", "JPEG", "WebP"]
    assert all(len(images) == 4 for images in coded.values())
    assert coded["JPEG"] == [None] * 4  # headers alone take more
    assert all(x is not None for x in coded["DCT truncation"])
