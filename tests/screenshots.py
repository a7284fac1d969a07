"""Makes the pictures of the README and of docs from the page as it is, with the embedded model.

    python -m tests.screenshots

Writes to assets/figures: TAB-light.webp, TAB-dark.webp and TAB-phone.webp of each tab after its first example;
generation.gif, the animation that the page offers for download; samples.png, classes by seeds; and prefix-strips.png,
the first of them coarse to fine. Seeds are 0, 1, 2, .., nothing is chosen but the classes.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from spectralar.demo.export import animation
from spectralar.demo.model import Model
from spectralar.demo.page import TABS, build, launch_options
from spectralar.demo.start import MODELS, find_models
from train.evaluation.report_figures import draw_grid

FIGURES = Path(__file__).parent.parent / "assets" / "figures"
VIEWS = {  # width, height of what is shown at once, longest picture, theme
    "light": (1280, 900, 2400, "light"),
    "dark": (1280, 900, 2400, "dark"),
    "phone": (390, 844, 1600, "light"),
}
# By tab: what is clicked for something to look at (a selector, and which of its matches), and what is there when that
# is drawn. The page opens with the subject of the first tab.
SUBJECTS = {
    "generate": [(None, "#export-png:enabled"), (None, "#try img[src]")],
    "reconstruct": [(("#photo-examples button", 2), "#reconstructed .chart:nth-child(4) b:text('cannot')")],
    "bands": [
        (("#bands-try button", 0), "#figure-contributions svg"),
        (("#measure-influence", 0), "#figure-influence svg"),
    ],
    "remix": [(("#remix-try button", 0), "#remix-strip svg")],
    "card": [(None, "#figure-cutoff-schedule svg")],
}
# Of the animation and the sheet; of another model, those that the page shows to try.
CLASSES = (
    "sports shoe", "handbag", "watch", "sunglasses", "belt", "cap", "backpack", "perfume", "shirt", "tie",
)  # fmt: skip
SEEDS = 10
TIMEOUT = 240_000  # ms, for a tab to have drawn what it shows


def shown_classes(model: Model) -> list[int]:
    """Class ids of the pictures."""
    named = [model.class_names.index(name) for name in CLASSES if name in model.class_names]
    return named if len(named) == len(CLASSES) else model.examples


def draw_samples(model: Model, folder: Path) -> None:
    """samples.png, a row for each class and a column for each seed, and prefix-strips.png of the first column."""
    classes = shown_classes(model)
    labels = [label for label in classes for _ in range(SEEDS)]
    generators = [torch.Generator().manual_seed(i % SEEDS) for i in range(len(labels))]
    codes = model.pipe(labels, **model.sampling, generator=generators, output_type="latent").codes
    rows = [model.class_names[label] for label in classes]
    images = (model.pipe.decode(codes) * 2 - 1).unflatten(0, (-1, SEEDS))
    draw_grid(images, rows, [f"seed {i}" for i in range(SEEDS)], folder / "samples.png")
    lengths = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= model.num_tokens]
    strips = model.pipe.decode(codes[::SEEDS], lengths) * 2 - 1
    draw_grid(strips, rows, [f"k = {k}" for k in lengths], folder / "prefix-strips.png")


def generation_gif(model: Model) -> bytes:
    """One image of each class, seed 0, coarse to fine."""
    labels = shown_classes(model)
    generators = [torch.Generator().manual_seed(0) for _ in labels]
    steps = model.pipe.stream(labels, **model.sampling, generator=generators, output_type="np")
    frames = [(step.images * 255).round().astype("uint8") for step in steps]
    return animation([f[..., 0] if f.shape[-1] == 1 else f for f in frames], "GIF")


def show(page: Page, slug: str, title: str) -> None:
    """Goes to a tab, gives it something to show, and waits until that is drawn."""
    size = page.viewport_size
    page.set_viewport_size({"width": 1280, "height": size["height"]})  # a narrow page has tabs in a menu
    page.get_by_role("tab", name=title).click()
    page.set_viewport_size(size)
    for button, sign in SUBJECTS[slug]:
        if button:
            page.locator(button[0]).nth(button[1]).click()
        page.wait_for_selector(sign, timeout=TIMEOUT)
        page.wait_for_timeout(2000)  # frames are decoded in the background
    page.mouse.move(0, 0)


def picture(page: Page, longest: int) -> bytes:
    """The page from its top, as WebP: a third of a PNG's size."""
    page.evaluate("window.scrollTo(0, 0)")
    width = page.viewport_size["width"]
    height = min(longest, page.evaluate("document.documentElement.scrollHeight"))
    data = page.screenshot(timeout=TIMEOUT, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "WEBP", quality=88, method=6)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=None, help="folder of a pipeline (default: the page's own default)")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the pictures")
    parser.add_argument("--tabs", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="default: all")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    model = Model.load(options.model or find_models(MODELS)[0], None)
    (options.output / "generation.gif").write_bytes(generation_gif(model))
    draw_samples(model, options.output)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    demo, first = build(model), model.class_names[model.examples[0]]
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for view, (width, height, longest, theme) in VIEWS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(f"{url}?__theme={theme}&class={first}&seed=0&count=8", timeout=TIMEOUT)
            page.wait_for_selector(SUBJECTS["generate"][0][1], timeout=TIMEOUT)
            for tab in TABS:
                slug = tab.__name__.rpartition(".")[2]
                if slug in options.tabs:
                    show(page, slug, tab.TITLE)
                    (options.output / f"{slug}-{view}.webp").write_bytes(picture(page, longest))
            page.close()
        browser.close()
    demo.close()
    print(f"Pictures in {options.output}.")


if __name__ == "__main__":
    main()
