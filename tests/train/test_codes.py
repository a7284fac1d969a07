"""Stored codes: what goes in comes out, nothing foreign, damaged or outdated does, and encoding resumes."""

import hashlib
import json
import time

import pytest
import torch
from safetensors.torch import load_file

from spectralar import SpectralTokenizer
from tests.helpers import tiny_tokenizer, tiny_transformer
from train import encode_dataset
from train.codes import fingerprint, read_shards, shard_identity, write_shard
from train.config import load_config
from train.data import load_images, to_float
from train.encode_dataset import encode_images, encode_split, wanted_shards

WANTED = {f"train-{copy:03d}.safetensors": {"tokenizer": "0123456789abcdef", "seed": str(copy)} for copy in range(2)}


@pytest.fixture
def shards(tmp_path):
    """Codes of five images in two copies, written to tmp_path: (codes (2, 5, 4), labels (5,))."""
    codes, labels = torch.randint(100_000, (2, 5, 4)), torch.tensor([0, 1, 1, 0, 2])
    for (name, identity), copy in zip(WANTED.items(), codes, strict=True):
        write_shard(tmp_path / name, copy, labels, {**identity, "class_names": '["a", "ü", "c"]'})
    return codes, labels


def test_shards_come_back_as_they_were(shards, tmp_path):
    stored = read_shards(tmp_path, WANTED)
    assert torch.equal(stored.codes.long(), shards[0])
    assert torch.equal(stored.labels, shards[1]) and stored.labels.dtype == torch.int64
    assert stored.class_names == ["a", "ü", "c"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(WANTED)


@pytest.mark.parametrize("key, value, said", [
    ("tokenizer", "fedcba9876543210", "codes of another tokenizer (0123456789ab, this one is fedcba987654)"),
    ("seed", "7", "was made with seed=1, not 7"),
    ("data", "{}", "was made with data=None, not {}"),
])  # fmt: skip
def test_foreign_and_outdated_codes_are_refused(shards, tmp_path, key, value, said):
    wanted = {name: dict(identity) for name, identity in WANTED.items()}
    wanted["train-001.safetensors"][key] = value
    with pytest.raises(ValueError) as refused:
        read_shards(tmp_path, wanted)
    assert str(refused.value).startswith(str(tmp_path / "train-001.safetensors"))
    assert said in str(refused.value)
    assert str(refused.value).endswith(": run train.encode_dataset again.")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_damaged_shard_is_named(shards, tmp_path, size):
    path = tmp_path / "train-001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert shard_identity(path) is None
    with pytest.raises(ValueError, match="train-001.safetensors is damaged: run train.encode_dataset again."):
        read_shards(tmp_path, WANTED)


def test_a_missing_shard_is_named(shards, tmp_path):
    (tmp_path / "train-001.safetensors").unlink()
    with pytest.raises(ValueError, match="There are no codes in .*train-001.safetensors: run train.encode_dataset"):
        read_shards(tmp_path, WANTED)


def test_copies_of_other_images_are_refused(shards, tmp_path):
    name, identity = list(WANTED.items())[1]
    write_shard(tmp_path / name, shards[0][1], shards[1].flip(0), {**identity, "class_names": "[]"})
    with pytest.raises(ValueError, match="other images"):
        read_shards(tmp_path, WANTED)


def test_fingerprint_is_of_shape_and_half_precision_weights():
    tokenizer = tiny_tokenizer().half().float()
    own = fingerprint(tokenizer)
    assert own == fingerprint(tokenizer.half()) == fingerprint(tiny_tokenizer())
    assert own != fingerprint(tiny_tokenizer(alpha=2.0))  # the same weights
    assert own != fingerprint(tiny_tokenizer(cutoffs=[16] * 12))
    for name, parameter in tokenizer.named_parameters():
        before = parameter.data.clone()
        parameter.data.view(-1)[-1] += 0.01
        assert fingerprint(tokenizer) != own, name
        parameter.data.copy_(before)
    assert fingerprint(tokenizer) == own
    assert fingerprint(tiny_transformer()) == fingerprint(tiny_transformer()) != fingerprint(tiny_transformer(seed=1))


def test_a_model_saved_before_there_were_some_settings_keeps_its_fingerprint(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fsq_levels"], config["cutoffs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fingerprint(SpectralTokenizer.from_pretrained(tmp_path)) == fingerprint(tokenizer)
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k[0] != "_"}, sort_keys=True).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + value.half().numpy().tobytes())
    assert fingerprint(tokenizer) == digest.hexdigest()


def test_images_are_encoded_in_order_and_augmented_by_seed():
    tokenizer = tiny_tokenizer()
    images = torch.randint(256, (300, 1, 16, 16), dtype=torch.uint8)  # more than a batch
    codes = encode_images(tokenizer, images, [], 0)
    assert codes.dtype == torch.int32
    assert torch.equal(codes.long(), torch.cat([tokenizer.encode(to_float(x)) for x in images.split(256)]))
    shifted = [encode_images(tokenizer, images, ["shift"], seed) for seed in (1, 1, 2)]
    assert torch.equal(shifted[0], shifted[1])
    assert not torch.equal(shifted[0], shifted[2]) and not torch.equal(shifted[0], codes)


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
