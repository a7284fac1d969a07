"""The parts of training that need no run: schedule, optimiser, losses, prefix lengths, clock, command line."""

import itertools
from dataclasses import fields, is_dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train.configs.config import Config, StageConfig, TokenizerStage
from train.data.images import ImageSet
from train.data.order import step_indices
from train.runs import checkpoints, clock, engine
from train.runs.checkpoints import publish, read_manifest
from train.runs.clock import StepClock
from train.runs.command_line import parse_arguments
from train.runs.engine import Run, learning_rate, make_ema

# ------------------------------------------------------------------------------------------------ optimisation


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    stage = StageConfig(lr=2.0, min_lr_ratio=0.1, warmup_steps=10, steps=111)
    rates = [learning_rate(step, stage) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)  # half way: the mean of first and last
    assert rates[35] == pytest.approx(0.2 + 1.8 * (1 + np.sqrt(0.5)) / 2)
    assert rates[110] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 5), (5, 5), (10, 5)])
def test_learning_rate_of_short_runs(warmup, steps):
    stage = StageConfig(lr=1.0, min_lr_ratio=0.0, warmup_steps=warmup, steps=steps)
    rates = [learning_rate(step, stage) for step in range(steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert max(rates) == pytest.approx(1.0 if warmup <= steps else steps / warmup)


@torch.no_grad()
def test_decay_of_the_averaged_weights_rises_to_its_setting():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema, expected = make_ema([weight], 0.5), 0.0
    for step in range(1, 20):
        weight.fill_(step**2)
        ema.step([weight])
        decay = 0 if step == 1 else min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * step**2
        assert ema.shadow_params[0].item() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("processes, accumulation", [(1, 1), (2, 1), (1, 4), (2, 3)])
def test_slices_of_a_step_make_up_its_batch_and_an_epoch_takes_each_image_once(processes, accumulation):
    n, batch = 50, 12
    data = ImageSet(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), ["a"], 0)
    stage = StageConfig(batch_size=batch, grad_accumulation=accumulation)
    seen = []
    for step in range(n // batch):
        slices = {}
        for rank in range(processes):
            micro_batch = batch // (processes * accumulation)
            process = SimpleNamespace(process_index=rank)
            run = SimpleNamespace(stage=stage, micro_batch=micro_batch, accelerator=process)
            for chosen, slot, slots in Run.micro_batches(run, data, step):
                slices[slot] = chosen
                assert slots == processes * accumulation
        assert sorted(slices) == list(range(processes * accumulation))
        whole = torch.cat([slices[slot] for slot in sorted(slices)])
        assert torch.equal(whole, step_indices(n, batch, stage.seed, step))
        seen += whole.tolist()
    assert len(seen) == len(set(seen)) == 48


def test_images_read_ahead_are_those_of_the_slices_each_once_an_epoch():
    n, batch = 50, 12
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    data = ImageSet(images, torch.zeros(n, dtype=torch.long), ["a"], 0)
    runs = []
    for rank in range(2):
        run = SimpleNamespace(stage=StageConfig(batch_size=batch, grad_accumulation=2), micro_batch=3)
        run.accelerator = SimpleNamespace(process_index=rank, device=torch.device("cpu"))
        run.micro_batches = partial(Run.micro_batches, run)
        runs.append((run, Run.prefetch(run, data)))
    seen = []
    for step in range(n // batch):
        for run, fetch in runs:
            for chosen, slot, _ in run.micro_batches(data, step):
                assert fetch(step)[slot][:, 0, 0, 0].tolist() == chosen.tolist()
                seen += chosen.tolist()
    assert len(seen) == len(set(seen)) == 48


def test_clock_leaves_out_pauses_and_tells_data_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    steps = StepClock()
    for _ in range(2):
        with steps.data():
            now[0] += 1
        now[0] += 3
    with steps.pause():
        now[0] += 100
    assert steps.read() == (8.0, 0.25)
    now[0] += 2
    assert steps.read() == (2.0, 0.0)


@pytest.mark.parametrize("kind", engine.SHARDED)
def test_sharded_training_is_refused(kind, monkeypatch, tmp_path):
    accelerator = SimpleNamespace(distributed_type=kind, is_main_process=True, device=torch.device("cpu"))
    monkeypatch.setattr(engine, "make_accelerator", lambda **options: accelerator)
    args, config = parse_arguments("", ["fashion-mnist-32", "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=rf"^{kind.value} is not supported.*: launch with plain data parallelism"):
        Run("tokenizer", config, config.train_tokenizer, args)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["fashion-mnist-32", "train_tokenizer.lrr=1"], "did you mean train_tokenizer.lr?"),
        (["fashion-mnist-32", "train_tokenizer.lr=fast"], "train_tokenizer.lr, which takes float"),
        (["fashion-mnist-32", "train_tokenizer.steps=0"], "train_tokenizer.steps must be above 0, not 0."),
        (["no-such-preset"], "There is no preset 'no-such-preset'"),
        (["fashion-mnist-32", "--max-minutes", "nan"], "invalid number of minutes value: 'nan'"),
        (["fashion-mnist-32", "--output", __file__], "is no folder: give another one."),
    ],
)
def test_a_wrong_command_line_is_answered_in_a_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments("", arguments)
    assert stopped.value.code == 2
    usage, error = capsys.readouterr().err.split("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_overrides_and_options_mix(tmp_path):
    arguments = ["fashion-mnist-32", "train_tokenizer.lr=0.5", "--output", str(tmp_path), "data.limit=3"]
    args, config = parse_arguments("", arguments)
    assert (config.train_tokenizer.lr, config.data.limit, args.output) == (0.5, 3, tmp_path)


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments("What it is for.", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "What it is for." in text
    sections = [item for item in fields(Config) if is_dataclass(item.type)]
    for section in sections:
        for item in fields(section.type):
            (line,) = [line for line in text.splitlines() if line.startswith(f"  {section.name}.{item.name}=")]
            assert len(line.split("  ", 2)[2]) > 3, f"{section.name}.{item.name} has no comment in config.py"
    assert f"train_tokenizer.revive_until={TokenizerStage.revive_until}  fraction of the steps" in text
    assert "train_tokenizer.lr=0.001  peak learning rate" in text  # inherited


# ------------------------------------------------------------------------------------------------ files


def write_files(folder, text):
    folder.mkdir()
    (folder / "a").write_text(text)


def test_publish_replaces_a_folder_whole(tmp_path):
    for name in ("model.partial", "model.old"):  # of a run that was killed while it published
        write_files(tmp_path / name, "leftover")
    for text in ("first", "second"):
        publish(tmp_path / "model", lambda folder, text=text: write_files(folder, text))
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert (tmp_path / "model" / "a").read_text() == text


def test_publish_keeps_what_was_there_if_the_new_cannot_be_written(tmp_path):
    def fail(folder):
        write_files(folder, "half")
        raise OSError(28, "No space left on device")

    publish(tmp_path / "model", lambda folder: write_files(folder, "whole"))
    with pytest.raises(OSError):
        publish(tmp_path / "model", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "whole"


def test_a_manifest_tells_whether_all_files_are_whole(tmp_path):
    (tmp_path / "a").write_text("12345")
    manifest = {"step": 3, "sizes": {"a": 5}}
    path = tmp_path / "manifest.json"
    path.write_text(checkpoints.json.dumps(manifest))
    assert read_manifest(tmp_path) == manifest
    whole = path.read_text()
    for spoil in (
        lambda: (tmp_path / "a").write_text("1234"),
        lambda: (tmp_path / "a").unlink(),
        lambda: path.write_text(whole[:-3]),
        lambda: path.write_text("{}"),
        lambda: path.unlink(),
    ):
        spoil()
        assert read_manifest(tmp_path) is None
        (tmp_path / "a").write_text("12345")
        path.write_text(whole)
