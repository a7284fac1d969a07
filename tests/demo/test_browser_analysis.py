"""The Frequency bands, Remix and Model tabs in a real browser."""

import csv
import io
import re

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from spectralar.demo.source import Origins
from tests.demo.browsing import PATIENCE, move_slider, pixels, wait_for_k
from tests.demo.conftest import served, tiny_model

N = 12
NO_IMAGE = "This file is not an image that can be read: please send JPEG"


@pytest.fixture(scope="module")
def page():
    with served(tiny_model()) as page:
        yield page


@pytest.fixture(scope="module")
def tab(open_tab):
    """The page, opened once and wandered through: loading it is what takes long."""
    return open_tab("?tab=bands")


@pytest.fixture(autouse=True)
def desktop(tab, no_problems):
    tab.set_viewport_size({"width": 1280, "height": 900})


@pytest.fixture
def no_image(tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    return tmp_path / "note.png"


def go_to(tab, title):
    tab.get_by_role("tab", name=title).click()


def wait_for_figure(tab, elem_id):
    expect(tab.locator(f"#{elem_id} svg text").first).to_be_visible(timeout=PATIENCE)


def scrubbed(tab, view, lengths, index=0):
    """A picture at several places of the slider; moving it must not ask the server for anything."""
    requests = []

    def count(request):
        if "/gradio_api/file=" not in request.url:  # a picture of before, which the browser may fetch late
            requests.append(request.url)

    tab.on("request", count)
    for _ in range(100):  # until the page has done what came before
        requests.clear()
        tab.wait_for_timeout(200)
        if not requests:
            break
    shown = {}
    for k in lengths:
        move_slider(tab, k, view)
        wait_for_k(tab, k, view)
        shown[k] = pixels(tab, index, view, "L").astype(int)
    tab.wait_for_timeout(200)
    tab.remove_listener("request", count)
    assert requests == []
    return shown


def saved(tab, elem_id, name):
    with tab.expect_download() as download:
        tab.locator(f"#{elem_id} button[data-format={name}]").click()
    return download.value.suggested_filename, download.value.path().read_bytes()


# -------------------------------------------------------------------------------------------------- Frequency bands


def test_bands_of_a_sample_in_one_click(tab, page):
    wait_for_k(tab, N, "#bands-view")  # the example that the tab opens with
    example = pixels(tab, 0, "#bands-view", "L")
    tab.locator("#bands-try button", has_text="Bag").click()
    expect(tab).to_have_url(re.compile("bands=sample"), timeout=PATIENCE)
    picture = Origins(page.model).picture("sample:2:0", None)
    frames = page.model.decode([picture.codes], list(range(1, N + 1)))[0]
    for _ in range(PATIENCE // 200):  # until the sample stands where the example was
        if not np.array_equal(pixels(tab, 0, "#bands-view", "L"), example):
            break
        tab.wait_for_timeout(200)
    wait_for_figure(tab, "figure-contributions")
    wait_for_k(tab, N, "#bands-view")
    for k, shown in scrubbed(tab, "#bands-view", (3, 12), index=1).items():
        np.testing.assert_allclose(shown, frames[k - 1], atol=1)
    expect(tab).to_have_url(re.compile("bands=sample%3A2%3A0"), timeout=PATIENCE)


def test_figures_are_saved_with_their_numbers(tab, page):
    name, data = saved(tab, "figure-band-energies", "csv")
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    num_bands = len(set(page.model.cutoffs))  # tokens with the cutoff of the one before open none
    assert name == "band-energies.csv" and len(rows) == num_bands < N and float(rows[0]["energy_image"]) > 0
    name, data = saved(tab, "figure-radial-spectra", "svg")
    assert name == "radial-spectra.svg" and b"1/f" in data
    name, data = saved(tab, "figure-contributions", "png")
    assert name == "contributions.png" and Image.open(io.BytesIO(data)).width > 1000


def test_influence(tab):
    tab.click("#measure-influence")
    wait_for_figure(tab, "figure-influence")
    name, data = saved(tab, "figure-influence", "csv")
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    assert name == "influence.csv" and len(rows) == N * 22 and min(float(row["influence"]) for row in rows) >= 0


def test_a_photo_takes_the_place_of_the_sample(tab, page, photo):
    before = pixels(tab, 0, "#bands-view", "L")
    tab.locator("#bands-image").get_by_label("Remove Image").click()
    expect(tab.locator("#bands-view canvas")).to_have_count(0, timeout=PATIENCE)
    tab.locator("#bands-image input[type=file]").set_input_files(photo)
    wait_for_figure(tab, "figure-contributions")
    wait_for_k(tab, N, "#bands-view")
    assert "bands=" not in tab.url  # a link cannot carry it
    assert not np.array_equal(pixels(tab, 0, "#bands-view", "L"), before)
    codes = page.model.pipe.encode(Image.open(photo)).tolist()
    shown = scrubbed(tab, "#bands-view", [12], index=1)[12]
    np.testing.assert_allclose(shown, page.model.decode(codes, [12])[0, 0], atol=1)


def test_a_bad_upload_is_answered_in_a_sentence(tab, no_image):
    tab.locator("#bands-image").get_by_label("Remove Image").click()
    expect(tab.locator("#bands-view canvas")).to_have_count(0, timeout=PATIENCE)
    tab.locator("#bands-image input[type=file]").set_input_files(no_image)
    expect(tab.get_by_text(NO_IMAGE)).to_be_visible(timeout=PATIENCE)
    expect(tab.locator("#bands-view canvas")).to_have_count(0)


# -------------------------------------------------------------------------------------------------- Remix


def test_remix_of_two_samples_in_one_click(tab, page):
    go_to(tab, "Remix")
    tab.locator("#remix-try button").first.click()
    wait_for_figure(tab, "remix-strip")
    wait_for_k(tab, N // 2, "#remixed")  # the middle says most
    a, b = (Origins(page.model).picture(origin, None) for origin in ("sample:0:0", "sample:1:1"))
    for k, shown in scrubbed(tab, "#remixed", (1, 7, 12)).items():
        np.testing.assert_allclose(shown, page.model.decode([a.codes[:k] + b.codes[k:]], [12])[0, 0], atol=1)
    name, data = saved(tab, "remix-strip", "csv")
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    assert name == "remix.csv" and rows[-1]["codes"] == " ".join(map(str, a.codes))


def test_continuation_is_stopped_and_scrubbed(tab, page):
    page.allow(N - 1 + 5)  # all of the first exchange point, and some of the second
    tab.get_by_label("new ones of the model").check()
    expect(tab.locator("#remix-class")).to_be_visible(timeout=PATIENCE)
    tab.click("#remix")
    some = re.compile("[1-9] of 12 exchange points")  # those that end together come in one message
    expect(tab.locator("#remixed .status")).to_contain_text(some, timeout=PATIENCE)
    expect(tab.locator("#remix")).to_be_disabled()
    tab.click("#remix-stop")
    # Those with a longer prefix need fewer tokens, and all go on together: more than one may be there.
    expect(tab.locator("#remixed .status")).to_contain_text(re.compile("Stopped after [1-9] of 12"), timeout=PATIENCE)
    expect(tab.locator("#remix")).to_be_enabled(timeout=PATIENCE)
    wait_for_figure(tab, "remix-strip")
    steps = page.steps
    page.allow(20)  # the round that was under way, with the prefixes of those who had just come in, and no others
    tab.wait_for_timeout(1000)
    assert page.steps <= steps + 6
    page.allow()


def test_continuation_to_the_end(tab, page):
    tab.click("#remix")
    wait_for_k(tab, N // 2, "#remixed")  # when all is there
    expect(tab.locator("#remixed canvas")).to_have_count(6)
    a = Origins(page.model).picture("sample:0:0", None)
    shown = scrubbed(tab, "#remixed", (5, 12), index=3)
    np.testing.assert_allclose(shown[12], page.model.decode([a.codes], [12])[0, 0], atol=1)
    for part in ("then=model", "a=sample%3A0%3A0"):
        expect(tab).to_have_url(re.compile(part), timeout=PATIENCE)


def test_a_link_opens_the_same_remix(tab):
    shown = scrubbed(tab, "#remixed", (4,), index=2)[4]
    expect(tab.locator("#remix")).to_be_enabled(timeout=PATIENCE)
    expect(tab).to_have_url(re.compile("[?&]k=4"), timeout=PATIENCE)
    tab.reload()
    wait_for_k(tab, 4, "#remixed")
    np.testing.assert_array_equal(scrubbed(tab, "#remixed", (4,), index=2)[4], shown)


def test_what_is_missing_is_said_in_a_sentence(tab):
    tab.locator("#remix-a").get_by_label("Remove Image").click()
    expect(tab).not_to_have_url(re.compile("[?&]a="), timeout=PATIENCE)
    tab.click("#remix")
    expect(tab.get_by_text("Choose image A first.")).to_be_visible(timeout=PATIENCE)


def test_a_bad_upload_is_answered_on_this_tab_too(tab, no_image):
    expect(tab.get_by_text("Choose image A first.")).to_have_count(0, timeout=PATIENCE)  # two would be folded into one
    tab.locator("#remix-a input[type=file]").set_input_files(no_image)
    expect(tab.locator("#remix-a").get_by_label("Remove Image")).to_be_visible(timeout=PATIENCE)
    tab.click("#remix")
    expect(tab.get_by_text(NO_IMAGE).last).to_be_visible(timeout=PATIENCE)
    expect(tab.locator("#remix")).to_be_enabled(timeout=PATIENCE)


# -------------------------------------------------------------------------------------------------- Model


def test_model(tab):
    go_to(tab, "Model")
    expect(tab.locator("#facts")).to_contain_text("12 of 32 codes, 60 bits an image")
    wait_for_figure(tab, "figure-cutoff-schedule")
    shown = scrubbed(tab, "#mask", (1, 6, 12))
    assert [np.unique(image).size for image in shown.values()] == [2, 3, 2]  # new and closed; all; old and new
    expect(tab.get_by_text("This model comes without a model card.")).to_be_visible()


@pytest.mark.parametrize("title", ["Frequency bands", "Remix", "Model"])
def test_phone(tab, title):
    tab.set_viewport_size({"width": 1280, "height": 844})
    go_to(tab, title)
    if title == "Frequency bands":
        tab.locator("#bands-try button").first.click()
        wait_for_figure(tab, "figure-contributions")
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.wait_for_timeout(500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
