"""Stage 2: trains the autoregressive transformer on the spectral tokens of a trained tokenizer.

    python -m train.encode_dataset fashion-mnist-32
    python -m train.train_transformer fashion-mnist-32

Next-token cross-entropy, with the class label replaced by the null class at `label_dropout` for classifier-free
guidance. The finished pipeline, tokenizer included, is written to OUTPUT/pipeline in half precision.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from spectralar.inference.feedback import expected_latents
from spectralar.pipeline import SpectralARPipeline
from spectralar.tokenizer import SpectralTokenizer
from spectralar.transformer import SpectralARTransformer

from .configs.config import Config
from .data.codes import StoredCodes, fingerprint, read_shards
from .data.encoding import encode_images, load_tokenizer, wanted_shards
from .data.images import ImageSet, augment, describe_classes, load_splits, to_float
from .data.order import balanced_order, evenly, step_indices
from .objectives.next_token import drawn_positions, next_token_loss, next_token_losses
from .runs.checkpoints import publish
from .runs.command_line import clear_errors, parse_arguments, read
from .runs.early_stopping import EarlyStopping
from .runs.engine import Run, image_grid, make_ema
from .runs.warm_start import warm_start

EVAL_IMAGES, EVAL_IMAGES_WITH_FEEDBACK = 2048, 256
SHOWN_CLASSES, SHOWN_SAMPLES, SHOWN_GUIDANCE = 10, 8, 2.0


class CodeSource:
    """Codes and labels of the images a step takes: stored ones, or encoded from images on the way.

    `seen` and `heldout` are those of images to measure on, none of them augmented.
    """

    def __init__(self, config: Config, run: Run, tokenizer: SpectralTokenizer) -> None:
        self.config, self.run, self.tokenizer = config, run, tokenizer
        self.images: ImageSet | None = None
        self._shown = EVAL_IMAGES_WITH_FEEDBACK if config.transformer.decoder_feedback else EVAL_IMAGES
        if config.train_transformer.codes == "stored" and not run.dry:
            folder = run.args.output / "codes"
            try:
                stored = read_shards(folder, wanted_shards(config, "train", tokenizer))
                heldout = read_shards(folder, wanted_shards(config, "eval", tokenizer))
            except ValueError as error:
                run.exit(str(error))
            self.codes, self.labels, self.class_names = stored.codes, stored.labels, stored.class_names
            self._epoch_order = balanced_order(self.labels, config.data.class_balance)
            self.seen, self.heldout = (self._some_of(split) for split in (stored, heldout))
        else:
            self.images, heldout = read(load_splits, config.data, config.train_transformer.batch_size)
            self.fetch = run.prefetch(self.images)
            self.labels, self.class_names = self.images.labels, self.images.class_names
            self.seen, self.heldout = (self._some_of(split) for split in (self.images, heldout))

    def __len__(self) -> int:
        return len(self.labels)

    def step_indices(self, batch_size: int, seed: int, step: int) -> Tensor:
        """Which images a step takes, over all processes, (batch_size,) int64."""
        if self.images is not None:
            return self.images.step_indices(batch_size, seed, step)
        return step_indices(len(self), batch_size, seed, step, self._epoch_order)

    def _some_of(self, split: StoredCodes | ImageSet) -> tuple[Tensor, Tensor]:
        if isinstance(split, StoredCodes):
            chosen = evenly(len(split.labels), self._shown)
            return split.codes[0, chosen].long(), split.labels[chosen]
        chosen = split.evenly(self._shown)
        return encode_images(self.tokenizer, split.images[chosen], [], 0).long(), split.labels[chosen]

    def batch(self, chosen: Tensor, slot: int, slots: int, step: int) -> tuple[Tensor, Tensor]:
        """Codes (b, N) and labels (b,) of a slice of the step's batch (see `Run.micro_batches`); some labels null."""
        stage, run = self.config.train_transformer, self.run
        mine = slice(slot * len(chosen), (slot + 1) * len(chosen))
        with run.clock.data():
            dropped = torch.rand(stage.batch_size, generator=run.generator(step, 1))[mine] < stage.label_dropout
            labels = run.to_device(self.labels[chosen].masked_fill(dropped, len(self.class_names)))
            if self.images is None:
                copy = torch.randint(len(self.codes), (stage.batch_size,), generator=run.generator(step, 0))[mine]
                return run.to_device(self.codes[copy, chosen]).long(), labels
            images = run.to_device(self.fetch(step)[slot])
            images = to_float(augment(images, self.config.data.augment, run.generator(step, 0), slot, slots))
        with torch.no_grad():
            return self.tokenizer.encode(images), labels


def summarise(by_position: Tensor, name: str) -> dict[str, float]:
    """The mean and the values at positions 1, 2, 4, ..., N."""
    n, values = len(by_position), by_position.tolist()
    shown = sorted({2**i for i in range(n.bit_length())} | {n})
    return {name: sum(values) / n} | {f"{name}_{k}": values[k - 1] for k in shown}


def compare(seen: Tensor, heldout: Tensor) -> str:
    """Losses by position (N,) of images trained on beside those of held-out ones."""
    pairs = zip(summarise(seen, "").items(), summarise(heldout, "").values(), strict=True)
    (_, mean), *positions = [(name[1:], f"{ours:.3f} / {theirs:.3f}") for (name, ours), theirs in pairs]
    by_position = ", ".join(f"{k}: {values}" for k, values in positions)
    return f"next-token loss of images trained on / held out {mean}; by position {by_position}"


