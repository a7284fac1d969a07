"""A visitor who is faster than the server: the page shows what was asked for last, all of it and nothing else."""

import asyncio
import contextlib
import re
import threading
from itertools import chain, repeat

import gradio as gr
import numpy as np
import pytest
from fastapi.dependencies import utils as dependencies
from playwright.sync_api import expect

from spectralar.demo import reconstruction
from tests.demo.browsing import PATIENCE, VIEW, pixels, wait_for_codecs, wait_for_k, wait_until
from tests.demo.conftest import served, tiny_model

pytestmark = pytest.mark.usefixtures("no_problems")


@pytest.fixture(scope="module")
def page():
    with served(tiny_model(3, 16, num_tokens=24, codebook_size=64)) as page:
        yield page


@pytest.fixture(scope="module")
def tab(open_tab):
    """The Reconstruct tab."""
    tab = open_tab("?tab=reconstruct&image=example:cat")
    wait_for_codecs(tab)
    return tab


@pytest.fixture(scope="module")
def originals(tab):
    """Each example as the view shows it."""
    images = []
    for i in range(3):
        example(tab, i).click()
        expect(tab).to_have_url(re.compile("image=example"), timeout=PATIENCE)
        wait_until(lambda: not any(np.array_equal(original(tab), image) for image in images))
        wait_for_codecs(tab)
        images.append(original(tab))
    return images


@pytest.fixture
def own_photo(tab, originals, photo):
    """The page with the visitor's own photo."""
    return send(tab, photo, originals)


@pytest.fixture
def slow(monkeypatch):
    """with slow(tab, NAME, ...): until its end the server answers none of these functions, or nothing at all.

    Gives a list that is no longer empty when one of them waits.
    """
    process, names, waiting = gr.Blocks.process_api, None, []

    async def process_api(self, block_fn, *args, **kwargs):
        if names == () or names and block_fn.name in names:
            waiting.append(asyncio.get_running_loop().create_future())
            await waiting[-1]
        return await process(self, block_fn, *args, **kwargs)

    @contextlib.contextmanager
    def slow(tab, *only):
        nonlocal names
        names = only
        try:
            yield waiting
            tab.wait_for_timeout(500)  # until all that was asked for waits; if it came later, tests would pass
        finally:
            names = None
            for future in waiting:  # in the order in which it was asked for
                future.get_loop().call_soon_threadsafe(future.set_result, None)
            waiting.clear()

    monkeypatch.setattr(gr.Blocks, "process_api", process_api)
    return slow


def example(tab, i):
    return tab.locator("#photo-examples button").nth(i)


def original(tab):
    return pixels(tab, 0, VIEW) if tab.locator(f"{VIEW} canvas").count() else np.zeros(0)


def send(tab, photo, others):
    """Sends a photo, and waits until it is shown; returns how the view shows it."""
    take_away(tab)
    expect(tab.locator(f"{VIEW} canvas")).to_have_count(0, timeout=PATIENCE)  # or it may be the photo before
    begin_to_send(tab, photo)
    known = [*others, np.zeros(0)]
    wait_until(lambda: not any(np.array_equal(original(tab), image) for image in known))
    wait_for_codecs(tab)
    return original(tab)


def take_away(tab):
    remove = tab.get_by_label("Remove Image")
    if remove.count():
        remove.click()
        expect(remove).to_have_count(0, timeout=PATIENCE)


def begin_to_send(tab, photo):
    take_away(tab)
    tab.locator("#photo input[type=file]").set_input_files(photo)


def settles(tab, expected):
    """Waits until the view shows an image, completely and for good: a second is long for a page that is not held."""
    seen = 0

    def shows_it():
        nonlocal seen
        seen = seen + 1 if np.array_equal(original(tab), expected) else 0
        tab.wait_for_timeout(100)
        return seen == 10

    wait_until(shows_it)
    wait_for_codecs(tab)


# -------------------------------------------------------------------------------------------------- Reconstruct


