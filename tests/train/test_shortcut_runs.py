"""Stage 1 with a spectral shortcut: fitted once, resumed exactly, and codes that stay while its decoder learns."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from spectralar import SpectralARPipeline, SpectralTokenizer
from tests.train.run_folders import assert_same_run, assert_same_up_to_rounding, newest_checkpoint

SETTINGS = [
    *(f"train_tokenizer.{key}" for key in ("steps=8", "checkpoint_every=2", "log_every=2", "eval_every=8")),
    "tokenizer.spectral_shortcut=true", "tokenizer.alpha=0.5",
]  # fmt: skip
ALONE = "tokenizer.encoder_layers=0"


@pytest.fixture(scope="module")
def reference(scripts, preset, tmp_path_factory):
    """Folder of a whole run of a shortcut without a network in the encoder."""
    output = tmp_path_factory.mktemp("alone")
    code, text = scripts.run("train_tokenizer", [preset, *SETTINGS, ALONE, "--output", output])
    assert code == 0, text
    return output


def test_a_stopped_run_is_not_fitted_again_and_goes_on_exactly(scripts, preset, reference, tmp_path):
    argv = [preset, *SETTINGS, ALONE, "--output", tmp_path]
    code, text = scripts.run("train_tokenizer", [*argv, "--max-minutes", "0"])
    assert code == 0, text
    assert "fitting the spectral shortcut" in text
    code, text = scripts.run("train_tokenizer", argv)
    assert code == 0, text
    assert "fitting the spectral shortcut" not in text
    assert_same_run(tmp_path, reference, "tokenizer")


def test_a_network_in_the_encoder_learns_beside_it(scripts, preset, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for output, *more in ((whole,), (halves, "--max-minutes", "0"), (halves,)):
        code, text = scripts.run("train_tokenizer", [preset, *SETTINGS, "--output", output, *more])
        assert code == 0, text
    assert_same_run(halves, whole, "tokenizer")
    tokenizer = SpectralTokenizer.from_pretrained(whole / "tokenizer")
    assert tokenizer.to_latent.weight.abs().max() > 0  # it began as nothing


def test_the_decoder_learns_and_the_codes_stay(scripts, preset, reference, tmp_path):
    done = SpectralTokenizer.from_pretrained(reference / "tokenizer", dtype=torch.float32)
    early = SpectralTokenizer.from_config(done.config)
    oldest = min(newest_checkpoint(reference, "tokenizer").parent.glob("step-*"))
    early.load_state_dict(load_file(oldest / "model.safetensors"))
    images = torch.rand(32, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(done.encode(images), early.encode(images))
    assert not torch.equal(done.to_pixels.weight, early.to_pixels.weight)
    # Trained on from the finished one, at its own half precision.
    more = [preset, *SETTINGS, ALONE, f"train_tokenizer.init_from={reference / 'tokenizer'}", "--output", tmp_path]
    code, text = scripts.run("train_tokenizer", more)
    assert code == 0, text
    assert "fitting" not in text
    further = SpectralTokenizer.from_pretrained(tmp_path / "tokenizer", dtype=torch.float32)
    assert torch.equal(further.encode(images), done.encode(images))
    assert not torch.equal(further.to_pixels.weight, done.to_pixels.weight)


def test_two_processes_train_as_one(scripts, preset, reference, tmp_path):
    code, text = scripts.run("train_tokenizer", [preset, *SETTINGS, ALONE, "--output", tmp_path], processes=2)
    assert code == 0, text
    assert text.count("fitting the spectral shortcut:   0%") == 1  # one says so
    assert_same_up_to_rounding(tmp_path, reference, "tokenizer")


@pytest.mark.parametrize("options, said", [
    ([ALONE], "encoder_layers must be at least 1 without spectral_shortcut."),
    ([*SETTINGS, "tokenizer.codebook_sizes=[4]"], "spectral_shortcut needs a plain codebook"),
    (["transformer.decoder_feedback=true"], "decoder_feedback needs transformer.codebook_dim and tokenizer.spec"),
    ([*SETTINGS, "tokenizer.codebook_dim=1"], "a spectral shortcut needs codebook_dim of at least 2, got 1."),
])  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(scripts, preset, tmp_path, options, said):
    code, text = scripts.run("train_tokenizer", [preset, "--output", tmp_path, *options])
    assert code != 0
    assert said in text.splitlines()[-1]
    assert "Traceback" not in text


LISTENS = [
    *(f"train_transformer.{key}" for key in ("steps=6", "checkpoint_every=2", "log_every=1", "eval_every=3")),
    "train_transformer.codes=on-the-fly", "transformer.codebook_dim=4", "transformer.decoder_feedback=true",
]  # fmt: skip


def test_stage_2_listens_to_the_decoder_and_goes_on_exactly(scripts, preset, reference, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for output, *more in ((whole,), (halves, "--max-minutes", "0"), (halves,)):
        shutil.copytree(reference / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
        argv = [preset, *SETTINGS, ALONE, *LISTENS, "--output", output, *more]
        code, text = scripts.run("train_transformer", argv)
        assert code == 0, text
    assert_same_run(halves, whole, "transformer")
    pipe = SpectralARPipeline.from_pretrained(whole / "pipeline")
    assert pipe.transformer.config.decoder_feedback
    pipe.set_progress_bar_config(disable=True)
    assert pipe(0, output_type="latent").codes.shape == (1, pipe.tokenizer.config.num_tokens)
    # Trained on from the finished one, almost not at all: what it has learnt stays, the maps of codes with it.
    shutil.copytree(reference / "tokenizer", tmp_path / "tokenizer")
    start = [f"train_transformer.init_from={whole / 'pipeline/transformer'}", "train_transformer.lr=1e-9"]
    code, text = scripts.run("train_transformer", [*argv[:-1], tmp_path, *start])
    assert code == 0, text
    further = SpectralARPipeline.from_pretrained(tmp_path / "pipeline").transformer
    torch.testing.assert_close(further.state_dict(), pipe.transformer.state_dict(), rtol=1e-3, atol=1e-5)
    # Another decoder, the same codes: what has been learnt from the first is no beginning for it.
    tokenizer = SpectralTokenizer.from_pretrained(halves / "tokenizer", dtype=torch.float32)
    with torch.no_grad():
        tokenizer.to_pixels.bias.add_(1)
    tokenizer.save_pretrained(halves / "tokenizer")
    code, text = scripts.run("train_transformer", [*argv, "train_transformer.steps=8"])
    assert code != 0 and "was trained with another tokenizer" in text.splitlines()[-1]
