"""The loaded model as the page sees it: where models come from, where they run, one call for a stream of frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..inference.streaming import FrameStream
from ..interface.labels import LabelNames
from ..pipeline import SpectralARPipeline

MAX_SEED = 2**31 - 1


class Frame(NamedTuple):
    """The images of one prefix length."""

    k: int
    images: np.ndarray  # (B, H, H) uint8 of a grey model, (B, H, H, 3) of a colour one
    codes: list[list[int]]  # B lists of k codes
    sampled: int  # tokens sampled so far, without those of a given prefix
    seconds: float  # since sampling began


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (..., C, H, W) in [0, 1] -> uint8 (..., H, W) for one channel, (..., H, W, 3) for three."""
    # The same steps as the pipeline's own way to PIL images: what the page shows is what its code gives.
    x = (images.movedim(-3, -1).float().cpu().numpy() * 255).round().astype(np.uint8)
    return x[..., 0] if x.shape[-1] == 1 else x


def best_device() -> str:
    """cuda, mps or cpu, the first there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str | None) -> None:
    """Raises a ValueError of one sentence for a device that this machine's torch does not have; None is always one."""
    if device is None:
        return
    try:
        torch.empty(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device {device} is not there: torch finds {best_device()} on this machine.") from None


def on_gpu(function: Callable) -> Callable:
    """`spaces.GPU` where the package is there (ZeroGPU lends a GPU for the call); else the function itself."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(duration=60)(function)


@dataclass
class Model:
    """A pipeline with its name and the numbers that all tabs need.

    Args:
        name: of the model's folder, or its Hub id.
        pipe: the pipeline, on its device.
        source: what `from_pretrained` takes to load it again, for the code that the page hands out.
    """

    name: str
    pipe: SpectralARPipeline
    source: str

    def __post_init__(self) -> None:
        config = self.pipe.tokenizer.config
        self.image_size: int = config.image_size
        self.channels: int = config.in_channels
        self.num_tokens: int = config.num_tokens
        self.codebook_size: int = config.codebook_size
        self.cutoffs: tuple[int, ...] = self.pipe.tokenizer.cutoffs
        self.class_names: list[str] = self.pipe.class_names
        # All names of each class, for a search to look through.
        self.all_names: list[str] = LabelNames(self.pipe.config.id2label, len(self.class_names)).whole
        self.frames = on_gpu(self._frames)
        self.encode = on_gpu(self._encode)
        self.decode = on_gpu(self._decode)
        self.decode_prefixes = on_gpu(self._decode_prefixes)

    @classmethod
    def load(cls, source: str | Path, device: str | None = None) -> Model:
        """Loads a saved pipeline from a folder or a Hub id onto `device` (default: the best there is)."""
        pipe = SpectralARPipeline.from_pretrained(source, use_safetensors=True).to(device or best_device())
        pipe.set_progress_bar_config(disable=True)
        is_folder = Path(source).is_dir()
        return cls(Path(source).name if is_folder else str(source), pipe, Path(source).as_posix())

    def label(self, label: int | str) -> int:
        """Class id of what the page or a client sends: an id, also as digits, or a name.

        Raises:
            ValueError: if there is no such class; names close ones.
        """
        try:
            return self.pipe.get_label_ids(label)[0]
        except ValueError:
            if isinstance(label, str) and label.strip().isdecimal():
                return self.pipe.get_label_ids(int(label[:20]))[0]
            raise

    def _frames(self, class_id: int, count: int, seed: int, **arguments: Any) -> Iterator[Frame | None]:
        """Samples `count` images of a class and yields the frames of k = 1, 2, .. tokens, and None after every token.

        The arguments are those of `SpectralARPipeline.stream`, and so are the frames, to the bit. Those inside a given
        prefix come first. Small frames come a few at a time, behind their tokens; a run can be stopped at any yield.
        """
        pipe, tokenizer = self.pipe, self.pipe.tokenizer
        prefix = arguments.get("prefix_codes")
        if prefix:
            for k, image in enumerate(pipe.decode(prefix, list(range(1, len(prefix[0]) + 1)))[0][:-1], start=1):
                yield Frame(k, np.repeat(to_pixels(image[None]), count, axis=0), [prefix[0][:k]] * count, 0, 0)
        given = len(prefix[0]) if prefix else 0
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same everywhere
        steps = pipe.stream(
            class_id, num_images_per_prompt=count, generator=generator, output_type="latent", **arguments
        )
        decoded = FrameStream(tokenizer, count, every=1, on_host=False)
        begin = time.perf_counter()

        def frames(ready: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Frame]:
            with torch.no_grad():
                ready = [(codes, to_pixels(images)) for codes, images in ready]
            for codes, images in ready:
                k = codes.shape[1]
                yield Frame(k, images, codes.tolist(), k - given, time.perf_counter() - begin)

        with closing(steps):  # a visitor who stops or leaves stops the computation with it
            for step in steps:
                yield from frames(decoded.add(step.codes))
                yield None
        yield from frames(decoded.finish())

    def _encode(self, images: Tensor) -> list[list[int]]:
        """Codes of images (B, C, H, H) in [-1, 1]."""
        with torch.no_grad():
            return self.pipe.tokenizer.encode(images.to(self.pipe.device)).tolist()

    def _decode(self, codes: list[list[int]], lengths: list[int]) -> np.ndarray:
        """Pixels (B, S, H, H[, 3]) uint8 of B lists of codes at S prefix lengths."""
        return to_pixels(self.pipe.decode(codes, lengths))

    def _decode_prefixes(self, codes: list[int]) -> Tensor:
        """All prefixes of one image's codes: (N, C, H, H), float, on the CPU, not clamped."""
        with torch.no_grad():
            rows = torch.tensor([codes], dtype=torch.int64, device=self.pipe.device)
            return self.pipe.tokenizer.decode(rows, list(range(1, len(codes) + 1)))[0].float().cpu()
