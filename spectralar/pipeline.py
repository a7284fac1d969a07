"""SpectralARPipeline: class labels -> images, coarse to fine; images -> codes -> images of any prefix."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor

from .checks import as_codes, integer, one_of
from .inference.batch import Request
from .inference.cuda_graphs import token_generator
from .inference.feedback import feedback_for
from .inference.offloading import Offloading
from .inference.streaming import FrameStream
from .interface.arguments import GenerationArguments, check_components, check_usable, prepare, returned_latents
from .interface.files import OptionalComponents, PipelineFiles
from .interface.image import ImageInput, to_model_input
from .interface.labels import ClassLabels, LabelNames
from .interface.outputs import OUTPUT_TYPES, Images, SpectralARPipelineOutput, SpectralARStep, as_output, to_output
from .interface.run_state import RunAttributes, Runs
from .sampling import check_guidance_scale
from .tokenizer import SpectralTokenizer
from .transformer import SpectralARTransformer


class SpectralARPipeline(RunAttributes, Offloading, PipelineFiles, DiffusionPipeline):
    r"""
    Class-conditional image generation by spectral tokens, coarse to fine (SpectralAR, arXiv 2506.10962).

    This model inherits from [`DiffusionPipeline`]: see there for loading, saving and moving to a device. Any number of
    calls and streams may run at a time, in threads or taking turns: none knows of the others.

    Parameters:
        tokenizer ([`SpectralTokenizer`] or `None`): images to codes, and any prefix of the codes to images. Without
            one the pipeline generates codes (`output_type="latent"`), any of the K at each position.
        transformer ([`SpectralARTransformer`] or `None`): the autoregressive model of the codes. Without one the
            pipeline encodes and decodes.
        id2label (`dict[int, str]`, *optional*): class names by id. One name, or several with commas between:
            the first is shown, all are understood.
    """

    model_cpu_offload_seq = "transformer->tokenizer"
    _callback_tensor_inputs = ["latents"]
    _optional_components = OptionalComponents("tokenizer", "transformer")

    def __init__(
        self,
        tokenizer: SpectralTokenizer | None,
        transformer: SpectralARTransformer | None,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._runs = Runs()
        check_components(tokenizer, transformer)
        self.register_modules(tokenizer=tokenizer, transformer=transformer)
        self._label_names = LabelNames(id2label, self._num_classes())
        self.register_to_config(id2label=self._label_names.id2label or None)

    def _num_classes(self) -> int | None:
        return None if self.transformer is None else self.transformer.config.num_classes

    # ------------------------------------------------------------------------------------------------ properties

    @property
    def _names(self) -> LabelNames:
        check_components(self.tokenizer, self.transformer)  # they may have been set since
        self._label_names = self._label_names.for_classes(self._num_classes())
        return self._label_names

    @property
    def labels(self) -> dict[str, int]:
        """All class names and their ids, in alphabetical order, without names that several classes share.

        Names may be added and changed in it; they are not saved, as those of `id2label` are.
        """
        return self._names.unique

    @property
    def class_names(self) -> list[str]:
        """The name to show for each class, in the order of the ids; the id itself where there is none."""
        return self._names.shown

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Class ids of labels, as `__call__` takes them; see `LabelNames.ids`."""
        return self._names.ids(class_labels)

    # ------------------------------------------------------------------------------------------------ generation

    @torch.inference_mode(False)  # of what is made inside it nothing could be written to outside
    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 2.0,
        guidance_schedule: str = "constant",
        num_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix_codes: Tensor | Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> SpectralARPipelineOutput | tuple[Images, Tensor]:
        r"""
        Generates images of classes.

        Args:
            class_labels: ids or names, one or a list; lists in it are flattened.
            num_images_per_prompt: images of each label, next to each other in the result.
            guidance_scale: w of classifier-free guidance, l_u + w (l_c - l_u) on the logits. 1 is off, and then the
                unconditional rows are not computed; larger is more typical and less varied.
            guidance_schedule: "constant", or "linear" or "cosine" from 1 at the first token to w at the last.
            num_tokens: generate the first n tokens only, default all N. The image is the prefix of the one that
                more tokens would give.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among the k most likely tokens; 0 is off.
            top_p: sample among the most likely tokens that have this probability together; 1 is off.
            prefix_codes: (R, k) tokens to start from instead of sampling them, k <= n. R is the number of images,
                or the number of labels, or 1.
            generator: one `torch.Generator`, or one an image. An image depends on its own random numbers only, not
                on the others in the batch, nor does token t depend on whether a prefix was given. In half precision
                the latter holds to the last bit and the former for batches of one size: sums of another size round
                otherwise, and now and then another token comes of it; in float32 that is rare.
            output_type: "pil", "np" (B, H, H, C) and "pt" (B, C, H, H) in [0, 1], or "latent" for codes.
            return_dict: False returns a tuple (images, codes).
            callback_on_step_end: called as `callback(pipe, step, index, kwargs)` after each sampled token, index
                being its position. `kwargs["latents"]` are the codes so far (B, index + 1); others that it returns
                take their place. It may set `pipe._guidance_scale` and, to stop here, `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: which tensors the callback gets, of "latents".

        Examples:

        ```py
        >>> pipe = SpectralARPipeline.from_pretrained("assets/models/products-64")
        >>> out = pipe(["handbag", 36], num_images_per_prompt=4, generator=torch.manual_seed(0))
        >>> out.images[0]
        ```

        Returns:
            [`SpectralARPipelineOutput`] or `tuple`: images and codes (B, n); fewer codes if interrupted.

        Raises:
            ValueError: if an argument is out of range; the message says what would be right.
        """
        run = self._prepare(
            class_labels, num_images_per_prompt, guidance_scale, guidance_schedule, num_tokens, temperature, top_k,
            top_p, prefix_codes, generator, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        try:
            for codes, _ in self._generate(run):  # noqa: B007
                pass
            images = codes if output_type == "latent" else to_output(self._decode(run.tokenizer, codes), output_type)
        finally:
            self.maybe_free_model_hooks()
        if not return_dict:
            return images, codes
        return SpectralARPipelineOutput(images=images, codes=codes)

    @torch.inference_mode(False)
    def stream(
        self,
        class_labels: ClassLabels,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 2.0,
        guidance_schedule: str = "constant",
        num_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix_codes: Tensor | Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        every: int = 1,
    ) -> Iterator[SpectralARStep]:
        r"""
        Generates as `__call__` does, same arguments, and yields the images of the prefixes while they grow.

        There is an event for each token count that `every` divides, for the last one and, with `prefix_codes`, for
        the prefix itself. A token goes through the decoder once; the frames are `decode(codes, [1, .., n])`. The
        first event comes at once; of small images, up to 16 later ones are made together, which is faster: tokens
        behind the event's are then sampled already. Closing the iterator stops the computation.

        Raises:
            ValueError: at once, not at the first event, if an argument is out of range.
        """
        every = integer(every, "every", 1)
        run = self._prepare(
            class_labels, num_images_per_prompt, guidance_scale, guidance_schedule, num_tokens, temperature, top_k,
            top_p, prefix_codes, generator, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        return self._stream(run, every)

    @torch.inference_mode(False)
    def request(self, class_labels: ClassLabels, **arguments: Any) -> Request:
        """What `__call__` would sample, for an `inference.engine.Engine`: its arguments but those of the output.

        Raises:
            ValueError: if an argument is out of range.
        """
        defaults = {
            "num_images_per_prompt": 1, "guidance_scale": 2.0, "guidance_schedule": "constant", "num_tokens": None,
            "temperature": 1.0, "top_k": 0, "top_p": 1.0, "prefix_codes": None, "generator": None,
        }  # fmt: skip
        if unknown := arguments.keys() - defaults.keys():
            raise TypeError(f"request() got unexpected arguments {', '.join(sorted(unknown))}.")
        run = self._prepare(class_labels, *(defaults | arguments).values(), "latent", None, ())
        scale = run.state.guidance_scale
        return Request(
            run.class_labels, run.codes, run.uniforms, run.prefix_length, scale, **run.sampling, feedback=run.feedback
        )

    def _prepare(self, *arguments: Any) -> GenerationArguments:
        """The arguments of one generation, checked, and what its transformer listens to."""
        run = prepare(
            self.tokenizer, self.transformer, self._names, self._execution_device, self._callback_tensor_inputs,
            *arguments,
        )  # fmt: skip
        run.feedback = feedback_for(run.transformer, run.tokenizer, len(run.codes))
        return run

    @torch.inference_mode(False)
    @torch.no_grad()
    def _stream(self, run: GenerationArguments, every: int) -> Iterator[SpectralARStep]:
        kind, state = run.output_type, run.state
        if kind != "latent":
            frames = FrameStream(run.tokenizer, run.codes.shape[0], every, kind != "pt", run.feedback)

        def steps(made: Iterator[tuple[Tensor, Tensor]]) -> Generator[SpectralARStep, None, bool]:
            """The events; returns whether one was answered with an interruption, after which there are no more."""
            with self._on_device(run.tokenizer):
                ready = list(made)  # only now are they decoded
            for codes, images in ready:
                interrupted_before = state.interrupt
                self._runs.enter(state)
                yield SpectralARStep(codes.shape[1], as_output(images, kind), codes)
                if state.interrupt and not interrupted_before:
                    return True
            return False

        try:
            with closing(self._generate(run)) as tokens:
                for codes, unchanged in tokens:
                    index = codes.shape[1]
                    ends = index in (run.prefix_length, run.codes.shape[1]) or state.interrupt
                    # A callback may have replaced tokens that a frame is made of.
                    if kind != "latent" and unchanged < frames.length:
                        if (yield from steps(frames.finish())):
                            return
                        frames.forget(unchanged)
                    if index % every and not ends:
                        continue
                    if kind == "latent":
                        self._runs.enter(state)
                        yield SpectralARStep(index, codes, codes)
                        continue
                    if (yield from steps(frames.add(codes))):
                        return
                if kind != "latent" and not frames.finished:
                    yield from steps(frames.finish())
        finally:
            self.maybe_free_model_hooks()

    def _generate(self, run: GenerationArguments) -> Iterator[tuple[Tensor, int]]:
        """The token loop. Yields the codes so far (B, t), and how many of them are as they were the last time."""
        state, start, total = run.state, run.prefix_length, run.codes.shape[1]
        with self._runs.going_on(state):
            if start:
                yield run.codes[:, :start].clone(), 0
            with self._offloading():
                generator = token_generator(
                    run.transformer, run.class_labels, run.codes, run.uniforms,
                    codebook_sizes=run.tokenizer and run.tokenizer.quantizer.codebook_sizes, feedback=run.feedback,
                    **run.sampling,
                )  # fmt: skip
            with closing(generator), self.progress_bar(total=total - start) as bar:
                for index in range(start, total):
                    if state.interrupt and index > 0:  # an image takes one token at least
                        break
                    if run.feedback is not None and index:
                        with self._on_device(run.tokenizer):
                            generator.listen(index)
                    with self._on_device(run.transformer):
                        generator.sample(index, check_guidance_scale(state.guidance_scale))  # a callback may set it
                    if index + 1 == total or run.codes.is_cpu:  # elsewhere it would wait for the device each time
                        generator.check()
                    unchanged = self._call_back(run, index)
                    if unchanged < index:
                        generator.restart()
                    bar.update()
                    yield run.codes[:, : index + 1].clone(), unchanged

    def _call_back(self, run: GenerationArguments, index: int) -> int:
        """Calls the callback, if any, after token `index`; how many of the codes are as they were before it."""
        if run.callback is None:
            return index
        codes = run.codes[:, : index + 1]
        given = {name: codes.clone() for name in run.callback_tensor_inputs}
        with self._runs.calling_back(run.state):
            returned = run.callback(self, index - run.prefix_length, index, given)
        latents = returned_latents(returned, codes, run.transformer.config.codebook_size)
        changed = (latents != codes).any(dim=0).nonzero()
        codes.copy_(latents)
        return min(index, int(changed[0])) if len(changed) else index

    # ------------------------------------------------------------------------------------------------ codes

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, images: ImageInput) -> Tensor:
        """Codes (B, N) int64 of images of any size and kind: PIL, numpy, torch, or a list of these.

        They are turned upright, laid on white, made grey or RGB, centre-cropped and resized to the model's size;
        `interface.image.to_model_input` has the shapes and ranges of arrays.

        Raises:
            ValueError: if an image cannot be read, or its shape, type or range is none of these.
        """
        tokenizer = self._tokenizer_for("encodes no images")
        pixels = to_model_input(images, tokenizer.config.image_size, tokenizer.config.in_channels)  # (B, C, H, H)
        try:
            with self._on_device(tokenizer):
                return tokenizer.encode(pixels.to(self._execution_device))
        finally:
            self.maybe_free_model_hooks()

    @torch.inference_mode(False)
    @torch.no_grad()
    def decode(
        self,
        codes: Tensor | Sequence[Sequence[int]],
        num_tokens: int | Tensor | Sequence[int] | None = None,
        output_type: str = "pt",
    ) -> Images | list[list[Image.Image]]:
        """Images of codes (B, n), or of prefixes of them, clamped to [0, 1]; `pipe.tokenizer.decode` does not clamp.

        Args:
            codes: (B, n) in 0..K-1, n <= N.
            num_tokens: prefix length: an int (default n), a tensor (B,) with one an image, or a list of S ints.
            output_type: "pt" (B, C, H, H), "np" (B, H, H, C) or "pil", a list of B images. With a list of prefix
                lengths (B, S, C, H, H), (B, S, H, H, C), and for each of the B images a list of S.

        Raises:
            ValueError: if codes, prefix lengths or the output type are out of range.
        """
        one_of(output_type, "output_type", OUTPUT_TYPES[:-1])
        try:
            tokenizer, device = self._tokenizer_for("decodes no codes"), self._execution_device
            codes = as_codes(codes, "codes", tokenizer.config.codebook_size, device)
            return to_output(self._decode(tokenizer, codes, num_tokens), output_type)
        finally:
            self.maybe_free_model_hooks()

    def _tokenizer_for(self, purpose: str) -> SpectralTokenizer:
        if self.tokenizer is None:
            raise ValueError(f"this pipeline has no tokenizer: it generates codes and {purpose}.")
        check_usable("tokenizer", tokenizer=self.tokenizer, transformer=self.transformer)
        return self.tokenizer

    def _decode(
        self, tokenizer: SpectralTokenizer, codes: Tensor, num_tokens: int | Tensor | Sequence[int] | None = None
    ) -> Tensor:
        with self._on_device(tokenizer):
            return tokenizer.decode(codes, num_tokens)
