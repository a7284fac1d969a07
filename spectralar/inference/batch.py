"""Requests that are sampled together though they begin and end at different times, each with its own settings."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import filled_up
from ..sampling import guidance_curve
from ..transformer import Conditioning, SamplingCache, SpectralARTransformer
from . import cuda_graphs
from .feedback import DecoderFeedback
from .generation import after_given, choose, logits_dtype

MOST_GRAPHS = 64


@dataclass(eq=False)
class Request:
    """Images with settings in common, as `interface.arguments` checks them."""

    class_labels: Tensor  # (B,) int64
    codes: Tensor  # (B, n) int64, n <= N; begins with the given prefix, the rest is filled in when it is read
    uniforms: Tensor  # (B, N) in [0, 1), the random number of each token
    length: int = 0  # tokens that are there, at first those of the prefix
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    finite: bool = True  # whether the logits of all tokens were, as far as they have been read
    feedback: DecoderFeedback | None = None  # of a transformer with decoder feedback

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1

    @property
    def num_rows(self) -> int:
        """Rows of the transformer that it takes: with guidance an unconditional one for each image."""
        return len(self.codes) * (2 if self.guided else 1)

    @property
    def done(self) -> bool:
        return self.length == self.codes.shape[1]

    @property
    def filters(self) -> tuple[float, int, float]:
        return self.temperature, self.top_k, self.top_p


@dataclass
class _Places:
    """Where a request's numbers lie in the batch's buffers."""

    images: Tensor  # (B,) int64
    rows: Tensor  # (B or 2B,) int64


@dataclass
class _FreeNumbers:
    """Numbers from 0 on that nobody has. The lowest go first, so that those in use stay close together."""

    count: int  # all there are
    numbers: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = list(range(self.count))

    def take(self, count: int) -> list[int]:
        return [heapq.heappop(self.numbers) for _ in range(count)]

    def give_back(self, numbers: list[int]) -> None:
        for number in numbers:
            heapq.heappush(self.numbers, number)


class SamplingBatch:
    """One step gives every request in it its next token, wherever it is.

    A request keeps its rows from its first token to its last. A row of another one, or of nobody, changes nothing in
    it: on a CPU in float32, on one thread, its codes are those of the request alone, see `rows_to_run`. All a step
    reads and writes lies in buffers that are made once; the weights are to stay as they are. On CUDA a step is
    captured for each bucket of rows and images whose requests share their filters.

    Args:
        transformer: the model.
        capacity: rows of the transformer that there are, up to the next multiple of four.
        codebook_sizes: entries that each position may use, of a tokenizer with nested codebooks. None: all.
    """

    def __init__(
        self, transformer: SpectralARTransformer, capacity: int, codebook_sizes: Sequence[int] | None = None
    ) -> None:
        capacity = filled_up(capacity)
        self.transformer, self.capacity = transformer, capacity
        config, device, n = transformer.config, transformer.device, transformer.config.num_tokens
        dtype, width = transformer.dtype, config.hidden_size

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        with torch.inference_mode():
            # Of each row.
            self._tokens, self._positions, self._image_of = zeros(capacity), zeros(capacity), zeros(capacity)
            self._conditioning = Conditioning(
                zeros(capacity, width, dtype=dtype), zeros(capacity, config.num_layers, 6, width, dtype=dtype),
                zeros(capacity, 2, width, dtype=dtype),
            )  # fmt: skip
            self._cache = transformer.make_cache(capacity)
            self._caches: dict[int, SamplingCache] = {}  # its first so many rows
            # Of each image. Without guidance both rows are the same one, and the scale is 1.
            self._cond, self._uncond = zeros(capacity), zeros(capacity)
            self._codes, self._uniforms = zeros(capacity, n), zeros(capacity, n, dtype=torch.float32)
            self._finite = zeros(capacity, dtype=torch.bool)  # whether all logits so far were
            self._scales = zeros(capacity, n, dtype=logits_dtype(transformer))
            self._expected = None  # (I, d), what the decoder expects of the next token
            if config.decoder_feedback:
                self._expected = zeros(capacity, config.codebook_dim, dtype=logits_dtype(transformer))
            self._sizes = None
            if codebook_sizes is not None:
                self._sizes = torch.tensor(codebook_sizes, dtype=torch.int64, device=device)
        self._free_rows, self._free_images = _FreeNumbers(capacity), _FreeNumbers(capacity)
        self._places: dict[Request, _Places] = {}
        self._captures = cuda_graphs.why_not(transformer) is None
        self._pool = cuda_graphs.graph_pool() if self._captures else None
        self._graphs: dict[tuple, Callable[[], None]] = {}
        self._members_changed()

    def __len__(self) -> int:
        """Requests that are being sampled."""
        return len(self._places)

    @property
    def free_rows(self) -> int:
        return len(self._free_rows.numbers)

    @torch.inference_mode()
    def add(self, request: Request) -> None:
        """Takes a request in; one with a prefix gets its first token here, as all tokens of a prefix run at once."""
        device = self._tokens.device
        ints = {"dtype": torch.int64, "device": device}
        images = torch.tensor(self._free_images.take(len(request.codes)), **ints)
        rows = torch.tensor(self._free_rows.take(request.num_rows), **ints)
        self._places[request] = _Places(images, rows)
        cond, uncond = rows.chunk(2) if request.guided else (rows, rows)  # each (B,)
        n = self._codes.shape[1]
        scale = request.guidance_scale if request.guided else 1.0
        curve = guidance_curve(n, scale, request.guidance_schedule)
        self._cond[images], self._uncond[images] = cond, uncond
        self._uniforms[images] = request.uniforms.float()
        self._scales[images] = torch.tensor(curve, dtype=self._scales.dtype, device=device)
        self._image_of[rows] = images.repeat(len(rows) // len(images))
        self._finite[images] = True
        if self._expected is not None:
            self._expected[images] = 0  # nothing, before the first token
        self._begin(request, rows)
        self._members_changed()

    def _begin(self, request: Request, rows: Tensor) -> None:
        """Conditioning of the request's rows, and what its prefix leaves in the cache."""
        labels, spare = request.class_labels, filled_up(request.num_rows) - request.num_rows
        if request.guided:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.null_label)])
        conditioning = self.transformer.condition(F.pad(labels, (0, spare)))  # of R rows
        for ours, new in zip(self._conditioning, conditioning, strict=True):
            ours[rows] = new[: len(rows)]
        batch, length = len(request.codes), request.length
        cache = self.transformer.make_cache(len(rows) + spare)
        if length:
            image_of = torch.arange(len(rows) + spare, dtype=torch.int64, device=rows.device) % batch
            prefix = request.codes[:, :length].index_select(0, image_of)
            logits = after_given(self.transformer, prefix, conditioning, cache)  # (R, K)
            if request.feedback is not None:
                expected = request.feedback.after(request.codes[:, :length])
                logits = self.transformer.add_expected(logits, expected.index_select(0, image_of), length, cache)
            images = self._places[request].images
            self._finite[images] = logits[: len(rows)].isfinite().all(1).view(-1, batch).all(0)
            uncond = logits[batch : 2 * batch] if request.guided else None
            tokens = self._choose(
                logits[:batch], uncond, self._scales[images, length, None], self._uniforms[images, length],
                torch.full((batch, 1), length, dtype=torch.int64, device=rows.device), request.filters,
            )  # fmt: skip
            request.codes[:, length] = tokens
            request.length = length + 1
            self._tokens[rows] = tokens.repeat(len(rows) // batch)
        self._positions[rows] = request.length
        self._codes[self._places[request].images, : request.codes.shape[1]] = request.codes
        self._cache.take(rows, cache)  # of others nothing is left, not even what is not a number
        if request.done:
            self.remove(request)

    def read(self, request: Request) -> Tensor:
        """The tokens of a request so far, (B, length); they stand in its `codes` too, and stay there.

        They are worth nothing where `finite` is False from here on.
        """
        length = request.length
        if request not in self._places:
            return request.codes[:, :length]
        images = self._places[request].images
        request.codes[:, :length] = self._codes[images, :length]
        request.finite = bool(self._finite[images].all())
        return request.codes[:, :length]

    @torch.inference_mode()
    def remove(self, request: Request) -> None:
        """Reads its tokens, and gives its rows to others. Those that are done leave by themselves."""
        if request not in self._places:
            return
        self.read(request)
        places = self._places.pop(request)
        # Until somebody has them they follow the first ones, which are always among those that are run.
        self._cond[places.images], self._uncond[places.images], self._image_of[places.rows] = 0, 0, 0
        self._free_images.give_back(places.images.tolist())
        self._free_rows.give_back(places.rows.tolist())
        self._members_changed()

    def _members_changed(self) -> None:
        """What of the buffers is used, and which images share filters."""
        rows = max((int(places.rows.max()) + 1 for places in self._places.values()), default=0)
        images = max((int(places.images.max()) + 1 for places in self._places.values()), default=0)
        rows = filled_up(rows)
        if self._captures and rows:
            rows, images = cuda_graphs.bucket(rows), cuda_graphs.bucket(images)
        self._used = min(self.capacity, rows), min(self.capacity, images)
        by_filters: dict[tuple, list[Tensor]] = {}
        for request, places in self._places.items():
            by_filters.setdefault(request.filters, []).append(places.images)
        self._groups = {filters: torch.cat(images) for filters, images in by_filters.items()}

    @torch.inference_mode()
    def step(self) -> None:
        """The next token of every request."""
        for request, places in self._places.items():
            if request.feedback is not None and request.length:
                self._expected[places.images] = request.feedback.after(self.read(request))
        key = (*self._used, *self._groups)
        if key in self._graphs:
            self._graphs[key]()
        elif self._places:
            self._step(*self._used)
            if self._captures and len(self._groups) == 1 and len(self._graphs) < MOST_GRAPHS:
                used = self._used
                if graph := cuda_graphs.captured(lambda: self._step(*used), self._pool):
                    self._graphs[key] = graph
        for request in list(self._places):
            request.length += 1
            if request.done:
                self.remove(request)

    def _step(self, rows: int, images: int) -> None:
        """Reads and writes the first rows and images of the buffers, and asks the device nothing."""
        if rows not in self._caches:
            self._caches[rows] = self._cache.narrow(rows)
        conditioning = Conditioning(*(part[:rows] for part in self._conditioning))
        positions, cond = self._positions[:rows], self._cond[:images]
        logits = self.transformer.step(self._tokens[:rows, None], positions, conditioning, self._caches[rows])
        if self._expected is not None:
            expected = self._expected.index_select(0, self._image_of[:rows])
            logits = self.transformer.add_expected(logits, expected, positions, self._caches[rows])
        at = positions.index_select(0, cond).unsqueeze(1)  # (I, 1), the token that is chosen
        both = logits.index_select(0, cond), logits.index_select(0, self._uncond[:images])  # each (I, K)
        finite = logits.isfinite().all(1)  # (R,)
        for of_rows in (cond, self._uncond[:images]):
            self._finite[:images].logical_and_(finite.index_select(0, of_rows))
        scales, uniforms = self._scales[:images].gather(1, at), self._uniforms[:images].gather(1, at).squeeze(1)
        if len(self._groups) == 1:
            tokens = self._choose(*both, scales, uniforms, at, next(iter(self._groups)))
        else:
            tokens = torch.zeros_like(cond)
            for filters, some in self._groups.items():
                numbers = (tensor.index_select(0, some) for tensor in (*both, scales, uniforms, at))
                tokens[some] = self._choose(*numbers, filters)
        self._codes[:images].scatter_(1, at, tokens.unsqueeze(1))
        self._tokens[:rows] = tokens.index_select(0, self._image_of[:rows])
        positions.add_(1).clamp_(max=self._codes.shape[1] - 1)  # those of nobody's rows stay in the cache

    def _choose(
        self, cond: Tensor, uncond: Tensor | None, scales: Tensor, uniforms: Tensor, at: Tensor, filters: Any
    ) -> Tensor:
        """Tokens (I,) from logits (I, K) at `at` (I, 1)."""
        sizes = None if self._sizes is None else self._sizes[at]
        temperature, top_k, top_p = filters
        return choose(cond, uncond, scales, uniforms, sizes, temperature=temperature, top_k=top_k, top_p=top_p)
