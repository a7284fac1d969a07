"""Images to codes and codes to images by the pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.interface.image import to_model_input
from tests.helpers import tiny_pipeline

N = 12  # tokens of the tiny models, 16x16 images


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_encode_takes_images_of_any_kind():
    for channels in (1, 3):
        pipe = tiny_pipeline(channels)
        pixels = np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8)
        image = Image.fromarray(pixels)
        images = [image, image.convert("CMYK"), pixels / 255, torch.rand(1, 16, 16)]
        codes = pipe.encode(images)
        assert codes.shape == (4, N) and codes.dtype == torch.int64
        assert torch.equal(codes, pipe.tokenizer.encode(to_model_input(images, 16, channels).double()))
        assert torch.equal(pipe.encode(images[0]), codes[:1])
        assert not torch.equal(codes[0], codes[3])
    with pytest.raises(ValueError, match="lie in"):
        pipe.encode(torch.full((1, 3, 16, 16), 2.0))


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_shapes_and_types(channels):
    pipe = tiny_pipeline(channels)
    codes = torch.randint(0, 32, (3, N))
    raw = pipe.tokenizer.decode(codes, [1, 5, N]).detach()  # (B, S, C, H, H)
    raw = (raw / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(pipe.decode(codes), raw[:, 2], atol=1e-10)
    assert torch.allclose(pipe.decode(codes, 5), raw[:, 1], atol=1e-10)
    per_image = pipe.decode(codes, torch.tensor([1, 5, N]))
    assert torch.allclose(per_image, raw[torch.arange(3), torch.arange(3)], atol=1e-10)
    frames = pipe.decode(codes.tolist(), [1, 5, N])
    assert torch.equal(frames, raw) and frames.shape == (3, 3, channels, 16, 16)
    array = pipe.decode(codes, [1, 5, N], output_type="np")
    assert np.allclose(array, raw.movedim(2, -1)) and array.shape == (3, 3, 16, 16, channels)
    pil = pipe.decode(codes, [1, 5], output_type="pil")
    assert [len(row) for row in pil] == [2, 2, 2]
    assert np.array_equal(np.array(pil[2][1]).reshape(16, 16, -1), (array[2, 1] * 255).round())
    assert [image.mode for image in pipe.decode(codes, output_type="pil")] == ["L" if channels == 1 else "RGB"] * 3


def test_decode_clamps_and_the_tokenizer_does_not():
    pipe = tiny_pipeline()
    pipe.tokenizer.to_pixels.weight.data.mul_(10)
    codes = torch.randint(0, 32, (64, N))
    raw = pipe.tokenizer.decode(codes)
    assert raw.abs().max() > 1
    assert pipe.decode(codes).min() == 0 and pipe.decode(codes).max() == 1


@pytest.mark.parametrize(
    ("codes", "arguments", "message"),
    [
        ([[32]], {}, "between 0 and 31"),
        ([[-1]], {}, "between 0 and 31"),
        ([1, 2], {}, r"shape \(B, n\)"),
        ([[1], [2, 3]], {}, "codes must be a rectangular array of integers"),
        ([[1, 2]], {"num_tokens": 3}, "between 1 and 2, got 3"),
        ([[1, 2]], {"num_tokens": [1, 0]}, "between 1 and 2, got 0"),
        ([[1, 2]], {"num_tokens": [None]}, "between 1 and 2, got None"),
        ([[1, 2]], {"output_type": "latent"}, "output_type must be one of pil, np, pt, got 'latent'"),
    ],
)
def test_bad_codes_are_told(pipe, codes, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.decode(codes, **arguments)


def test_images_that_are_not_finite_are_told():
    pipe = tiny_pipeline(dtype=torch.float32)
    pipe.tokenizer.to_pixels.weight.data[3, 0] = torch.inf
    for call in (lambda: pipe(1), lambda: list(pipe.stream(1)), lambda: pipe.decode([[1, 2]], output_type="np")):
        with pytest.raises(ValueError, match="the images are not finite: the tokenizer's weights hold NaN"):
            call()
