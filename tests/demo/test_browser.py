"""The page in a real browser."""

import re
import time

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.demo.browsing import PATIENCE, VIEW, k_of, move_slider, pixels, wait_for_codecs, wait_for_k, wait_until
from tests.demo.conftest import served, tiny_model

pytestmark = pytest.mark.usefixtures("no_problems")


@pytest.fixture(scope="module")
def page():
    # 16 x 16 in colour, 24 tokens: some of them open no band.
    with served(tiny_model(3, 16, num_tokens=24, codebook_size=64)) as page:
        yield page


@pytest.fixture(scope="module")
def generating(open_tab):
    """The Generate tab, opened once: loading the page is what takes long."""
    tab = open_tab()
    wait_for_k(tab, 24)
    return tab


@pytest.fixture(scope="module")
def reconstructing(generating, photo):
    """The same page on its Reconstruct tab, with a photo in it."""
    generating.get_by_role("tab", name="Reconstruct").click()
    generating.locator("#photo input[type=file]").set_input_files(photo)
    wait_for_codecs(generating)
    return generating


# -------------------------------------------------------------------------------------------------- helpers


def wait_until_done(tab):
    expect(tab.locator("#stop")).to_be_disabled(timeout=PATIENCE)
    expect(tab.locator("#export-png")).to_be_enabled(timeout=PATIENCE)


def fill(tab, **settings):
    for name, value in settings.items():
        tab.locator(f"#{name} input[type=number]").fill(str(value))
        tab.keyboard.press("Tab")


def start(tab, page, tokens, **settings):
    """Begins to generate, and waits until so many tokens are on the screen; the model is held there."""
    fill(tab, **settings)
    page.allow(tokens)
    tab.click("#generate")
    wait_for_k(tab, tokens)


def run(tab, page, button):
    """Clicks on what begins to generate, and waits until that is done."""
    page.allow(1)  # held, so that the beginning cannot be missed
    button.click()
    expect(tab.locator("#stop")).to_be_enabled(timeout=PATIENCE)
    page.allow()
    wait_until_done(tab)


# -------------------------------------------------------------------------------------------------- Generate


def test_opening_picture_is_there_without_a_click(generating, page):
    generating.wait_for_selector("#try button:last-child img[src]", timeout=PATIENCE)
    assert generating.locator("#generated canvas").count() == 4
    assert page.steps >= 24


def test_opening_pictures_are_sampled_once_for_all_visitors(generating, page, open_tab):
    steps = page.steps
    other = open_tab()
    wait_for_k(other, 24)
    other.wait_for_selector("#try button:last-child img[src]", timeout=PATIENCE)
    assert page.steps == steps


def test_a_link_to_another_tab_leaves_the_opening_picture_in_generate(generating, open_tab):
    other = open_tab("?tab=bands")
    other.get_by_role("tab", name="Generate").click()
    wait_for_k(other, 24)
    assert np.array_equal(pixels(other, 3), pixels(generating, 3))


def test_a_link_to_a_tab_that_does_not_exist_opens_generate(open_tab, page):
    other = open_tab("?tab=nothing&seed=9&count=1")
    wait_for_k(other, 24)
    wait_until_done(other)
    assert other.locator("#generated canvas").count() == 1


def test_images_sharpen_token_by_token(generating, page):
    start(generating, page, 1, seed=5)
    first = pixels(generating)
    expect(generating.locator("#generated .status")).to_contain_text("s left")
    expect(generating.locator("#generate")).to_be_disabled()
    page.allow(2)
    wait_for_k(generating, 3)
    page.allow()
    wait_for_k(generating, 24)
    wait_until_done(generating)
    assert "seed=5" in generating.url
    frames = [frame for frame in page.model._frames(0, 4, 5, guidance_scale=2.0) if frame]
    last = pixels(generating)
    np.testing.assert_allclose(first.astype(int), frames[0].images[0].astype(int), atol=1)
    np.testing.assert_allclose(last.astype(int), frames[23].images[0].astype(int), atol=1)


