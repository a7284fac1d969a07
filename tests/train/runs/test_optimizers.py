"""Which parameters decay, which Muon moves and how far, and that a saved optimiser goes on exactly."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import tiny_tokenizer, tiny_transformer
from train.configs.config import StageConfig
from train.runs import optimizers
from train.runs.optimizers import Muon, make_optimizer, orthogonalise

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


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24), (24, 96), (96, 24), (24, 48)], ids=str)
@pytest.mark.parametrize("rank", [24, 3])
def test_orthogonalising_moves_the_singular_values_alone(monkeypatch, shape, rank):
    monkeypatch.setattr(optimizers, "fast_dtype", lambda device: torch.float32)
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    x = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    moved = s > 0.02  # one that is next to nothing takes more rounds
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert moved.sum() >= 0.8 * rank
    assert ((0.6 < s[moved]) & (s[moved] < 1.3)).all()
    torch.testing.assert_close(orthogonalise(x), (u * s @ v).float(), rtol=0, atol=1e-4)


@pytest.fixture(params=[(32, 32), (96, 24), (24, 96)], ids=str)
def beside_torch(request):
    """A weight under `Muon`, its copy under torch's, and a function that gives both the same gradients."""
    ours = torch.nn.Parameter(torch.randn(request.param, generator=torch.Generator().manual_seed(7)))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = (
        Muon([ours], lr=0.05, weight_decay=0.4),
        torch.optim.Muon([theirs], lr=0.05, weight_decay=0.4, adjust_lr_fn="match_rms_adamw"),
    )

    def steps(seeds):
        for seed in seeds:
            gradient = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed))
            for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
                weight.grad = gradient.clone()
                optimizer.step()

    return (ours, theirs), optimizers, steps


def test_muon_is_that_of_torch_up_to_bfloat16(beside_torch):
    (ours, theirs), _, steps = beside_torch
    before = ours.detach().clone()
    steps(range(4))
    moved = (theirs - before).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_muon_goes_on_from_a_state_of_torch(beside_torch):
    (ours, theirs), (muon, of_torch), steps = beside_torch
    steps(range(2))
    muon.load_state_dict(copy.deepcopy(of_torch.state_dict()))
    ours.data.copy_(theirs.data)
    before = ours.detach().clone()
    steps(range(2, 4))
    assert (ours - theirs).norm() < 0.02 * (theirs - before).norm()


class TypesOfProducts(TorchDispatchMode):
    """Notes the types that matrices are multiplied in."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")):
            self.seen |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("instructions, dtype", [
    ({}, torch.float32), ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, torch.float32),
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.bfloat16),
])  # fmt: skip
def test_muon_multiplies_in_what_the_cpu_has_instructions_for(monkeypatch, instructions, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    model = tiny_transformer()
    optimizer = make_optimizer(model, StageConfig(optimizer="muon"))
    give_gradients(model, 0)
    with TypesOfProducts() as products:
        optimizer.step()
    assert products.seen == {dtype}
    assert {x.dtype for state in optimizer.state.values() for x in state.values()} == {torch.float32}


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
