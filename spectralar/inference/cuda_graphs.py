"""The token loop on CUDA: each step captured once as a CUDA graph, then replayed.

A step of `d16` is some 300 kernels, which take the host longer to launch than the GPU to run at small batches. A graph
launches them all by one call. The step at each position has a graph of its own, of the very code that runs without:
attention then spans just the tokens so far, and the results are the same.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transformer import Conditioning, SamplingCache, SpectralARTransformer
from .generation import TokenGenerator

logger = logging.getLogger(__name__)

LARGEST_BUCKET = 64
KEPT = 4  # sets of graphs with their buffers, for each transformer


def token_generator(transformer: SpectralARTransformer, *args: Any, **settings: Any) -> TokenGenerator:
    """The fastest `TokenGenerator` there is for the transformer where it is; same arguments, same tokens."""
    obstacle = why_not(transformer)
    if obstacle is None:
        return GraphedTokenGenerator(transformer, *args, **settings)
    if obstacle:
        _log_once(f"sampling without CUDA graphs: {obstacle}")
    return TokenGenerator(transformer, *args, **settings)


def why_not(transformer: SpectralARTransformer) -> str | None:
    """Why its steps cannot be captured; None if they can, "" if it is not on CUDA anyway."""
    if transformer.device.type != "cuda":
        return ""
    if os.environ.get("SPACES_ZERO_GPU"):
        return "ZeroGPU forks a process for each call, which no graph outlives."
    if hasattr(transformer, "_hf_hook"):
        return "the transformer's weights move between host and device."
    if transformer.casts_weights:
        return "the transformer's weights are cast at each use."
    if _failed:
        return f"capture failed before: {_failed[0]}"
    return None


_failed: list[str] = []
_lock = threading.Lock()  # of what all threads share: `_unused`, and the stream that captures


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def bucket(batch: int) -> int:
    """The batch size to run for `batch` images: the next power of two up to 64, then multiples of 64."""
    if batch <= LARGEST_BUCKET:
        return 1 << (batch - 1).bit_length()
    return -(-batch // LARGEST_BUCKET) * LARGEST_BUCKET


def capture(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """What launches the kernels of `function` again, with the same addresses. It must have run before."""
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Other threads may go on allocating meanwhile: only what this one does must be fit for a graph.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def captured(function: Callable[[], None], pool: Any) -> Callable[[], None] | None:
    """What `capture` gives; None if that has failed, which is logged once."""
    if _failed:
        return None
    try:
        with _lock:
            return capture(function, pool)
    except RuntimeError as error:
        _failed.append(str(error).splitlines()[0])
        _log_once(f"sampling without CUDA graphs: capture failed: {_failed[0]}")
        return None


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: each stream takes a workspace of its own for products."""
    return torch.cuda.Stream(device)


def graph_pool() -> Any:
    """Memory that graphs share, whose intermediate results do not outlive a step."""
    return torch.cuda.graph_pool_handle()


@dataclass
class Buffers:
    """All that a step reads and writes, at fixed addresses, and the graphs that do so."""

    codes: Tensor  # (B, N) int64
    uniforms: Tensor  # (B, N)
    scales: Tensor  # (N,)
    image_of: Tensor  # (R,) int64, of each row of the transformer
    conditioning: Conditioning  # of R rows: B, or 2B with guidance
    cache: SamplingCache
    finite: Tensor  # () bool
    expected: Tensor | None  # (B, d) with decoder feedback
    pool: Any
    graphs: dict[int, Callable[[], None]] = field(default_factory=dict)  # by index


# Buffers that no generator uses at the moment, the latest first, with their keys.
_unused: WeakKeyDictionary[SpectralARTransformer, list[tuple[tuple, Buffers]]] = WeakKeyDictionary()


