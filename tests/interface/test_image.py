"""Preprocessing of images of every kind. What one PIL image becomes is also tested in train/data/test_images.py."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.interface.image import preprocess_pil, to_model_input


def encoded(image: Image.Image, kind: str, **options) -> Image.Image:
    """`image` written to a file's bytes and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


@pytest.fixture
def pixels():
    """(20, 12, 3) uint8, smooth in space, so that resizing stays in range, and different in each channel."""
    y, x = np.mgrid[:20, :12]
    waves = [np.sin(0.3 * y + phase) + np.cos(0.4 * x * (phase + 1)) for phase in range(3)]
    return ((np.stack(waves, -1) + 2) / 4 * 255).round().astype(np.uint8)


# One PIL image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"]
)
def test_every_mode_becomes_grey_or_colour(mode, channels):
    via = {"RGBa": "RGBA", "PA": "P", "La": "LA", "LAB": "RGB", "I": "L", "F": "L"}.get(mode, "RGB")
    white = Image.new("RGB", (12, 10), "white").convert(via)
    white = Image.new("LAB", (12, 10), (255, 128, 128)) if mode == "LAB" else white.convert(mode)
    array = preprocess_pil(white, 8, channels)
    assert array.shape == (channels, 8, 8) and array.dtype == np.uint8
    assert array.min() >= 254


def test_the_middle_square_is_taken_and_filtered():
    wide = np.zeros((8, 24), np.uint8)
    wide[:, 8:16] = np.tile([0, 255], (8, 4))  # stripes at the highest frequency, in the middle only
    array = preprocess_pil(Image.fromarray(wide), 4, 1)
    assert array.mean() == pytest.approx(127.5, abs=2)
    # A filter that only samples would give 0 or 255.
    assert array.min() > 90 and array.max() < 165


def test_exif_orientation_is_applied():
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # light above
    exif = Image.Exif()
    exif[0x0112] = 3  # the camera was upside down
    turned = encoded(image, "PNG", exif=exif)
    assert preprocess_pil(turned, 8, 1)[0, :, 0].tolist() == [0] * 4 + [255] * 4


def test_16_bit_files_are_scaled_not_clipped():
    ramp = np.tile(np.arange(0, 256, 32, dtype=np.uint16), (8, 1))
    file = encoded(Image.fromarray(ramp * 257), "PNG")
    assert file.mode.startswith("I")
    assert np.array_equal(preprocess_pil(file, 8, 1)[0], ramp)


def ranged(low: float, high: float, dtype=np.float32) -> Image.Image:
    """An 8x8 ramp from `low` to `high`, as mode "F" or "I"."""
    return Image.fromarray(np.linspace(low, high, 64).reshape(8, 8).astype(dtype))


RAMP = np.linspace(0, 255, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (ranged(0, 1), RAMP),
        (ranged(-0.0009, 1.0009), RAMP),  # rounding
        (ranged(0.2, 0.4), 51 + RAMP / 5),  # as it is, not stretched
        (ranged(0, 255), RAMP),
        (ranged(-0.2, 255.2), RAMP),
        (ranged(20, 50), 20 + RAMP * 30 / 255),
        (Image.fromarray(np.full((8, 8), 3, np.uint8)).convert("F"), np.full((8, 8), 3)),  # dark, but whole numbers
        (ranged(0, 255, np.int32), RAMP),
        (ranged(0, 3, np.int32), RAMP // 85),
        (ranged(0, 65535, np.int32), RAMP),
        (ranged(4096, 8192, np.int32), (4096 + RAMP * 4096 / 255) / 257),
        (ranged(0, 200, np.uint16), np.zeros((8, 8))),  # the mode says 16 bits
    ],
)
def test_ranges_of_grey_beyond_8_bits(image, expected):
    assert np.abs(preprocess_pil(image, 8, 1)[0] - expected).max() <= 1
    assert np.array_equal(to_model_input(image, 8, 3)[0, 0], to_model_input(image, 8, 1)[0, 0])


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (ranged(-0.012, 1.012), "mode F .* from -0.012 to 1.012"),  # as a Lanczos filter leaves them
        (ranged(0, 1.5), "from 0 to 1.5"),
        (ranged(0, 15.5), "from 0 to 15.5"),
        (ranged(-1, 1), "from -1 to 1"),
        (ranged(0, 65535), "from 0 to 6.554e"),
        (ranged(-5, 250), "from -5 to 250"),
        (ranged(-1, 255, np.int32), "mode I .* from -1 to 255"),
        (ranged(0, 256, np.int32), "from 0 to 256"),
        (ranged(0, 65536, np.int32), "from 0 to 6.554e"),
        (ranged(-70000, -1, np.int32), "from -7e\\+04 to -1"),
    ],
)
def test_other_ranges_are_told(image, found):
    for call in (preprocess_pil, to_model_input):
        with pytest.raises(ValueError, match=found):
            call(image, 8, 1)


@pytest.mark.parametrize("value", [1.01, 7.0, np.nan, np.inf, -np.inf, -0.01])
def test_one_pixel_does_not_make_the_others_black(value):
    pixels = np.random.default_rng(0).random((8, 8), np.float32)
    pixels[3, 4] = value
    with pytest.raises(ValueError, match="a PIL image of mode F must lie in 0..1 or"):
        to_model_input(Image.fromarray(pixels), 8, 1)


