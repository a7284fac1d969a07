"""What the demo's tests share: tiny models, and a page that is served."""

import contextlib
import math
import threading
import time
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest
import torch
from gradio import networking
from PIL import Image
from playwright.sync_api import sync_playwright

from spectralar.demo.model import Model
from spectralar.demo.page import build, launch_options
from spectralar.demo.runs import SECONDS_A_MESSAGE
from spectralar.inference import streaming
from tests.demo.browsing import PATIENCE
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
    """A served page, with a brake on its model: tests let tokens through instead of racing with them."""

    url: str
    model: Model
    steps: int = 0  # of the transformer, so far
    limit: float = math.inf  # the model waits before it takes more steps than this
    changed: threading.Condition = field(default_factory=threading.Condition)

    def allow(self, steps=math.inf):
        """Lets so many more steps through."""
        with self.changed:
            self.limit = self.steps + steps
            self.changed.notify_all()

    def wait(self):
        with self.changed:
            assert self.changed.wait_for(lambda: self.steps < self.limit, timeout=120)
            self.steps += 1
        if self.limit < math.inf:
            time.sleep(1.5 * SECONDS_A_MESSAGE)  # slow enough for every token to have a message of its own


@contextlib.contextmanager
def served(model, **options):
    """The page of a model on a free port; `options` are those of `Blocks.launch`."""
    page = Page("", model)
    step = model.pipe.transformer.step

    def braked(*args, **kwargs):
        page.wait()
        return step(*args, **kwargs)

    model.pipe.transformer.step = braked
    at_once, streaming.MASK_TOKENS_AT_ONCE = streaming.MASK_TOKENS_AT_ONCE, 1  # a frame for every token let through
    demo = build(model)
    # Gradio gives its own server three seconds to answer, which a busy machine may exceed.
    networking.url_ok = lambda url: httpx.head(url, timeout=60).status_code == 200
    try:
        _, page.url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(), **options)
        yield page
    finally:
        page.allow()
        demo.close()
        model.pipe.transformer.step = step
        streaming.MASK_TOKENS_AT_ONCE = at_once


# -------------------------------------------------------------------------------------------------- browser
# For a module with a fixture `page`, what `served` gives.


@pytest.fixture(scope="module")
def browser(chromium):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def problems():
    """What pages report as errors, and requests to other hosts."""
    return []


@pytest.fixture(scope="module")
def open_tab(browser, page, problems):
    contexts = []

    def open_tab(query="", width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
        tab = context.new_page()
        tab.set_default_timeout(PATIENCE)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda r: None if r.url.startswith((page.url, "data:", "blob:")) else problems.append(r.url))
        tab.goto(page.url + query)
        contexts.append(context)
        return tab

    yield open_tab
    for context in contexts:
        context.close()


@pytest.fixture
def no_problems(page, problems):
    """For tests in which pages must report no error, and ask no other host."""
    page.allow()
    problems.clear()
    yield
    page.allow()
    assert not problems


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    y, x = np.mgrid[:60, :80]
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.stack([x * 3, y * 4, 255 - x * 3], -1).astype(np.uint8)).save(path)
    return path
