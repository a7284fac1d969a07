"""Frames of a stream: codes go in as they are sampled, images of the prefixes come out, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..tokenizer import SpectralTokenizer
from .feedback import DecoderFeedback
from .frames import PrefixDecoder

# At most so many mask tokens are decoded at once, where more gain nothing; no frame waits for more tokens than this.
MASK_TOKENS_AT_ONCE = 512
LONGEST_WAIT = 16


def largest_group(tokenizer: SpectralTokenizer, batch_size: int, every: int = 1) -> int:
    """Frames of a batch, `every` tokens apart, that are decoded at once."""
    return max(1, min(LONGEST_WAIT // every, MASK_TOKENS_AT_ONCE // (batch_size * tokenizer.num_patches)))


class HostCopy:
    """A tensor on its way to the host. From CUDA it goes on a stream of its own, while the device computes on."""

    def __init__(self, x: Tensor) -> None:
        self._event = None
        if x.device.type != "cuda":
            self._host = x.cpu()
            return
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            self._host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(side)
        x.record_stream(side)  # its memory is not to be used again before

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class FrameStream:
    """Decodes the prefixes of a batch while they grow.

    Small frames take a third of the time if several are decoded at once: all but the first, which is not kept
    waiting. Copies to the host of one group run while the next group is sampled.

    Args:
        tokenizer: decodes.
        batch_size: B.
        every: tokens from one frame to the next.
        on_host: whether images come on the host, else where they were made.
        feedback: what makes the images, one by one, if the sampling of these codes asks it for them anyway.
    """

    def __init__(
        self, tokenizer: SpectralTokenizer, batch_size: int, every: int, on_host: bool,
        feedback: DecoderFeedback | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.on_host = on_host
        self.length = 0  # tokens of the last frame
        self._waiting: list[Tensor] = []  # codes to be decoded
        self._copied: tuple[list[Tensor], HostCopy] | None = None  # codes, and their images on the way
        self._decoder: PrefixDecoder | None = None
        self._feedback = feedback
        self._largest_group = 1 if feedback else largest_group(tokenizer, batch_size, every)
        self._group = 1

    @property
    def finished(self) -> bool:
        """Whether nothing is left of what was added."""
        return not self._waiting and self._copied is None

    def add(self, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Takes codes (B, t), longer than the last; yields codes and images (B, C, H, H) in [0, 1] that are ready."""
        self.length = codes.shape[1]
        self._waiting.append(codes)
        if len(self._waiting) >= self._group:
            self._group = self._largest_group
            yield from self._decode()

    def finish(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all that is left."""
        if self._waiting:
            yield from self._decode()
        yield from self._take_copied()

    def forget(self, unchanged: int) -> None:
        """All tokens from number `unchanged` on are about to be others. What waits is to be finished before."""
        self.length = unchanged
        if self._decoder is not None and unchanged < self._decoder.length:
            self._decoder = None

    def _decode(self) -> Iterator[tuple[Tensor, Tensor]]:
        waiting, self._waiting = self._waiting, []
        images = self._images(waiting)
        images = (images / 2 + 0.5).clamp(0, 1)
        if not self.on_host:
            yield from zip(waiting, images.unbind(1), strict=True)
            return
        copied = waiting, HostCopy(images)
        yield from self._take_copied()  # of the group before
        self._copied = copied
        if images.device.type != "cuda":
            yield from self._take_copied()  # nothing to wait for

    def _images(self, waiting: list[Tensor]) -> Tensor:
        """(B, S, C, H, H) of S prefixes."""
        if self._feedback is not None:
            return self._feedback.image(waiting[-1]).unsqueeze(1)
        self._decoder = self._decoder or PrefixDecoder(self.tokenizer, self.batch_size)
        self._decoder.append(waiting[-1][:, self._decoder.length :])
        return self._decoder.frames([codes.shape[1] for codes in waiting])

    def _take_copied(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._copied is not None:
            (waiting, copy), self._copied = self._copied, None
            yield from zip(waiting, copy.wait().unbind(1), strict=True)
