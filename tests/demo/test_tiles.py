"""Classes to try: what a tile shows is what the class gives."""

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from spectralar.demo.model import Model
from spectralar.demo.tiles import SEED, markup, samples
from tests.helpers import tiny_pipeline


def test_a_tile_shows_the_first_image_of_its_class(model):
    pictures = samples(model)
    assert list(pictures) == model.examples
    for class_id, address in pictures.items():
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
        _, pixels = model.last(class_id, 4, SEED, guidance_scale=2.0)
        assert np.array_equal(image, pixels[0])


def test_tiles_are_buttons_with_names_that_are_text(model):
    pipe = tiny_pipeline(dtype=torch.float32, id2label={0: "<script>", 1: "b", 2: "c", 3: "d"})
    html = markup(Model("m", pipe, "m"), {1: "data:x"})
    assert re.findall(r'data-id="(\d+)"', html) == ["0", "1", "2", "3"]
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert html.count("src=") == 1 and 'data-id="1"><img src="data:x"' in html
