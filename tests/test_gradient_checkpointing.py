"""Activation checkpointing of both models: the same losses and gradients, dropout included, from less that is kept."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import tiny_tokenizer, tiny_transformer


def tokenizer_loss(model):
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames, quantized, _ = model(images, torch.tensor([12, 3]))
    return (frames - images[:, None]).square().mean() + quantized.codebook_loss + quantized.commitment_loss


def transformer_loss(model):
    codes = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(0))
    return F.cross_entropy(model(codes[:, :-1], torch.tensor([0, 1, 2, 4])).mT, codes)


MODELS = {
    "tokenizer": (lambda: tiny_tokenizer(encoder_layers=4, decoder_layers=4), tokenizer_loss),
    "transformer": (lambda: tiny_transformer(num_layers=6, dropout=0.2), transformer_loss),
}


def run(model, loss) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss, all gradients, and the bytes kept for the backward pass beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = loss(model)
        held = sum(kept.values())  # before the backward pass computes again
    value.backward()
    return value.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, held


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_memory_and_nothing_else(name):
    build, loss = MODELS[name]
    plain, checkpointed = build().double().train(), build().double().train()
    checkpointed.enable_gradient_checkpointing()
    assert checkpointed.is_gradient_checkpointing
    expected, gradients, kept = run(plain, loss)
    found, own, less = run(checkpointed, loss)
    assert torch.equal(found, expected)
    torch.testing.assert_close(own, gradients, rtol=1e-12, atol=1e-12)
    assert less < kept / 3
    checkpointed.disable_gradient_checkpointing()
    checkpointed.zero_grad()
    assert run(checkpointed, loss)[2] > 0.99 * kept
