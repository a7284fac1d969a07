"""Cutoffs of a tokenizer from its data: which frequencies are worth anything at the bits of each prefix.

    python -m train.cutoffs tiny-imagenet-64
    python -m train.cutoffs tiny-imagenet-64 tokenizer.num_tokens=32 tokenizer.codebook_size=2048

Reverse water-filling (`spectral.data_cutoffs`) on the variances of the DCT coefficients over training images, without
augmentation; of several sources in their shares of a step. Colours go together, so each coefficient's C variances are
those along the principal axes of its C x C covariance over images. Prints a table with the Gaussian bound, the PSNR of
the mean squared error that no code of so many bits can beat on Gaussian images of these variances, and the list for a
preset. Images are not Gaussian: a learned tokenizer can be better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm import tqdm

from spectralar.spectral import cutoff_schedule, data_cutoffs, dct2, gaussian_psnr
from spectralar.tokenizer import SpectralTokenizer

from .configs.config import Config
from .data.images import ImageSet, Prefetch, to_float
from .data.mixing import load_mixed
from .evaluation.report import table
from .runs.command_line import clear_errors, make_parser, parse_settings, read

IMAGES, BATCH = 20_000, 256  # a variance of so many images is known to one per cent


def dct_variances(sources: Sequence[ImageSet], shares: Sequence[float] = (1,), count: int = IMAGES) -> Tensor:
    """Variances (C, H, H) of the DCT coefficients of images in [-1, 1], along the principal axes of their colours.

    Args:
        sources: sets of images, which together are one.
        shares: in which proportion.
        count: of how many images of each, spread evenly.
    """
    moments = [_moments(source, count) for source in sources]
    mean, products = (
        sum(share * moment for share, moment in zip(shares, kind, strict=True)) / sum(shares)
        for kind in zip(*moments, strict=True)
    )
    covariance = products - torch.einsum("cuv,duv->uvcd", mean, mean)  # (H, H, C, C)
    return torch.linalg.eigvalsh(covariance).clamp(min=0).permute(2, 0, 1)  # (C, H, H)


def _moments(data: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Means over images of the spectra (C, H, H), and of the products of their colours (H, H, C, C)."""
    batches = data.evenly(count).split(BATCH)
    fetch = Prefetch(lambda i: data.gather(batches[i]) if i < len(batches) else None)
    mean, products = 0.0, 0.0
    with tqdm(total=sum(map(len, batches)), desc="variances", unit="img", leave=False) as bar:
        for i in range(len(batches)):
            spectra = dct2(to_float(fetch(i))).double()  # (b, C, H, H)
            mean += spectra.sum(dim=0) / bar.total
            products += torch.einsum("bcuv,bduv->uvcd", spectra, spectra) / bar.total
            bar.update(len(spectra))
    return mean, products


def describe(config: Config, variances: Tensor) -> str:
    """The table of prefix lengths 1, 2, 4, .., N, and the list."""
    with torch.device("meta"):
        bits = SpectralTokenizer(**asdict(config.tokenizer)).prefix_bits
    n, size, alpha = len(bits), variances.shape[-1], config.tokenizer.alpha
    cutoffs, by_alpha = data_cutoffs(variances, bits), cutoff_schedule(size, n, alpha)
    bounds = [gaussian_psnr(variances, bits, r).tolist() for r in (None, by_alpha)]
    rows = [
        [
            k,
            f"{bits[k - 1]:.0f}",
            cutoffs[k - 1],
            f"{bounds[0][k - 1]:.2f}",
            by_alpha[k - 1],
            f"{bounds[1][k - 1]:.2f}",
        ]
        for k in sorted({2**i for i in range(n.bit_length())} | {n})
    ]
    head = ["Tokens k", "Bits", "Cutoff", "Gaussian bound, dB", f"Cutoff, alpha {alpha:g}", "Bound within it, dB"]
    return (
        f"{table(head, rows)}\n\nIn the preset, under tokenizer:\n  cutoffs: {list(cutoffs)}\n"
        f"or behind a command: tokenizer.cutoffs={str(list(cutoffs)).replace(' ', '')}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__.split("\n\n")[0])
    args, config = parse_settings(parser, argv, "tokenizer.cutoffs=[]")  # a preset's own are for its own N and H
    with clear_errors():
        sources = read(load_mixed, config.data, "train")
        shares = config.data.images_a_step(config.train_tokenizer.batch_size)
        variances = dct_variances([*sources.values()], shares)
        if variances.max() < 1e-9:  # of rounding
            raise SystemExit(f"All images of {config.data.source} are alike: there is nothing to spend bits on.")
        counts = " and ".join(f"{min(IMAGES, len(data))} of {len(data)}" for data in sources.values())
        print(f"{config.name}: variances over {counts} training images.\n")
        print(describe(config, variances))


if __name__ == "__main__":
    main()
