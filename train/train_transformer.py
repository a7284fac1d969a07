"""Stage 2: trains the autoregressive transformer on the spectral tokens of a trained tokenizer.

    python -m train.encode_dataset fashion-mnist-32
    python -m train.train_transformer fashion-mnist-32

Next-token cross-entropy, with the class label replaced by the null class at `label_dropout` for classifier-free
guidance. The finished pipeline, tokenizer included, is written to OUTPUT/pipeline in half precision.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict

import torch
import torch.nn.functional as F
from spectralar.pipeline import SpectralARPipeline
from torch import Tensor

from spectralar.tokenizer import SpectralTokenizer
from spectralar.transformer import SpectralARTransformer

from .codes import read_shards
from .config import Config
from .data import ImageSet, augment, load_images, step_indices, to_float
from .encode_dataset import encode_images, load_tokenizer
from .engine import Run, image_grid, make_ema, make_optimizer, parse_arguments

EVAL_IMAGES = 2048
SHOWN_CLASSES, SHOWN_SAMPLES, SHOWN_GUIDANCE = 10, 8, 2.0


class CodeSource:
    """Codes and labels of the images a step takes: stored ones, or encoded from images on the way."""

    def __init__(self, config: Config, run: Run, tokenizer: SpectralTokenizer) -> None:
        self.config, self.run, self.tokenizer = config, run, tokenizer
        self.images: ImageSet | None = None
        if config.train_transformer.codes == "stored" and not run.dry:
            try:
                stored = read_shards(run.args.output / "codes", "train", tokenizer)
                heldout = read_shards(run.args.output / "codes", "eval", tokenizer)
            except ValueError as error:
                raise SystemExit(str(error)) from error
            self.codes, self.labels, self.class_names = stored.codes, stored.labels, stored.class_names
            self.heldout = heldout.codes[0, :EVAL_IMAGES].long(), heldout.labels[:EVAL_IMAGES]
        else:
            self.images = load_images(config.data, "train")
            self.labels, self.class_names = self.images.labels, self.images.class_names
            heldout = load_images(config.data, "eval")
            heldout.images = heldout.images[:EVAL_IMAGES]
            codes = encode_images(tokenizer, heldout, [], 0, run.accelerator.device)
            self.heldout = codes.long(), heldout.labels[:EVAL_IMAGES]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, chosen: Tensor, slot: int, step: int) -> tuple[Tensor, Tensor]:
        """Codes (b, N) and labels (b,) of this process's slice `slot` of the step, label dropout included."""
        stage, device = self.config.train_transformer, self.run.accelerator.device
        mine = slice(slot * len(chosen), (slot + 1) * len(chosen))
        if self.images is None:
            copy = torch.randint(len(self.codes), (stage.batch_size,), generator=self.run.generator(step, 0))[mine]
            codes = self.codes[copy, chosen].long().to(device)
        else:
            images = self.images.images[chosen].to(device)
            slices = stage.batch_size // len(chosen)
            images = augment(images, self.config.data.augment, self.run.generator(step, 0), slot, slices)
            with torch.no_grad():
                codes = self.tokenizer.encode(to_float(images))
        dropped = torch.rand(stage.batch_size, generator=self.run.generator(step, 1))[mine] < stage.label_dropout
        return codes, self.labels[chosen].masked_fill(dropped, len(self.class_names)).to(device)


def next_token_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy (N,) in nats at each position, averaged over images: logits (B, N, K), codes (B, N)."""
    return F.cross_entropy(logits.float().mT, codes, reduction="none").mean(dim=0)


@torch.no_grad()
def evaluate(model: SpectralARTransformer, codes: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """Held-out next-token loss by position (N,), in nats."""
    model.eval()
    total = torch.zeros(codes.shape[1], device=device)
    for c, y in zip(codes.split(256), labels.split(256), strict=True):
        c, y = c.to(device), y.to(device)
        total += next_token_loss(model(c[:, :-1], y), c) * len(c)
    model.train()
    return total / len(codes)


def summarise(by_position: Tensor, name: str) -> dict[str, float]:
    """The mean and the values at positions 1, 2, 4, ..., N."""
    n = len(by_position)
    shown = sorted({2**i for i in range(n.bit_length())} | {n})
    return {name: float(by_position.mean())} | {f"{name}_{k}": float(by_position[k - 1]) for k in shown}


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
    optimizer = make_optimizer(transformer, stage)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    model.train()
    forward = torch.compile(model) if stage.compile else model
    parameters = list(transformer.parameters())
    ema = make_ema(parameters, stage.ema_decay)
    ema.to(device)
    accelerator.register_for_checkpointing(ema)
    run.print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {len(source)} images.")

    done = run.resume()
    for step in run.steps(done):
        by_position = torch.zeros(tokenizer.config.num_tokens, device=device)
        for part, (chosen, slot) in enumerate(run.micro_batches(len(source), step, step_indices)):
            codes, labels = source.batch(chosen, slot, step)
            synchronise = part + 1 == stage.grad_accumulation
            with nullcontext() if synchronise else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss = next_token_loss(forward(codes[:, :-1], labels), codes)
                accelerator.backward(loss.mean() / stage.grad_accumulation)
            by_position += loss.detach() / stage.grad_accumulation
        norm = run.optimise(optimizer, list(model.parameters()), step)
        ema.step(parameters)

        done = step + 1
        if done % stage.log_every == 0 or done == stage.steps:
            run.check_finite({"loss": by_position.mean()}, step)
            values = summarise(by_position, "loss/train")
            run.log(values | {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}, done)
        show, measure = (done % n == 0 or done == stage.steps for n in (stage.sample_every, stage.eval_every))
        if show or measure:
            ema.store(parameters)
            ema.copy_to(parameters)
            if measure:
                heldout = summarise(evaluate(transformer, *source.heldout, device), "loss/heldout")
                run.log(heldout, done)
                run.print(f"step {done}: train {by_position.mean():.3f}, held-out {heldout['loss/heldout']:.3f}")
            if show and run.is_main and not run.dry:
                pipeline = make_pipeline(tokenizer, transformer, source.class_names)
                run.log_images("samples", sample_grid(pipeline, stage.seed), done)
            ema.restore(parameters)
        if done % stage.checkpoint_every == 0:
            run.save(done)

    if run.finish(done) and run.is_main:
        ema.copy_to(parameters)
        pipeline = make_pipeline(tokenizer.half(), transformer.half(), source.class_names)
        folder = run.args.output / "pipeline"
        pipeline.save_pretrained(folder)
        run.print(f"Pipeline in {folder}.")


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(__doc__.split("\n\n")[0], argv)
    train(Run("transformer", config, config.train_transformer, args), config)


if __name__ == "__main__":
    main()
