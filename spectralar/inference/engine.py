"""One engine a model: whatever visitors ask for is sampled as one batch, and their frames are decoded together.

A thread goes round: it lets requests in, gives each that is in its next token (`SamplingBatch`), decodes frames that
are due, and hands out what there is. It is started by the first request and ends with the last, or with the program.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..tokenizer import SpectralTokenizer
from ..transformer import SpectralARTransformer
from .batch import Request, SamplingBatch
from .frames import PrefixDecoder, frames_of_several
from .generation import no_next_token
from .streaming import MASK_TOKENS_AT_ONCE, largest_group

CACHE_BYTES = 128 << 20  # of keys and values, as far as that is enough for the fewest rows
FEWEST_ROWS, MOST_ROWS = 32, 512
MOST_WAITING = 128  # requests
FRAMES_TOGETHER = 2  # times what gains from being decoded at once
SECONDS_BETWEEN_SIGNS = 0.2  # of life, while there is no news

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_at_exit = threading.Event()


@atexit.register
def _end_threads() -> None:
    """Python ends a thread that is still at work by force, and in the midst of torch's C++ that aborts the program."""
    _at_exit.set()
    for thread in list(_threads):
        thread.join()


class EngineBusyError(ValueError):
    """A request cannot be served now, and can later: too many wait, or a sampling process has died. The message says
    which in a sentence."""


class Frame(NamedTuple):
    """One prefix of a request."""

    codes: Tensor  # (B, k)
    images: Tensor | None  # (B, C, H, H) in [0, 1] on the host, if they were asked for


Wanted = Literal["all", "last", "none"]
News = list[Frame] | Exception
NO_MORE: News = []


@dataclass(eq=False)
class Frames:
    """Frames on their way to who asked for them. Iterating yields them in order, and None now and then while there is
    none.

    `close` it where it is not wanted any longer: its rows are free after the token that is being sampled.
    """

    news: queue.SimpleQueue = field(default_factory=queue.SimpleQueue, kw_only=True)
    closed: bool = field(default=False, kw_only=True)

    def __iter__(self) -> Iterator[Frame | None]:
        try:
            while True:
                try:
                    news = self.news.get(timeout=SECONDS_BETWEEN_SIGNS)
                except queue.Empty:
                    news = None
                if isinstance(news, BaseException):
                    raise news
                if news == NO_MORE:
                    return
                if news is None:
                    yield None
                else:
                    yield from news
        finally:
            self.close()

    def close(self) -> None:
        """No more is wanted; who waits for news is told so."""
        self.closed = True
        self.news.put(NO_MORE)


