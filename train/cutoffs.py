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

from dataclasses import asdict

import torch
from torch import Tensor

from spectralar.spectral import cutoff_schedule, data_cutoffs, gaussian_psnr
from spectralar.tokenizer import SpectralTokenizer

from .configs.config import Config
from .data.mixing import load_mixed
from .data.variances import IMAGES, dct_variances
from .evaluation.report import table
from .runs.command_line import clear_errors, make_parser, parse_settings, read


def describe(config: Config, variances: Tensor) -> str:
    """The table of prefix lengths 1, 2, 4, .., N, and the list."""
    with torch.device("meta"):
        bits = SpectralTokenizer(**asdict(config.tokenizer)).prefix_bits
    n, size, alpha = len(bits), variances.shape[-1], config.tokenizer.alpha
    cutoffs, by_alpha = data_cutoffs(variances, bits), cutoff_schedule(size, n, alpha)
    bound, within = (gaussian_psnr(variances, bits, r).tolist() for r in (None, by_alpha))
    columns = list(zip(bits, cutoffs, bound, by_alpha, within, strict=True))
    rows = []
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        total, r, best, r_alpha, best_alpha = columns[k - 1]
        rows.append([k, f"{total:.0f}", r, f"{best:.2f}", r_alpha, f"{best_alpha:.2f}"])
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
