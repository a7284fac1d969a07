"""Nearest training images: a model that copies is told from one that does not."""

import pytest
import torch

from train.evaluation.judges import Judged
from train.evaluation.neighbours import Looked, find_neighbours


def looked(pixels: torch.Tensor, features: torch.Tensor) -> Looked:
    nothing = torch.empty(len(pixels), 0)
    return Looked(pixels, {"classifier": Judged(features, nothing, nothing, nothing)})


def random_pixels(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8)


@pytest.fixture
def sets():
    """Training images, held-out ones and their reconstructions: 300, 200 and 200 of one distribution."""
    train, heldout, rebuilt = (looked(random_pixels(n), torch.randn(n, 6)) for n in (300, 200, 200))
    return train, heldout, rebuilt


def test_samples_of_the_same_distribution_lie_as_held_out_images_do(sets):
    train, heldout, rebuilt = sets
    found, _ = find_neighbours(looked(random_pixels(400), torch.randn(400, 6)), heldout, rebuilt, train)
    for space in found["spaces"].values():
        assert all(share < 0.05 for share in space["closer"].values())
        assert space["samples"][50] == pytest.approx(space["heldout"][50], rel=0.1)
    assert found["images"] == {"samples": 400, "heldout": 200, "train": 300}


def test_copies_are_found_in_pixels_and_to_the_judge(sets):
    train, heldout, rebuilt = sets
    copied = torch.randperm(300)[:40]
    pixels, features = random_pixels(400), torch.randn(400, 6)
    pixels[:40] = train.pixels[copied]
    features[100:140] = train.views["classifier"].features[copied] + 0.001
    found, places = find_neighbours(looked(pixels, features), heldout, rebuilt, train)
    for space in ("pixels", "classifier"):
        for share in found["spaces"][space]["closer"].values():
            assert 0.1 <= share < 0.15
    assert found["spaces"]["pixels"]["samples"][5] == 0
    assert places["pixels"][:40, 0].tolist() == copied.tolist()
    assert places["classifier"][100:140, 0].tolist() == copied.tolist()
    assert set(places["pixels, closest"][:40].tolist()) == set(range(40))
    assert set(places["classifier, closest"][:40].tolist()) == set(range(100, 140))


def test_distances_in_pixels_are_root_mean_squares():
    train = looked(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 6))
    one = looked(torch.full((2, 1, 8, 8), 51, dtype=torch.uint8), torch.full((2, 6), 2.0))
    found, _ = find_neighbours(one, one, one, train)
    assert found["spaces"]["pixels"]["samples"] == pytest.approx([0.2] * 101)
    assert found["spaces"]["classifier"]["heldout"] == pytest.approx([24**0.5] * 101)
