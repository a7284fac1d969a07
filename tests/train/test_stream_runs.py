"""Training runs on streamed Parquet: resumption, two processes, codes, and how a run ends that cannot read on."""

import shutil

import numpy as np
import pytest
import yaml

from tests.train.conftest import PRESET
from tests.train.data.test_streams import SHARDS, WINDOW, N, wait_until, write_shard
from tests.train.run_folders import assert_same_run, assert_same_up_to_rounding, stop_at


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """Path of a preset that streams 45 waves, across or down, in windows of 16: an epoch is 5 steps of 8."""
    folder, random = tmp_path_factory.mktemp("stream"), np.random.default_rng(0)
    greys = [int(grey) for grey in random.integers(0, 256, N)]
    start = 0
    for number, groups in enumerate(SHARDS):
        write_shard(folder / f"pictures-{number}.parquet", greys[start : start + sum(groups)], groups)
        start += sum(groups)
    data = {**PRESET["data"], "source": f"{folder}/*.parquet", "decode": "stream", "window": WINDOW,
            "eval_split": "train"}  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**PRESET, "data": data}))
    return folder / "tiny.yaml"


ON_THE_FLY = ["train_transformer.codes=on-the-fly", "transformer.dropout=0"]


@pytest.fixture(scope="module")
def reference(scripts, preset, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference")
    for script in ("train_tokenizer", "encode_dataset", "train_transformer"):
        code, text = scripts.run(script, [preset, "--output", output, *ON_THE_FLY])
        assert code == 0, text
    return output


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_killed_run_goes_on_to_the_same_weights(scripts, preset, reference, tmp_path, stage):
    shutil.copytree(reference / "tokenizer", tmp_path / "tokenizer")
    argv = [preset, "--output", tmp_path, *ON_THE_FLY]
    stop_at(scripts, argv, stage, 8)  # in the middle of an epoch and of a window
    code, text = scripts.run(f"train_{stage}", argv)
    assert code == 0 and "Resumed from" in text, text
    assert_same_run(tmp_path, reference, stage)


def test_two_processes_train_as_one(scripts, preset, reference, tmp_path):
    code, text = scripts.run("train_tokenizer", [preset, "--output", tmp_path], processes=2)
    assert code == 0, text
    assert_same_up_to_rounding(tmp_path, reference, "tokenizer")


def test_codes_of_a_stream_are_those_of_a_download(scripts, preset, reference, tmp_path):
    shutil.copytree(reference / "tokenizer", tmp_path / "tokenizer")
    code, text = scripts.run("encode_dataset", [preset, "--output", tmp_path, "data.decode=on-the-fly"])
    assert code == 0, text
    names = sorted(path.name for path in (reference / "codes").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "codes").iterdir()) and len(names) == 3
    for name in names:
        assert (tmp_path / "codes" / name).read_bytes() == (reference / "codes" / name).read_bytes()


def test_what_ends_a_stream_is_said_in_a_sentence(scripts, preset, tmp_path):
    for path in preset.parent.glob("*.parquet"):
        shutil.copy(path, tmp_path)
    argv = [preset, "--output", tmp_path / "run", f"data.source={tmp_path}/*.parquet", "train_tokenizer.steps=100000"]
    run = scripts.start("train_tokenizer", argv)
    wait_until((tmp_path / "run" / "train_tokenizer" / "checkpoints" / "step-00000004").exists)
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    code, text = run.wait()
    assert code == 1 and "Traceback" not in text
    assert "cannot be read: FileNotFoundError" in text and "the same command goes on" in text
