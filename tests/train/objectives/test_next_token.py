"""The loss of stage 2 against its formula."""

import torch

from train.objectives.next_token import next_token_loss


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
