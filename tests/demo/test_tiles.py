"""Classes to try: what a tile shows is what the class gives."""

import base64
import io
import re
import time

import gradio as gr
import numpy as np
import torch
from PIL import Image

from spectralar.demo.model import Model
from spectralar.demo.tiles import AT_ONCE, SEED, markup, samples, tiles
from spectralar.inference.engine import EngineBusyError
from tests.demo.conftest import tiny_model
from tests.helpers import tiny_pipeline


def test_a_tile_shows_the_first_image_of_its_class(model):
    pictures = samples(model)
    assert list(pictures) == model.examples
    for class_id, address in pictures.items():
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
        _, pixels = model.last(class_id, 4, SEED, guidance_scale=2.0)
        assert np.array_equal(image, pixels[0])


def test_few_tiles_are_sampled_at_once():
    """The pictures that a visitor waits for begin at the same time."""
    model = tiny_model()
    real, running, most = model.last, [], []

    def last(class_id, *args, **kwargs):
        running.append(class_id)
        most.append(len(running))
        time.sleep(0.05)  # others would begin meanwhile
        running.remove(class_id)
        return real(class_id, *args, **kwargs)

    model.last = last
    assert list(samples(model)) == model.examples and len(model.examples) > AT_ONCE
    assert max(most) <= AT_ONCE


def test_tiles_are_buttons_with_names_that_are_text(model):
    pipe = tiny_pipeline(dtype=torch.float32, id2label={0: "<script>", 1: "b", 2: "c", 3: "d"})
    html = markup(Model("m", pipe, "m"), {1: "data:x"})
    assert re.findall(r'data-id="(\d+)"', html) == ["0", "1", "2", "3"]
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert html.count("src=") == 1 and 'data-id="1"><img src="data:x"' in html


def fill_of(model):
    """What fills the row when a page is opened, None if nothing does."""
    with gr.Blocks() as demo:
        tiles(model, "try")
    functions = [block.fn for block in demo.fns.values()]
    return functions[0] if functions else None


def test_on_zero_gpu_no_pictures_are_taken_from_a_visitors_share(monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    assert fill_of(tiny_model()) is None


def test_with_too_many_visitors_the_words_stay_and_the_next_one_has_pictures(monkeypatch):
    model = tiny_model()
    fill, real = fill_of(model), model.last

    def busy(*_, **__):
        raise EngineBusyError("too many others are being served.")

    model.last = busy
    assert fill() == gr.skip()
    model.last = real
    assert fill().count("src=") == len(model.examples)
