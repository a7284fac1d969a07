"""Of several requests the last counts, whichever is answered first."""

import asyncio
import copy
import threading
import time

import anyio.to_thread
import gradio as gr
import httpx
import pytest
from gradio.state_holder import SessionState

from spectralar.demo.guard import GuardedBlocks
from spectralar.demo.page import launch_options
from spectralar.demo.turns import Turns, one_at_a_time


def counting(closed, count=3):
    try:
        yield from range(count)
    finally:
        closed.append(True)


def test_a_request_alone_is_answered_as_it_is():
    turns, closed = Turns(), []
    assert list(turns.shown(counting(closed))) == [gr.skip(), 0, 1, 2]
    assert closed == [True]


def test_an_older_request_ends_when_a_newer_one_begins():
    turns, closed = Turns(), []
    older, newer = turns.shown(counting(closed)), turns.shown(counting([]))
    assert [next(older), next(older)] == [gr.skip(), 0]
    assert next(newer) == gr.skip() and not closed
    assert list(older) == [gr.skip()] and closed  # nothing of it stands in the last message, and its model is free
    assert list(newer) == [0, 1, 2]


def test_nothing_is_computed_for_who_waited_and_is_not_the_last():
    def costly():
        raise AssertionError
        yield

    turns = Turns()
    older, newer = turns.shown(costly()), turns.shown(counting([]))
    assert next(older) == next(newer) == gr.skip()
    assert list(older) == [gr.skip()]
    assert list(newer) == [0, 1, 2]


def test_an_edit_ends_what_is_shown():
    turns = Turns()
    shown = turns.shown(counting([]))
    assert [next(shown), next(shown)] == [gr.skip(), 0]
    turns.begin()
    assert list(shown) == [gr.skip()]


def test_who_leaves_closes_the_handler():
    turns, closed = Turns(), []
    shown = turns.shown(counting(closed))
    assert [next(shown), next(shown)] == [gr.skip(), 0]
    shown.close()
    assert closed


def test_a_failure_is_passed_on_and_ends_nothing_else():
    def failing():
        yield 1
        raise ValueError("broken")

    turns = Turns()
    with pytest.raises(ValueError, match="broken"):
        list(turns.shown(failing()))
    assert list(turns.shown(counting([]))) == [gr.skip(), 0, 1, 2]


def test_a_request_is_coming_until_it_has_something_to_show():
    def failing():
        raise ValueError("broken")
        yield

    turns = Turns()
    first, second = turns.shown(counting([])), turns.shown(counting([]))
    assert not turns.coming
    next(first)
    assert turns.coming == 1
    next(second)
    list(first)  # which ends, while the other one is still to come
    assert turns.coming == 2
    next(second)
    assert not turns.coming
    broken = turns.shown(failing())
    next(broken)
    assert turns.coming
    with pytest.raises(ValueError, match="broken"):
        next(broken)
    assert not turns.coming
    left = turns.shown(counting([]))
    next(left)
    assert turns.coming
    left.close()
    assert not turns.coming


def test_visitors_do_not_end_each_others():
    turns = Turns()
    other = copy.deepcopy(turns)  # as Gradio makes a session's state
    assert other.lock is not turns.lock
    first = turns.shown(counting([]))
    assert next(first) == gr.skip()
    assert list(other.shown(counting([]))) == [gr.skip(), 0, 1, 2]
    assert list(first) == [0, 1, 2]


# -------------------------------------------------------------------------------------------------- in the page


@pytest.fixture
def page():
    """Blocks with functions that take turns, a function that does not, and what they did."""
    done, go_on = [], threading.Event()

    def slow(turns, name):
        done.append(f"{name} begins")
        assert go_on.wait(60)
        done.append(f"{name} ends")
        return name

    with GuardedBlocks() as blocks:
        turns, text, result = gr.State(Turns()), gr.Textbox(), gr.Textbox()
        text.input(slow, [turns, text], result)
        text.change(slow, [turns, text], result)
        text.submit(lambda name: done.append(name), text)
    return blocks, done, go_on


def test_requests_of_a_visitor_wait_for_each_other_in_their_order(page):
    blocks, done, go_on = page
    first, second, other = blocks.fns.values()
    session, another_session = SessionState(blocks), SessionState(blocks)

    async def ask():
        calls = [(first, "a", session), (second, "b", session), (first, "c", session)]
        asked = [asyncio.create_task(blocks.process_api(f, [None, name], state=s)) for f, name, s in calls]
        while not done:
            await asyncio.sleep(0.01)
        await blocks.process_api(other, ["no turn"], state=session)
        asked.append(asyncio.create_task(blocks.process_api(first, [None, "d"], state=another_session)))
        while len(done) < 3:
            await asyncio.sleep(0.01)
        go_on.set()
        return [(await answer)["data"] for answer in asked]

    assert asyncio.run(ask()) == [["a"], ["b"], ["c"], ["d"]]
    assert done[:3] == ["a begins", "no turn", "d begins"]
    assert [line for line in done if line[0] in "abc"] == [
        f"{name} {does}" for name in "abc" for does in ("begins", "ends")
    ]


def test_a_request_that_is_cancelled_lets_the_next_one_in(page):
    blocks, done, go_on = page
    first, *_ = blocks.fns.values()
    session = SessionState(blocks)

    async def ask():
        asked = asyncio.create_task(blocks.process_api(first, [None, "a"], state=session))
        while not done:
            await asyncio.sleep(0.01)
        asked.cancel()
        threading.Thread(target=lambda: (time.sleep(0.1), go_on.set())).start()
        return await blocks.process_api(first, [None, "b"], state=session)

    assert asyncio.run(ask())["data"] == ["b"]


def test_without_a_session_nobody_waits(page):
    blocks, *_ = page
    first, _, other = blocks.fns.values()
    for function, state in ((first, None), (other, SessionState(blocks)), (0, SessionState(blocks))):
        assert not isinstance(one_at_a_time(function, state), asyncio.Lock)
    assert isinstance(one_at_a_time(first, SessionState(blocks)), asyncio.Lock)


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
