"""What a visitor's session keeps: what its buttons need, and nothing large. There are up to 128 of them."""

import gc

import gradio as gr
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from spectralar.demo.model import Model
from spectralar.demo.page import build
from spectralar.demo.turns import Turns

HANDLERS = {  # by the view that is filled: a function's name, and what it takes besides its turn
    "generated": ("generate", (0, 2, 7, 2.0, "constant", 1.0, 0, 1.0, 20, "")),
    "reconstructed": ("show_origin", ("example:cat",)),
    "bands-view": ("show_origin", ("sample:1:3",)),
    "remixed": ("remix", (None, None, "sample:1:3", "sample:2:3", "tail", 0, 0, 2.0)),
}


@pytest.fixture(scope="module")
def demo(colour_model):
    return build(colour_model)


def kept(demo, view):
    """Values of the session's states when a handler of the page has come to its end."""
    name, inputs = HANDLERS[view]
    shows = (f for f in demo.fns.values() if view in [component.elem_id for component in f.outputs])
    handler = next(f.fn for f in shows if f.name == name)
    states = {}
    for news in handler(Turns(), *inputs):
        states |= {component: value for component, value in news.items() if isinstance(component, gr.State)}
    values = [value for value in states.values() if value is not None]
    assert values
    return values


def parts(thing, found):
    """All that a value holds on to, but for the model, which is every visitor's."""
    if id(thing) not in found and not isinstance(thing, Model | type) and not callable(thing):
        found[id(thing)] = thing
        for part in gc.get_referents(thing):
            parts(part, found)
    return found.values()


@pytest.mark.parametrize("view", HANDLERS)
def test_a_session_keeps_no_frames_and_no_figures(demo, view):
    image = 3 * 24 * 24
    for value in parts(kept(demo, view), {}):
        assert not isinstance(value, Figure)
        if isinstance(value, torch.Tensor | np.ndarray):
            assert np.prod(value.shape) <= image
        elif isinstance(value, str | bytes):
            assert len(value) < 1000
