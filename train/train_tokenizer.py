"""Stage 1: trains the spectral tokenizer by nested reconstruction.

    python -m train.train_tokenizer fashion-mnist-32
    accelerate launch -m train.train_tokenizer tiny-imagenet-64 train_tokenizer.batch_size=512

The loss of a step, on a batch of images x with full prefix N and S sampled prefix lengths k (docs/design.md#losses):

    L = ||D_N - x||² + sum_k w_k ||D_k - x_k||² + quantizer_weight (codebook + commitment * commitment),
    w_k = prefix_weight * min(largest_boost, H / r_k),   ||.||² = mean over pixels,

and, where they are switched on, the perceptual distance of D_N and of one D_k with k >= N / 4, and an adversarial loss
of D_N (`objectives.adversarial`), each at a weight that follows its gradient (`objectives.losses.GradientShare`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from spectralar.quantizer import CodebookRevival, VectorQuantizer, codebook_statistics
from spectralar.spectral import nested_targets
from spectralar.tokenizer import SpectralTokenizer

from .configs.config import Config, TokenizerStage
from .data.images import ImageSet, augment, describe_classes, to_float
from .data.mixing import MixedImages, load_mixed_splits
from .data.order import evenly
from .objectives.adversarial import AdversarialTerm
from .objectives.losses import PerceptualTerm
from .objectives.nested import nested_loss, sample_lengths
from .objectives.shortcut import fit, images_to_fit
from .runs.checkpoints import publish
from .runs.command_line import clear_errors, parse_arguments, read
from .runs.engine import Run, image_grid, make_ema
from .runs.warm_start import warm_start

REVIVAL_EVERY = 10  # steps between looks for dead codes: each look waits for the device
EVAL_IMAGES, SHOWN_IMAGES = 1024, 10


@torch.no_grad()
def evaluate(model: SpectralTokenizer, images: Tensor, device: torch.device) -> dict[str, float]:
    """PSNR (dB) against the image and against x_k, at the powers of two and N; perplexity and usage of the codes."""
    model.eval()
    lengths = sorted({2**i for i in range(model.config.num_tokens.bit_length())} | {model.config.num_tokens})
    cutoffs = [model.cutoffs[k - 1] for k in lengths]
    codes, errors = [], []
    for batch in images.split(128):
        x = to_float(batch).to(device)
        codes.append(model.encode(x))
        frames = model.decode(codes[-1], lengths).float()  # (b, S, C, H, H)
        targets = torch.stack([x.unsqueeze(1).expand_as(frames), nested_targets(x, cutoffs)])  # (2, b, S, C, H, H)
        difference = (frames.clamp(-1, 1) - targets.clamp(-1, 1)) / 2  # on [0, 1]
        errors.append(difference.square().mean(dim=(3, 4, 5)))
    model.train()
    psnr = -10 * torch.cat(errors, dim=1).clamp(min=1e-10).log10().mean(dim=1)  # (2, S)
    result = {f"psnr_{k}": float(v) for k, v in zip(lengths, psnr[0], strict=True)}
    result |= {f"psnr_low_pass_{k}": float(v) for k, v in zip(lengths, psnr[1], strict=True)}
    statistics = codebook_statistics(torch.cat(codes), model.config.codebook_size)
    return result | statistics


@torch.no_grad()
def sample_grid(model: SpectralTokenizer, images: Tensor, device: torch.device) -> Tensor:
    """One row an image: the original, then prefixes 1, 2, 4, ..., N."""
    model.eval()
    x = to_float(images).to(device)
    lengths = sorted({2**i for i in range(model.config.num_tokens.bit_length())} | {model.config.num_tokens})
    frames = model.decode(model.encode(x), lengths)
    model.train()
    return image_grid([torch.cat([a[None], b]).float().cpu() for a, b in zip(x, frames, strict=True)])


def averaged_parameters(model: SpectralTokenizer) -> list[torch.nn.Parameter]:
    """All but the codebook: an average of entries that jump when they are revived is an entry nobody used."""
    return [p for name, p in model.named_parameters() if name != "quantizer.codebook"]


def pixel_terms(
    run: Run, stage: TokenizerStage, in_channels: int, cutoffs: Tensor
) -> tuple[dict[str, PerceptualTerm | AdversarialTerm], dict[str, Any]]:
    """The losses beside the squared error that are switched on, and what of them no checkpoint may differ in."""
    terms: dict[str, PerceptualTerm | AdversarialTerm] = {}
    facts = {"perceptual": stage.perceptual, "adversarial": stage.adversarial}
    if stage.perceptual:
        try:
            terms["perceptual"] = PerceptualTerm(stage, cutoffs, run.accelerator)
        except ImportError as error:
            run.exit(str(error))
    if stage.adversarial:
        if stage.mixed_precision == "fp16":
            run.exit("An adversarial loss trains with train_tokenizer.mixed_precision bf16 or 'no', not fp16.")
        terms["adversarial"] = AdversarialTerm(stage, in_channels, run.accelerator)
        facts["discriminator_width"] = stage.discriminator_width
    return terms, facts


def sample_to_fit(config: Config, sources: dict[str, ImageSet]) -> Tensor:
    """Images (n, C, H, H) uint8 that a spectral shortcut is fitted to, of each source as many as its share says."""
    count = images_to_fit(config.tokenizer.image_size, config.tokenizer.in_channels)
    shares = config.data.images_a_step(config.train_tokenizer.batch_size)
    parts = zip(sources.values(), shares, strict=True)
    return torch.cat([data.gather(data.evenly(round(count * share / sum(shares)))) for data, share in parts])


def make_tokenizer(run: Run, config: Config) -> SpectralTokenizer:
    """The tokenizer to train: with random weights or those of a trained one, whose codebook is in use at once."""
    try:
        fresh = SpectralTokenizer(**asdict(config.tokenizer))
    except ValueError as error:
        run.exit(str(error))
    tokenizer = warm_start(run, fresh, config.train_tokenizer.init_from)
    tokenizer.quantizer.requires_grad_(config.tokenizer.encoder_layers > 0)  # else it is the shortcut's
    return tokenizer


def train(run: Run, config: Config, sources: dict[str, ImageSet], heldout: dict[str, ImageSet]) -> None:
    stage, accelerator, num_tokens = config.train_tokenizer, run.accelerator, config.tokenizer.num_tokens
    device = accelerator.device
    tokenizer = make_tokenizer(run, config)
    if stage.gradient_checkpointing:
        tokenizer.enable_gradient_checkpointing()
    model, optimizer = run.prepare(tokenizer)
    forward = torch.compile(model) if stage.compile else model
    averaged = averaged_parameters(tokenizer)
    ema = make_ema(averaged, stage.ema_decay)
    accelerator.register_for_checkpointing(ema)
    revival, revived = None, 0
    learns_codes = config.tokenizer.encoder_layers > 0  # else codes are the shortcut's, and so is the codebook
    if learns_codes and isinstance(tokenizer.quantizer, VectorQuantizer):
        tokenizer.quantizer.rotation_trick = stage.rotation_trick
        revival = CodebookRevival(tokenizer.quantizer, stage.revive_after, stage.seed)
        accelerator.register_for_checkpointing(revival)
    cutoffs = torch.tensor((1, *tokenizer.cutoffs), device=device)  # indexed by prefix length
    terms, facts = pixel_terms(run, stage, tokenizer.config.in_channels, cutoffs)
    data = sources[""] if len(sources) == 1 else MixedImages([*sources.values()], config.data.images_a_step)
    measured_on = {name: images.images[images.evenly(EVAL_IMAGES)] for name, images in heldout.items()}
    run.print(f"{sum(p.numel() for p in tokenizer.parameters()) / 1e6:.2f} M parameters.")
    for (name, part), count in zip(sources.items(), config.data.images_a_step(stage.batch_size), strict=True):
        share = f"{count} images a step from {name or 'data.source'}: " if len(sources) > 1 else ""
        run.print(share + describe_classes(part.labels, part.class_names, part.class_balance))

    fitted = tokenizer.shortcut is not None
    quantize_from = 0 if stage.init_from or fitted else stage.quantize_from
    fetch = run.prefetch(data)
    done = run.resume(len(data), train_tokenizer=facts)
    if fitted and not (done or stage.init_from or run.dry):
        fit(tokenizer, sample_to_fit(config, sources), stage.seed, run.is_main)
    ema.to(device)  # a checkpoint is loaded to the CPU
    for step in run.steps(done):
        with run.clock.data():
            lengths = sample_lengths(
                stage.batch_size, stage.prefixes_per_step, num_tokens, run.generator(step, 0), stage.prefix_law
            )
        quantize = step >= quantize_from
        at_work = [term for term in terms.values() if step >= term.first_step]
        sums: dict[str, Tensor] = {}
        parts: list[tuple[Tensor, Tensor]] = []
        for part, (_, slot, slots) in enumerate(run.micro_batches(data, step)):
            with run.clock.data():
                # Equal draws for each part, of which it takes its own slice.
                images = run.to_device(fetch(step)[slot])
                x = to_float(augment(images, config.data.augment, run.generator(step, 1), slot, slots))
                own = lengths[slot * run.micro_batch : (slot + 1) * run.micro_batch]
                mine = run.to_device(own)
            synchronise = part + 1 == stage.grad_accumulation
            with run.accumulation(model, synchronise):
                with accelerator.autocast():
                    frames, quantized, latents = forward(x, mine, quantize)
                losses = nested_loss(frames, x, mine, cutoffs, stage.prefix_weight, stage.largest_boost)
                losses |= {"codebook": quantized.codebook_loss, "commitment": quantized.commitment_loss}
                quantizer = losses["codebook"] + stage.commitment * losses["commitment"]
                loss = losses["full"] + losses["prefix"] + stage.quantizer_weight * quantize * learns_codes * quantizer
                for term in at_work:
                    values, weighted = term(frames, x, own, losses["full"], synchronise)
                    losses, loss = losses | values, loss + weighted
                accelerator.backward(loss / stage.grad_accumulation)
            parts.append((quantized.codes, latents.detach()))
            for name, value in losses.items():
                sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0) + value.detach() / stage.grad_accumulation
        norm = run.optimise(optimizer, list(model.parameters()), sums, step)
        ema.step(averaged)
        for term in at_work:
            term.step()
        revive = step % REVIVAL_EVERY == 0 and step < stage.revive_until * stage.steps
        codes, latents = (torch.cat(x) for x in zip(*parts, strict=True))
        if revival and step + 1 == quantize_from:
            revival.fill(latents, step)
        elif revival and quantize:
            revived += revival.update(codes, latents, step, revive)

        done = step + 1
        if run.due(stage.log_every, done):
            values = dict(zip(sums, run.mean(torch.stack([*sums.values()])).tolist(), strict=True))
            values |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"], "revived": revived}
            values |= {f"{name}_weight": float(term.share.weight) for name, term in terms.items()}
            run.log_step(values, done)
            revived = 0
        measure, show = run.due(stage.eval_every, done), run.due(stage.sample_every, done)
        if measure or show:
            with run.averaged(tokenizer, ema, averaged) as measured:
                logged: dict[str, float] = {}
                for name, images in measured_on.items():
                    if measure:
                        values = evaluate(measured, images, device)
                        logged |= {f"eval/{name}/{k}" if name else f"eval/{k}": v for k, v in values.items()}
                        shown = ", ".join(f"{k} {v:.2f}" for k, v in values.items() if "low_pass" not in k)
                        run.print(f"step {done}{f', {name}' if name else ''}: {shown}")
                    if show and run.is_main:
                        few = images[evenly(len(images), SHOWN_IMAGES)]
                        title = f"reconstruction-{name}" if name else "reconstruction"
                        run.log_images(title, sample_grid(measured, few, device), done)
                if measure:
                    run.log(logged, done)
        if done % stage.checkpoint_every == 0:
            run.save(done)

    def deliver() -> None:
        with run.averaged(tokenizer, ema, averaged) as final:
            folder = run.args.output / "tokenizer"
            if run.is_main:
                # Half precision is what ships, so it is what stage 2 must learn from.
                publish(folder, final.half().save_pretrained)
            run.print(f"Tokenizer in {folder}.")

    run.finish(done, deliver=deliver)


def main(argv: list[str] | None = None) -> None:
    args, config = parse_arguments(__doc__.split("\n\n")[0], argv)
    with clear_errors():
        run = Run("tokenizer", config, config.train_tokenizer, args)
        train(run, config, *read(load_mixed_splits, config.data, config.train_tokenizer.batch_size))


if __name__ == "__main__":
    main()
