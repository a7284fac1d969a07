"""Tabs show an example when they are opened, and leave alone what a visitor has."""

import asyncio

import httpx
import pytest

from tests.demo.conftest import served
from tests.load.wire import STATE, Page, Session, result_of


@pytest.fixture(scope="module")
def page(model):
    with served(model) as page:
        yield page


def opened(page, tab, query="", before=None):
    """What the tab's view is sent when the tab is selected, in a session that has asked for an image `before`."""

    async def select():
        async with httpx.AsyncClient(timeout=None) as client:
            config = Page((await client.get(page.url + "config")).json())
            target = [config.components[tab], "select"]
            (first,) = (f["id"] for f in config.functions if target in map(list, f["targets"]) and f["backend_fn"])
            (function,) = (f["id"] for f in config.functions if f["trigger_after"] == first)
            session = Session(client, page.url)
            if before:
                view, photo = before
                await answer(session, config.updating(view, photo), [STATE, None])
            return (await answer(session, function, [STATE], query))[0]

    return asyncio.run(select())


async def answer(session, function, data, query=""):
    event_id = await session.join(function, data, query=query)
    async with session.events() as events:
        async for event in events:
            if event.ends(event_id):
                return result_of(event)


TABS = [
    ("tab-reconstruct", "image", ("reconstructed", "photo")),
    ("tab-bands", "bands", ("bands-view", "bands-image")),
]


@pytest.mark.parametrize(("tab", "link", "own"), TABS)
def test_a_tab_opens_with_an_example(page, tab, link, own):
    value = opened(page, tab)
    assert len(value["frames"]) == page.model.num_tokens and not value["busy"]
    assert opened(page, tab)["id"] == value["id"]  # made once, for all visitors
    assert "frames" not in opened(page, tab, f"?{link}=sample:1:2")  # the address names another
    assert "frames" not in opened(page, tab, before=own)  # the visitor has taken the image away


def test_the_opening_picture_does_not_take_the_place_of_what_was_asked_for(page):
    async def generate_and_open():
        async with httpx.AsyncClient(timeout=None) as client:
            config = Page((await client.get(page.url + "config")).json())
            session = Session(client, page.url)
            settings = [1, 2, 5, 2.0, "constant", 1.0, 0, 1.0, page.model.num_tokens, ""]
            asked = (await answer(session, config.click("generate"), [STATE, *settings]))[0]
            opening = (await answer(session, config.updating("generated"), [STATE]))[0]
            other = Session(client, page.url)
            return asked, opening, (await answer(other, config.updating("generated"), [STATE]))[0]

    asked, opening, of_another_visitor = asyncio.run(generate_and_open())
    assert len(asked["frames"]) == len(of_another_visitor["frames"]) == page.model.num_tokens
    assert "frames" not in opening
