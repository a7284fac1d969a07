"""Two processes (gloo, as torchrun starts them), or rounds within a step, train as one process with the same batch."""

import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.train.run_folders import (
    STAGES,
    assert_same_up_to_rounding,
    metrics,
    newest_checkpoint,
    newest_step,
    stop_at,
    wait_for,
)

# Dropout draws by process, so it is left out.
SETTINGS = ["transformer.dropout=0", "train_transformer.codes=on-the-fly"] + [
    f"train_{stage}.{key}" for stage in STAGES for key in ("steps=24", "log_every=1", "eval_every=24")
]
# Muon, in stage 2, enlarges what rounding makes of products in shards; more so in bfloat16, where it is fast.
TOLERANCE = {"tokenizer": 5e-5, "transformer": 5e-4}


def published(output, stage):
    """The file of a finished stage's weights."""
    folder = output / ("tokenizer" if stage == "tokenizer" else "pipeline/transformer")
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def reference(scripts, preset, tmp_path_factory):
    """Folder of both stages, trained in one process."""
    output = tmp_path_factory.mktemp("one")
    for stage in STAGES:
        code, text = scripts.run(f"train_{stage}", [preset, "--output", output, *SETTINGS])
        assert code == 0, text
    return output


@pytest.fixture
def argv(preset, reference, tmp_path):
    """Arguments of a run in tmp_path, where the trained tokenizer is in place."""
    shutil.copytree(reference / "tokenizer", tmp_path / "tokenizer")
    return [preset, "--output", tmp_path, *SETTINGS]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(scripts, argv, reference, tmp_path, stage):
    code, text = scripts.run(f"train_{stage}", argv, processes=2)
    assert code == 0, text
    assert (newest_checkpoint(tmp_path, stage) / "random_states_1.pkl").exists()  # there were two
    assert text.count("Finished: 24 steps") == 1
    assert_same_up_to_rounding(tmp_path, reference, stage)
    if stage == "tokenizer":
        assert sum(line.get("revived", 0) for line in metrics(tmp_path, stage)) > 0


@pytest.mark.parametrize("stage", STAGES)
def test_shards_train_as_one(scripts, argv, reference, tmp_path, stage):
    """Weights, moments and averages in shards, rounds within a step, and what is published."""
    settings = [f"train_{stage}.fsdp=true", f"train_{stage}.grad_accumulation=2"]
    code, text = scripts.run(f"train_{stage}", [*argv, *settings], processes=2)
    assert code == 0, text
    assert text.count("Finished: 24 steps") == 1
    assert_same_up_to_rounding(tmp_path, reference, stage, TOLERANCE[stage])
    ours, theirs = (load_file(published(folder, stage)) for folder in (tmp_path, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # in half precision
    if stage == "tokenizer":
        assert sum(line.get("revived", 0) for line in metrics(tmp_path, stage)) > 0


@pytest.mark.parametrize("stage, first, then", [
    ("tokenizer", (2, True), (1, False)), ("transformer", (1, False), (2, True)),
])  # fmt: skip
def test_a_run_goes_on_with_and_without_shards(scripts, argv, reference, tmp_path, stage, first, then):
    step = stop_at(scripts, [*argv, f"train_{stage}.fsdp={first[1]}"], stage, 8, processes=first[0])
    code, text = scripts.run(f"train_{stage}", [*argv, f"train_{stage}.fsdp={then[1]}"], processes=then[0])
    assert code == 0, text
    assert f"Resumed from {tmp_path}/train_{stage}/checkpoints/step-{step:08d}." in text
    assert_same_up_to_rounding(tmp_path, reference, stage, TOLERANCE[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_is_the_same_step_in_rounds(scripts, argv, reference, tmp_path, stage):
    code, text = scripts.run(f"train_{stage}", [*argv, f"train_{stage}.grad_accumulation=4"])
    assert code == 0, text
    assert_same_up_to_rounding(tmp_path, reference, stage)


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_in_another_number_of_processes(scripts, argv, reference, tmp_path, first, then):
    step = stop_at(scripts, argv, "tokenizer", 8, processes=first)
    code, text = scripts.run("train_tokenizer", argv, processes=then)
    assert code == 0, text
    assert f"Resumed from {tmp_path}/train_tokenizer/checkpoints/step-{step:08d}." in text
    assert_same_up_to_rounding(tmp_path, reference, "tokenizer")


def test_processes_stop_together_if_one_is_told_to(scripts, argv, reference, tmp_path):
    run = scripts.start("train_tokenizer", argv, processes=2)
    wait_for(tmp_path / "train_tokenizer" / "checkpoints" / "step-00000004")
    run.pids, all_pids = run.pids[1:], run.pids
    run.kill(signal.SIGTERM)
    run.pids = all_pids
    code, text = run.wait()
    assert code == 128 + signal.SIGTERM
    step = newest_step(tmp_path, "tokenizer")
    assert f"Stopped at step {step} of 24: another process stops. The same command goes on." in text
    assert scripts.run("train_tokenizer", argv, processes=2)[0] == 0
    assert_same_up_to_rounding(tmp_path, reference, "tokenizer")


@pytest.mark.parametrize("setting, said", [
    ("train_tokenizer.batch_size=9", "batch_size 9 must be a multiple of processes x grad_accumulation (2 x 1)."),
    ("train_tokenizer.lr=1e30", "Step 1: loss/full is not finite."),
])  # fmt: skip
def test_what_ends_a_run_is_said_once(scripts, argv, setting, said):
    code, text = scripts.run("train_tokenizer", [*argv, "train_tokenizer.warmup_steps=0", setting], processes=2)
    assert code == 1
    assert text.count(said) == 1
    assert "Traceback" not in text
