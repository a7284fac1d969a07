"""Vector quantization against brute force and closed forms; codebooks that must not collapse."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image

from spectralar.quantizer import (
    CodebookRevival,
    FiniteScalarQuantizer,
    VectorQuantizer,
    codebook_statistics,
    nested_codebook_sizes,
    rotate,
)


def nearest(latents, entries, allowed=None):
    """Codes (B, n) by distance on the unit sphere, one latent at a time; position t sees its first allowed[t]."""
    codes = torch.empty(latents.shape[:2], dtype=torch.long)
    for b, t in np.ndindex(*latents.shape[:2]):
        seen = entries[: None if allowed is None else allowed[t]]
        distance = (seen / seen.norm(dim=-1, keepdim=True) - latents[b, t] / latents[b, t].norm()).norm(dim=-1)
        codes[b, t] = distance.argmin()
    return codes


# Look-up --------------------------------------------------------------------------------------------------


def test_codes_are_the_nearest_entries():
    quantizer = VectorQuantizer(40, 6).double()
    with torch.no_grad():
        quantizer.codebook.mul_(torch.rand(40, 1) * 5 + 0.1)  # lengths must not matter
    latents = 3 * torch.randn(5, 7, 6, dtype=torch.float64)
    expected = nearest(latents, quantizer.codebook.detach())
    assert torch.equal(quantizer.encode(latents), expected)
    output = quantizer(latents)
    assert torch.equal(output.codes, expected)
    entries = F.normalize(quantizer.codebook, dim=-1)[expected]
    torch.testing.assert_close(output.quantized, entries)
    torch.testing.assert_close(quantizer.lookup(expected), entries)


def test_a_position_uses_only_its_first_entries():
    sizes = [1, 2, 5, 40]
    quantizer = VectorQuantizer(40, 6, sizes).double()
    latents = torch.randn(50, 4, 6, dtype=torch.float64)
    codes = quantizer.encode(latents)
    assert torch.equal(codes, nearest(latents, quantizer.codebook.detach(), sizes))
    assert torch.equal(quantizer(latents).codes, codes)
    assert torch.equal(quantizer.encode(latents[:, :2]), codes[:, :2])  # a prefix
    assert (codes.max(dim=0).values < torch.tensor(sizes)).all()
    assert codes[:, 2].unique().numel() == 5


@pytest.mark.parametrize("first, last, n", [(2, 2048, 32), (16, 16, 5), (1, 7, 3), (4, 8, 1)])
def test_nested_sizes_grow_in_equal_ratios(first, last, n):
    sizes = nested_codebook_sizes(first, last, n)
    assert len(sizes) == n and sizes[0] == first and sizes == sorted(sizes)
    if n > 1:
        assert sizes[-1] == last
        bits = np.log2(first) + np.arange(n) * (np.log2(last) - np.log2(first)) / (n - 1)
        assert np.abs(sizes - 2**bits).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_look_up_is_float32_whatever_the_weights(dtype):
    half = VectorQuantizer(256, 8).to(dtype)
    full = VectorQuantizer(256, 8)
    full.load_state_dict(half.state_dict())  # the rounded weights
    latents = torch.randn(16, 32, 8).to(dtype)
    codes = full.encode(latents.float())
    assert torch.equal(half.encode(latents), codes)
    assert torch.equal(half(latents).codes, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full.encode(latents), codes)
        assert full(latents).quantized.dtype == torch.float32
    assert half.lookup(codes).dtype == dtype
    # The half-precision product has ties and errors that the test above must be able to see.
    rounded = (F.normalize(latents, dim=-1) @ F.normalize(half.codebook, dim=-1).T).argmax(-1)
    assert not torch.equal(rounded, codes)


# Gradients and losses -------------------------------------------------------------------------------------


def test_gradients_pass_straight_through_to_unit_latents():
    quantizer = VectorQuantizer(16, 4).double()
    upstream = torch.randn(3, 5, 4, dtype=torch.float64)
    unit = F.normalize(torch.randn(3, 5, 4, dtype=torch.float64), dim=-1).requires_grad_()
    (quantizer(unit).quantized * upstream).sum().backward()
    # The quantizer normalises unit latents once more, which takes out the radial part; the rest is identity.
    tangential = upstream - (upstream * unit).sum(-1, keepdim=True) * unit
    torch.testing.assert_close(unit.grad, tangential.detach())
    assert quantizer.codebook.grad is None  # quantized carries nothing to the entries

    latents = (3 * unit.detach()).requires_grad_()
    (quantizer(latents).quantized * upstream).sum().backward()
    torch.testing.assert_close(latents.grad, unit.grad / 3)


def test_the_rotation_trick_turns_the_gradient_with_the_latent():
    quantizer = VectorQuantizer(16, 4).double()
    quantizer.rotation_trick = True
    latents = 3 * torch.randn(3, 5, 4, dtype=torch.float64)
    unit = F.normalize(latents, dim=-1).requires_grad_()
    output = quantizer(unit)
    entries = quantizer.lookup(output.codes).detach()
    assert torch.equal(output.quantized, entries)  # exactly
    upstream = torch.randn(3, 5, 4, dtype=torch.float64)
    (output.quantized * upstream).sum().backward()
    # The rotation in the plane of latent and entry, written as an exponential: exp(angle (q e^T - e q^T)), q upright.
    e, q = unit.detach(), entries
    upright = F.normalize(q - (q * e).sum(-1, keepdim=True) * e, dim=-1)
    angle = torch.acos((q * e).sum(-1))[..., None, None]
    generator = upright[..., :, None] * e[..., None, :]
    rotation = torch.linalg.matrix_exp(angle * (generator - generator.mT))
    torch.testing.assert_close((rotation @ e[..., None]).squeeze(-1), q)
    turned = (rotation.mT @ upstream[..., None]).squeeze(-1)
    tangential = turned - (turned * e).sum(-1, keepdim=True) * e
    torch.testing.assert_close(unit.grad, tangential)
    assert quantizer.codebook.grad is None


def test_rotation_by_nothing_is_straight_through():
    unit = F.normalize(torch.randn(6, 4), dim=-1).requires_grad_()
    upstream = torch.randn(6, 4)
    (rotate(unit, unit.detach()) * upstream).sum().backward()
    torch.testing.assert_close(unit.grad, upstream)


def test_losses():
    quantizer = VectorQuantizer(16, 4).double()
    latents = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    output = quantizer(latents)
    cosine = F.cosine_similarity(latents, quantizer.codebook[output.codes], dim=-1)
    expected = (2 - 2 * cosine).mean()  # |a - b|² of unit vectors
    torch.testing.assert_close(output.codebook_loss, expected)
    torch.testing.assert_close(output.commitment_loss, expected)

    wanted = torch.autograd.grad(expected, (latents, quantizer.codebook))
    to_latents, to_entries = torch.autograd.grad(
        output.codebook_loss, (latents, quantizer.codebook), retain_graph=True, allow_unused=True
    )
    assert to_latents is None
    torch.testing.assert_close(to_entries, wanted[1])
    to_latents, to_entries = torch.autograd.grad(
        output.commitment_loss, (latents, quantizer.codebook), allow_unused=True
    )
    assert to_entries is None
    torch.testing.assert_close(to_latents, wanted[0])


@pytest.mark.parametrize(
    ("codes", "perplexity", "usage"),
    [
        (torch.arange(8), 8.0, 1.0),
        (torch.zeros(3, 4, dtype=torch.long), 1.0, 1 / 8),
        (torch.tensor([[0, 0], [5, 5]]), 2.0, 2 / 8),
        (torch.tensor([7, 7, 7, 1]), math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)), 2 / 8),
    ],
)
def test_statistics(codes, perplexity, usage):
    assert codebook_statistics(codes, 8) == pytest.approx({"perplexity": perplexity, "usage": usage})


# Finite scalars -------------------------------------------------------------------------------------------


def test_finite_scalars_are_the_nearest_grid_points():
    levels = [8, 5, 4, 3]
    quantizer = FiniteScalarQuantizer(levels).double()
    latents = 2 * torch.randn(50, 7, 4, dtype=torch.float64)
    output = quantizer(latents)
    for i, level in enumerate(levels):
        half, offset = (level - 1) / 2, 0.5 if level % 2 == 0 else 0.0
        bounded = half * np.tanh(latents[..., i].numpy() + np.arctanh(offset / half)) - offset
        whole = np.round(bounded)
        assert set(np.unique(whole)) == set(range(-(level // 2), (level + 1) // 2))  # all values, none outside
        np.testing.assert_allclose(output.quantized[..., i].numpy(), whole / (level // 2), atol=1e-12)
        np.testing.assert_allclose(quantizer.continuous(latents)[..., i].numpy(), bounded / (level // 2), atol=1e-12)
    assert (quantizer.continuous(torch.zeros(1, 1, 4)).abs() < 1e-6).all()
    assert torch.equal(quantizer.encode(latents), output.codes)
    torch.testing.assert_close(quantizer.lookup(output.codes), output.quantized, rtol=0, atol=1e-7)
    assert float(output.codebook_loss) == float(output.commitment_loss) == 0


def test_grid_points_and_codes_correspond_one_to_one():
    quantizer = FiniteScalarQuantizer([7, 5, 4])
    codes = torch.arange(140)
    points = quantizer.lookup(codes)
    assert quantizer.codebook_size == 140 == len(points.unique(dim=0))
    assert points.abs().max() == 1
    # Latents that the bound maps onto the points, as nearly as it reaches them.
    width, offset = torch.tensor([3, 2, 2]), torch.tensor([0, 0, 0.5])
    half = torch.tensor([3, 2, 1.5])
    latents = torch.atanh(((points * width + offset) / half).clamp(-0.999, 0.999)) - torch.atanh(offset / half)
    assert torch.equal(quantizer.encode(latents[None])[0], codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finite_scalars_are_bounded_in_float32_whatever_the_weights(dtype):
    full, half = (FiniteScalarQuantizer([7, 5, 4]).to(x) for x in (torch.float32, dtype))
    latents = torch.randn(64, 32, 3).to(dtype)
    codes = full.encode(latents.float())
    assert torch.equal(half.encode(latents), codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full.encode(latents), codes)
    # Half precision rounds some to another value, which the test above must be able to see.
    assert not torch.equal((3 * latents[..., 0].tanh()).round().float(), (3 * latents[..., 0].float().tanh()).round())


def test_finite_scalars_pass_gradients_straight_through_the_rounding():
    quantizer = FiniteScalarQuantizer([8, 5]).double()
    latents = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 2, dtype=torch.float64)
    (quantizer(latents).quantized * upstream).sum().backward()
    (wanted,) = torch.autograd.grad((quantizer.continuous(latents) * upstream).sum(), latents)
    torch.testing.assert_close(latents.grad, wanted)


# Revival --------------------------------------------------------------------------------------------------


def test_only_entries_idle_for_long_enough_are_revived():
    quantizer = VectorQuantizer(6, 3)
    revival = CodebookRevival(quantizer, patience=3)
    before = quantizer.codebook.detach().clone()
    latents = torch.randn(1, 4, 3)
    used = torch.tensor([[0, 1, 2, 2]])
    assert [revival.update(used, latents, step) for step in range(2)] == [0, 0]
    assert revival.idle_steps.tolist() == [0, 0, 0, 2, 2, 2]
    assert revival.update(torch.tensor([[0, 1, 5, 5]]), latents, 2, revive=False) == 0
    assert torch.equal(quantizer.codebook, before)
    assert revival.idle_steps.tolist() == [0, 0, 1, 3, 3, 0]
    assert revival.update(used, latents, 3) == 2  # 3 and 4
    assert revival.idle_steps.tolist() == [0, 0, 0, 0, 0, 1]
    assert torch.equal(quantizer.codebook[[0, 1, 2, 5]], before[[0, 1, 2, 5]])
    moved, onto = quantizer.codebook[[3, 4]], F.normalize(latents[0], dim=-1)
    places = (moved @ onto.T).argmax(dim=-1)
    torch.testing.assert_close(moved, onto[places])
    assert places[0] != places[1]  # no latent twice


def test_latents_are_drawn_anew_at_each_step_and_with_each_seed():
    latents = torch.randn(1, 64, 3)

    def drawn(seed: int, step: int, fill: bool) -> tuple[int, ...]:
        quantizer = VectorQuantizer(5, 3)
        revival = CodebookRevival(quantizer, patience=1, seed=seed)
        if fill:
            revival.fill(latents, step)
        else:
            assert revival.update(torch.zeros(1, 64).long(), latents, step) == 4
        return tuple((quantizer.codebook[1:] @ F.normalize(latents[0], dim=-1).T).argmax(dim=-1).tolist())

    for fill in (False, True):
        draws = {drawn(seed, step, fill) for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))}
        assert len(draws) == 3
        assert all(draw != tuple(sorted(draw)) for draw in draws)  # neither the first nor in their order


def test_more_dead_entries_than_latents():
    quantizer = VectorQuantizer(50, 3)
    revival = CodebookRevival(quantizer, patience=1)
    assert revival.update(torch.tensor([[0, 1]]), torch.randn(1, 2, 3), 0) == 2
    assert revival.idle_steps[:5].tolist() == [0, 0, 0, 0, 1]  # the rest waits for the next step


def test_nested_entries_are_revived_where_they_can_be_used():
    sizes = [1, 4, 16]  # entries 16..19 have no position at all
    quantizer = VectorQuantizer(20, 3, sizes)
    before = quantizer.codebook.detach().clone()
    latents = torch.eye(3)[None].expand(5, 3, 3)  # position t has latent e_t
    assert CodebookRevival(quantizer, patience=1).update(torch.zeros(5, 3).long(), latents, 0) == 15
    position = quantizer.codebook[1:16].argmax(dim=-1)
    torch.testing.assert_close(quantizer.codebook[1:16], torch.eye(3)[position])
    assert (position[:3] >= 1).all()
    assert (position[3:] == 2).all()
    assert torch.equal(quantizer.codebook[16:], before[16:])


@pytest.mark.parametrize("entries", [8, 12, 40])  # fewer than the latents, as many, more
def test_a_filled_codebook_is_made_of_latents(entries):
    quantizer = VectorQuantizer(entries, 6)
    revival = CodebookRevival(quantizer)
    latents = 5 * torch.randn(3, 4, 6)
    revival.update(torch.zeros(3, 4).long(), latents, 0)
    revival.fill(latents, 1)
    assert not revival.idle_steps.any()
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(entries))
    cosine, which = (quantizer.codebook @ F.normalize(latents.flatten(0, 1), dim=-1).T).max(dim=-1)
    assert (cosine > 0.995).all()
    assert which.bincount(minlength=12).max() <= -(-entries // 12)  # none taken again before all were taken
    assert torch.pdist(quantizer.codebook).min() > 1e-4


def test_counters_survive_a_checkpoint():
    revivals = [CodebookRevival(VectorQuantizer(4, 2)) for _ in range(2)]
    revivals[0].update(torch.tensor([[0, 3]]), torch.randn(1, 2, 2), 0)
    revivals[1].load_state_dict(revivals[0].state_dict())
    revivals[0].update(torch.tensor([[0, 3]]), torch.randn(1, 2, 2), 1)
    assert revivals[0].idle_steps.tolist() == [0, 2, 2, 0]
    assert revivals[1].idle_steps.tolist() == [0, 1, 1, 0]


# Collapse -------------------------------------------------------------------------------------------------


def put_in_one_corner(quantizer: VectorQuantizer) -> None:
    """A bad start: all entries within about a degree or two of one direction."""
    with torch.no_grad():
        direction = F.one_hot(torch.tensor(0), quantizer.codebook.shape[1])
        quantizer.codebook.copy_(F.normalize(direction + 0.02 * torch.randn_like(quantizer.codebook), dim=-1))


def train_on(data, encoder, decoder, revive: bool, codebook_size: int, dim: int, steps: int) -> VectorQuantizer:
    """Trains (n, features) data through a quantizer that starts in a corner; revives in the first four fifths."""
    quantizer = VectorQuantizer(codebook_size, dim)
    put_in_one_corner(quantizer)
    parameters = [*quantizer.parameters(), *encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    revival = CodebookRevival(quantizer, patience=10)
    for step in range(steps):
        x = data[torch.randint(len(data), (1024,))]
        latents = encoder(x).unsqueeze(1)
        output = quantizer(latents)
        loss = (decoder(output.quantized.squeeze(1)) - x).square().mean()
        loss = loss + 0.1 * (output.codebook_loss + 0.25 * output.commitment_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        revival.update(output.codes, latents.detach(), step, revive and step < 0.8 * steps)
    return quantizer


@torch.no_grad()
def use(quantizer: VectorQuantizer, encoder, heldout) -> float:
    return codebook_statistics(quantizer.encode(encoder(heldout).unsqueeze(1)), quantizer.codebook_size)["usage"]


def photo_patches(*paths: Path) -> torch.Tensor:
    """(n, 64): grey 8x8 patches without their mean and contrast, flat ones left out."""
    patches = []
    for path in paths:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("L"))).float() / 255
        patches.append(pixels.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 64))
    patches = torch.cat(patches)
    return F.layer_norm(patches[patches.std(dim=1) > 0.01], (64,))


@pytest.fixture(scope="module")
def photos() -> tuple[torch.Tensor, torch.Tensor]:
    """Patches to train on and, from another photo, to measure on: pictures that come with installed packages."""
    gradio, matplotlib = (Path(importlib.util.find_spec(name).origin).parent for name in ("gradio", "matplotlib"))
    train = [gradio / "media_assets" / "images" / name for name in ("cheetah.jpg", "tower.jpg", "groot.jpeg")]
    return photo_patches(*train), photo_patches(matplotlib / "mpl-data" / "sample_data" / "grace_hopper.jpg")


@pytest.mark.parametrize("revive", [True, False])
def test_no_collapse_on_real_images(photos, revive):
    train, heldout = photos
    encoder, decoder = torch.nn.Linear(64, 8), torch.nn.Linear(8, 64)
    quantizer = train_on(train, encoder, decoder, revive, codebook_size=256, dim=8, steps=200)
    usage = use(quantizer, encoder, heldout)
    assert usage > 0.9 if revive else usage < 0.5  # without it this start does collapse


@pytest.mark.parametrize("revive", [True, False])
def test_no_collapse_on_clusters(revive):
    centres = F.normalize(torch.randn(256, 12), dim=-1)
    train, heldout = (centres.repeat(n, 1) + 0.05 * torch.randn(n * 256, 12) for n in (32, 16))
    same = torch.nn.Identity()
    quantizer = train_on(train, same, same, revive, codebook_size=256, dim=12, steps=200)
    usage = use(quantizer, same, heldout)
    assert usage > 0.9 if revive else usage < 0.5


# Data parallelism -----------------------------------------------------------------------------------------


def revive_for_a_while(sizes: list[int] | None, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Fills and revives with this process's slice of 8 images; the codebook, the counters, the numbers revived."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, sizes)
    revival = CodebookRevival(quantizer, patience=2, seed=3)
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    revived = []
    revival.fill(torch.randn(8, 6, 4)[part], 0)
    for step in range(1, 10):
        latents = torch.randn(8, 6, 4)[part]
        revived.append(revival.update(quantizer.encode(latents), latents, step))
    return {"codebook": quantizer.codebook.data, "revived": torch.tensor(revived), **revival.state_dict()}


NESTED = [4, 8, 16, 32, 64, 64]


def revive_in_parallel(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = [revive_for_a_while(sizes, rank, 2) for sizes in (None, NESTED)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_revive_as_one_does(tmp_path):
    # Forked, not spawned: importing everything twice more takes longer than all other tests here together.
    mp.start_processes(revive_in_parallel, (str(tmp_path),), nprocs=2, start_method="fork")
    for number, sizes in enumerate((None, NESTED)):
        alone = revive_for_a_while(sizes, 0, 1)
        assert alone["revived"].sum() > 0
        for rank in range(2):
            parallel = torch.load(tmp_path / f"{rank}.pt")[number]
            assert parallel.keys() == alone.keys()
            assert all(torch.equal(parallel[name], alone[name]) for name in alone)


# Bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "codebook_size and codebook_dim must be at least 1, got 0, 4"),
        ((8, 0), "codebook_size and codebook_dim must be at least 1, got 8, 0"),
        ((8, 4, [4, 9]), r"codebook_sizes must lie between 1 and codebook_size \(8\)"),
        ((8, 4, [0, 8]), r"codebook_sizes must lie between 1 and codebook_size \(8\)"),
    ],
)
def test_impossible_codebooks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(*arguments)


@pytest.mark.parametrize("levels", [[], [8, 2]])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ValueError, match="fsq_levels must be one or more numbers of at least 3, got"):
        FiniteScalarQuantizer(levels)


def test_patience_is_at_least_one_step():
    with pytest.raises(ValueError, match="patience must be at least 1 step, got 0"):
        CodebookRevival(VectorQuantizer(4, 2), patience=0)
