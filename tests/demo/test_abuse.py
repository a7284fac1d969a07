"""A short version of `python -m tests.load.abuse`, and the guard that answers what Gradio does not."""

import asyncio
import contextlib
import logging
import random

import gradio as gr
import httpx
import pytest
from playwright.sync_api import Error, sync_playwright

from spectralar.demo import upload
from spectralar.demo.guard import Guard
from tests.demo.conftest import served
from tests.load.abuse import abuse, trespass
from tests.load.payloads import FORMATS, HTML, SECRET, SVG, bomb
from tests.load.wire import API, Page, RefusedError, Session, result_of

NUM_INPUTS = 80


@pytest.fixture(scope="module")
def page(model):
    with served(model) as page:
        yield page


def test_bad_input_is_answered(page, tmp_path, capfd):
    (tmp_path / "secret.txt").write_bytes(SECRET)
    outcome = asyncio.run(abuse(page.url, tmp_path, NUM_INPUTS, patience=120))
    assert outcome.bad == []
    assert sum(outcome.counts.values()) == NUM_INPUTS
    assert sum(n for what, n in outcome.counts.items() if what.endswith("a sentence")) > NUM_INPUTS / 4
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_files_and_sessions_of_others_are_out_of_reach(page, tmp_path):
    (tmp_path / "secret.txt").write_bytes(SECRET)
    assert asyncio.run(trespass(page.url, tmp_path / "secret.txt")) == []


@pytest.mark.parametrize("file_format", [name for name in FORMATS if name in upload.FORMATS])
def test_bombs_of_every_format_are_refused_by_their_header(file_format):
    """By the page, or by Pillow's own reader of AVIF, before a pixel is decoded."""
    data = bomb(random.Random(0), file_format)
    with pytest.raises(gr.Error, match="not an image" if file_format == "AVIF" else "megapixels"):
        upload.open_photo(data)


def test_nothing_that_is_sent_runs_in_a_browser(page, chromium):
    """Files are handed out as what to save, or as something that runs nothing."""
    ran = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, data in (
            ("a.html", HTML),
            ("a.svg", SVG),
            ("a.png", HTML),
            ("a.gif", b"GIF89a" + HTML),
            ("a", HTML),
        ):
            answer = httpx.post(page.url + API + "upload", files={"files": (name, data)}, timeout=60)
            tab = browser.new_page()
            tab.on("dialog", lambda dialog, name=name: (ran.append(name), dialog.dismiss()))
            with contextlib.suppress(Error):  # a download begins instead
                tab.goto(f"{page.url}{API}file={answer.json()[0]}")
                tab.wait_for_timeout(500)
        browser.close()
    assert ran == []


def test_unknown_functions_and_broken_requests_get_a_sentence(page, capfd):
    unknown = {"data": [], "fn_index": 10**6, "session_hash": "x"}
    for path, body in (("queue/join", unknown), ("run/predict", unknown), ("run/predict", {"data": []})):
        answer = httpx.post(page.url + API + path, json=body, timeout=60)
        assert 400 <= answer.status_code < 500 and answer.json()["detail"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_that_an_event_names_is_refused_without_a_traceback(page, capfd):
    """Gradio's own refusal, which it would print with all of its stack."""
    functions = Page(httpx.get(page.url + "config", timeout=60).json()).functions
    function = next(f["id"] for f in functions if f["api_name"].startswith("save_own"))
    photo = {"path": "/etc/passwd", "url": None, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}

    async def ask():
        async with httpx.AsyncClient(timeout=60) as client:
            session = Session(client, page.url)
            event_id = await session.join(function, [None], photo)
            async with session.events() as events:
                async for event in events:
                    if event.ends(event_id):
                        with pytest.raises(RefusedError, match="cannot be accessed"):
                            result_of(event)
                        return

    asyncio.run(ask())
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err


def test_bodies_have_a_bound():
    sent = []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def status(path, size):
        sent.clear()
        scope = {"type": "http", "path": path, "headers": [(b"content-length", str(size).encode())]}
        asyncio.run(Guard(app)(scope, None, send))
        return sent[0]["status"]

    assert status("/gradio_api/queue/join", 10**6) == 200 and status("/gradio_api/queue/join", 10**9) == 413
    assert b"A request may have at most 16 MB." in sent[1]["body"]
    assert status("/gradio_api/upload", 10**9) == 200  # which Gradio bounds itself


def test_a_mistake_of_our_own_is_noted_in_one_line(page, monkeypatch, caplog):
    monkeypatch.setattr(type(page.model), "label", lambda *args: 1 / 0)
    body = {"data": ["Bag", 1, 0, 1.0, "constant", 1.0, 0, 1.0, None, None]}
    with caplog.at_level(logging.WARNING):
        joined = httpx.post(page.url + API + "call/generate", json=body, timeout=60).json()
        text = httpx.get(page.url + API + f"call/generate/{joined['event_id']}", timeout=60).text
    assert "please reload the page" in text
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("guard")]
    assert len(lines) == 1 and lines[0].startswith("generate: ZeroDivisionError at ") and "\n" not in lines[0]