@dataclass(eq=False)
class Sampling(Frames):
    """A request and how far it is."""

    request: Request
    visitor: Hashable
    wanted: Wanted
    decoder: PrefixDecoder | None
    group: int  # frames that are decoded at once, after the first
    frames: int = 0  # decoded so far
    next_length: int = 1  # of the next frame
    rounds: int = 0  # it has waited to be let in

    def let_go(self) -> None:
        """Of the decoder, with the keys and values of all tokens."""
        self.decoder = self.request.feedback = None

    def lengths_due(self) -> list[int]:
        """Prefixes to be decoded now: a few at a time, but the first at once and the last ones without waiting."""
        request = self.request
        waiting = range(self.next_length, request.length + 1)
        if self.wanted != "all":
            return [request.length] if self.wanted == "last" and request.done else []
        enough = self.group if self.frames else 1
        return list(waiting[: self.group]) if len(waiting) >= enough or request.done else []

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be sampled or decoded."""
        decoded = {"all": self.next_length > self.request.length, "last": self.frames > 0, "none": True}
        return self.request.done and decoded[self.wanted]


class Engine:
    """Samples for many at a time, fairly: shares are by visitor, and one who wants many images waits for the room.

    A request is let in if it takes no more than half of the rows that are free, those of visitors who have least in
    the batch first; a small one so finds room beside large ones. One that has waited as long as a sample takes goes
    before all others. Frames are decoded in the order of how many a visitor has got.

    On a CPU in float32, with torch on one thread, codes are those of the request alone, to the bit (see
    `transformer.sums_in_order`); on more threads and other devices up to rounding, which gives another token where a
    random number falls between two sums.

    Args:
        transformer, tokenizer: the models, on their device, in eval mode.
        max_rows: rows of the transformer at once, two for an image with guidance. Default: what 128 MiB of keys and
            values hold, from 32 to 512.
        max_waiting: requests that may wait.
        workers: threads that decode images of decoder feedback side by side, where torch itself has but one. An image
            is the same as without.
    """

    def __init__(
        self, transformer: SpectralARTransformer, tokenizer: SpectralTokenizer, max_rows: int | None = None,
        max_waiting: int = MOST_WAITING, workers: int = 1,
    ) -> None:  # fmt: skip
        self.transformer, self.tokenizer = transformer, tokenizer
        self.max_rows = max_rows or rows_that_fit(transformer)
        self.max_waiting = max_waiting
        self._workers = ThreadPoolExecutor(workers, "decoding") if workers > 1 else None
        self._lock = threading.Lock()
        self._waiting: list[Sampling] = []
        self._running: list[Sampling] = []  # being sampled or decoded
        self._batch: SamplingBatch | None = None  # made by the first request
        self._thread: threading.Thread | None = None
        self._given: Counter[Hashable] = Counter()  # frames by visitor, of those that are here

    def sample(
        self, request: Request, visitor: Hashable = None, wanted: Wanted = "all", news: queue.SimpleQueue | None = None
    ) -> Sampling:
        """Puts a request in the queue.

        Args:
            request: what is to be sampled.
            visitor: who asks; requests of one visitor share what one gets. None: somebody else each time.
            wanted: frames of "all" prefixes from the given one on, the "last", or "none": then codes alone.
            news: where frames are put, if they go elsewhere than to who iterates over what is returned.

        Raises:
            EngineBusyError: if too many wait already.
            ValueError: if it asks for more images than there are rows for.
        """
        if request.num_rows > self.max_rows:
            most = self.max_rows // (2 if request.guided else 1)
            raise ValueError(f"at most {most} images can be sampled at once, got {len(request.codes)}.")
        batch = len(request.codes)
        decoder = None if wanted == "none" or request.feedback else PrefixDecoder(self.tokenizer, batch)
        sampling = Sampling(
            request, object() if visitor is None else visitor, wanted, decoder,
            1 if request.feedback else largest_group(self.tokenizer, batch), next_length=max(1, request.length),
            news=news or queue.SimpleQueue(),
        )  # fmt: skip
        with self._lock:
            if len(self._waiting) >= self.max_waiting:
                raise EngineBusyError("too many others are being served: try again in a moment.")
            self._waiting.append(sampling)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
                _threads.add(self._thread)
                self._thread.start()
        return sampling

    @property
    def num_requests(self) -> int:
        """Requests that are waiting or being served."""
        return len(self._waiting) + len(self._running)

    # ------------------------------------------------------------------------------------------------ the loop

    def _run(self) -> None:
        while True:
            with self._lock:
                self._drop_closed()
                entering = self._next_in()
                if not self._running or _at_exit.is_set():
                    self._thread = None
                    return
            try:
                self._go_round(entering)
            except Exception as error:  # whatever it is, those who are in are told; the others go on
                self._batch = None
                for sampling in self._running:
                    sampling.news.put(error)
                    sampling.close()

    def _go_round(self, entering: list[Sampling]) -> None:
        if self._batch is None:
            sizes = self.tokenizer.quantizer.codebook_sizes
            self._batch = SamplingBatch(self.transformer, self.max_rows, sizes)
        for sampling in entering:
            if not sampling.request.done:
                self._batch.add(sampling.request)
                if sampling.request.feedback:  # the image of a prefix, before that of the token behind it
                    self._hand_out_feedback(sampling)
        self._batch.step()
        self._decode_feedback()
        self._decode()
        for sampling in self._running:
            if not sampling.request.finite:
                sampling.news.put(no_next_token(self.transformer))
                sampling.close()
        for sampling in [sampling for sampling in self._running if sampling.finished and not sampling.closed]:
            if sampling.wanted == "none":
                sampling.news.put([Frame(sampling.request.codes.clone(), None)])
            sampling.news.put(NO_MORE)
            sampling.let_go()  # visitors may keep the rest for long
            self._running.remove(sampling)

    def _decode_feedback(self) -> None:
        """Images that decoder feedback needs, side by side; who asks for one then finds it there."""
        if self._workers is None or torch.get_num_threads() > 1:
            return
        known = []
        for sampling in self._running:
            request, lengths = sampling.request, sampling.lengths_due()
            if request.feedback and (lengths or sampling.wanted != "all"):
                codes = self._batch.read(request)  # (B, length)
                if request.finite and codes.shape[1]:
                    known.append((request.feedback, codes[:, : lengths[0]] if lengths else codes))
        list(self._workers.map(lambda pair: pair[0].image(pair[1]), known))

    @torch.no_grad()
    def _decode(self) -> None:
        """Frames that are due, as many as gain from it; those of visitors who have got least come first."""
        room = FRAMES_TOGETHER * MASK_TOKENS_AT_ONCE // self.tokenizer.num_patches
        due: list[tuple[Sampling, list[int]]] = []
        for sampling in sorted(self._running, key=lambda sampling: self._given[sampling.visitor]):
            if sampling.request.feedback:
                self._hand_out_feedback(sampling)
                continue
            lengths = sampling.lengths_due()
            count = len(lengths) * len(sampling.request.codes)
            if lengths and (count <= room or not due):
                due.append((sampling, lengths))
                room -= count
        for sampling, _ in due:
            self._batch.read(sampling.request)
        due = [(sampling, lengths) for sampling, lengths in due if sampling.request.finite]
        for sampling, lengths in due:
            sampling.decoder.append(sampling.request.codes[:, sampling.decoder.length : lengths[-1]])
        if due:
            images = frames_of_several([(sampling.decoder, lengths) for sampling, lengths in due])
            for (sampling, lengths), frames in zip(due, images, strict=True):
                self._hand_out(sampling, lengths, (frames / 2 + 0.5).clamp(0, 1).cpu())

    def _hand_out_feedback(self, sampling: Sampling) -> None:
        """The image that is due of a request whose next token needs it anyway."""
        if lengths := sampling.lengths_due():
            codes = self._batch.read(sampling.request)[:, : lengths[0]]
            if sampling.request.finite:
                images = sampling.request.feedback.image(codes).unsqueeze(1)
                self._hand_out(sampling, lengths, (images / 2 + 0.5).clamp(0, 1).cpu())

    def _hand_out(self, sampling: Sampling, lengths: list[int], images: Tensor) -> None:
        """Images (B, S, C, H, H) of S prefixes."""
        codes = sampling.request.codes[:, : lengths[-1]].clone()
        # All at once: who waits for them is woken, and asks for the interpreter, once.
        pairs = zip(lengths, images.unbind(1), strict=True)
        sampling.news.put([Frame(codes[:, :length], frame) for length, frame in pairs])
        sampling.frames += len(lengths)
        sampling.next_length = lengths[-1] + 1
        self._given[sampling.visitor] += images.shape[0] * images.shape[1]

    def _next_in(self) -> list[Sampling]:
        """Takes those out of the queue that are let in now."""
        rows: Counter[Hashable] = Counter()
        for sampling in self._running:
            rows[sampling.visitor] += sampling.request.num_rows
        free = self.max_rows if self._batch is None else self._batch.free_rows
        patience, entering = self.transformer.config.num_tokens, []
        for sampling in sorted(self._waiting, key=lambda s: (s.rounds < patience, rows[s.visitor])):
            overdue = sampling.rounds >= patience
            if sampling.request.num_rows <= (free if overdue or free == self.max_rows else free // 2):
                entering.append(sampling)
                free -= sampling.request.num_rows
            elif overdue:
                break  # all that becomes free is kept for it
        self._running += entering
        self._waiting = [sampling for sampling in self._waiting if sampling not in entering]
        for sampling in self._waiting:
            sampling.rounds += 1
        return entering

    def _drop_closed(self) -> None:
        for sampling in [*self._running, *self._waiting]:
            if sampling.closed:
                if self._batch is not None:
                    self._batch.remove(sampling.request)
                sampling.let_go()
        self._running = [sampling for sampling in self._running if not sampling.closed]
        self._waiting = [sampling for sampling in self._waiting if not sampling.closed]
        self._given = Counter({sampling.visitor: self._given[sampling.visitor] for sampling in self._running})


def rows_that_fit(transformer: SpectralARTransformer) -> int:
    """Rows whose keys and values stay within `CACHE_BYTES`, within limits."""
    config = transformer.config
    a_row = 2 * config.num_layers * config.num_tokens * config.hidden_size * transformer.dtype.itemsize
    return max(FEWEST_ROWS, min(MOST_ROWS, CACHE_BYTES // a_row // FEWEST_ROWS * FEWEST_ROWS))
