"""What an evaluation measures, one function for each part of the report: dicts that JSON can hold.

Judged figures are by judge: {"classifier": {...}, "efficientnet-lite1": {...}}. Errors are standard errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectralar import SpectralARPipeline
from spectralar.analysis.quality import psnr, ssim
from spectralar.analysis.statistics import next_token_entropy
from spectralar.inference.feedback import all_logits
from spectralar.quantizer import codebook_statistics
from spectralar.spectral import nested_targets

from ..data.images import to_float
from ..objectives.next_token import next_token_losses
from ..runs.processes import Team
from .judges import Judge, Judged, compare, join
from .metrics import frechet_distance, inception_score, mean
from .neighbours import Looked, to_pixels
from .sample_bank import sample_bank

ENCODE_BATCH, DECODE_BATCH, PREFIX_BATCH = 256, 128, 16  # images; of the last all prefixes are decoded
PERCEPTUAL_IMAGES = 200  # each costs two passes a prefix length through a network made for far larger ones

Views = dict[str, Judged]  # by judge


@dataclass
class Evaluation:
    """What every measurement looks at: the models, and images in a random order that depends on the seed alone."""

    pipe: SpectralARPipeline
    judges: dict[str, Judge]  # the first one picks the best guidance scale
    perceptual: Callable[[Tensor, Tensor], Tensor] | None  # from `losses.make_perceptual_loss`
    images: Tensor  # (n, C, H, H) uint8, held out
    labels: Tensor  # (n,)
    sample_labels: Tensor  # (m,) classes of the samples
    train_alike: Tensor  # which of the training images stand for samples of a perfect model
    prefix_images: int  # how many of the images, and of the samples, are measured at several prefix lengths
    manifold_images: int  # how many of a set precision, recall, density and coverage are measured on
    seed: int
    temperature: float  # of the samples
    folder: Path
    team: Team

    @property
    def shown_lengths(self) -> list[int]:
        """Prefix lengths 1, 2, 4, .., N."""
        n = self.pipe.tokenizer.config.num_tokens
        return sorted({2**i for i in range(n.bit_length())} | {n})

    def judge(self, images: Tensor) -> Views:
        """What each judge makes of images (b, C, H, H) in [-1, 1]."""
        return {name: judge(images) for name, judge in self.judges.items()}

    def judge_pixels(self, images: Tensor, description: str) -> Views:
        """What each judge makes of images (n, C, H, H) uint8."""
        return join_views(self.team.map(lambda x: self.judge(to_float(x)), DECODE_BATCH, description, images))

    def decode(self, codes: Tensor, lengths: int | list[int] | None = None) -> Tensor:
        """Images (b, C, H, H) of codes (b, N); with prefix lengths (b, S, C, H, H)."""
        tokenizer = self.pipe.tokenizer
        return tokenizer.decode(codes.long().to(tokenizer.device), lengths).float()


def join_views(parts: Sequence[Views]) -> Views:
    return {name: join([part[name] for part in parts]) for name in parts[0]}


# ------------------------------------------------------------------------------------------- tokenizer


@torch.no_grad()
def encode(run: Evaluation, images: Tensor) -> Tensor:
    """Codes (n, N) int32 of images (n, C, H, H) uint8."""
    tokenizer = run.pipe.tokenizer

    def encoded(batch: Tensor) -> Tensor:
        return tokenizer.encode(to_float(batch.to(tokenizer.device))).int().cpu()

    return torch.cat(run.team.map(encoded, ENCODE_BATCH, "encoding", images))


@torch.no_grad()
def reconstruct(run: Evaluation, codes: Tensor, real: Views) -> tuple[dict[str, Any], Looked]:
    """All held-out images from all their tokens: PSNR, SSIM, rFD and the other measures; and the images themselves."""

    def measured(batch: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Views]:
        decoded = run.decode(tokens)
        x = to_float(batch).to(decoded.device)
        return torch.stack([psnr(decoded, x), ssim(decoded, x)]).cpu(), to_pixels(decoded), run.judge(decoded)

    parts = run.team.map(measured, DECODE_BATCH, "reconstructing", run.images, codes)
    values = dict(zip(("psnr", "ssim"), map(mean, torch.cat([v for v, _, _ in parts], dim=1)), strict=True))
    views = join_views([view for _, _, view in parts])
    return {
        "images": len(codes),
        **{name: estimate.value for name, estimate in values.items()},
        "errors": {name: estimate.error for name, estimate in values.items()},
        "judged": {
            name: compare(real[name], views[name], run.labels, run.manifold_images, paired=True) for name in real
        },
    }, Looked(torch.cat([pixels for _, pixels, _ in parts]), views)  # fmt: skip


@torch.no_grad()
def prefix_quality(run: Evaluation, codes: Tensor) -> tuple[dict[str, Any], dict[int, Views]]:
    """Every prefix length of the first held-out images, against the image and against its ideal low-pass x_k.

    Returns the measurements by prefix length, and the judges' view of the real x_k, for `shown_lengths`.
    """
    tokenizer, n = run.pipe.tokenizer, run.prefix_images
    lengths, shown = list(range(1, tokenizer.config.num_tokens + 1)), run.shown_lengths

    def measured(batch: Tensor, tokens: Tensor) -> tuple[Tensor, list[tuple[Views, Views]]]:
        frames = run.decode(tokens, lengths)  # (b, N, C, H, H)
        x = to_float(batch).to(frames.device)
        targets, image = nested_targets(x, tokenizer.cutoffs), x.unsqueeze(1)
        rows = [psnr(frames, image), psnr(frames, targets), ssim(frames, image), ssim(frames, targets)]
        pairs = [(targets[:, k - 1], frames[:, k - 1]) for k in shown]
        return torch.stack(rows).cpu(), [(run.judge(t), run.judge(d)) for t, d in pairs]

    parts = run.team.map(measured, PREFIX_BATCH, "decoding all prefixes", run.images[:n], codes[:n])
    names = ("psnr_image", "psnr_low_pass", "ssim_image", "ssim_low_pass")
    each = torch.cat([rows for rows, _ in parts], dim=1).double()  # (4, n, N)
    means = each.mean(dim=1)  # (4, N)
    of_mean_error = -10 * (10 ** (-each[0] / 10)).mean(dim=0).log10()  # (N,)
    pairs = list(zip(*(pair for _, pair in parts), strict=True))  # by length, of all batches
    low_pass, rebuilt = (
        {k: join_views([pair[side] for pair in batches]) for k, batches in zip(shown, pairs, strict=True)}
        for side in (0, 1)
    )
    labels = run.labels[:n]
    return {
        "images": n, "length": lengths, "cutoff": list(tokenizer.cutoffs), "shown": shown,
        **{name: row.tolist() for name, row in zip(names, means, strict=True)},
        "psnr_mean_error": of_mean_error.tolist(),
        "judged": {
            name: [
                {
                    "length": k,
                    "accuracy_low_pass": low_pass[k][name].accuracy(labels),
                    "accuracy": rebuilt[k][name].accuracy(labels),
                    "fd": frechet_distance(low_pass[k][name].features, rebuilt[k][name].features),
                }
                for k in shown
            ]
            for name in run.judges
        },
    }, low_pass  # fmt: skip


@torch.no_grad()
def perceptual_distances(run: Evaluation, codes: Tensor) -> dict[str, Any]:
    """Perceptual distance of `shown_lengths` to the image and to x_k, on the first `PERCEPTUAL_IMAGES` at most."""
    n, shown = min(run.prefix_images, PERCEPTUAL_IMAGES), run.shown_lengths
    columns = [k - 1 for k in shown]
    size = 16 if run.team.device.type == "cpu" else 256  # a CPU takes twice as long where activations leave its cache

    def measured(batch: Tensor, tokens: Tensor) -> Tensor:
        frames = run.decode(tokens, shown)  # (b, S, C, H, H)
        x = to_float(batch).to(frames.device)
        targets = nested_targets(x, run.pipe.tokenizer.cutoffs)[:, columns]
        against = torch.stack([x.unsqueeze(1).expand_as(targets), targets])  # (2, b, S, C, H, H)
        pairs = [side.flatten(0, 2).split(size) for side in (frames.expand_as(against), against)]
        distances = torch.cat([run.perceptual(*pair) for pair in zip(*pairs, strict=True)])
        return distances.view(2, len(x), len(shown)).cpu()

    parts = run.team.map(measured, PREFIX_BATCH, "perceptual distances", run.images[:n], codes[:n])
    distances = torch.cat(parts, dim=1)  # (2, n, S)
    image, low_pass = ([mean(column) for column in side.T] for side in distances)
    return {
        "images": n, "length": shown,
        "image": [d.value for d in image], "image_errors": [d.error for d in image],
        "low_pass": [d.value for d in low_pass], "low_pass_errors": [d.error for d in low_pass],
    }  # fmt: skip


def codebook_use(run: Evaluation, codes: Tensor) -> dict[str, Any]:
    """Perplexity and share of entries in use, over all positions together and at each one alone."""
    size = run.pipe.tokenizer.config.codebook_size
    each = [codebook_statistics(column.long(), size) for column in codes.T]
    return {
        "images": len(codes), "codebook_size": size, **codebook_statistics(codes.long(), size),
        "perplexity_by_position": [s["perplexity"] for s in each], "usage_by_position": [s["usage"] for s in each],
    }  # fmt: skip


def other_source(run: Evaluation, images: Tensor, prefix_images: int) -> dict[str, Any]:
    """The tokenizer on held-out images (n, C, H, H) uint8 of another source that it learnt from, and no judge.

    Returns "reconstruction", "codebook" and "prefixes", as `reconstruct`, `codebook_use` and `prefix_quality` do.
    """
    labels = torch.zeros(len(images), dtype=torch.long)  # which say nothing here
    own = replace(run, judges={}, images=images, labels=labels, prefix_images=prefix_images)
    codes = encode(own, images)
    reconstruction, _ = reconstruct(own, codes, {})
    prefixes, _ = prefix_quality(own, codes)
    return {"reconstruction": reconstruction, "codebook": codebook_use(own, codes), "prefixes": prefixes}


# ------------------------------------------------------------------------------------------- transformer


def next_token_loss(run: Evaluation, codes: Tensor, train_codes: Tensor, train_labels: Tensor) -> dict[str, Any]:
    """Next-token cross-entropy in nats by position, on images trained on and on held-out ones."""
    transformer, tokenizer = run.pipe.transformer, run.pipe.tokenizer

    def losses(c: Tensor, y: Tensor) -> Tensor:
        by_position = next_token_losses(transformer, c.long(), y, transformer.device, tokenizer)  # (N,)
        return len(c) * by_position.double().cpu()

    result: dict[str, Any] = {"train_images": len(train_codes), "heldout_images": len(codes)}
    for name, c, y in (
        ("train", train_codes, train_labels[: len(train_codes)]), ("heldout", codes, run.labels[: len(codes)]),
    ):  # fmt: skip
        values = sum(run.team.map(losses, ENCODE_BATCH, f"next-token loss, {name}", c, y)) / len(c)
        result |= {name: float(values.mean()), f"{name}_by_position": values.tolist()}
    transformer.eval()
    return result


def entropy_by_position(run: Evaluation, codes: Tensor) -> Tensor:
    """Entropy of the next token (N,) in nats, averaged over the held-out images."""
    device, logits_of = run.pipe.device, partial(all_logits, run.pipe.transformer, run.pipe.tokenizer)

    def entropies(c: Tensor, y: Tensor) -> Tensor:
        return len(c) * next_token_entropy(logits_of, c.long().to(device), y.to(device))

    total = sum(run.team.map(entropies, ENCODE_BATCH, "next-token entropy", codes, run.labels[: len(codes)]))
    return total / len(codes)


def references(run: Evaluation, real: Views, train: Views, train_labels: Tensor) -> dict[str, Any]:
    """By judge: held-out images as they are, and against them what nothing generated can beat.

    That are training images of the samples' classes: where classes are sampled evenly and held-out images are uneven,
    the distance is that of the proportions first of all.
    """
    return {
        "heldout": {
            name: {
                "images": len(judged), "accuracy": judged.accuracy(run.labels),
                "accuracy_top5": judged.accuracy(run.labels, 5),
                "inception_score": inception_score(judged.probabilities),
            }
            for name, judged in real.items()
        },
        "train": {
            name: compare(real[name], train[name][run.train_alike], train_labels[run.train_alike], run.manifold_images)
            for name in real
        },
    }  # fmt: skip


@torch.no_grad()
def measure_samples(
    run: Evaluation, guidance_scale: float, real: Views, low_pass: dict[int, Views], npz: bool
) -> tuple[dict[str, Any], Tensor, Looked]:
    """Samples at one guidance scale: in full against the held-out images, as prefixes against their x_k.

    Returns the measurements, the samples' codes (n, N), and the samples themselves.
    """
    shown, full = run.shown_lengths, run.shown_lengths[-1:]
    labels = run.sample_labels
    codes = sample_bank(run.pipe, run.folder / "samples", labels, guidance_scale, run.seed, run.team, run.temperature)
    several = min(run.prefix_images, len(labels))
    prefixes: dict[int, list[Views]] = {k: [] for k in shown}
    pixels = []
    for part, lengths in ((codes[:several], shown), (codes[several:], full)):

        def judged(tokens: Tensor, lengths: list[int] = lengths) -> tuple[list[Views], Tensor]:
            frames = run.decode(tokens, lengths)  # (b, S, C, H, H)
            return [run.judge(frames[:, column]) for column in range(len(lengths))], to_pixels(frames[:, -1])

        for views, full_prefix in run.team.map(judged, DECODE_BATCH // len(lengths) + 1, "decoding samples", part):
            for k, view in zip(lengths, views, strict=True):
                prefixes[k].append(view)
            pixels.append(full_prefix)
    if npz and run.team.is_main:
        write_npz(run.folder / f"samples-{guidance_scale:g}.npz", torch.cat(pixels))
    views = {k: join_views(parts) for k, parts in prefixes.items()}
    return {
        "guidance_scale": guidance_scale,
        "judged": {
            name: compare(real[name], views[full[0]][name], labels, run.manifold_images) for name in run.judges
        },
        "prefixes": {
            name: [
                {
                    "length": k,
                    "images": several,
                    "accuracy": views[k][name].first(several).accuracy(labels[:several]),
                    "fd": frechet_distance(
                        low_pass[k][name].features, views[k][name].first(several).features
                    ),
                }
                for k in shown
            ]
            for name in run.judges
        },
    }, codes, Looked(torch.cat(pixels), views[full[0]])  # fmt: skip


def write_npz(path: Path, images: Tensor) -> None:
    """uint8 images (n, C, H, H) as the ADM evaluator reads them: arr_0, (n, H, H, 3)."""
    np.savez(path, arr_0=images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