def test_scrubbing_asks_the_server_for_nothing(generating):
    requests = []

    def count(request):
        requests.append(request.url)

    generating.on("request", count)
    shown = {}
    for k in (24, 12, 1, 7):
        move_slider(generating, k)
        assert k_of(generating) == k
        shown[k] = pixels(generating)
    assert not np.array_equal(shown[24], shown[1]) and not np.array_equal(shown[12], shown[7])
    generating.locator("#generated .slider").focus()
    generating.keyboard.press("ArrowRight")
    assert k_of(generating) == 8
    generating.keyboard.press("Home")
    assert k_of(generating) == 1
    third = generating.locator("#generated button.tile").nth(2)
    third.click()
    generating.keyboard.press("ArrowRight")  # the keys work on the pictures too
    assert k_of(generating) == 2
    expect(third).to_have_attribute("aria-pressed", "true")
    box = third.bounding_box()
    generating.mouse.move(box["x"] + 20, box["y"] + 20)
    generating.mouse.down()
    generating.mouse.move(box["x"] + 220, box["y"] + 20, steps=4)  # and so does drawing a finger over them
    generating.mouse.up()
    assert k_of(generating) > 2
    generating.locator("#generated select").select_option("4")
    generating.click("#generated .play")
    wait_for_k(generating, 24)
    milliseconds = generating.evaluate(
        """() => { const s = document.querySelector('#generated .slider'), times = [];
        for (let k = 1; k <= 24; k++) { const begin = performance.now(); s.value = k;
          s.dispatchEvent(new Event('input')); times.push(performance.now() - begin); }
        return times; }"""
    )
    assert np.median(milliseconds) < 32
    generating.wait_for_timeout(300)
    generating.remove_listener("request", count)
    assert requests == []


def test_place_is_kept_while_frames_arrive(generating, page):
    start(generating, page, 4, seed=6)
    height = generating.locator("#generated").bounding_box()["height"]
    move_slider(generating, 2)
    page.allow(3)
    expect(generating.locator("#generated .chip")).to_have_count(7, timeout=PATIENCE)
    assert k_of(generating) == 2
    assert generating.locator("#generated").bounding_box()["height"] == height  # and nothing jumps
    page.allow()
    wait_until_done(generating)
    assert k_of(generating) == 2
    expect(generating).to_have_url(re.compile("[?&]k=2"))


def test_the_address_is_right_once_the_picture_is(generating, page):
    move_slider(generating, 5)
    expect(generating).to_have_url(re.compile("[?&]k=5"))
    # What the page puts off is not done at all: it comes too late where a picture takes less time than that.
    generating.evaluate(
        "window.later = setTimeout; window.setTimeout = (f, ms, ...rest) => (ms === 400 ? 0 : later(f, ms, ...rest))"
    )
    try:
        start(generating, page, 1, seed=9, count=2)
        query = generating.evaluate("location.search")
        assert not re.search("[?&]k=", query) and "seed=9" in query and "count=2" in query
    finally:
        generating.evaluate("window.setTimeout = window.later")
    page.allow()
    wait_until_done(generating)
    fill(generating, count=4)


def test_stop_keeps_what_is_there_and_stops_the_model(generating, page):
    start(generating, page, 3, seed=7)
    steps = page.steps
    generating.click("#stop")
    expect(generating.locator("#generated .status")).to_contain_text("Stopped after", timeout=PATIENCE)
    page.allow()
    wait_until_done(generating)
    generating.wait_for_timeout(500)
    assert page.steps <= steps + 1  # the token that was being sampled
    assert k_of(generating) == 3
    move_slider(generating, 2)
    assert k_of(generating) == 2
    generating.click("#same-again")
    wait_for_k(generating, 24)
    wait_until_done(generating)
    assert "seed=7" in generating.url


