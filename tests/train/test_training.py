"""Whole runs of both training stages, as processes: results, interruptions, damage, and what is refused."""

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable

import psutil
import pytest
import torch
from safetensors.torch import load_file

from spectralar import SpectralARPipeline, SpectralTokenizer
from tests.train.run_folders import STAGES, assert_same_run, metrics, newest_checkpoint, newest_step, stop_at, wait_for
from train.runs.hardware import cpu_has_bfloat16

STEPS = 24


@pytest.fixture(scope="module")
def reference(scripts, preset, tmp_path_factory):
    """Folder of a run of all scripts that nothing interrupted."""
    output = tmp_path_factory.mktemp("reference")
    for script in ("train_tokenizer", "encode_dataset", "train_transformer"):
        code, text = scripts.run(script, [preset, "--output", output])
        assert code == 0, text
    return output


@pytest.fixture
def command(preset, reference, tmp_path):
    """Arguments of a run of a stage in tmp_path, where what earlier stages wrote is in place."""

    def make(stage: str, *options: str) -> list:
        if stage == "transformer":
            for name in ("tokenizer", "codes"):
                shutil.copytree(reference / name, tmp_path / name, dirs_exist_ok=True)
        return [preset, "--output", tmp_path, *options]

    return make


# ------------------------------------------------------------------------------------------------ results


def test_the_finished_models_load_and_generate(reference, preset):
    tokenizer = SpectralTokenizer.from_pretrained(reference / "tokenizer")
    pipeline = SpectralARPipeline.from_pretrained(reference / "pipeline")
    for name, weight in tokenizer.state_dict().items():
        torch.testing.assert_close(pipeline.tokenizer.state_dict()[name], weight, rtol=0, atol=0)
    assert not [path for path in reference.glob("*/**/*.json") if str(reference) in path.read_text()]  # no paths
    files = [load_file(path) for path in reference.glob("*/**/diffusion_pytorch_model.safetensors")]
    assert len(files) == 3
    assert {weight.dtype for file in files for weight in file.values()} == {torch.float16}
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(["across", "down"], generator=torch.Generator().manual_seed(0))
    assert out.codes.shape == (2, 4)
    assert [image.size for image in out.images] == [(16, 16)] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_the_finished_weights_are_the_averaged_ones(reference, stage):
    folder = newest_checkpoint(reference, stage)
    trained = load_file(folder / "model.safetensors")
    average = torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)
    assert average["optimization_step"] == STEPS  # one of each step
    finished = load_file(
        reference / {"tokenizer": "tokenizer", "transformer": "pipeline/transformer"}[stage]
        / "diffusion_pytorch_model.safetensors"
    )  # fmt: skip
    assert finished.keys() == trained.keys()
    left = {weight.half().numpy().tobytes() for weight in average["shadow_params"]}
    for name, weight in finished.items():
        if name == "quantizer.codebook":
            torch.testing.assert_close(weight, trained[name].half(), rtol=0, atol=0)
        else:
            assert weight.numpy().tobytes() in left, name
    assert any(not torch.equal(finished[name], trained[name].half()) for name in trained)


@pytest.mark.parametrize("stage", STAGES)
def test_training_learns_and_its_log_is_complete(reference, stage):
    lines = [line for line in metrics(reference, stage) if "lr" in line]
    assert [line["step"] for line in lines] == list(range(4, STEPS + 1, 4))
    loss = "loss/full" if stage == "tokenizer" else "loss/train"
    assert lines[-1][loss] < lines[0][loss]
    assert all(0 < line["time/data_share"] < 1 and line["time/images_per_second"] > 0 for line in lines)
    (last,) = [line for line in metrics(reference, stage) if "lr" not in line]
    measured = {
        "tokenizer": {f"eval/psnr_{kind}{k}" for kind in ("", "low_pass_") for k in (1, 2, 4)}
        | {"eval/perplexity", "eval/usage"},
        "transformer": {f"loss/{images}{k}" for images in ("seen", "heldout") for k in ("", "_1", "_2", "_4")},
    }
    assert last.keys() == {"step"} | measured[stage]
    folder = reference / f"train_{stage}"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints", "config.yaml", "lock", "metrics.jsonl", "samples", "tensorboard"
    }  # fmt: skip
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000020", "step-00000024"]
    assert [path.suffix for path in (folder / "samples").iterdir()] == [".png"]


def test_codes_were_revived_in_the_reference(reference):
    """Or the tests of resumption would not test it."""
    assert sum(line.get("revived", 0) for line in metrics(reference, "tokenizer")) > 0


