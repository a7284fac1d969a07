"""The order of images: functions of seed and step alone; classes balanced; places spread evenly."""

import pytest
import torch

from train.data.order import balanced_order, evenly, in_proportion, of_classes, step_indices


def test_each_epoch_is_another_permutation_less_the_last_few():
    epochs = [torch.cat([step_indices(23, 5, 0, 4 * epoch + i) for i in range(4)]) for epoch in range(6)]
    for epoch in epochs:
        assert epoch.dtype == torch.int64
        assert len(epoch.unique()) == len(epoch) == 20
        assert 0 <= epoch.min() and epoch.max() < 23
    assert not torch.equal(epochs[0], epochs[1])
    assert len(torch.cat(epochs).unique()) == 23  # what one epoch leaves out is not always the same


def test_step_depends_on_seed_and_step_alone():
    expected = [step_indices(100, 8, 3, step).clone() for step in range(40)]
    for step in (39, 0, 17, 12, 11):  # as after an interruption; crosses epochs both ways
        found = step_indices(100, 8, 3, step)
        assert torch.equal(found, expected[step])
        found.zero_()  # a caller may do as it likes with its indices
        torch.rand(1)
    assert torch.equal(step_indices(100, 8, 3, 17), expected[17])
    assert not torch.equal(step_indices(100, 8, 4, 17), expected[17])


def test_fewer_images_than_a_batch_is_said():
    with pytest.raises(ValueError, match="3 images, fewer than one batch of 4"):
        step_indices(3, 4, 0, 0)


def test_evenly_takes_from_everywhere():
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly(3, 8).tolist() == [0, 1, 2]
    assert len(set(evenly(10_000, 1024).tolist())) == 1024


# ------------------------------------------------------------------------------------------------ balance

SIZES = {0: 4, 1: 100, 3: 25, 7: 1}  # of classes, by label; 130 images
LABELS = torch.cat([torch.full((size,), label) for label, size in SIZES.items()])[
    torch.randperm(130, generator=torch.Generator().manual_seed(0))
]


def drawn(balance: str, epochs: int, seed: int = 0) -> torch.Tensor:
    order = balanced_order(LABELS, balance)
    return torch.stack([order(seed, epoch) for epoch in range(epochs)])  # (epochs, n)


@pytest.mark.parametrize("balance, shares", [("sqrt", [2, 10, 5, 1]), ("even", [1, 1, 1, 1])])
def test_classes_are_drawn_by_the_rule(balance, shares):
    expected = 130 * torch.tensor(shares) / sum(shares)
    for epoch in drawn(balance, 5):
        found = torch.tensor([(LABELS[epoch] == label).sum() for label in SIZES])
        assert len(epoch) == 130 and ((found - expected).abs() <= 1).all(), found
        first_half = LABELS[epoch[:65]]  # one class among the other
        assert abs(int((first_half == 1).sum()) - expected[1] / 2) < 15


@pytest.mark.parametrize("balance", ["sqrt", "even"])
def test_within_a_class_no_image_comes_again_before_all_others_have(balance):
    times = torch.stack([epoch.bincount(minlength=130) for epoch in drawn(balance, 23)]).cumsum(0)  # (epochs, n)
    for label in SIZES:
        own = times[:, label == LABELS]
        assert ((own.amax(1) - own.amin(1)) <= 1).all()
    assert (times[-1] > 0).all()


def test_balanced_epochs_are_functions_of_seed_and_epoch_and_all_differ():
    epochs = drawn("sqrt", 4)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    again = balanced_order(LABELS, "sqrt")
    for epoch in (3, 0, 2):  # as after an interruption
        assert torch.equal(again(0, epoch), epochs[epoch])
    assert not torch.equal(again(1, 0), epochs[0])
    chosen = again(0, 0)[LABELS[again(0, 0)] == 1]
    other = again(1, 0)[LABELS[again(1, 0)] == 1]
    assert set(chosen.tolist()) != set(other.tolist())  # which of a large class come first, too
    assert torch.equal(step_indices(130, 50, 0, 3, again), epochs[1][50:100])


def test_unbalanced_is_the_uniform_order():
    assert balanced_order(LABELS, "none") is None


def test_every_class_comes_in_every_epoch_however_uneven():
    labels = torch.tensor([0] * 20_000 + list(range(1, 12)))
    for balance in ("sqrt", "even"):
        epoch = balanced_order(labels, balance)(0, 1)
        assert len(epoch) == len(labels) and len(labels[epoch].unique()) == 12


def test_images_of_wanted_classes_are_those_that_there_are():
    labels, wanted = torch.tensor([3, 0, 0, 2, 0, 3, 1]), torch.tensor([0, 0, 3, 3, 3, 1])
    assert of_classes(labels, wanted).tolist() == [0, 1, 2, 5, 6]


def test_in_proportion_every_stretch_has_classes_as_they_are():
    assert in_proportion(torch.tensor([5, 5, 5]), 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    counts = torch.tensor([60, 0, 4, 36])
    labels = in_proportion(counts, 1000)
    assert labels.bincount(minlength=4).tolist() == [600, 0, 40, 360]
    for start in range(0, 900, 7):
        part = labels[start : start + 100].bincount(minlength=4)
        assert (part - counts).abs().max() <= 1