def test_more_like_this_keeps_the_first_tokens(generating, page):
    generating.locator("#generated button.tile").nth(1).click()
    move_slider(generating, 6)
    kept = pixels(generating, 1)
    more = generating.locator("#generated .actions button").first
    expect(more).to_have_text("More like image 2 from token 6")
    move_slider(generating, 24)
    expect(more).to_have_text("More like image 2 from token 12")  # all of them would leave nothing to sample
    move_slider(generating, 6)
    run(generating, page, more)
    assert "prefix=" in generating.url
    move_slider(generating, 6)
    for image in range(4):
        np.testing.assert_allclose(pixels(generating, image).astype(int), kept.astype(int), atol=1)
    move_slider(generating, 24)
    assert not np.array_equal(pixels(generating, 0), pixels(generating, 1))


def test_one_click_examples_and_downloads(generating, page):
    run(generating, page, generating.locator("#try button", has_text="Bag"))
    assert "class=2" in generating.url and "prefix=" not in generating.url
    for name, begins in (("py", b"import torch"), ("png", b"\x89PNG"), ("gif", b"GIF89a")):
        with generating.expect_download() as download:
            generating.click(f"#export-{name}")
        assert download.value.path().read_bytes().startswith(begins)
        assert re.fullmatch(rf"bag-seed\d+\.{name}", download.value.suggested_filename)
    move_slider(generating, 5)
    shown = pixels(generating, 0)
    with generating.expect_download() as download:
        generating.locator("#generated .actions button").nth(1).click()
    assert download.value.suggested_filename.endswith("-1-k5.png")
    np.testing.assert_array_equal(np.asarray(Image.open(download.value.path()).convert("RGB")), shown)


def test_a_link_opens_the_same_pictures(generating, open_tab, page):
    fill(generating, seed=123, count=3)
    generating.click("#generate")
    expect(generating.locator("#generated canvas")).to_have_count(3, timeout=PATIENCE)
    wait_until_done(generating)
    wait_for_k(generating, 24)
    other = open_tab(generating.url.removeprefix(page.url) + "&guidance=nan&schedule=%3Cscript%3E")
    wait_for_k(other, 24)
    wait_until_done(other)
    for image in range(3):
        np.testing.assert_array_equal(pixels(generating, image), pixels(other, image))
    # While one visitor's run is held, the other's pictures stay theirs, and scrub.
    before = pixels(generating)
    start(other, page, 2, seed=8)
    steps = page.steps
    assert k_of(generating) == 24 and k_of(other) == 2
    move_slider(generating, 2)
    assert k_of(generating) == 2 and not np.array_equal(pixels(generating), pixels(other))
    move_slider(generating, 24)
    np.testing.assert_array_equal(pixels(generating), before)
    # And a visitor who leaves stops the model.
    other.close()
    time.sleep(1)
    page.allow()
    time.sleep(1)
    assert page.steps <= steps + 1


# -------------------------------------------------------------------------------------------------- Reconstruct


def test_reconstruct_scrubs_pictures_and_charts(reconstructing):
    expect(reconstructing.locator(".crop figcaption")).to_contain_text("The middle 60 × 60 of 80 × 60")
    requests = []

    def count(request):
        requests.append(request.url)

    reconstructing.on("request", count)
    move_slider(reconstructing, 24, VIEW)
    # The low-pass of everything is the original.
    np.testing.assert_array_equal(pixels(reconstructing, 1, VIEW), pixels(reconstructing, 0, VIEW))
    move_slider(reconstructing, 1, VIEW)
    assert pixels(reconstructing, 1, VIEW).reshape(-1, 3).std(axis=0).max() == 0  # cutoff 1: the mean colour alone
    charts = reconstructing.locator(f"{VIEW} .chart")
    assert all(re.fullmatch(r"-?[\d.]+ dB", text) for text in charts.first.locator("li b").all_inner_texts())
    assert "cannot go this low" in charts.nth(2).inner_text()
    plot = charts.first.locator(".plot").bounding_box()
    reconstructing.mouse.click(plot["x"] + plot["width"] / 2, plot["y"] + 20)
    assert k_of(reconstructing, VIEW) in (12, 13)
    reconstructing.locator(f"{VIEW} .chip").nth(9).hover()
    expect(reconstructing.locator(f"{VIEW} .which")).to_contain_text("Token 10, code")
    reconstructing.remove_listener("request", count)
    assert requests == []


