"""What the demo's tests share: tiny models, and a page that is served."""

import contextlib
import time
from dataclasses import dataclass

import pytest
import torch

from spectralar.demo.model import Model
from spectralar.demo.page import build, launch_options
from tests.helpers import tiny_pipeline


def tiny_model(channels=1, image_size=16, **tokenizer):
    return Model("tiny", tiny_pipeline(channels, image_size, dtype=torch.float32, tokenizer=tokenizer), "models/tiny")


@pytest.fixture(scope="session")
def model():
    """Grey, 16x16, 12 tokens of 32 codes."""
    return tiny_model()


@pytest.fixture(scope="session")
def colour_model():
    """Colour, 24x24, 20 tokens of 64 codes."""
    return tiny_model(3, 24, num_tokens=20, codebook_size=64)


@dataclass
class Page:
    url: str
    model: Model
    steps: int = 0  # transformer steps so far
    delay: float = 0.0  # seconds that each of them takes at least


@contextlib.contextmanager
def served(model):
    """The page of a model on a free port, with a brake on its sampling."""
    page = Page("", model)
    step = model.pipe.transformer.step

    def slow_step(*args, **kwargs):
        page.steps += 1
        time.sleep(page.delay)
        return step(*args, **kwargs)

    model.pipe.transformer.step = slow_step
    demo = build(model)
    try:
        _, page.url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
        yield page
    finally:
        demo.close()
        model.pipe.transformer.step = step