class GraphedTokenGenerator(TokenGenerator):
    """A `TokenGenerator` that replays steps. Rows are filled up to a bucket, so that few batch sizes are captured.

    The first sample of a batch size and settings runs as without graphs, and captures; that takes a second at most.
    """

    def __init__(self, transformer, class_labels: Tensor, codes: Tensor, uniforms: Tensor, **settings: Any) -> None:
        self._given = codes  # (B, n)
        self._spare = bucket(codes.shape[0]) - codes.shape[0]
        super().__init__(transformer, F.pad(class_labels, (0, self._spare)), codes, uniforms, **settings)
        self._given_uniforms = uniforms
        self._key: tuple = ()
        self._buffers: Buffers | None = None

    def sample(self, index: int, guidance_scale: float) -> None:
        super().sample(index, guidance_scale)
        with torch.inference_mode():
            self._given[:, index] = self.codes[: self._given.shape[0], index]

    def _begin(self, guided: bool) -> None:
        key = self._key_of(guided)
        if key != self._key:
            self.close()
            self._key, self._buffers = key, self._take(key)
        super()._begin(guided)
        given, uniforms, rows = self._given, self._given_uniforms, self._given.shape[0] + self._spare
        if self._buffers is None:
            n = uniforms.shape[1]
            self._buffers = Buffers(
                given.new_zeros(rows, n), uniforms.new_zeros(rows, n), torch.empty_like(self._scales),
                self._image_of, Conditioning(*map(torch.empty_like, self._conditioning)), self._cache,
                torch.empty_like(self._finite),
                None if self._expected is None else self._expected.new_zeros(rows, self._expected.shape[1]),
                graph_pool(),
            )  # fmt: skip
        buffers = self._buffers
        for ours, new in zip(buffers.conditioning, self._conditioning, strict=True):
            ours.copy_(new)
        buffers.codes[: given.shape[0], : given.shape[1]] = given
        buffers.uniforms[: given.shape[0]] = uniforms
        buffers.scales.copy_(torch.tensor(self._scales_set, dtype=self._scales.dtype, device="cpu"))
        self.codes, self.uniforms, self._scales = buffers.codes, buffers.uniforms, buffers.scales
        self._image_of, self._conditioning = buffers.image_of, buffers.conditioning
        self._finite = buffers.finite.copy_(self._finite)
        if self._expected is not None:
            buffers.expected[: given.shape[0]] = self._expected[: given.shape[0]]
            self._expected = buffers.expected

    def _empty_cache(self, rows: int) -> SamplingCache:
        return super()._empty_cache(rows) if self._buffers is None else self._buffers.cache

    def _step(self, index: int) -> None:
        graphs = self._buffers.graphs
        if index in graphs:
            graphs[index]()
            return
        super()._step(index)
        step = super()._step
        if graph := captured(lambda: step(index), self._buffers.pool):
            graphs[index] = graph

    def _key_of(self, guided: bool) -> tuple:
        """All that a graph has taken in as a constant: where the weights are, sizes, filters."""
        weights = tuple(p.data_ptr() for p in self.transformer.parameters())
        sizes = None if self.codebook_sizes is None else tuple(self.codebook_sizes)
        rows = self._given.shape[0] + self._spare
        feedback = self.feedback is not None
        return (weights, rows, guided, self._given_uniforms.dtype, tuple(self.filters.values()), sizes, feedback)

    def _take(self, key: tuple) -> Buffers | None:
        """Unused buffers of this key."""
        with _lock:
            unused = _unused.get(self.transformer, [])
            for i, (theirs, _) in enumerate(unused):
                if theirs == key:
                    return unused.pop(i)[1]
        return None

    def close(self) -> None:
        """Leaves the graphs to the next generator."""
        if self._buffers is None:
            return
        mine = (self._key, self._buffers)
        with _lock:
            # Those of weights that have moved since are of no use any more.
            others = [entry for entry in _unused.get(self.transformer, []) if entry[0][0] == self._key[0]]
            _unused[self.transformer] = [mine, *others][:KEPT]
        self._finite = self._finite.clone()
        self._buffers, self._key, self._cache = None, (), None
        self.codes, self.uniforms = self._given, self._given_uniforms
        self._expected = None if self._expected is None else self._expected.clone()
