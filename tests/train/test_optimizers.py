"""Which parameters decay, which Muon moves and how far, and that a saved optimiser goes on exactly."""

import copy

import pytest
import torch

from tests.helpers import tiny_tokenizer, tiny_transformer
from train.config import StageConfig
from train.optimizers import make_optimizer

MODELS = pytest.mark.parametrize("make", [tiny_tokenizer, tiny_transformer], ids=["tokenizer", "transformer"])


def names_in(group, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in group["params"]}


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@MODELS
def test_only_weights_of_projections_decay(make):
    model = make()
    optimizer = make_optimizer(model, StageConfig(weight_decay=0.3, beta1=0.8, beta2=0.7))
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == (0.8, 0.7)
    projections = {
        f"{name}.weight" for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not name.endswith("embed")
    }  # fmt: skip
    assert names_in(decayed, model) == projections
    assert names_in(decayed, model) | names_in(kept, model) == {name for name, _ in model.named_parameters()}


@MODELS
def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(make):
    model = make()
    optimizer = make_optimizer(model, StageConfig(optimizer="muon", weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    muon, *rest = [names_in(group, model) for group in optimizer.param_groups]
    blocks = ("blocks.", "encoder.", "decoder.")
    assert muon == {
        f"{name}.weight" for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(blocks)
    }  # fmt: skip
    assert sorted([*muon, *rest[0], *rest[1]]) == sorted(name for name, _ in model.named_parameters())


def test_muon_steps_are_orthogonal_and_as_large_as_those_of_adamw():
    model = tiny_transformer(hidden_size=128)  # wide enough for other scalings to be far off
    weight = model.blocks[0].mlp.up.weight
    before = weight.detach().clone()
    optimizer = make_optimizer(model, StageConfig(optimizer="muon", lr=1e-2, weight_decay=0.0))
    give_gradients(model, 0)
    optimizer.step()
    step = (weight.detach() - before) / 1e-2
    singular = torch.linalg.svdvals(step)
    assert singular.max() / singular.min() < 2.5  # the iteration brings them near to 1, not to 1
    assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.3)  # of AdamW: about 0.2, Liu et al.


def test_a_saved_optimizer_goes_on_exactly():
    model = tiny_tokenizer()
    optimizer = make_optimizer(model, StageConfig(optimizer="muon"))
    for seed in range(3):
        give_gradients(model, seed)
        optimizer.step()
    assert optimizer.state.keys() == set(model.parameters())
    twin = tiny_tokenizer()
    twin.load_state_dict(model.state_dict())
    resumed = make_optimizer(twin, StageConfig(optimizer="muon"))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3, 5):
        for one, its in ((model, optimizer), (twin, resumed)):
            give_gradients(one, seed)
            for group in its.param_groups:
                group["lr"] = 1e-4 * seed  # as the schedule does: it must reach the parts after loading too
            its.step()
            its.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
