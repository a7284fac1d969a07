"""Tabs show an example when they are opened, and leave alone what a visitor has."""

import asyncio

import httpx
import pytest

from tests.demo.conftest import served
from tests.load.wire import Page, Session, result_of


@pytest.fixture(scope="module")
def page(model):
    with served(model) as page:
        yield page


def opened(page, tab, query=""):
    """What the tab's view is sent when the tab is selected."""

    async def select():
        async with httpx.AsyncClient(timeout=None) as client:
            config = Page((await client.get(page.url + "config")).json())
            target = [config.components[tab], "select"]
            (function,) = (f["id"] for f in config.functions if target in map(list, f["targets"]) and f["backend_fn"])
            session = Session(client, page.url)
            await session.join(function, [None], query=query)
            async with session.events() as events:
                async for event in events:
                    if event.kind == "process_completed":
                        return result_of(event)[0]

    return asyncio.run(select())


@pytest.mark.parametrize(("tab", "link"), [("tab-reconstruct", "image"), ("tab-bands", "bands")])
def test_a_tab_opens_with_an_example(page, tab, link):
    value = opened(page, tab)
    assert len(value["frames"]) == page.model.num_tokens and not value["busy"]
    assert opened(page, tab)["id"] == value["id"]  # made once, for all visitors
    assert "frames" not in opened(page, tab, f"?{link}=sample:1:2")  # the address names another
