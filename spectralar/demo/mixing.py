"""Codes with the first tokens of one image and the others from another image, or from the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import torch

from ..analysis import plots
from ..analysis.chart import Chart
from ..inference.engine import EngineBusyError
from ..spectral import low_pass
from .model import Model, Sampled, to_pixels
from .scrubber import StripEncoder, scrubber_value
from .source import Picture

VARIATIONS = 6
AHEAD = 4  # exchange points that are sampled at once


# -------------------------------------------------------------------------------------------------- heads and tails


def exchange(model: Model, a: Picture, b: Picture) -> tuple[list[list[int]], np.ndarray]:
    """A's first k codes and B's others for k = 1..N: codes, and their images (N, H, H[, 3]) uint8."""
    codes = [a.codes[:k] + b.codes[k:] for k in range(1, model.num_tokens + 1)]
    return codes, model.decode(codes, [model.num_tokens])[:, 0]


def exchange_value(model: Model, a: Picture, b: Picture, images: np.ndarray) -> dict[str, Any]:
    """The scrubber's: the exchange of tokens, for comparison that of frequencies, and the two images."""
    captions = ["A's tokens to k, then B's", "A below the cutoff, B above", "A", "B"]
    value = scrubber_value(
        [{"title": "Remix", "captions": captions}], model.cutoffs, model.image_size, model.codebook_size,
        keep_place=True, name="remix",
    )  # fmt: skip
    cutoffs = torch.tensor(model.cutoffs, dtype=torch.int64, device="cpu")
    filtered = low_pass(a.image[None], cutoffs) + b.image - low_pass(b.image[None], cutoffs)  # (N, C, H, H)
    filtered, *ends = (to_pixels((x / 2 + 0.5).clamp(0, 1)) for x in (filtered, a.image, b.image))
    encoder = StripEncoder(model.num_tokens)
    value["frames"] = [encoder.encode([mixed, plain, *ends]) for mixed, plain in zip(images, filtered, strict=True)]
    return value | {"status": "k tokens are A's, the rest B's: the last place is A itself", "rest": len(images) // 2}


# -------------------------------------------------------------------------------------------------- continuations


def continuations(
    model: Model, class_id: int, codes: list[int], seed: int, guidance_scale: float
) -> Iterator[Sampled | None]:
    """`VARIATIONS` continuations of the first k codes for k = 1..N, with their pixels; None while there is no news.

    The random numbers are the same for all k: where neighbouring k differ, it is the prefix that made them.
    """
    n, how = model.num_tokens, {"guidance_scale": guidance_scale, "temperature": model.temperature}
    ahead = AHEAD if model.engine else 1
    with ExitStack() as stack:  # a visitor who stops or leaves stops all that is on its way
        under_way: deque[Iterable[Sampled | None]] = deque()
        for k in range(1, n):
            for prefix in range(k + len(under_way), min(n, k + ahead)):
                try:
                    sampled = model.sampled(class_id, VARIATIONS, seed, **how, prefix_codes=[codes[:prefix]])
                except EngineBusyError:
                    if under_way:
                        break  # goes on with fewer at once
                    raise
                under_way.append(stack.enter_context(closing(sampled)))
            yield from under_way.popleft()
    yield [codes] * VARIATIONS, np.repeat(model.decode([codes], [n])[:, 0], VARIATIONS, axis=0)


class Continuation:
    """Variations over the whole range of exchange points, as far as they are sampled."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.images: list[np.ndarray] = []  # (V, H, H[, 3]) uint8, one an exchange point
        self.codes: list[list[int]] = []  # of the first variation
        self.encoder = StripEncoder(model.num_tokens)
        self.value = scrubber_value(
            [{"title": "Variations", "captions": [""] * VARIATIONS}],
            model.cutoffs, model.image_size, model.codebook_size, selectable=True, name="remix",
        )  # fmt: skip
        self.value |= {"busy": True, "status": "Waiting for its turn", "rest": model.num_tokens // 2}

    def add(self, rows: list[list[int]], images: np.ndarray, seconds: float) -> None:
        self.images.append(images)
        self.codes.append(rows[0])
        self.value["frames"].append(self.encoder.encode(images))
        n, done = self.model.num_tokens, len(self.images)
        share = 1 - (n - done) * (n - done - 1) / (n * (n - 1)) if n > 1 else 1.0  # of all tokens to be sampled
        left = seconds / share - seconds
        self.value["status"] = f"{done} of {n} exchange points · {left:.0f} s left" if done < n else f"{seconds:.1f} s"

    def finish(self, stopped: bool = False) -> None:
        self.value["busy"] = False
        if stopped:
            self.value["status"] = f"Stopped after {len(self.images)} of {self.model.num_tokens} exchange points"

    def chart(self) -> Chart:
        """The strip of the first variation, as far as it goes; there must be one."""
        return strip_chart(self.codes, np.stack([images[0] for images in self.images]))

    def snapshot(self) -> dict[str, Any]:
        """The value as it is now: Gradio keeps what it sent to find the difference, so lists must be copies."""
        return self.value | {"frames": list(self.value["frames"])}


def strip_chart(codes: list[list[int]], images: np.ndarray) -> Chart:
    """The strip, with the codes of every exchange point as its table."""
    lengths = range(1, len(codes) + 1)
    columns = {"tokens_of_a": list(lengths), "codes": [" ".join(map(str, row)) for row in codes]}
    return plots.image_strip(images, [str(k) for k in lengths], columns)
