"""What tests do with the page in a browser, and wait for."""

import base64
import io
import re
import time

import numpy as np
from PIL import Image
from playwright.sync_api import expect

PATIENCE = 120_000  # ms; a busy machine is slow, and waiting costs nothing where it is not
VIEW = "#reconstructed"


def k_of(tab, view="#generated"):
    """Prefix length shown, 0 before there is one."""
    text = tab.locator(f"{view} [data-read=k]").inner_text()
    return int(text.split()[0]) if text[0].isdigit() else 0


def wait_for_k(tab, k, view="#generated"):
    expect(tab.locator(f"{view} [data-read=k]")).to_have_text(re.compile(rf"^{k} "), timeout=PATIENCE)


def pixels(tab, index=0, view="#generated", mode="RGB"):
    """A picture as it stands on its canvas: (H, H, 3), or (H, H) with mode "L"."""
    url = tab.locator(f"{view} canvas").nth(index).evaluate("node => node.toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert(mode))


def wait_for_codecs(tab):
    """Until the last of the charts of Reconstruct is complete."""
    expect(tab.locator("#reconstructed .chart").nth(3)).to_contain_text("cannot go this low", timeout=PATIENCE)


def move_slider(tab, k, view="#generated"):
    tab.locator(f"{view} .slider").evaluate(
        "(node, k) => { node.value = k; node.dispatchEvent(new Event('input', { bubbles: true })); }", k
    )


def wait_until(condition):
    """For what the browser does in the background, such as decoding new frames."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
