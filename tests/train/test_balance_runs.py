"""Training on uneven classes, drawn evenly: every script says it and does it, interrupted or in two processes."""

import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.train.conftest import PRESET, STAGE
from tests.train.run_folders import assert_same_run, assert_same_up_to_rounding, logged, stop_at

SETTINGS = ["data.class_balance=even", "transformer.dropout=0", "train_tokenizer.log_every=1",
            "train_transformer.log_every=1"]  # fmt: skip


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """Path of a preset of 40 dark and 4 bright images."""
    folder, random = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    for name, count, low in (("dark", 40, 0), ("bright", 4, 200)):
        for split, images in (("train", count), ("test", 4)):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(low, low + 50, (16, 16), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{i}.png")
    data = {**PRESET["data"], "source": str(folder / "images")}
    classifier = {"train_classifier": {**STAGE, "steps": 8, "log_every": 1, "warmup_steps": 1}}
    (folder / "uneven.yaml").write_text(yaml.safe_dump({**PRESET, **classifier, "data": data}))
    return folder / "uneven.yaml"


@pytest.fixture(scope="module")
def reference(scripts, preset, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference")
    for script in ("train_tokenizer", "encode_dataset", "train_transformer", "train_classifier"):
        code, text = scripts.run(script, [preset, "--output", output, *SETTINGS])
        assert code == 0, text
        said = "44 images of 2 classes, from 4 ('bright') to 40 ('dark') a class. Classes are drawn evenly."
        assert script == "encode_dataset" or said in text
    return output


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_balanced_run_goes_on_exactly_and_in_two_processes(scripts, preset, reference, tmp_path, stage):
    for name in ("tokenizer", "codes"):
        shutil.copytree(reference / name, tmp_path / "one" / name)
        shutil.copytree(reference / name, tmp_path / "two" / name)
    argv = [preset, "--output", tmp_path / "one", *SETTINGS]
    stop_at(scripts, argv, stage, 8)
    code, text = scripts.run(f"train_{stage}", argv)
    assert code == 0 and "Resumed from" in text, text
    assert_same_run(tmp_path / "one", reference, stage)
    code, text = scripts.run(f"train_{stage}", [preset, "--output", tmp_path / "two", *SETTINGS], processes=2)
    assert code == 0, text
    assert_same_up_to_rounding(tmp_path / "two", reference, stage, atol=5e-4)


def test_the_setting_reaches_every_script_and_codes_serve_every_balance(scripts, preset, reference, tmp_path):
    for name in ("tokenizer", "codes"):
        shutil.copytree(reference / name, tmp_path / name)
    for stage in ("tokenizer", "transformer", "classifier"):
        code, text = scripts.run(
            f"train_{stage}", [preset, "--output", tmp_path, *SETTINGS, "data.class_balance=none"]
        )
        assert code == 0, text
        assert "data.class_balance=sqrt draws small classes more often" in text
        assert logged(tmp_path, stage)[0] != logged(reference, stage)[0]  # the first step has other images
        if stage == "tokenizer":  # the codes are still those of the reference's
            shutil.copytree(reference / "tokenizer", tmp_path / "tokenizer", dirs_exist_ok=True)
