"""The loss of stage 2 against its formula."""

from collections import Counter

import pytest
import torch

from spectralar.inference.feedback import all_logits
from tests.helpers import tiny_pipeline
from train.objectives.next_token import drawn_positions, middle_positions, next_token_loss, next_token_losses, strata


def test_cross_entropy_by_position_is_the_mean_over_images():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 7, generator=generator, dtype=torch.bfloat16)
    codes = torch.randint(7, (5, 3), generator=generator)
    expected = [
        sum(float(logits[i, t].double().logsumexp(0) - logits[i, t, codes[i, t]]) for i in range(5)) / 5
        for t in range(3)
    ]
    losses = next_token_loss(logits, codes)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.tensor(expected))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 12, 64, 256])
def test_strata_are_all_positions_behind_the_first(num_tokens):
    parts = strata(num_tokens)
    assert [t for part in parts for t in part] == list(range(1, num_tokens))
    lengths = [len(part) for part in parts]
    assert len(parts) == min(8, num_tokens - 1) and max(lengths, default=0) - min(lengths, default=0) <= 1


def test_positions_drawn_are_the_first_and_one_of_each_stratum_evenly():
    generator = torch.Generator().manual_seed(0)
    drawn = [drawn_positions(64, generator) for _ in range(3000)]
    counts = Counter(t for positions in drawn for t in positions)
    for positions in drawn:
        assert positions[0] == 0 and all(t in part for t, part in zip(positions[1:], strata(64), strict=True))
    for part in strata(64):
        expected = 3000 / len(part)
        assert all(abs(counts[t] - expected) < 6 * expected**0.5 for t in part)
    assert drawn_positions(1, generator) == middle_positions(1) == [0]
    means = torch.tensor(drawn, dtype=torch.float64).mean(dim=0)
    assert torch.allclose(means, torch.tensor(middle_positions(64)).double(), atol=1)


def test_losses_of_a_model_with_feedback_are_those_of_its_logits():
    listens = {"codebook_dim": 8, "decoder_feedback": True}
    shortcut = {"spectral_shortcut": True, "encoder_layers": 0}
    pipe = tiny_pipeline(tokenizer=shortcut, transformer=listens, dtype=torch.float32)
    codes, labels = torch.randint(32, (5, 12), generator=torch.Generator().manual_seed(1)), torch.arange(5) % 4
    losses = next_token_losses(pipe.transformer, codes, labels, torch.device("cpu"), pipe.tokenizer)
    pipe.transformer.eval()
    logits = all_logits(pipe.transformer, pipe.tokenizer, codes, labels)
    torch.testing.assert_close(losses, next_token_loss(logits, codes))
