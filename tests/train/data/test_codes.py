"""Stored codes: what goes in comes out, nothing foreign, damaged or outdated does, and encoding resumes."""

import hashlib
import json

import pytest
import torch

from spectralar import SpectralTokenizer
from tests.helpers import tiny_tokenizer, tiny_transformer
from train.data.codes import DECODER, fingerprint, read_shards, shard_identity, write_shard

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


@pytest.mark.parametrize("shape", [{}, {"spectral_shortcut": True, "encoder_layers": 0}], ids=["plain", "shortcut"])
def test_fingerprint_is_of_shape_and_half_precision_weights_that_make_codes(shape):
    tokenizer = tiny_tokenizer(**shape).half().float()
    own = fingerprint(tokenizer)
    assert own == fingerprint(tokenizer.half()) == fingerprint(tiny_tokenizer(**shape))
    assert own != fingerprint(tiny_tokenizer(**shape, alpha=2.0))  # the same weights
    assert own != fingerprint(tiny_tokenizer(**shape, cutoffs=[16] * 12))
    images = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(images)
    for name, value in tokenizer.state_dict().items():
        before = value.clone()
        value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
        moved = not torch.equal(tokenizer.encode(images), codes)
        assert (fingerprint(tokenizer) != own) == moved, name
        value.copy_(before)
    assert fingerprint(tokenizer) == own
    whole = fingerprint(tokenizer, decoder=True)
    with torch.no_grad():
        tokenizer.to_pixels.bias.add_(1)
    assert fingerprint(tokenizer) == own and fingerprint(tokenizer, decoder=True) != whole
    assert fingerprint(tiny_transformer()) == fingerprint(tiny_transformer()) != fingerprint(tiny_transformer(seed=1))


def test_a_model_saved_before_there_were_some_settings_keeps_its_fingerprint(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fsq_levels"], config["cutoffs"], config["spectral_shortcut"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fingerprint(SpectralTokenizer.from_pretrained(tmp_path)) == fingerprint(tokenizer)
    digest = hashlib.sha256(json.dumps({k: v for k, v in config.items() if k[0] != "_"}, sort_keys=True).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        if not name.startswith(DECODER):
            digest.update(name.encode() + value.half().numpy().tobytes())
    assert fingerprint(tokenizer) == digest.hexdigest()