def test_every_code_is_put_onto_a_latent_before_the_first_quantized_step(scripts, command, tmp_path):
    settings = [f"train_tokenizer.{key}" for key in ("steps=4", "quantize_from=4", "checkpoint_every=1")]
    code, text = scripts.run("train_tokenizer", command("tokenizer", *settings))
    assert code == 0, text
    folders = sorted((tmp_path / "train_tokenizer" / "checkpoints").glob("step-*"))
    before, after = (load_file(folder / "model.safetensors")["quantizer.codebook"] for folder in folders)
    # No gradient has reached the codebook so far: what moves it is the batch that it is filled with.
    assert (before != after).any(dim=1).all()


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_ends_at_once_and_changes_nothing(scripts, command, reference, tmp_path, stage):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    code, text = scripts.run(f"train_{stage}", command(stage))
    assert code == 0
    assert f"Finished: {STEPS} steps" in text
    assert_same_run(tmp_path, reference, stage)
    for folder in ("tokenizer", "pipeline/tokenizer", "pipeline/transformer"):
        file = f"{folder}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / file).read_bytes() == (reference / file).read_bytes()


@pytest.mark.parametrize("script", ["train_tokenizer", "encode_dataset", "train_transformer"])
def test_a_dry_run_writes_nothing(scripts, preset, reference, tmp_path, script):
    if script != "train_tokenizer":
        shutil.copytree(reference / "tokenizer", tmp_path / "tokenizer")
    before = sorted(tmp_path.rglob("*"))
    code, text = scripts.run(script, [preset, "--output", tmp_path, "--dry-run"])
    assert code == 0, text
    assert re.search(r"Dry run: .*nothing was written\.", text)
    assert sorted(tmp_path.rglob("*")) == before


def test_codes_encoded_on_the_way_train_as_stored_ones(scripts, command, tmp_path):
    """Without augmentation both are the same codes."""
    options = ["data.augment=[]", "train_transformer.copies=1"]
    argv = command("transformer", *options)
    assert scripts.run("encode_dataset", argv)[0] == 0
    assert scripts.run("train_transformer", argv)[0] == 0
    stored = tmp_path / "stored"
    stored.mkdir()
    (tmp_path / "train_transformer").rename(stored / "train_transformer")
    shutil.rmtree(tmp_path / "codes")
    code, text = scripts.run("train_transformer", [*argv, "train_transformer.codes=on-the-fly"])
    assert code == 0, text
    assert_same_run(tmp_path, stored, "transformer")


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains(scripts, command, reference, tmp_path, stage):
    options = [f"train_{stage}.mixed_precision=bf16", f"train_{stage}.steps=4"]
    code, text = scripts.run(f"train_{stage}", command(stage, *options))
    assert code == 0, text
    assert (f"train_{stage}.mixed_precision=no is faster" in text) == (not cpu_has_bfloat16())
    ours, theirs = metrics(tmp_path, stage)[0], metrics(reference, stage)[0]
    loss = "loss/full" if stage == "tokenizer" else "loss/train"
    assert ours[loss] == pytest.approx(theirs[loss], rel=0.05)
    assert ours[loss] != theirs[loss]


# ------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_run_goes_on_as_if_nothing_had_been(scripts, command, reference, tmp_path, stage, number, code):
    run = scripts.start(f"train_{stage}", command(stage))
    wait_for(tmp_path / f"train_{stage}" / "checkpoints" / "step-00000008")
    run.kill(number)
    ended, text = run.wait()
    assert ended == code, text
    step = newest_step(tmp_path, stage)
    assert 8 <= step < STEPS
    if number == signal.SIGTERM:
        assert f"Stopped at step {step} of {STEPS}: got SIGTERM. The same command goes on." in text
    assert not (tmp_path / {"tokenizer": "tokenizer", "transformer": "pipeline"}[stage]).exists()
    code, text = scripts.run(f"train_{stage}", command(stage))
    assert code == 0, text
    assert f"Resumed from {tmp_path}/train_{stage}/checkpoints/step-{step:08d}." in text
    assert_same_run(tmp_path, reference, stage)


