"""What the machine does not allow is said at the start, or where it happens, in one sentence."""

import io
import os
import sys
from pathlib import Path

import datasets
import pytest

from tests.train.data.test_sources import write_folders, write_parquet
from train.configs.config import DataConfig
from train.data.decoding import pack_folder
from train.data.images import load_images
from train.runs.command_line import clear_errors, parse_arguments


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_arguments("", ["fashion-mnist-32", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.split("error: ")[1]


def test_an_output_that_cannot_be_written_is_said_first(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    run = str(tmp_path / "file" / "run")
    said = f"--output {run} cannot be made, since {tmp_path}/file is no folder: give another one."
    assert refusal(capsys, "--output", run) == said + "\n"
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    run = str(tmp_path / "new" / "run")
    said = f"--output {run} cannot be written, since {tmp_path} may not be: give another folder."
    assert refusal(capsys, "--output", run) == said + "\n"
    parse_arguments("", ["fashion-mnist-32", "--output", run, "--dry-run"])  # which writes nothing
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_no_utf8_can_be_printed(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    with clear_errors():
        print("runs/caf\udce9")
    out.flush()
    assert out.buffer.getvalue() == b"runs/caf\\udce9\n"


def test_without_a_home_images_are_kept_where_temporary_files_are(tmp_path, monkeypatch):
    for name in ("SPECTRALAR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", os.fspath)  # as where no account has the user's number
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = pack_folder(DataConfig(source="x"), "train", "1")
    assert folder.parent == tmp_path / f"spectralar-{os.getuid()}"


def test_a_home_that_may_not_be_written_costs_the_cache_alone(tmp_path, monkeypatch, caplog):
    (tmp_path / "home").write_text("")  # no folder: not even root may write there
    for name in ("SPECTRALAR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_folders(tmp_path / "X", {"cat": 3})
    data = load_images(DataConfig(source=str(tmp_path / "X"), image_size=8, eval_split="train"), "train")
    assert len(data) == 2
    assert "so each run decodes them anew: set data.cache to another folder." in caplog.text


def test_datasets_that_may_not_write_says_where(tmp_path, monkeypatch):
    write_parquet(tmp_path / "X" / "a.parquet", [1, 2, 3], [0, 0, 0], datasets.ClassLabel(names=["oak"]))

    def load_dataset(*arguments, **options):
        raise PermissionError(13, "Permission denied", "/home/somebody/.cache/huggingface")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="PermissionError: .*Permission denied.*variable HF_DATASETS_CACHE"):
        load_images(DataConfig(source=str(tmp_path / "X"), image_size=8, cache=str(tmp_path / "cache")), "train")


def test_a_home_that_does_not_exist_is_a_source_that_does_not(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.source='~nobody-here/x' does not exist"):
        load_images(DataConfig(source="~nobody-here/x", cache=str(tmp_path)), "train")
