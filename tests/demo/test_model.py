import numpy as np
import pytest
import torch

from spectralar.demo.model import Model, best_device, find_models, to_pixels


def test_models_are_found_and_loaded(model, tmp_path):
    model.pipe.save_pretrained(tmp_path / "b")
    model.pipe.save_pretrained(tmp_path / "a")
    (tmp_path / "c").mkdir()
    assert [path.name for path in find_models(tmp_path)] == ["a", "b"]
    loaded = Model.load(tmp_path / "b", "cpu")
    assert loaded.name == "b" and loaded.source == (tmp_path / "b").as_posix()
    assert loaded.cutoffs == model.cutoffs and loaded.class_names == ["T-shirt", "Sneaker", "Bag", "Ankle boot"]


def test_device_is_one_that_is_there():
    assert torch.empty(1, device=best_device()).device.type == best_device()


def test_labels_by_name_or_id(model):
    assert model.label("gym shoe") == 1 and model.label("3") == 3
    with pytest.raises(ValueError, match="no class is named 'sock'"):
        model.label("sock")


def test_pixels_are_the_pipelines_own(colour_model):
    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    images = colour_model.pipe._to_output(x * 2 - 1, "pil")
    np.testing.assert_array_equal(to_pixels((x * 2 - 1) / 2 + 0.5), np.stack([np.asarray(image) for image in images]))


def test_decode_prefixes_are_nested(model):
    codes = model.encode(torch.zeros(1, 1, 16, 16))[0]
    frames = model.decode_prefixes(codes)
    assert frames.shape == (12, 1, 16, 16)
    np.testing.assert_array_equal(model.decode([codes], [3])[0][0], to_pixels((frames[2] / 2 + 0.5).clamp(0, 1)))


def test_samples_run_side_by_side(model):
    """Two visitors at once get what each would get alone."""
    alone = [list(model._frames(label, 1, seed=5))[-1].codes for label in (0, 2)]
    first, second = model._frames(0, 1, seed=5), model._frames(2, 1, seed=5, guidance_scale=2.0)
    together = [frames[-1].codes for frames in zip(*zip(first, second, strict=True), strict=True)]
    assert together == alone
