"""What belongs to a run of a pipeline, and which run `pipe._guidance_scale` and the like mean, seen from where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary


@dataclass(eq=False)
class RunState:
    """What callbacks see of a run and may change, under the names that diffusers has for it on its pipelines."""

    guidance_scale: float = 1.0
    num_timesteps: int = 0  # tokens to be sampled
    interrupt: bool = False


_NONE: Mapping[Runs, RunState] = WeakKeyDictionary()  # never written: another takes its place
# By pipeline: the run whose callback is being called, and the one that this thread or task went on with last.
_calling_back: ContextVar[Mapping[Runs, RunState]] = ContextVar("calling_back", default=_NONE)
_current: ContextVar[Mapping[Runs, RunState]] = ContextVar("current", default=_NONE)


class Runs:
    """The runs of one pipeline, any number at a time, in threads or taking turns as streams.

    A callback reads and writes the state of its own run. Elsewhere it is read of the run that the thread, or asyncio
    task, went on with last, else of the one that began last. It is written to the same one if that still goes on,
    else to the run that began last of those that do: a Stop button sits in another thread than what it stops.
    """

    def __init__(self) -> None:
        self._going_on: list[RunState] = []
        self._latest = RunState()

    @contextmanager
    def going_on(self, state: RunState) -> Iterator[None]:
        """Around the whole of a run."""
        self._latest = state
        self._going_on.append(state)
        self.enter(state)
        try:
            yield
        finally:
            self._going_on.remove(state)

    def enter(self, state: RunState) -> None:
        """This thread, or task, goes on with a run."""
        if _current.get().get(self) is not state:
            _current.set(self._with(_current.get(), state))

    @contextmanager
    def calling_back(self, state: RunState) -> Iterator[None]:
        """Around a callback, which may itself run the pipeline: what it sees is its own run nevertheless."""
        token = _calling_back.set(self._with(_calling_back.get(), state))
        try:
            yield
        finally:
            _calling_back.reset(token)

    def _with(self, runs: Mapping[Runs, RunState], state: RunState) -> Mapping[Runs, RunState]:
        # A copy: tasks inherit the variables of the one that made them.
        runs = WeakKeyDictionary(runs)
        runs[self] = state
        return runs

    def seen(self) -> RunState:
        """The run that is meant by reading."""
        return _calling_back.get().get(self) or _current.get().get(self) or self._latest

    def changed(self) -> RunState:
        """The run that is meant by writing; what it is set to can be read again."""
        state = self.seen()
        if state not in self._going_on and self._going_on:
            state = self._going_on[-1]
            self.enter(state)
        return state


class RunAttributes:
    """For pipelines with `_runs`: what is known of a run under the names that diffusers has for it; see `Runs`.

    Callbacks may set those with an underscore.
    """

    _runs: Runs

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Tokens that the run samples."""
        return self._runs.seen().num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def _guidance_scale(self) -> float:
        return self._runs.seen().guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._runs.changed().guidance_scale = value

    @property
    def _interrupt(self) -> bool:
        return self._runs.seen().interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._runs.changed().interrupt = value
