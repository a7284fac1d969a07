"""A visitor may ask for something else before there is an answer. Then the last request counts, whichever ends first.

Gradio alone drops a click while an earlier one of the same kind is answered, and lets clicks of different kinds
overwrite each other's results. So what fills a view is called with `ALWAYS`, and takes a state of `Turns` first.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Generator
from contextlib import AbstractAsyncContextManager, closing, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.routing import APIRoute
from gradio.block_function import BlockFunction
from gradio.state_holder import SessionState

ALWAYS = {"trigger_mode": "multiple"}  # Gradio's default "once" drops what is asked for while it answers


@dataclass
class Turns:
    """Of one visitor and one view: how many requests have begun. Each step of one keeps the others out."""

    last: int = 0
    coming: int = 0  # the request that has begun to fill the view and has nothing to show yet; 0 is none
    lock: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:  # which makes a session's state of the first value
        return Turns(self.last)

    def begin(self) -> int:
        """Begins a request: what began before it ends unseen. Returns its number."""
        self.last += 1
        return self.last

    def shown(self, values: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """What a handler yields, until something else begins. It is closed then, and lets go of the model."""
        number = self.coming = self.begin()
        try:
            with closing(values):
                # At first nothing: it is computed only for who is the last of those who wait.
                for i, value in enumerate(chain([gr.skip()], values)):
                    if i:
                        self.coming = 0
                    yield value
                    if self.last != number:
                        break
                else:
                    return
        finally:
            if self.coming == number:
                self.coming = 0
        yield gr.skip()  # Gradio sends what came last once more


def one_at_a_time(function: BlockFunction | int, state: SessionState | None) -> AbstractAsyncContextManager:
    """For one step of a function: waits for those of the same visitor and view, in the order in which they came."""
    if state is not None and isinstance(function, BlockFunction):
        for component in function.inputs:
            if isinstance(component, gr.State) and isinstance(component.value, Turns):
                return state[component._id].lock
    return nullcontext()


def check_logins_in_order(app: FastAPI) -> None:
    """Gradio has a thread look at who sent a request; on a busy machine a later click comes out of it first."""
    config = (route for route in app.routes if isinstance(route, APIRoute) and route.path == "/config")
    check = next((each.dependency for route in config for each in route.dependencies), None)  # that of all routes
    if check is None or inspect.iscoroutinefunction(check):  # as another version of Gradio may have it
        return

    async def check_at_once(**given: Any) -> None:
        check(**given)

    check_at_once.__signature__ = inspect.signature(check)
    app.dependency_overrides[check] = check_at_once
