"""The loaded model as the page sees it: where models come from, where they run, one call for a stream of frames."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gradio.context import LocalContext
from torch import Tensor

from ..inference.engine import Engine, Frames, Wanted
from ..inference.process import EngineProcess
from ..inference.streaming import FrameStream
from ..interface.labels import LabelNames
from ..pipeline import SpectralARPipeline
from . import embedded
from .threads import usable_cpus

MAX_SEED = 2**31 - 1
NUM_EXAMPLES = 9  # three rows of three


class Frame(NamedTuple):
    """The images of one prefix length."""

    k: int
    images: np.ndarray  # (B, H, H) uint8 of a grey model, (B, H, H, 3) of a colour one
    codes: list[list[int]]  # B lists of k codes
    sampled: int  # tokens sampled so far, without those of a given prefix
    seconds: float  # since sampling began


Sampled = tuple[list[list[int]], np.ndarray]  # B lists of codes, and their pixels (B, H, H[, 3]) uint8


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
        shown = embedded.shown(self.name)
        self.trained_on = shown.trained_on
        self.guidance_scale, self.temperature = shown.guidance_scale, shown.temperature
        # How the page samples by itself, as arguments of the pipeline.
        self.sampling = {"guidance_scale": self.guidance_scale, "temperature": self.temperature}
        ids = [i for i, name in enumerate(self.class_names) if name in shown.examples]
        ids.sort(key=lambda i: shown.examples.index(self.class_names[i]))
        spread = range(0, len(self.class_names), max(1, len(self.class_names) // NUM_EXAMPLES))
        # Class ids to try; the page opens with the first. Of a model it knows nothing of, some from all of them.
        self.examples: list[int] = ids or list(spread)[:NUM_EXAMPLES]
        # One for all visitors. Not on ZeroGPU, where every call has a process of its own.
        self.engine = None
        if not os.environ.get("SPACES_ZERO_GPU"):
            workers = usable_cpus() if self.pipe.device.type == "cpu" else 1
            self.engine = Engine(self.pipe.transformer, self.pipe.tokenizer, workers=workers)
        self.frames = on_gpu(self._frames)
        self.last = on_gpu(self._last)
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

    def _frames(
        self, class_id: int, count: int, seed: int, on_start: Callable[[Callable[[], None]], None] | None = None,
        **arguments: Any,
    ) -> Iterator[Frame | None]:  # fmt: skip
        """Samples `count` images of a class and yields the frames of k = 1, 2, .. tokens.

        The arguments are those of `SpectralARPipeline.stream`, and so are the frames; those inside a given prefix come
        first. Frames come a few at a time, with None between them while there is no news: at any of these yields a run
        can be stopped; `on_start` gets a function that stops the sampling at once, from any thread.
        """
        prefix = arguments.get("prefix_codes")
        if prefix:
            for k, image in enumerate(self.pipe.decode(prefix, list(range(1, len(prefix[0]) + 1)))[0][:-1], start=1):
                yield Frame(k, np.repeat(to_pixels(image[None]), count, axis=0), [prefix[0][:k]] * count, 0, 0)
        given, begin = len(prefix[0]) if prefix else 0, time.perf_counter()
        with closing(self.sampled(class_id, count, seed, "all", **arguments)) as sampled:  # also if a visitor leaves
            if on_start:
                on_start(sampled.close)
            for news in sampled:
                if news is None:
                    yield None
                    continue
                codes, pixels = news
                k = len(codes[0])
                yield Frame(k, pixels, codes, k - given, time.perf_counter() - begin)

    def _last(self, class_id: int, count: int, seed: int, **arguments: Any) -> Sampled:
        """Codes and pixels of the whole images only."""
        with closing(self.sampled(class_id, count, seed, **arguments)) as sampled:
            (last,) = (news for news in sampled if news)
        return last

    def sampled(
        self, class_id: int, count: int, seed: int, wanted: Wanted = "last", **arguments: Any
    ) -> Iterable[Sampled | None]:
        """Codes and pixels of all prefixes that are sampled or of the last one, with None while there is no news.

        To be closed. With an engine the request is on its way at once, before the first value is asked for.

        Raises:
            ValueError: if an argument is out of range, or too many others are being served.
        """
        arguments |= {"num_images_per_prompt": count, "generator": torch.Generator().manual_seed(seed)}
        if self.engine is None:
            return self._sampled_alone(class_id, wanted, arguments)
        return _AsPixels(self.engine.sample(self.pipe.request(class_id, **arguments), visitor(), wanted))

    def _sampled_alone(self, class_id: int, wanted: Wanted, arguments: dict[str, Any]) -> Iterator[Sampled | None]:
        """The same without an engine."""
        decoded = FrameStream(self.pipe.tokenizer, arguments["num_images_per_prompt"], every=1, on_host=False)
        with closing(self.pipe.stream(class_id, output_type="latent", **arguments)) as steps:
            for step in steps:
                codes = step.codes
                if wanted == "all":
                    yield from [(c.tolist(), to_pixels(images)) for c, images in decoded.add(codes)]
                yield None
        if wanted == "last":
            yield codes.tolist(), to_pixels(self.pipe.decode(codes))
        yield from [(c.tolist(), to_pixels(images)) for c, images in decoded.finish()]

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


def sample_apart(models: Sequence[Model]) -> None:
    """Has models on a CPU sample in one process of their own, if there is a core for it.

    Not by `Model` itself: a process is for a page, and takes seconds to start.
    """
    models = [model for model in models if model.engine is not None and model.pipe.device.type == "cpu"]
    if models and usable_cpus() > 1:
        process = EngineProcess([(model.pipe.transformer, model.pipe.tokenizer) for model in models], usable_cpus())
        for model, engine in zip(models, process.engines, strict=True):
            model.engine = engine


def visitor() -> str | None:
    """Who is being served, where there is somebody: a tab of a browser, or a client."""
    request = LocalContext.request.get(None)
    return getattr(request, "session_hash", None)


@dataclass
class _AsPixels:
    """What the engine samples; unlike a generator it can be closed by another thread than the one that waits."""

    sampling: Frames

    def __iter__(self) -> Iterator[Sampled | None]:
        for frame in self.sampling:
            yield frame and (frame.codes.tolist(), to_pixels(frame.images))

    def close(self) -> None:
        self.sampling.close()