def make_pipeline(
    tokenizer: SpectralTokenizer, transformer: SpectralARTransformer, class_names: list[str]
) -> SpectralARPipeline:
    pipeline = SpectralARPipeline(tokenizer, transformer, id2label=dict(enumerate(class_names)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_grid(pipeline: SpectralARPipeline, seed: int) -> Tensor:
    """One row a class, the same seeds in each."""
    pipeline.transformer.eval()
    rows = []
    for label in range(min(SHOWN_CLASSES, pipeline.transformer.config.num_classes)):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(SHOWN_SAMPLES)]
        out = pipeline(
            [label], num_images_per_prompt=SHOWN_SAMPLES, guidance_scale=SHOWN_GUIDANCE, generator=generators,
            output_type="pt",
        )  # fmt: skip
        rows.append(out.images.float().cpu() * 2 - 1)
    pipeline.transformer.train()
    return image_grid(rows)


def train(run: Run, config: Config) -> None:
    stage, accelerator = config.train_transformer, run.accelerator
    device = accelerator.device
    tokenizer = load_tokenizer(run.args.output / "tokenizer").to(device)
    source = CodeSource(config, run, tokenizer)
    transformer = SpectralARTransformer(
        num_classes=len(source.class_names),
        codebook_size=tokenizer.config.codebook_size,
        num_tokens=tokenizer.config.num_tokens,
        **asdict(config.transformer),
    )
    transformer = warm_start(run, transformer, stage.init_from)
    if transformer.entry_maps is not None:  # of a trained transformer only the codebook is set: its maps have learnt
        shortcut = None if stage.init_from else tokenizer.shortcut
        transformer.entry_maps.adopt(tokenizer.quantizer.codebook, shortcut)
    if stage.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    model, optimizer = run.prepare(transformer)
    model.train()
    forward = torch.compile(model) if stage.compile else model
    parameters = list(transformer.parameters())
    ema = make_ema(parameters, stage.ema_decay)
    accelerator.register_for_checkpointing(ema)
    stopping = EarlyStopping(stage.early_stopping)
    if stage.early_stopping:
        accelerator.register_for_checkpointing(stopping)
    run.print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters.")
    run.print(describe_classes(source.labels, source.class_names, config.data.class_balance))

    done = run.resume(
        len(source), tokenizer_weights=fingerprint(tokenizer, config.transformer.decoder_feedback),
        class_names=source.class_names,
        train_transformer={"early_stopping": stage.early_stopping},
    )  # fmt: skip
    ema.to(device)  # a checkpoint is loaded to the CPU
    for step in () if stopping.over else run.steps(done):
        positions, at = None, range(tokenizer.config.num_tokens)
        if config.transformer.decoder_feedback:
            at = drawn_positions(len(at), run.generator(step, 2))
            positions = torch.tensor(at, dtype=torch.int64, device=device)
        by_position = torch.zeros(len(at), device=device)
        for part, (chosen, slot, slots) in enumerate(run.micro_batches(source, step)):
            codes, labels = source.batch(chosen, slot, slots, step)
            synchronise = part + 1 == stage.grad_accumulation
            with run.accumulation(model, synchronise):
                with accelerator.autocast():
                    expected = None if positions is None else expected_latents(tokenizer, codes, at)
                    logits = forward(codes[:, :-1], labels, expected, positions)
                loss = next_token_loss(logits, codes if positions is None else codes[:, positions])
                accelerator.backward(loss.mean() / stage.grad_accumulation)
            by_position += loss.detach() / stage.grad_accumulation
        norm = run.optimise(optimizer, list(model.parameters()), {"loss": by_position}, step)
        ema.step(parameters)

        done = step + 1
        if run.due(stage.log_every, done):
            by_position = run.mean(by_position)
            values = summarise(by_position, "loss/train")
            if positions is not None:  # drawn anew each step: there is no curve of them
                values = {"loss/train": values["loss/train"]}
            run.log_step(values | {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}, done)
        measure, show = run.due(stage.eval_every, done), run.due(stage.sample_every, done)
        if measure or show:
            with run.averaged(transformer, ema, parameters) as measured:
                if measure:
                    seen, heldout = (
                        next_token_losses(measured, *s, device, tokenizer) for s in (source.seen, source.heldout)
                    )
                    run.log(summarise(seen, "loss/seen") | summarise(heldout, "loss/heldout"), done)
                    run.print(f"step {done}: {compare(seen, heldout)}")
                    stopping.update(float(run.mean(heldout.mean())), list(measured.parameters()), done)
                if show and run.is_main:
                    pipeline = make_pipeline(tokenizer, measured, source.class_names)
                    run.log_images("samples", sample_grid(pipeline, stage.seed), done)
        if done % stage.checkpoint_every == 0:
            run.save(done)
        if stopping.over:
            break

    def deliver() -> None:
        with run.averaged(transformer, ema, parameters) as final:
            if stopping.patience:
                stopping.copy_to(list(final.parameters()))
                run.print(f"Weights of step {stopping.step}, of the lowest held-out loss, {stopping.lowest:.4f}.")
            folder = run.args.output / "pipeline"
            if run.is_main:
                pipeline = make_pipeline(tokenizer.half(), final.half(), source.class_names)
                publish(folder, pipeline.save_pretrained)
            run.print(f"Pipeline in {folder}.")

    run.finish(done, early=stopping.over, deliver=deliver)


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(__doc__.split("\n\n")[0], argv)
    with clear_errors():
        train(Run("transformer", config, config.train_transformer, args), config)


if __name__ == "__main__":
    main()