def test_a_photo_sent_while_another_is_taken_away(tab, slow, own_photo, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    with slow(tab, "show_photo"):
        begin_to_send(tab, tmp_path / "note.png")
    sentence = tab.get_by_text("This file is not an image that can be read: please send JPEG")
    expect(sentence).to_be_visible(timeout=PATIENCE)
    expect(tab.locator(f"{VIEW} canvas")).to_have_count(0, timeout=PATIENCE)


def test_a_bad_file_is_told_once(tab, slow, originals, tmp_path):
    """By what shows photos; not also by what shows examples, which hears that there is none any more."""
    example(tab, 0).click()
    settles(tab, originals[0])
    (tmp_path / "bad.png").write_text("not an image")
    toasts = tab.get_by_text("This file is not an image")
    expect(toasts).to_have_count(0, timeout=PATIENCE)
    with slow(tab, "preview"):
        begin_to_send(tab, tmp_path / "bad.png")
        expect(toasts).to_have_count(1, timeout=PATIENCE)
    tab.wait_for_timeout(1000)
    expect(toasts).to_have_count(1)


@pytest.mark.parametrize("only", [(), ("preview",), ("show_origin",)])
def test_two_examples(tab, slow, originals, only):
    for first, second in ((0, 1), (1, 2), (2, 0)):
        with slow(tab, *only):
            example(tab, first).click()
            tab.wait_for_timeout(100)
            example(tab, second).click()
        settles(tab, originals[second])


@pytest.mark.parametrize("only", [(), ("preview",), ("show_origin",)])
def test_an_own_photo_after_an_example(tab, slow, originals, own_photo, photo, only):
    with slow(tab, *only):
        example(tab, 1).click()
        tab.wait_for_timeout(200)
        begin_to_send(tab, photo)
    settles(tab, own_photo)
    expect(tab.locator("#photo img").first).to_have_attribute("src", re.compile("photo.png"))
    assert "image=" not in tab.url


@pytest.mark.parametrize("only", [(), ("show_photo",)])
def test_an_example_after_an_own_photo(tab, slow, originals, own_photo, photo, only):
    with slow(tab, *only):
        begin_to_send(tab, photo)
        expect(tab.locator("#photo img").first).to_have_attribute("src", re.compile("photo.png"), timeout=PATIENCE)
        example(tab, 2).click()
    settles(tab, originals[2])
    assert "photo.png" not in tab.locator("#photo img").first.get_attribute("src")


def test_an_own_photo_while_a_sample_is_made(tab, page, own_photo, photo):
    page.allow(1)
    tab.click("#photo-sample")
    wait_until(lambda: page.steps == page.limit)
    begin_to_send(tab, photo)
    settles(tab, own_photo)
    page.allow()
    tab.wait_for_timeout(1000)
    settles(tab, own_photo)
    expect(tab.locator("#photo img").first).to_have_attribute("src", re.compile("photo.png"))


def test_tokens_and_codes_chosen_in_haste(tab, slow, own_photo):
    with slow(tab):
        for k in (4, 9, 7):
            tab.locator(f"{VIEW} .chip").nth(k - 1).click()
    token, code = tab.locator("#token input"), tab.locator("#code input")
    expect(token).to_have_value("7", timeout=PATIENCE)
    with slow(tab):
        for k in (2, 5, 11):
            token.fill(str(k))
            code.fill("63" if "63" not in tab.locator(f"{VIEW} .chip").nth(k - 1).inner_text() else "62")
            tab.click("#replace-code")
            tab.wait_for_timeout(100)
    expect(tab.locator(f"{VIEW} .status")).to_contain_text("3 of 24 codes replaced", timeout=PATIENCE)


def test_a_token_of_an_image_that_is_taken_away(tab, slow, own_photo):
    with slow(tab, "choose") as waiting:
        tab.locator(f"{VIEW} .chip").nth(2).click()
        wait_until(lambda: waiting)
        take_away(tab)
        expect(tab.locator(f"{VIEW} canvas")).to_have_count(0, timeout=PATIENCE)
    expect(tab.get_by_text("Choose an image first.")).to_be_visible(timeout=PATIENCE)


def test_a_code_replaced_while_charts_are_drawn(tab, originals, own_photo, monkeypatch):
    go_on, measure = threading.Event(), reconstruction.baselines
    monkeypatch.setattr(reconstruction, "baselines", lambda *args: go_on.wait(60) and measure(*args))
    example(tab, 0).click()
    wait_until(lambda: np.array_equal(original(tab), originals[0]))
    tab.locator(f"{VIEW} .chip").nth(2).click()
    expect(tab.locator("#token input")).to_have_value("3", timeout=PATIENCE)
    tab.click("#random-code")
    tab.wait_for_timeout(300)
    go_on.set()
    expect(tab.locator(f"{VIEW} .status")).to_contain_text("of 24 codes replaced", timeout=PATIENCE)
    tab.wait_for_timeout(1000)
    expect(tab.locator(f"{VIEW} .status")).to_contain_text("of 24 codes replaced")
    tab.click("#undo-codes")
    expect(tab.locator(f"{VIEW} .status")).to_have_text("", timeout=PATIENCE)


@pytest.mark.parametrize("button", ["#random-code", "#replace-code", "#undo-codes"])
def test_a_code_is_not_replaced_any_more_when_another_image_comes(tab, slow, originals, own_photo, button):
    """It is of the image that goes; of the other one, the visitor has not seen a code yet."""
    tab.locator(f"{VIEW} .chip").nth(2).click()
    expect(tab.locator("#random-code")).to_be_visible(timeout=PATIENCE)
    if button == "#undo-codes":
        tab.click("#random-code")
        expect(tab.locator(f"{VIEW} .status")).to_contain_text("of 24 codes replaced", timeout=PATIENCE)
    with slow(tab, "show_origin") as waiting:
        example(tab, 1).click()
        wait_until(lambda: waiting)
        tab.click(button)
    settles(tab, originals[1])
    expect(tab.locator(f"{VIEW} .status")).to_have_text("")


# -------------------------------------------------------------------------------------------------- Generate, Remix


def shows(tab, view, title):
    expect(tab.locator(f"{view} .row").first).to_have_attribute("aria-label", title, timeout=PATIENCE)


def test_another_class_while_one_is_sampled(tab, page):
    tab.get_by_role("tab", name="Generate").click()
    wait_for_k(tab, 24)
    for first in (tab.locator("#try button", has_text="Sneaker"), tab.locator("#generate")):
        page.allow(2)
        first.click()
        wait_for_k(tab, 2)
        tab.locator("#try button", has_text="Bag").click()
        expect(tab).to_have_url(re.compile("class=2"), timeout=PATIENCE)
        page.allow()
        shows(tab, "#generated", "Bag")
        wait_for_k(tab, 24)
        expect(tab.locator("#stop")).to_be_disabled(timeout=PATIENCE)
        tab.wait_for_timeout(500)
        shows(tab, "#generated", "Bag")


def test_classes_chosen_in_haste(tab, slow):
    tab.get_by_role("tab", name="Generate").click()
    with slow(tab):
        for name in ("T-shirt", "Bag", "Ankle boot", "Sneaker"):
            tab.locator("#try button", has_text=name).click()
            tab.wait_for_timeout(50)
    shows(tab, "#generated", "Sneaker")
    wait_for_k(tab, 24)
    expect(tab.locator("#stop")).to_be_disabled(timeout=PATIENCE)
    expect(tab).to_have_url(re.compile("class=1&"), timeout=PATIENCE)


def test_requests_do_not_overtake_each_other(tab, monkeypatch):
    """Where Gradio's server leaves a request to a thread, the earlier ones come back later."""
    in_a_thread, seconds = dependencies.run_in_threadpool, chain((1.5, 1.0, 0.5), repeat(0))

    async def late(*args, **kwargs):
        await asyncio.sleep(next(seconds))
        return await in_a_thread(*args, **kwargs)

    tab.get_by_role("tab", name="Generate").click()
    monkeypatch.setattr(dependencies, "run_in_threadpool", late)
    for name in ("T-shirt", "Bag"):
        with tab.expect_request("**/queue/join*", timeout=PATIENCE):
            tab.locator("#try button", has_text=name).click()
    wait_for_k(tab, 24)
    tab.wait_for_timeout(2000)
    shows(tab, "#generated", "Bag")
    expect(tab).to_have_url(re.compile("class=2&"), timeout=PATIENCE)


def test_another_pair_while_one_is_remixed(tab, page):
    tab.get_by_role("tab", name="Remix").click()
    pairs = tab.locator("#remix-try button")
    pairs.nth(1).click()
    shows(tab, "#remixed", "Variations")
    wait_for_k(tab, 12, "#remixed")  # all of it is there, and the samples are kept
    pairs.nth(0).click()
    expect(tab.locator("#remixed .row").first).not_to_have_attribute("aria-label", "Variations", timeout=PATIENCE)
    exchanged = tab.locator("#remixed canvas").count()
    page.allow(2)
    pairs.nth(1).click()
    expect(tab.locator("#remix-stop")).to_be_enabled(timeout=PATIENCE)
    pairs.nth(0).click()
    tab.wait_for_timeout(500)
    page.allow()
    expect(tab.locator("#remix")).to_be_enabled(timeout=PATIENCE)
    expect(tab.locator("#remix-stop")).to_be_disabled(timeout=PATIENCE)
    expect(tab.locator("#remixed canvas")).to_have_count(exchanged, timeout=PATIENCE)
    wait_for_k(tab, 12, "#remixed")  # also if nothing was shown of the pair before
    expect(tab.locator("#remixed .row").first).not_to_have_attribute("aria-label", "Variations", timeout=PATIENCE)
