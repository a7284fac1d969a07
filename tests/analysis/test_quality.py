"""PSNR and SSIM against closed forms and another library."""

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from spectralar.analysis.quality import psnr, ssim
from tests.analysis.photos import photo


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 3, 8, 8)
    images = reference + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    # On [0, 1] the errors are 0.1 and 0.01.
    torch.testing.assert_close(psnr(images, reference), torch.tensor([20.0, 40.0]))
    assert psnr(reference, reference).tolist() == [100.0, 100.0]


def test_psnr_clamps_and_broadcasts():
    reference = torch.full((2, 1, 1, 4, 4), 3.0)
    frames = torch.stack([torch.full((3, 1, 4, 4), 1.5), torch.full((3, 1, 4, 4), -7.0)])
    assert psnr(frames, reference).tolist() == [[100.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (3, 33)])
def test_ssim_is_the_published_one(channels, size):
    reference = torch.stack([photo(channels, size, seed) for seed in range(3)])
    images = reference + 0.2 * torch.randn(reference.shape)
    ours = ssim(images, reference)
    a, b = ((x.clamp(-1, 1) + 1) / 2 for x in (images, reference))
    # torchmetrics also averages over the border, where it sees reflections; Wang et al. do not.
    whole = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)[1]
    theirs = whole[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.max() < 0.95
    torch.testing.assert_close(ssim(reference, reference), torch.ones(3))
    # Leading axes: two images at three noise levels, each as if alone.
    frames = torch.stack([images[:2], reference[:2], (images + reference)[:2] / 2], dim=1)
    expected = torch.stack([ssim(frame, reference[:2]) for frame in frames.unbind(1)], dim=1)
    torch.testing.assert_close(ssim(frames, reference[:2, None]), expected)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 12"):
        ssim(torch.zeros(1, 12, 10), torch.zeros(1, 12, 10))
