"""Early stopping: when it ends a run, which weights it keeps, and runs that it ends."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.train.run_folders import assert_same_run, metrics, newest_step
from train.runs.early_stopping import EarlyStopping
from train.train_transformer import compare

# So high a rate that the loss on a few images soon rises; measured at each fourth step.
SETTINGS = [f"train_transformer.{key}" for key in (
    "early_stopping=2", "eval_every=4", "steps=400", "lr=0.05", "warmup_steps=0", "ema_decay=0.5", "copies=1",
)]  # fmt: skip


def test_it_is_over_when_the_lowest_loss_is_long_past():
    weight = torch.nn.Parameter(torch.zeros(3))
    stopping = EarlyStopping(2)
    for step, (loss, over) in enumerate([(5, False), (4, False), (4, False), (3, False), (3, False), (3.5, True)]):
        with torch.no_grad():
            weight.fill_(step)
        stopping.update(loss, [weight], step)
        assert stopping.over == over
    assert (stopping.lowest, stopping.step) == (3, 3)
    resumed = EarlyStopping(2)
    resumed.load_state_dict(stopping.state_dict())
    assert resumed.over
    resumed.copy_to([weight])
    assert weight.tolist() == [3, 3, 3]


def test_without_patience_it_is_never_over_and_keeps_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    stopping = EarlyStopping(0)
    for loss in range(10):
        stopping.update(loss, [weight], loss)
    assert not stopping.over
    assert stopping.state_dict()["weights"] == []
    stopping.copy_to([weight])
    assert weight.tolist() == [1, 1, 1]


def test_losses_are_printed_side_by_side_by_position():
    said = compare(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5, 5.0]))
    assert said.endswith("held out 2.000 / 3.000; by position 1: 1.000 / 1.500, 2: 2.000 / 2.500, 3: 3.000 / 5.000")


# ------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def reference(scripts, preset, tmp_path_factory):
    """Folder of a transformer that was stopped early."""
    output = tmp_path_factory.mktemp("stopped")
    for script in ("train_tokenizer", "encode_dataset", "train_transformer"):
        code, text = scripts.run(script, [preset, "--output", output, *SETTINGS])
        assert code == 0, text
    return output, text


def test_a_run_ends_early_with_its_best_weights(reference):
    output, text = reference
    measured = [(line["loss/heldout"], line["step"]) for line in metrics(output, "transformer") if "lr" not in line]
    lowest, best = min(measured)
    last = newest_step(output, "transformer")
    assert best < last < 400
    assert [step for _, step in measured][-3:] == [best, best + 4, best + 8] and last == best + 8
    assert f"Finished: {last} steps" in text
    (step, loss) = re.search(r"Weights of step (\d+), of the lowest held-out loss, ([\d.]+)\.", text).groups()
    assert (int(step), float(loss)) == (best, pytest.approx(lowest, abs=1e-4))
    # The checkpoint holds them too, and the model has no others.
    folder = output / "train_transformer" / "checkpoints" / f"step-{last:08d}"
    kept = torch.load(folder / "custom_checkpoint_1.pkl", weights_only=True)["weights"]
    saved = load_file(output / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    kept = {weight.half().numpy().tobytes() for weight in kept}
    assert all(weight.numpy().tobytes() in kept for weight in saved.values())


def test_a_stopped_run_goes_on_exactly_and_is_over_when_it_was(scripts, preset, reference, tmp_path):
    for name in ("tokenizer", "codes"):
        shutil.copytree(reference[0] / name, tmp_path / name)
    argv = [preset, "--output", tmp_path, *SETTINGS]
    for _ in range(6):  # past the first measurement
        assert scripts.run("train_transformer", [*argv, "--max-minutes", "0"])[0] == 0
    for _ in range(2):  # the second finds it over
        code, text = scripts.run("train_transformer", argv)
        assert code == 0, text
        assert_same_run(tmp_path, reference[0], "transformer")
        file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
        assert (tmp_path / file).read_bytes() == (reference[0] / file).read_bytes()