def test_a_run_out_of_time_stops_with_a_checkpoint(scripts, command, reference, tmp_path):
    for step in (1, 2):
        code, text = scripts.run("train_tokenizer", command("tokenizer", "--max-minutes", "0"))
        assert code == 0, text
        assert f"Stopped at step {step} of {STEPS}: 0 minutes are over." in text
    code, text = scripts.run("train_tokenizer", command("tokenizer"))
    assert code == 0, text
    assert_same_run(tmp_path, reference, "tokenizer")


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_kills_at_random_moments_with_a_full_disk_and_damage_among_them(scripts, command, tmp_path, stage):
    """Moments are counted in processor time, of which start and steps take as much: they fall anywhere."""
    script = f"train_{stage}"
    settings = [f"{script}.{key}" for key in ("steps=150", "checkpoint_every=3", "log_every=20")]
    argv = command(stage, *settings)
    whole = tmp_path / "whole"
    for earlier in tmp_path.glob("[!w]*"):  # what the stage starts from
        shutil.copytree(earlier, whole / earlier.name)
    assert scripts.run(script, [*argv, "--output", whole])[0] == 0

    def checkpoints():
        return sorted((tmp_path / script / "checkpoints").glob("step-????????"))

    started, said = run_until(scripts, script, argv, lambda _: checkpoints())
    random_moment = random.Random(0)
    for attempt in range(20):
        if attempt == 7:
            code, text = scripts.run(script, argv, file_limit=20_000)
            assert code == 1 and "no checkpoint could be written" in text and "Traceback" not in text, text
        if attempt == 13:
            run_until(scripts, script, argv, lambda _: len(checkpoints()) == 2)
            cut = checkpoints()[-1]
            weights = cut / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1])
        limit = random_moment.uniform(0.1, 1.6) * started
        spent, text = run_until(scripts, script, argv, lambda spent, limit=limit: spent >= limit)
        assert spent >= limit, "the run ended before it could be killed"
        said += text

    code, text = scripts.run(script, argv)
    assert code == 0, text
    assert f"{cut} is damaged" in said + text
    assert_same_run(tmp_path, whole, stage)


def run_until(scripts, script: str, argv: list, when: Callable[[float], object]) -> tuple[float, str]:
    """Runs a script and kills it when the time, in seconds of processor time, has come: these and the output."""
    run = scripts.start(script, argv)
    process, spent = psutil.Process(run.pids[0]), 0.0
    while process.status() != psutil.STATUS_ZOMBIE and not when(spent):
        spent = sum(process.cpu_times()[:2])
        time.sleep(0.005)
    run.kill()
    code, text = run.wait()
    assert code in (0, -signal.SIGKILL) and "Traceback" not in text, text
    return spent, text


# ------------------------------------------------------------------------------------------------ damage


