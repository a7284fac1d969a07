"""The order of images: permutations, a function of seed and step alone; places spread evenly."""

import pytest
import torch

from train.order import evenly, step_indices


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
