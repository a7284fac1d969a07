"""Stage 1 with each quantizer: what it saves, and that a stopped run goes on exactly."""

import pytest
import torch

from spectralar import SpectralTokenizer
from tests.train.run_folders import assert_same_run, metrics, training_state

GRID = ["tokenizer.fsq_levels=[4,4,3]", "tokenizer.codebook_size=48", "tokenizer.codebook_dim=3"]
SETTINGS = [f"train_tokenizer.{key}" for key in ("steps=8", "checkpoint_every=2", "log_every=2")]


@pytest.mark.parametrize("options, config", [
    (GRID, {"fsq_levels": [4, 4, 3], "codebook_sizes": None}),
    (["tokenizer.codebook_sizes=[4]"], {"fsq_levels": None, "codebook_sizes": [4, 8, 16, 32]}),
    (["train_tokenizer.rotation_trick=true"], {"fsq_levels": None, "codebook_sizes": None}),
])  # fmt: skip
def test_it_trains_resumes_and_is_recorded(scripts, preset, tmp_path, options, config):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    argv = [preset, *SETTINGS, *options, "--output"]
    for output, *more in ((whole,), (halves, "--max-minutes", "0"), (halves,)):
        code, text = scripts.run("train_tokenizer", [*argv, output, *more])
        assert code == 0, text
    assert_same_run(halves, whole, "tokenizer")
    lines = [line for line in metrics(whole, "tokenizer") if "lr" in line]
    assert lines[-1]["loss/full"] < lines[0]["loss/full"]
    tokenizer = SpectralTokenizer.from_pretrained(whole / "tokenizer")
    assert {key: tokenizer.config[key] for key in config} == config
    code, text = scripts.run("encode_dataset", [*argv, whole])
    assert code == 0, text


def test_the_rotation_trick_is_another_gradient(scripts, preset, tmp_path):
    losses, weights = [], []
    for trick in ("false", "true"):
        output = tmp_path / trick
        argv = [preset, "--output", output, *SETTINGS, f"train_tokenizer.rotation_trick={trick}"]
        assert scripts.run("train_tokenizer", argv)[0] == 0
        losses.append([line["loss/full"] for line in metrics(output, "tokenizer") if "lr" in line])
        weights.append(training_state(output, "tokenizer")["weights"]["to_latent.weight"])
    assert losses[0][:2] == losses[1][:2]  # nothing is quantized yet
    assert not torch.equal(*weights)


@pytest.mark.parametrize("options, said", [
    (["tokenizer.fsq_levels=[4,4]"], "fsq_levels [4, 4] need codebook_size 16 and codebook_dim 2."),
    ([*GRID, "tokenizer.codebook_sizes=[2]"], "set one."),
    (["tokenizer.codebook_sizes=[4,8]"], "codebook_sizes needs one size for each of the 4 tokens, or the first"),
    ([*GRID, "train_tokenizer.rotation_trick=true"], "train_tokenizer.rotation_trick turns gradients onto"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(scripts, preset, tmp_path, options, said):
    code, text = scripts.run("train_tokenizer", [preset, "--output", tmp_path, *options])
    assert code != 0
    assert said in text.splitlines()[-1]
    assert "Traceback" not in text
