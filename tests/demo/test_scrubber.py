import base64
import io

import numpy as np
import pytest
from PIL import Image

from spectralar.demo.scrubber import MAX_TOTAL_BYTES, SCRIPT, TEMPLATE, StripEncoder, scrubber, scrubber_value


def decoded(url):
    kind, _, data = url.partition(",")
    assert kind in ("data:image/webp;base64", "data:image/png;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
def test_strips_are_exact_and_in_order(shape):
    tiles = noise(5, *shape)
    strip = decoded(StripEncoder(10).encode(tiles))
    pixels = np.asarray(strip.convert("RGB" if len(shape) == 3 else "L"))
    assert pixels.shape[:2] == (16, 5 * 16)
    for i, tile in enumerate(tiles):
        np.testing.assert_array_equal(pixels[:, 16 * i : 16 * (i + 1)], tile)


def test_grey_and_colour_tiles_share_a_strip():
    grey, colour = noise(16, 16), noise(16, 16, 3)
    pixels = np.asarray(decoded(StripEncoder(10).encode([grey, colour])))
    np.testing.assert_array_equal(pixels[:, :16], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(pixels[:, 16:], colour)


def test_all_strips_stay_within_the_budget_whatever_the_size():
    # Noise is the worst case: 16 images of 256 x 256 at 64 prefix lengths are 200 MB of it.
    encoder = StripEncoder(64)
    tiles = noise(16, 256, 256, 3)
    sizes = [len(encoder.encode(tiles)) for _ in range(2)]
    assert sum(sizes) / 2 * 64 < 8e6
    assert not encoder.lossless and encoder.reduction > 1
    assert decoded(encoder.encode(tiles)).height == 256 // encoder.reduction


def test_what_coarse_strips_save_is_for_the_fine_ones():
    encoder = StripEncoder(4, max_total_bytes=40_000)
    for _ in range(3):
        encoder.encode(np.zeros((1, 96, 96, 3), np.uint8))
    url = encoder.encode(noise(1, 96, 96, 3))  # 28 kB as it is, more than a fourth of the bytes
    assert len(url) > 20_000 and encoder.lossless and encoder.num_left == 0 <= encoder.bytes_left


def test_a_strip_is_never_wider_than_webp_can_be():
    tiles = np.zeros((16, 1024, 1024), np.uint8)
    strip = decoded(StripEncoder(64).encode(tiles))
    assert strip.size == (16 * 512, 512)


def test_quality_falls_before_size_and_stays_down():
    encoder = StripEncoder(1, max_total_bytes=6000)
    assert decoded(encoder.encode(noise(1, 64, 64, 3))).height == 64
    assert (encoder.lossless, encoder.reduction) == (False, 1)
    encoder.encode(np.zeros((1, 64, 64, 3), np.uint8))
    assert not encoder.lossless  # or a picture would look better and worse by turns


def test_value_says_where_each_prefix_length_is():
    value = scrubber_value([{"title": "x", "captions": ["a"]}], (1, 2, 4, 8), 8, 1024, num_tokens=3)
    assert value["cutoffs"] == [1, 2, 4] and value["bits"] == [10.0, 20.0, 30.0]
    other = scrubber_value([], (1,), 8, 1024)
    assert value["id"] != other["id"]  # a new picture is never taken for more of the old one


def test_template_and_script_are_fit_for_gradio():
    # The template goes through Handlebars and a JavaScript template literal; props named in the script as strings
    # would become events; what a message says must not become markup.
    assert "${" not in TEMPLATE and "{{" not in TEMPLATE and "`" not in TEMPLATE
    assert "innerHTML" not in SCRIPT
    component = scrubber(hint="nothing yet", elem_id="x", actions=[{"name": "more", "label": "More"}])
    assert component.get_config()["props"]["hint"] == "nothing yet"
    assert callable(component.action) and callable(component.token)
    assert MAX_TOTAL_BYTES * 4 / 3 < 8e6
