"""Encoding a data set: resumed, shared by processes, made anew when it must be."""

import time

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import tiny_tokenizer
from train import encode_dataset
from train.configs.reading import load_config
from train.data.codes import read_shards, shard_identity
from train.data.encoding import wanted_shards
from train.data.images import load_images, to_float
from train.encode_dataset import encode_split


def contents(folder) -> dict:
    """What is in the files of a folder of shards. (Their bytes vary: safetensors writes metadata in any order.)"""
    return {
        path.name: (shard_identity(path), {name: value.tolist() for name, value in load_file(path).items()})
        for path in folder.iterdir()
    }


def test_encoding_resumes_and_keeps_what_is_right(preset, tmp_path, capsys):
    config, tokenizer = load_config(str(preset)), tiny_tokenizer()
    encode_split(tokenizer, config, "train", tmp_path)
    encode_split(tokenizer, config, "eval", tmp_path)
    whole = contents(tmp_path)
    assert sorted(whole) == ["eval-000.safetensors", "train-000.safetensors", "train-001.safetensors"]
    data = load_images(config.data, "train")
    stored = read_shards(tmp_path, wanted_shards(config, "train", tokenizer))
    assert torch.equal(stored.labels, data.labels) and stored.class_names == data.class_names
    assert torch.equal(stored.codes[0].long(), tokenizer.encode(to_float(data.images)))
    assert not torch.equal(stored.codes[1], stored.codes[0])

    # A kill in the middle of the second copy, and damaged codes of the other split.
    (tmp_path / "train-001.safetensors").rename(tmp_path / "train-001.partial")
    (tmp_path / "train-007.partial").write_bytes(b"of a copy that is not wanted any more")
    damaged = tmp_path / "eval-000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    for split in ("train", "eval"):
        encode_split(tokenizer, config, split, tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert [line.endswith("is there already.") for line in said] == [True, False, False]
    assert contents(tmp_path) == whole

    config.train_transformer.copies = 1
    encode_split(tokenizer, config, "train", tmp_path)
    assert sorted(contents(tmp_path)) == ["eval-000.safetensors", "train-000.safetensors"]


def test_codes_are_made_anew_for_another_tokenizer_or_other_data(preset, tmp_path):
    config = load_config(str(preset))
    encode_split(tiny_tokenizer(), config, "train", tmp_path)
    for other, limit in ((tiny_tokenizer(seed=1), 0), (tiny_tokenizer(seed=1), 20)):
        config.data.limit = limit
        with pytest.raises(ValueError, match="run train.encode_dataset again"):
            read_shards(tmp_path, wanted_shards(config, "train", other))
        encode_split(other, config, "train", tmp_path)
        assert len(read_shards(tmp_path, wanted_shards(config, "train", other)).labels) == (limit or 54)


def test_processes_share_the_copies(preset, tmp_path):
    config, tokenizer = load_config(str(preset), ["train_transformer.copies=3"]), tiny_tokenizer()
    encode_split(tokenizer, config, "train", tmp_path / "one")
    for rank in (1, 0):
        encode_split(tokenizer, config, "train", tmp_path / "two", rank, 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 3


def test_large_sets_are_cut_into_shards_that_processes_share(preset, tmp_path, monkeypatch, capsys):
    config, tokenizer = load_config(str(preset)), tiny_tokenizer()
    encode_split(tokenizer, config, "train", tmp_path / "whole")
    whole = read_shards(tmp_path / "whole", wanted_shards(config, "train", tokenizer))
    monkeypatch.setattr(encode_dataset, "SHARD", 20)
    for rank in (1, 0):
        encode_split(tokenizer, config, "train", tmp_path / "cut", rank, 2)
    names = [f"train-{copy:03d}{part}.safetensors" for copy in range(2) for part in ("", "-00000020", "-00000040")]
    assert sorted(contents(tmp_path / "cut")) == sorted(names)
    cut = read_shards(tmp_path / "cut", wanted_shards(config, "train", tokenizer))
    assert torch.equal(cut.codes[0], whole.codes[0]) and torch.equal(cut.labels, whole.labels)
    assert torch.equal(cut.codes[1, :20], whole.codes[1, :20])  # as augmented as before
    assert not torch.equal(cut.codes[1], cut.codes[0])
    (tmp_path / "cut" / names[1]).unlink()
    with pytest.raises(ValueError, match=f"There are no codes in .*{names[1]}"):
        read_shards(tmp_path / "cut", wanted_shards(config, "train", tokenizer))
    capsys.readouterr()
    encode_split(tokenizer, config, "train", tmp_path / "cut")
    said = capsys.readouterr().out.splitlines()
    assert [line.endswith("is there already.") for line in said] == [True, False, True, True, True, True]
    again = read_shards(tmp_path / "cut", wanted_shards(config, "train", tokenizer))
    assert torch.equal(again.codes, cut.codes)


def test_encoding_stops_in_time_and_goes_on(preset, tmp_path):
    config, tokenizer = load_config(str(preset)), tiny_tokenizer()
    assert not encode_split(tokenizer, config, "train", tmp_path, deadline=time.monotonic() - 1)
    assert not list(tmp_path.iterdir())
    assert encode_split(tokenizer, config, "train", tmp_path, deadline=time.monotonic() + 100)
    assert encode_split(tokenizer, config, "train", tmp_path, deadline=time.monotonic() - 1)  # all there
