"""What stage 1 measures."""

import pytest
import torch

from spectralar.analysis.quality import psnr
from spectralar.spectral import low_pass
from tests.helpers import tiny_tokenizer
from train.train_tokenizer import evaluate


def test_held_out_quality_is_the_mean_over_images_of_each_ones_psnr():
    tokenizer = tiny_tokenizer()
    images = torch.randint(0, 256, (200, 1, 16, 16), dtype=torch.uint8)
    x = images / 127.5 - 1
    measured = evaluate(tokenizer, images, torch.device("cpu"))
    codes = tokenizer.encode(x)
    for k in (1, 2, 4, 8, 12):
        frame = tokenizer.decode(codes, k).detach()
        assert measured[f"psnr_{k}"] == pytest.approx(float(psnr(frame, x).mean()), abs=1e-3)
        target = low_pass(x, tokenizer.cutoffs[k - 1])
        assert measured[f"psnr_low_pass_{k}"] == pytest.approx(float(psnr(frame, target).mean()), abs=1e-3)
    assert measured["usage"] == codes.unique().numel() / 32
