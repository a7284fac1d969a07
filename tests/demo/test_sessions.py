"""What a visitor's session keeps: what its buttons need, and nothing large. There are up to 128 of them."""

import gc

import gradio as gr
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from spectralar.demo.model import Model
from spectralar.demo.page import build

HANDLERS = {
    "generate._Tab.generate": (0, 2, 7, 2.0, "constant", 1.0, 0, 1.0, 20, ""),
    "reconstruct._Tab.reconstruct": ("example:cat", None),
    "bands.build.<locals>.analyse": ("sample:1:3", None),
    "remix._Tab.remix": (None, None, "sample:1:3", "sample:2:3", "tail", 0, 0, 2.0),
}


@pytest.fixture(scope="module")
def demo(colour_model):
    return build(colour_model)


def kept(demo, handler, inputs):
    """Values of the session's states when a handler of the page has come to its end."""
    functions = [f.fn for f in demo.fns.values() if hasattr(f.fn, "__qualname__")]
    named = {f"{function.__module__}.{function.__qualname__}": function for function in functions}
    states = {}
    for news in named[f"spectralar.demo.{handler}"](*inputs):
        states |= {component: value for component, value in news.items() if isinstance(component, gr.State)}
    assert states and None not in states.values()
    return list(states.values())


def parts(thing, found):
    """All that a value holds on to, but for the model, which is every visitor's."""
    if id(thing) not in found and not isinstance(thing, Model | type) and not callable(thing):
        found[id(thing)] = thing
        for part in gc.get_referents(thing):
            parts(part, found)
    return found.values()


@pytest.mark.parametrize("handler", HANDLERS)
def test_a_session_keeps_no_frames_and_no_figures(demo, handler):
    image = 3 * 24 * 24
    for value in parts(kept(demo, handler, HANDLERS[handler]), {}):
        assert not isinstance(value, Figure)
        if isinstance(value, torch.Tensor | np.ndarray):
            assert np.prod(value.shape) <= image
        elif isinstance(value, str | bytes):
            assert len(value) < 1000