def test_a_damaged_checkpoint_is_passed_over(scripts, command, reference, tmp_path):
    step = stop_at(scripts, command("tokenizer"), "tokenizer", 12)
    folder = newest_checkpoint(tmp_path, "tokenizer")
    leftover = folder.with_name("step-00000099.partial")
    shutil.copytree(folder, leftover)
    (folder / "optimizer.bin").write_bytes((folder / "optimizer.bin").read_bytes()[:1000])
    with open(tmp_path / "train_tokenizer" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')  # cut off by the kill
    before = folder.with_name(f"step-{step - 4:08d}")
    code, text = scripts.run("train_tokenizer", command("tokenizer"))
    assert code == 0, text
    assert f"{folder} is damaged (files are missing or cut off): falling back on the one before." in text
    assert f"Resumed from {before}." in text
    assert not leftover.exists()
    assert_same_run(tmp_path, reference, "tokenizer")


def test_a_damaged_checkpoint_is_written_again_when_its_step_comes(scripts, command, tmp_path):
    step = stop_at(scripts, command("tokenizer"), "tokenizer", 12)
    folder = newest_checkpoint(tmp_path, "tokenizer")
    (folder / "model.safetensors").unlink()
    stop_at(scripts, command("tokenizer"), "tokenizer", step + 4)
    assert (folder / "model.safetensors").is_file() or not folder.exists()


def test_without_a_whole_checkpoint_a_run_starts_anew(scripts, command, reference, tmp_path):
    stop_at(scripts, command("tokenizer"), "tokenizer", 4)
    for path in (tmp_path / "train_tokenizer" / "checkpoints").rglob("model.safetensors"):
        path.write_bytes(b"")
    code, text = scripts.run("train_tokenizer", command("tokenizer"))
    assert code == 0, text
    assert "No whole checkpoint is left: starting anew." in text
    assert_same_run(tmp_path, reference, "tokenizer")


def test_a_checkpoint_that_cannot_be_read_is_named(scripts, command, tmp_path):
    stop_at(scripts, command("tokenizer"), "tokenizer", 4)
    folder = newest_checkpoint(tmp_path, "tokenizer")
    size = (folder / "optimizer.bin").stat().st_size
    (folder / "optimizer.bin").write_bytes(bytes(size))  # of the right size: a failing disk
    code, text = scripts.run("train_tokenizer", command("tokenizer"))
    assert code == 1
    assert f"{folder} cannot be read" in text and "delete it" in text
    assert "Traceback" not in text


def test_a_full_disk_leaves_earlier_checkpoints_whole(scripts, command, reference, tmp_path):
    stop_at(scripts, command("tokenizer"), "tokenizer", 8)
    before = newest_checkpoint(tmp_path, "tokenizer")
    code, text = scripts.run("train_tokenizer", command("tokenizer"), file_limit=4096)
    assert code == 1
    (said,) = [line for line in text.splitlines() if "no checkpoint could be written" in line]
    assert re.match(r"Step \d+: .* MiB are free .*; earlier ones are whole, and the same command goes on", said)
    assert "Traceback" not in text
    assert newest_checkpoint(tmp_path, "tokenizer") == before
    assert not list(before.parent.glob("*.partial"))
    code, text = scripts.run("train_tokenizer", command("tokenizer"))
    assert code == 0 and f"Resumed from {before}." in text
    assert_same_run(tmp_path, reference, "tokenizer")


def test_a_disk_that_fills_while_logging_is_said_in_a_sentence(scripts, command, tmp_path):
    folder = tmp_path / "train_tokenizer"
    folder.mkdir()
    (folder / "metrics.jsonl").mkdir()  # as good as a full disk: it cannot be written
    code, text = scripts.run("train_tokenizer", command("tokenizer"))
    assert code == 1
    assert "metrics.jsonl" in text.splitlines()[-1]
    assert "Traceback" not in text


# ------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(scripts, command, tmp_path, stage):
    stop_at(scripts, command(stage), stage, 8)
    start = newest_step(tmp_path, stage)
    # No step is logged, and every one is saved: the weights explode in the first, which shows in the second.
    every = [f"train_{stage}.{key}" for key in ("lr=1e30", "log_every=100", "checkpoint_every=1")]
    code, text = scripts.run(f"train_{stage}", command(stage, *every))
    assert code == 1
    (said,) = [line for line in text.splitlines() if "not finite" in line]
    term = {"tokenizer": r"loss/\w+", "transformer": "loss"}[stage]
    assert re.match(rf"Step {start + 1}: ({term}|the gradient norm) is not finite\. The last good state is in", said)
    assert "Traceback" not in text
    newest = newest_checkpoint(tmp_path, stage)
    assert newest.name == f"step-{start + 1:08d}"
    assert all(weight.isfinite().all() for weight in load_file(newest / "model.safetensors").values())


# ------------------------------------------------------------------------------------------------ refusals


def test_another_model_is_refused_and_the_run_left_as_it_is(scripts, command, tmp_path):
    stop_at(scripts, command("tokenizer"), "tokenizer", 4)
    kept = (tmp_path / "train_tokenizer" / "config.yaml").read_text()
    code, text = scripts.run("train_tokenizer", command("tokenizer", "tokenizer.hidden_size=32", "data.image_size=24"))
    assert code == 1
    changes = "tokenizer.image_size=16, not 24 and tokenizer.hidden_size=16, not 32"
    assert f"was trained with {changes}: set that back, take another --output, or delete" in text
    assert "Traceback" not in text
    assert (tmp_path / "train_tokenizer" / "config.yaml").read_text() == kept


def test_another_optimizer_is_refused(scripts, command, tmp_path):
    stop_at(scripts, command("tokenizer"), "tokenizer", 4)
    code, text = scripts.run("train_tokenizer", command("tokenizer", "train_tokenizer.optimizer=muon"))
    assert code == 1 and "was trained with train_tokenizer.optimizer=adamw, not muon: set that back" in text


def test_other_images_take_a_flag(scripts, command, tmp_path):
    stop_at(scripts, command("tokenizer"), "tokenizer", 4)
    kept = (tmp_path / "train_tokenizer" / "config.yaml").read_text()
    other = ["data.limit=40", "train_tokenizer.batch_size=4", "train_tokenizer.seed=7"]
    code, text = scripts.run("train_tokenizer", command("tokenizer", *other))
    assert code == 1 and "Traceback" not in text
    for change in ("data.limit=0, not 40", "train_tokenizer.batch_size=8, not 4", "54 images, not 40"):
        assert change in text
    assert (tmp_path / "train_tokenizer" / "config.yaml").read_text() == kept
    code, text = scripts.run("train_tokenizer", command("tokenizer", *other, "--allow-changes"))
    assert code == 0 and "Until step" in text and newest_step(tmp_path, "tokenizer") == STEPS, text


def test_a_run_starts_from_a_trained_tokenizer(scripts, command, reference, tmp_path):
    start = ["train_tokenizer.init_from=" + str(reference / "tokenizer"), "train_tokenizer.lr=1e-9"]
    code, text = scripts.run("train_tokenizer", command("tokenizer", *start, "train_tokenizer.revive_until=0"))
    assert code == 0, text
    weights = [load_file(folder / "tokenizer/diffusion_pytorch_model.safetensors") for folder in (tmp_path, reference)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)
    code, text = scripts.run("train_tokenizer", command("tokenizer", *start, "tokenizer.hidden_size=32"))
    assert code == 1
    said = f"The SpectralTokenizer in {reference}/tokenizer has hidden_size=16, other than this run: set the same."
    assert said in text


def test_a_run_starts_from_a_trained_transformer(scripts, command, reference, tmp_path):
    folder = reference / "pipeline" / "transformer"
    start = [f"train_transformer.init_from={folder}", "train_transformer.lr=1e-9"]
    code, text = scripts.run("train_transformer", command("transformer", *start))
    assert code == 0, text
    files = (place / "pipeline/transformer/diffusion_pytorch_model.safetensors" for place in (tmp_path, reference))
    torch.testing.assert_close(*map(load_file, files), rtol=1e-3, atol=1e-5)
    code, text = scripts.run("train_transformer", command("transformer", *start, "transformer.hidden_size=32"))
    assert code == 1 and "has hidden_size=16, other than this run: set the same." in text, text
    code, text = scripts.run("train_transformer", command("transformer", f"train_transformer.init_from={tmp_path}"))
    assert code == 1 and f"there is no SpectralARTransformer in {tmp_path}" in text and "Traceback" not in text, text


def test_other_settings_of_the_training_itself_may_change(scripts, command, tmp_path):
    stop_at(scripts, command("tokenizer"), "tokenizer", 4)
    settings = ["train_tokenizer.lr=1e-5", "train_tokenizer.steps=26"]
    code, text = scripts.run("train_tokenizer", command("tokenizer", *settings))
    assert code == 0, text
    assert newest_checkpoint(tmp_path, "tokenizer").name == "step-00000026"
    assert "train_tokenizer.lr=0.001, not 1e-05 and train_tokenizer.steps=24, not 26." in text
    assert (tmp_path / "train_tokenizer" / "config.yaml").exists()
    (before,) = (tmp_path / "train_tokenizer").glob("config-until-*.yaml")
    assert "lr: 0.001" in before.read_text()
    assert max(line["lr"] for line in metrics(tmp_path, "tokenizer") if line["step"] > 20 and "lr" in line) <= 1e-5


def test_a_transformer_is_not_continued_on_codes_of_another_tokenizer(scripts, command, tmp_path):
    argv = command("transformer", "train_transformer.codes=on-the-fly")
    stop_at(scripts, argv, "transformer", 4)
    tokenizer = SpectralTokenizer.from_pretrained(tmp_path / "tokenizer")
    with torch.no_grad():
        tokenizer.queries += 0.1
    tokenizer.half().save_pretrained(tmp_path / "tokenizer")
    code, text = scripts.run("train_transformer", [*argv[:3], "train_transformer.codes=on-the-fly"])
    assert code == 1
    assert "was trained with another tokenizer than the one that is beside it now" in text
    assert f"or delete {tmp_path}/train_transformer to train this stage anew" in text


def test_a_second_run_in_the_same_folder_is_refused(scripts, command, reference, tmp_path):
    first = scripts.start("train_tokenizer", command("tokenizer"))
    wait_for(tmp_path / "train_tokenizer" / "checkpoints" / "step-00000004")
    os.kill(first.pids[0], signal.SIGSTOP)
    code, text = scripts.run("train_tokenizer", command("tokenizer"))
    assert code == 1
    assert text.splitlines()[-1].startswith(f"Another run works in {tmp_path}/train_tokenizer: wait for its end")
    os.kill(first.pids[0], signal.SIGCONT)
    assert first.wait()[0] == 0
    assert_same_run(tmp_path, reference, "tokenizer")


@pytest.mark.parametrize(
    "script, options, said",
    [
        ("train_tokenizer", ["data.source=/no/such/folder"], "data.source='/no/such/folder' does not exist"),
        ("train_tokenizer", ["train_tokenizer.batch_size=64"], "There are 54 images, fewer than one batch of 64"),
        ("encode_dataset", [], "There is no trained tokenizer in"),
        ("train_transformer", [], "There is no trained tokenizer in"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(scripts, preset, tmp_path, script, options, said):
    code, text = scripts.run(script, [preset, "--output", tmp_path, *options])
    assert code == 1
    assert said in text.splitlines()[-1]
    assert "Traceback" not in text