def test_replacing_a_code_shows_what_moves(reconstructing):
    move_slider(reconstructing, 12, VIEW)
    before = pixels(reconstructing, 2, VIEW)
    reconstructing.locator(f"{VIEW} .chip").nth(4).click()
    assert k_of(reconstructing, VIEW) == 5
    expect(reconstructing.locator("#token input")).to_be_visible(timeout=PATIENCE)
    expect(reconstructing.locator("#token input")).to_have_value("5", timeout=PATIENCE)
    move_slider(reconstructing, 12, VIEW)
    code = reconstructing.locator("#code input")
    code.fill(str((int(code.input_value()) + 1) % 64))
    reconstructing.click("#replace-code")
    expect(reconstructing.locator(f"{VIEW} .status")).to_contain_text("1 of 24 codes replaced", timeout=PATIENCE)
    wait_for_k(reconstructing, 12, VIEW)  # it stays where it was
    expect(reconstructing.locator(f"{VIEW} .slider")).to_be_enabled()
    wait_until(lambda: not np.array_equal(before, pixels(reconstructing, 2, VIEW)))
    reconstructing.click("#undo-codes")
    expect(reconstructing.locator(f"{VIEW} .status")).to_have_text("", timeout=PATIENCE)
    wait_until(lambda: np.array_equal(before, pixels(reconstructing, 2, VIEW)))


# -------------------------------------------------------------------------------------------------- phone


def test_phone_width(reconstructing):
    reconstructing.set_viewport_size({"width": 360, "height": 780})
    tabs = reconstructing.locator("#tabs .tab-container:not(.visually-hidden) [role=tab]")
    expect(tabs).to_have_count(5)
    boxes = [tab.bounding_box() for tab in tabs.all()]
    assert all(0 <= box["x"] and box["x"] + box["width"] <= 360 for box in boxes)
    assert not reconstructing.locator("#tabs .overflow-menu").is_visible()
    for name, view in (("Generate", "#generated"), ("Reconstruct", VIEW)):
        reconstructing.get_by_role("tab", name=name).click()
        expect(reconstructing.locator(f"{view} .slider")).to_be_visible()
        assert reconstructing.evaluate("document.documentElement.scrollWidth") <= 360
        assert reconstructing.locator(f"{view} canvas").first.bounding_box()["width"] > 100
    expect(reconstructing).to_have_url(re.compile("tab=reconstruct"), timeout=PATIENCE)


def test_a_bad_upload_is_answered_in_a_sentence(reconstructing, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    reconstructing.get_by_label("Remove Image").click()
    reconstructing.locator("#photo input[type=file]").set_input_files(tmp_path / "note.png")
    sentence = "This file is not an image that can be read: please send JPEG"
    expect(reconstructing.get_by_text(sentence)).to_be_visible(timeout=PATIENCE)
    expect(reconstructing.locator(f"{VIEW} canvas")).to_have_count(0)
    expect(reconstructing.locator(f"{VIEW} [data-read=k]")).to_have_text("–")  # nothing is left of the photo before


def test_an_example_in_one_click_and_its_link(reconstructing, open_tab, page):
    reconstructing.locator("#photo-examples button").nth(2).click()
    wait_for_codecs(reconstructing)
    wait_for_k(reconstructing, 24, VIEW)
    move_slider(reconstructing, 9, VIEW)
    expect(reconstructing).to_have_url(re.compile("[?&]k=9"))
    expect(reconstructing).to_have_url(re.compile("image=example%3Ashirt"), timeout=PATIENCE)
    other = open_tab(reconstructing.url.removeprefix(page.url))
    wait_for_k(other, 9, VIEW)  # the link knows the slider's place
    np.testing.assert_array_equal(pixels(other, 2, VIEW), pixels(reconstructing, 2, VIEW))
