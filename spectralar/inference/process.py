"""Engines in a process of their own, for a page whose visitors are served by Python threads of this one.

Threads of one process take turns with the interpreter: the page waits while a token is sampled, and the sampler, at
each of the hundreds of small operations of a token, while the page does something. On two cores one stayed half idle.
A process of its own has an interpreter of its own, and what it samples is the same.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from ..tokenizer import SpectralTokenizer
from ..transformer import SpectralARTransformer
from .batch import Request
from .engine import Engine, EngineBusyError, Frame, Frames, News, Wanted
from .feedback import feedback_for

LOST = "the sampler had to be started again, and what it was at is lost: try once more."


class EngineProcess:
    """A process with an `Engine` for each of several models.

    The first request has it started, also after it has died. Its start takes seconds of a core, which the page needs
    for its own start and for what its first visitor sees: so it comes a little later, and until then requests are
    served by engines here. It ends with this process, however that ends. Weights are copied.

    Args:
        models: pairs of transformer and tokenizer, on a CPU, in eval mode.
        workers: as `Engine` has them.
        delay: seconds from a request without a process to the start of one.
    """

    def __init__(
        self, models: Sequence[tuple[SpectralARTransformer, SpectralTokenizer]], workers: int = 1, delay: float = 10.0
    ) -> None:
        self.delay = delay
        self._models, self._workers = list(models), workers
        self._lock = threading.Lock()  # of all below, and of what is sent
        self._numbers = itertools.count()
        self._open: dict[int, _Remote] = {}
        self._connection: Connection | None = None
        self.ready = False  # whether requests go there
        self._coming = False  # whether a start has been ordered
        self.engines = [RemoteEngine(self, i, Engine(*model, workers=workers)) for i, model in enumerate(models)]

    def _order(self) -> None:
        """Has the process started a little later, once."""
        with self._lock:
            if self._coming or self._connection is not None:
                return
            self._coming = True
        timer = threading.Timer(self.delay, self._start)
        timer.daemon = True
        timer.start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would have this one's locks, and no threads
        ours, theirs = context.Pipe()
        # Weights go by value: shared memory, torch's way between processes, is scarce in containers.
        arguments = theirs, pickle.dumps(self._models), torch.get_num_threads(), self._workers
        process = context.Process(target=_serve, args=arguments, name="sampling", daemon=True)
        try:
            process.start()  # takes seconds, as it hands over the weights: not under the lock, requests go on here
        except OSError:  # the system may start one later
            self._coming = False
            return
        theirs.close()
        with self._lock:
            self.process, self._connection, self._coming = process, ours, False
        threading.Thread(target=self._listen, args=(ours,), name="from sampling", daemon=True).start()

    def _listen(self, connection: Connection) -> None:
        """Hands out what comes, until the process has ended."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, news = pickle.loads(connection.recv_bytes())
                if number is None:
                    self.ready = True
                elif remote := self._open.get(number):
                    if isinstance(news, _Answer):
                        remote.answer.put(news.refusal)
                    else:
                        remote.news.put(_unpacked(news))
        with self._lock:
            self._connection, self.ready = None, False
            lost = list(self._open.values())
        for remote in lost:
            for waiting in (remote.answer, remote.news):
                waiting.put(EngineBusyError(LOST))

    def sample(self, model: int, request: Request, visitor: Hashable, wanted: Wanted) -> Frames | None:
        """`Engine.sample` of one of the models, which is waited for until the request is in the queue.

        None if there is no process yet; one is then on its way.

        Raises:
            EngineBusyError, ValueError: as there; EngineBusyError also, then or while frames are waited for, if the
                process dies.
        """
        if not self.ready:
            self._order()
            return None
        remote = _Remote(self, next(self._numbers), model)
        message = replace(request, feedback=None), visitor, wanted  # decoder feedback has a tokenizer: made there
        with self._lock:
            if self._connection is None:  # it has died since
                return None
            self._open[remote.number] = remote
            self._send(remote, message)
        if refusal := remote.answer.get():
            remote.close()
            raise refusal
        return remote

    def leave(self, remote: _Remote) -> None:
        """Somebody wants no more of what they asked for."""
        with self._lock:
            if self._open.pop(remote.number, None) and self._connection is not None:
                self._send(remote, None)

    def num_requests(self, model: int) -> int:
        return sum(remote.model == model for remote in list(self._open.values()))

    def _send(self, remote: _Remote, what: Any) -> None:
        with contextlib.suppress(OSError):  # if the process has died, `_listen` tells all
            self._connection.send_bytes(pickle.dumps((remote.number, remote.model, what)))


@dataclass
class RemoteEngine:
    """What an `Engine` is to who samples, with the engine in another process; `here` is one for while that starts."""

    process: EngineProcess
    model: int
    here: Engine

    def sample(self, request: Request, visitor: Hashable = None, wanted: Wanted = "all") -> Frames:
        """As `Engine.sample`."""
        frames = self.process.sample(self.model, request, visitor, wanted)
        return self.here.sample(request, visitor, wanted) if frames is None else frames

    @property
    def num_requests(self) -> int:
        """Requests that are waiting or being served."""
        return self.process.num_requests(self.model) + self.here.num_requests


@dataclass(eq=False)
class _Remote(Frames):
    """Frames that come from the other process."""

    process: EngineProcess
    number: int
    model: int
    answer: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def close(self) -> None:
        super().close()
        self.process.leave(self)


# -------------------------------------------------------------------------------------------------- over there


class _Answer(NamedTuple):
    """To a request: whether it is in the queue."""

    refusal: Exception | None


@dataclass
class _Outbox:
    """Takes the news of one request to where all are sent from."""

    number: int
    all_news: queue.SimpleQueue = field(repr=False)

    def put(self, news: Any) -> None:
        self.all_news.put((self.number, news))


def _serve(connection: Connection, models: bytes, threads: int, workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page, whose end closes the connection
    torch.set_num_threads(threads)
    engines = [Engine(*model, workers=workers) for model in pickle.loads(models)]
    all_news: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_send_all, args=(connection, all_news), daemon=True).start()
    all_news.put((None, None))  # ready
    samplings: dict[int, Frames] = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, model, what = pickle.loads(connection.recv_bytes())
            if what is None:
                if sampling := samplings.pop(number, None):
                    sampling.close()
                continue
            request, visitor, wanted = what
            outbox, engine, refusal = _Outbox(number, all_news), engines[model], None
            try:
                request.feedback = feedback_for(engine.transformer, engine.tokenizer, len(request.codes))
                samplings[number] = engine.sample(request, visitor, wanted, outbox)
            except Exception as error:
                refusal = error
            outbox.put(_Answer(refusal))


def _send_all(connection: Connection, all_news: queue.SimpleQueue) -> None:
    with contextlib.suppress(OSError):
        while True:
            number, news = all_news.get()
            connection.send_bytes(pickle.dumps((number, _packed(news))))


def _packed(news: News | _Answer) -> Any:
    """As arrays: a pickled tensor is a file. Errors of others' making may not survive the way."""
    if isinstance(news, list):  # NumPy knows no bfloat16
        return [(codes.numpy(), None if images is None else images.float().numpy()) for codes, images in news]
    if isinstance(news, Exception) and type(news) not in (ValueError, EngineBusyError):
        at = traceback.extract_tb(news.__traceback__)[-1]
        return RuntimeError(f"{type(news).__name__} at {at.filename}:{at.lineno}: {news}")
    return news


def _unpacked(news: Any) -> News:
    if isinstance(news, list):
        return [Frame(*(None if x is None else torch.from_numpy(x) for x in frame)) for frame in news]
    return news
