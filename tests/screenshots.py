"""Makes the README's pictures from the page as it is, with the embedded model: python -m tests.screenshots

Writes to assets/figures: one screenshot of each tab (light, dark, phone), page.png, which is the first tab after a
generation, and generation.gif, the animation that the page offers for download. Seeds are fixed, nothing is chosen.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright

from app import MODELS
from spectralar.demo.export import animation
from spectralar.demo.model import Model, find_models
from spectralar.demo.page import TABS, build, launch_options

FIGURES = Path(__file__).parent.parent / "assets" / "figures"
VIEWS = {"light": (1280, 900, "light"), "dark": (1280, 900, "dark"), "phone": (390, 844, "light")}
CLASSES = 8  # of the animation, the first ones, one image each
TIMEOUT = 120_000  # ms, for a tab to have drawn what it shows


def generation_gif(model: Model) -> bytes:
    """The first classes of the model, one image each, seed 0, coarse to fine."""
    labels = list(range(min(CLASSES, len(model.class_names))))
    generators = [torch.Generator().manual_seed(0) for _ in labels]
    steps = model.pipe.stream(labels, guidance_scale=2.0, generator=generators, output_type="np")
    frames = [(step.images * 255).round().astype("uint8") for step in steps]
    return animation([f[..., 0] if f.shape[-1] == 1 else f for f in frames], "GIF")


def show(page: Page, url: str, slug: str, theme: str) -> None:
    """Opens a tab by its link and waits until it has come to rest."""
    query = f"?__theme={theme}&tab={slug}" + ("&seed=0&count=8" if slug == "generate" else "")
    page.goto(url + query)
    page.wait_for_selector("#tabs", timeout=TIMEOUT)
    if slug != "generate":
        example = page.locator(f"#tab-{slug} .gallery-item, #tab-{slug} .examples button, #tab-{slug} tbody tr").first
        if example.count():
            example.click()
    page.wait_for_load_state("networkidle", timeout=TIMEOUT)
    page.wait_for_timeout(4000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=None, help="folder of a pipeline (default: the page's own default)")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    model = Model.load(options.model or find_models(MODELS)[0], None)
    (options.output / "generation.gif").write_bytes(generation_gif(model))
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    demo = build(model)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for tab in TABS:
            slug = tab.__name__.rpartition(".")[2]
            for view, (width, height, theme) in VIEWS.items():
                page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1)
                show(page, url, slug, theme)
                page.screenshot(path=options.output / f"{slug}-{view}.png", full_page=True)
                page.close()
        browser.close()
    demo.close()
    print(f"Pictures in {options.output}.")


if __name__ == "__main__":
    main()
