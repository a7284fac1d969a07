"""The adversarial loss: closed forms, what the discriminator depends on and learns, whole runs with it."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from tests.train.run_folders import (
    assert_same_run,
    assert_same_up_to_rounding,
    metrics,
    newest_checkpoint,
    training_state,
)
from train.configs.config import TokenizerStage
from train.objectives.adversarial import LECAM_DECAY, AdversarialTerm, PatchDiscriminator, discriminator_loss

SETTINGS = [f"train_tokenizer.{key}" for key in (
    "adversarial=patchgan", "discriminator_width=8", "lecam_weight=1", "adversarial_from=3", "quantize_from=2",
    "steps=12", "log_every=1", "checkpoint_every=2",
)]  # fmt: skip


def test_discriminator_loss():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    hinge = (0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3
    assert float(discriminator_loss(real, fake, torch.zeros(2), 0.0)) == pytest.approx(hinge)
    means = torch.tensor([0.5, -0.5])  # of real and of reconstructed images
    lecam = (2.5**2 + 1.0**2 + 0) / 3 + (3.5**2 + 0.5**2 + 0) / 3
    assert float(discriminator_loss(real, fake, means, 0.1)) == pytest.approx(hinge + 0.1 * lecam)


@pytest.mark.parametrize("channels, size", [(1, 16), (3, 64)])
def test_a_logit_for_each_patch_whatever_the_batch(channels, size):
    discriminator = PatchDiscriminator(channels, 8)
    images = torch.randn(4, channels, size, size)
    logits = discriminator(images)
    assert logits.shape == (4, 1, size // 8, size // 8)
    torch.testing.assert_close(discriminator(images[2:3]), logits[2:3])


def term_and_batch(**settings):
    stage = TokenizerStage(adversarial="patchgan", discriminator_width=8, **settings)
    images = torch.randn(16, 1, 16, 16)
    smooth = F.avg_pool2d(images, 3, 1, 1).unsqueeze(1).repeat(1, 2, 1, 1, 1)  # (16, 2, 1, 16, 16)
    return AdversarialTerm(stage, 1, Accelerator(cpu=True)), images, smooth.requires_grad_()


def test_the_discriminator_learns_to_tell_and_pulls_at_the_full_prefix_alone():
    term, images, frames = term_and_batch(discriminator_lr=2e-3)
    error = (frames[:, 0] - images).square().mean()
    losses = []
    for _ in range(30):
        frames.grad = None
        values, weighted = term(frames, images, None, error, True)
        weighted.backward()
        losses.append(values["discriminator"].item())
        term.step()
    assert losses[0] == pytest.approx(2, abs=0.3)  # hinge losses of answers about 0
    assert losses[-1] < 0.5
    assert frames.grad[:, 0].any() and not frames.grad[:, 1].any()
    (of_error,) = torch.autograd.grad(error, frames)
    assert 0.1 < float(frames.grad.norm() / of_error.norm()) < 0.9  # about adversarial_weight; the norm is a mean
    assert float(term.means[0]) > 0 > float(term.means[1])
    # Against the gradient lies what the discriminator takes for real.
    moved = frames[:, 0] - 10 * frames.grad[:, 0] / frames.grad.norm()
    assert term.discriminator(moved).mean() > term.discriminator(frames[:, 0]).mean()


def test_the_means_are_running_ones_of_the_answers():
    term, images, frames = term_and_batch(discriminator_lr=1e-9)
    with torch.no_grad():
        wanted = torch.stack([term.discriminator(x).mean() for x in (images, frames[:, 0])])
    for steps in range(1, 4):
        term(frames, images, None, torch.ones(()), True)
        term.step()
        torch.testing.assert_close(term.means, (1 - LECAM_DECAY**steps) * wanted, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def reference(scripts, preset, tmp_path_factory):
    output = tmp_path_factory.mktemp("adversarial")
    code, text = scripts.run("train_tokenizer", [preset, "--output", output, *SETTINGS])
    assert code == 0, text
    return output


def test_it_is_at_work_from_its_first_step_on(reference):
    lines = [line for line in metrics(reference, "tokenizer") if "lr" in line]
    assert ["loss/discriminator" in line for line in lines] == [False] * 3 + [True] * 9
    assert [line["adversarial_weight"] > 0 for line in lines] == [False] * 3 + [True] * 9
    assert (newest_checkpoint(reference, "tokenizer") / "model_1.safetensors").exists()


@pytest.mark.parametrize("stops", [1, 4])  # before and after its first step
def test_a_stopped_run_goes_on_exactly(scripts, preset, reference, tmp_path, stops):
    for _ in range(stops):
        assert scripts.run("train_tokenizer", [preset, "--output", tmp_path, *SETTINGS, "--max-minutes", "0"])[0] == 0
    code, text = scripts.run("train_tokenizer", [preset, "--output", tmp_path, *SETTINGS])
    assert code == 0, text
    assert_same_run(tmp_path, reference, "tokenizer")


@pytest.mark.parametrize("processes, rounds", [(2, 1), (1, 4)])
def test_processes_and_rounds_train_as_one(scripts, preset, reference, tmp_path, processes, rounds):
    argv = [preset, "--output", tmp_path, *SETTINGS, f"train_tokenizer.grad_accumulation={rounds}"]
    code, text = scripts.run("train_tokenizer", argv, processes=processes)
    assert code == 0, text
    assert_same_up_to_rounding(tmp_path, reference, "tokenizer")
    ours, theirs = (
        [state["means"] for state in training_state(folder, "tokenizer").values() if "means" in state]
        for folder in (tmp_path, reference)
    )
    assert len(ours) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("setting, said", [
    ("train_tokenizer.adversarial=", "was trained with train_tokenizer.adversarial=patchgan, not : set that back"),
    ("train_tokenizer.discriminator_width=16", "was trained with train_tokenizer.discriminator_width=8, not 16"),
    ("train_tokenizer.mixed_precision=fp16", "An adversarial loss trains with train_tokenizer.mixed_precision bf16"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(scripts, preset, reference, setting, said):
    code, text = scripts.run("train_tokenizer", [preset, "--output", reference, *SETTINGS, setting])
    assert code == 1
    assert said in text.splitlines()[-1]
    assert "Traceback" not in text
