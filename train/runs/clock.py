"""How fast a run trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepClock:
    """Wall time of steps and, apart, of their data; without what is no training (measuring, sampling, saving).

    On an accelerator it is right over an interval that ends by waiting for the device, as reading a loss does.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._start, self._data, self._paused = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._data += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def read(self) -> tuple[float, float]:
        """Seconds of training since the last reading, and the share of them that went into data; starts again."""
        seconds, data = time.perf_counter() - self._start - self._paused, self._data
        self.restart()
        return seconds, data / seconds
