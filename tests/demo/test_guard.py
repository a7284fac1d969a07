"""Requests are looked at in the order in which they come; who they are from is still asked."""

import anyio.to_thread
import gradio as gr
import httpx
import pytest

from spectralar.demo.guard import GuardedBlocks
from spectralar.demo.page import launch_options


@pytest.mark.parametrize("auth", [None, ("ann", "her password")])
def test_logins_are_checked_and_not_in_a_thread(auth, monkeypatch):
    in_threads, run_sync = [], anyio.to_thread.run_sync

    def noted(function, *args, **kwargs):
        in_threads.append(str(function))
        return run_sync(function, *args, **kwargs)

    with GuardedBlocks() as blocks:
        gr.Textbox().input(lambda text: text, gr.Textbox(), gr.Textbox(), api_name="echo")
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, auth=auth, **launch_options())
    try:
        monkeypatch.setattr(anyio.to_thread, "run_sync", noted)
        body = {"data": ["a"], "fn_index": 0, "session_hash": "session"}
        with httpx.Client(base_url=url, timeout=60) as client:

            def ask() -> int:
                return client.post("/gradio_api/queue/join", json=body).status_code

            answers = [ask()]
            assert not any("login_check" in function for function in in_threads)
            if auth:
                client.post("/login", data={"username": auth[0], "password": auth[1]}).raise_for_status()
                answers.append(ask())
        assert answers == ([401, 200] if auth else [200])
    finally:
        blocks.close()