def test_images_of_too_many_pixels_are_told(monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # Pillow refuses twice as many
    for image in (Image.fromarray(pixels), pixels):
        with pytest.raises(ValueError, match="an image of 12 x 20 pixels is too large"):
            to_model_input(image, 8, 1)


# All kinds of input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_arrays_are_what_pil_images_are(pixels, channels):
    expected = to_model_input(Image.fromarray(pixels), 8, channels)
    assert expected.shape == (1, channels, 8, 8) and expected.dtype == torch.float32
    torch_pixels = torch.from_numpy(pixels).permute(2, 0, 1)
    for images in (pixels, pixels[None], torch_pixels, torch_pixels[None], [pixels], (torch_pixels,)):
        assert torch.equal(to_model_input(images, 8, channels), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_floats_go_the_same_way_without_rounding(pixels, layers, channels):
    """8-bit grey, grey + alpha, RGB and RGBA as floats differ from the same as PIL by the rounding to 8 bits only."""
    array = np.concatenate([pixels, pixels[..., :1]], -1)[..., [0, 3, 1, 2] if layers == 2 else [0, 1, 2, 3]]
    array = array[..., :layers]
    expected = to_model_input(array, 8, channels)
    for dtype in (np.float32, np.float64, np.float16):
        given = to_model_input(array.astype(dtype) / dtype(255), 8, channels)
        assert given.shape == (1, channels, 8, 8) and given.dtype == torch.float32
        assert torch.allclose(given, expected, atol=2 / 127.5)


def test_floats_of_the_right_size_stay_as_they_are():
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(to_model_input(x, 8, 1), x * 2 - 1)
    assert torch.equal(to_model_input(x[:, 0].unsqueeze(-1).numpy(), 8, 3), (x * 2 - 1).expand(-1, 3, -1, -1))
    assert to_model_input(x.bfloat16(), 8, 1).dtype == torch.float32
    eighths = ((8 * x).round() / 8).to(torch.float8_e4m3fn)
    assert torch.equal(to_model_input(eighths, 8, 1), eighths.float() * 2 - 1)


def test_rounding_beyond_the_range_is_clamped():
    x = torch.tensor([-5e-4, 0.5, 1 + 5e-4, 1.0]).expand(1, 4, 4)
    assert to_model_input(x, 4, 1)[0, 0, 0].tolist() == [-1, 0, 1, 1]


def test_luma_and_range():
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 8, 8)
    assert torch.allclose(to_model_input(red, 8, 1), torch.tensor(2 * 0.299 - 1))
    assert to_model_input(np.zeros((8, 8), np.uint8), 8, 1).unique().tolist() == [-1]
    assert to_model_input(np.full((8, 8), 255, np.uint8), 8, 1).unique().tolist() == [1]
    assert to_model_input(np.full((8, 8), 65535, np.uint16), 8, 1).unique().tolist() == [1]
    assert to_model_input(torch.full((1, 8, 8), 65535, dtype=torch.uint16), 8, 1).unique().tolist() == [1]


def test_alpha_is_laid_on_white():
    clear = torch.cat([torch.zeros(1, 8, 8), torch.tensor([0.25]).expand(1, 8, 8)])  # black, a quarter opaque
    assert torch.allclose(to_model_input(clear, 8, 1), torch.tensor(2 * 0.75 - 1))


def test_kinds_and_sizes_mix_in_a_list(pixels):
    mixed = [Image.fromarray(pixels), pixels[:, :, 0], torch.rand(2, 3, 5, 9), pixels[None] / 255.0]
    batch = to_model_input(mixed, 8, 3)
    assert batch.shape == (5, 3, 8, 8)
    assert torch.allclose(batch[0], batch[4], atol=2 / 127.5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        ("photo.png", "PIL images, numpy arrays, torch tensors or a list of these, got str"),
        ([None], "got NoneType"),
        (Image.new("L", (0, 4)), "no pixels"),
        (np.zeros((3, 8, 9)), r"numpy images must have shape \(B, H, W, C\), .* got \(3, 8, 9\)"),
        (np.zeros(8), r"got \(8,\)"),
        (np.zeros((8, 8, 5)), "1 to 4 channels"),
        (np.zeros((0, 8, 8, 1)), "no empty axis"),
        (torch.zeros(8, 8), r"torch images must have shape \(B, C, H, W\) or \(C, H, W\).* got \(8, 8\)"),
        (torch.zeros(8, 8, 3), "1 to 4 channels"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), "uint8 in 0..255, uint16 in 0..65535 or floats .* got int64"),
        (np.zeros((8, 8), bool), "got bool"),
        (np.zeros((8, 8), object), "got object"),
        (np.zeros((8, 8), complex), "got complex128"),
        (np.ma.masked_less(np.zeros((8, 8)), 1), "must not be masked arrays"),
        ([np.ma.zeros((8, 8), np.uint8)], "must not be masked arrays"),
        (torch.full((1, 8, 8), 255.0), "from 255 to 255: divide by 255"),
        (torch.linspace(-1, 1, 64).view(1, 8, 8), r"from -1 to 1: .* take x / 2 \+ 0.5"),
        (torch.full((1, 8, 8), torch.nan), "from nan to nan"),
        (torch.full((1, 8, 8), torch.inf), "from inf to inf"),
    ],
)
def test_bad_input_is_told(images, message):
    with pytest.raises(ValueError, match=message):
        to_model_input(images, 8, 1)


def test_one_bad_pixel_is_enough():
    x = torch.rand(2, 1, 8, 8)
    x[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="from nan to nan"):
        to_model_input(x, 8, 1)


def test_a_truncated_file_is_told(pixels):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="cannot be decoded"):
        to_model_input(Image.open(io.BytesIO(buffer.getvalue()[:2000])), 8, 1)
