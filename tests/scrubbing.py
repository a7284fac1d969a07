"""Measures the frame scrubber in a browser: python -m tests.scrubbing

For models of several sizes, 16 images each: the size of the message with all frames, the size of a picture in it, and
how long a step of the slider takes, from the event until the pictures' pixels can be read. The frames are noise of
16 x 16, enlarged smoothly. The baseline is a step of the smallest case in the same run; aimed at: 8 MB, 32 ms.
"""

from __future__ import annotations

import json
import os
import shutil

import gradio as gr
import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from spectralar.demo.page import launch_options
from spectralar.demo.scrubber import StripEncoder, scrubber, scrubber_value
from spectralar.spectral import cutoff_schedule

CASES = [(32, 1, 32), (64, 3, 64), (256, 3, 64), (512, 3, 128)]  # image size, channels, tokens
COUNT = 16
STEPS = """async () => {
  const slider = document.querySelector('#s .slider'), times = [];
  const canvases = [...document.querySelectorAll('#s canvas')];
  for (let i = 0; i < 100; i++) {
    const begin = performance.now();
    slider.value = 1 + (i * 7) % slider.max;
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    for (const canvas of canvases) canvas.getContext('2d').getImageData(0, 0, 1, 1); // waits for the drawing
    times.push(performance.now() - begin);
    await new Promise(requestAnimationFrame);
  }
  return times;
}"""


def value(size: int, channels: int, num_tokens: int) -> dict:
    encoder = StripEncoder(num_tokens)
    result = scrubber_value(
        [{"title": "x", "captions": [""] * COUNT}], cutoff_schedule(size, num_tokens), size, 4096, selectable=True
    )
    rng = np.random.default_rng(0)
    for _ in range(num_tokens):
        coarse = Image.fromarray(rng.integers(0, 256, (COUNT * 16, 16, channels), np.uint8).squeeze())
        images = np.asarray(coarse.resize((size, COUNT * size), Image.Resampling.BICUBIC))
        result["frames"].append(encoder.encode(images.reshape(COUNT, size, *images.shape[1:])))
        result["codes"].append(rng.integers(0, 4096, COUNT).tolist())
    return result


def main() -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    baseline = None
    print(f"{'model':>18} {'message':>9} {'picture':>9} {'median':>9} {'slowest':>9} {'of the first':>13}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for size, channels, num_tokens in CASES:
            sent = value(size, channels, num_tokens)
            with gr.Blocks() as demo:
                view = scrubber(hint="", elem_id="s")
                view.value = sent
            _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(url)
            page.wait_for_function(
                f"document.querySelector('#s [data-read=k]')?.textContent.startsWith('{num_tokens} ')", timeout=240_000
            )
            side = page.locator("#s canvas").first.evaluate("canvas => canvas.width")
            times = page.evaluate(STEPS)
            page.close()
            demo.close()
            median = float(np.median(times))
            baseline = baseline or median
            sizes = f"{len(json.dumps(sent)) / 1e6:>6.2f} MB {side:>6} px"
            print(f"{size:>5} x {size}, N = {num_tokens:<4}{sizes}", end=" ")
            print(f"{median:>6.1f} ms {max(times):>6.1f} ms {median / baseline:>12.1f}x", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
