"""torch.compile of both models' training passes: one graph each, the same losses and gradients in both precisions.

By the backend that traces forward and backward but generates no code: seconds, not minutes, and no C++ compiler.
"""

import pytest
import torch

from tests.helpers import tiny_tokenizer, tiny_transformer
from train.objectives.nested import nested_loss
from train.objectives.next_token import next_token_loss


def tokenizer_loss(model, forward, autocast):
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[12, 3], [12, 1], [12, 12], [12, 7]])
    with autocast:
        frames, quantized, _ = forward(images, lengths)
    losses = nested_loss(frames, images, lengths, torch.tensor((1, *model.cutoffs)))
    return losses["full"] + losses["prefix"] + quantized.codebook_loss


def transformer_loss(model, forward, autocast):
    codes = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(0))
    with autocast:
        logits = forward(codes[:, :-1], torch.tensor([0, 1, 2, 4]))
    return next_token_loss(logits, codes).mean()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("build, loss", [
    (lambda: tiny_tokenizer(encoder_layers=1), tokenizer_loss),
    (lambda: tiny_transformer(num_layers=1), transformer_loss),
], ids=["tokenizer", "transformer"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_training_is_the_same(build, loss, dtype):
    found = []
    for compiled in (False, True):
        model = build().train()
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        value = loss(model, forward, torch.autocast("cpu", dtype, enabled=dtype is not None))
        value.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({"loss": value.detach(), **gradients})
    tolerance = 1e-5 if dtype is None else 2e-2
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
