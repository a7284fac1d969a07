"""The judge: its shapes, its files, and how it is trained, interrupted and resumed."""

import gc
import json
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from train.configs.reading import load_config
from train.data.images import load_images, to_float
from train.evaluation.classifier import Classifier, load_classifier, save_classifier
from train.train_classifier import main

# 16x16 waves across or down; the evaluation split has other ones, 4 of 50 of which lie in the wrong folder.
PRESET = {
    "name": "waves",
    "data": {"image_size": 16, "channels": 1, "augment": ["shift"]},
    "classifier": {"width": 8},
    "train_classifier": {"batch_size": 16, "steps": 40, "warmup_steps": 5, "checkpoint_every": 100, "eval_every": 20},
}


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("waves"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 25)):
        for label, name in enumerate(["across", "down"]):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                wave = 128 + 100 * np.sin(np.arange(16) / random.uniform(1, 3) + random.uniform(0, 6))
                pixels = np.broadcast_to(wave, (16, 16)) + random.normal(0, 10, (16, 16))
                down = bool(label) != (split == "test" and i < 2)
                image = Image.fromarray((pixels.T if down else pixels).clip(0, 255).astype(np.uint8))
                image.save(folder / "images" / split / name / f"{i}.png")
    path = folder / "waves.yaml"
    path.write_text(yaml.safe_dump(PRESET | {"data": {**PRESET["data"], "source": str(folder / "images")}}))
    return path


def run(preset, output, *options: str) -> None:
    """The script, and the end of what it holds on to: signal handlers, and with them its folder."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main([str(preset), "--output", str(output), *options])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        gc.collect()


# ------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize(("size", "channels", "features"), [(8, 1, 6), (16, 3, 12), (32, 1, 24), (64, 3, 48)])
def test_features_come_from_a_map_of_four_by_four(size, channels, features):
    model = Classifier(size, channels, num_classes=5, width=6, blocks=2).eval()
    maps = []
    model.stages[-1].register_forward_hook(lambda module, inputs, output: maps.append(output.shape))
    x = torch.randn(3, channels, size, size)
    assert model.num_features == features
    assert model.features(x).shape == (3, features)
    assert maps == [(3, features, 4, 4)]
    assert model.views(x)[1].shape == ((3, features // 2, 8, 8) if size > 8 else (3, 0, 4, 4))
    torch.testing.assert_close(model(x), model.head(model.features(x)))


def test_every_pixel_and_every_parameter_counts():
    model = Classifier(16, 1, num_classes=3, width=8).train()
    x = torch.randn(8, 1, 16, 16, requires_grad=True)
    model(x).square().sum().backward()
    assert (x.grad.abs().sum(dim=(0, 1)) > 0).all()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters())


@pytest.mark.parametrize("size", [4, 24, 28])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"8, 16, 32, 64, ... pixels a side, not {size}"):
        Classifier(size, 1, num_classes=2)


# ------------------------------------------------------------------------------------------- files


def test_files_hold_everything_and_the_hash_guards_the_weights(tmp_path):
    model = Classifier(16, 3, num_classes=2, width=4, blocks=2)
    model(torch.randn(16, 3, 16, 16))  # moves the running statistics
    sha256 = save_classifier(model, tmp_path / "judge", class_names=["a", "b"], accuracy=0.75)
    loaded, card = load_classifier(tmp_path / "judge")
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=0)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert card["sha256"] == sha256 and card["class_names"] == ["a", "b"] and card["accuracy"] == 0.75

    path = tmp_path / "judge" / "classifier.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="one of the two was changed"):
        load_classifier(tmp_path / "judge")
    with pytest.raises(ValueError, match="no trained classifier in .*nowhere"):
        load_classifier(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------- training


def test_training_learns_and_reports_its_accuracy_on_held_out_images(preset, tmp_path):
    run(preset, tmp_path)
    model, card = load_classifier(tmp_path / "classifier")
    heldout = load_images(load_config(str(preset)).data, "eval")
    right = model(to_float(heldout.images)).argmax(dim=1) == heldout.labels
    assert len(heldout) == 50
    assert card["accuracy"] == pytest.approx(float(right.float().mean()))
    assert 0.85 < card["accuracy"] <= 0.92
    assert card["class_names"] == ["across", "down"]
    lines = (tmp_path / "train_classifier" / "metrics.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, lines) if "eval/accuracy" in line] == [20, 40]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(preset, tmp_path):
    steps = "train_classifier.steps=6"
    run(preset, tmp_path / "whole", steps)
    run(preset, tmp_path / "parts", steps, "--max-minutes", "0")  # one step and a checkpoint
    assert not (tmp_path / "parts" / "classifier").exists()
    run(preset, tmp_path / "parts", steps)
    file = "classifier/classifier.safetensors"
    whole, parts = (load_file(tmp_path / name / file) for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_images_of_an_unfit_size_are_refused_in_words(preset, tmp_path):
    with pytest.raises(SystemExit, match="not 24"):
        run(preset, tmp_path, "data.image_size=24")
    assert not (tmp_path / "classifier").exists()
