import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.demo.model import to_pixels
from spectralar.demo.source import Origins, sample_examples


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def origins(colour_model, example):
    return Origins(colour_model, {"noise": example})


def test_a_sample_is_the_pipelines(origins, colour_model):
    picture = origins.picture("sample:2:5", None)
    expected = colour_model.pipe(2, generator=torch.manual_seed(5), output_type="pt")
    assert picture.codes == expected.codes[0].tolist()
    torch.testing.assert_close(picture.image / 2 + 0.5, expected.images[0], rtol=0, atol=1e-5)
    assert origins.picture("sample:2:5", None) is picture  # kept
    assert origins.picture("sample:2:6", None).codes != picture.codes


def test_an_example_and_a_photo_are_encoded(origins, colour_model, example):
    photo = Image.open(example)
    expected = colour_model.pipe.encode(photo)[0].tolist()
    for picture in (origins.picture("example:noise", None), origins.picture("", photo)):
        assert picture.codes == expected and picture.image.shape == (3, 24, 24)


def test_previews(origins, example):
    np.testing.assert_array_equal(np.asarray(origins.preview("example:noise")), np.asarray(Image.open(example)))
    preview = origins.preview("sample:1:0")
    assert preview.size == (240, 240)  # whole steps of 24
    small = np.asarray(preview)[::10, ::10]
    np.testing.assert_array_equal(small, to_pixels(origins.picture("sample:1:0", None).image / 2 + 0.5))


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [
        ("", "choose image A first"),
        (None, "choose image A first"),
        ("example:../secret", "no such example"),
        ("sample:9:0", "class ids must be between 0 and 3, got 9"),
        ("sample:1", "is no sample"),
        ("sample:1:99999999999", "is no sample"),
        ("/etc/passwd", "neither an example nor a sample"),
    ],
)
def test_what_is_no_origin(origins, origin, sentence):
    with pytest.raises(ValueError, match=sentence):
        origins.picture(origin, None, "image A")


def test_examples_of_samples_are_origins(origins):
    tried, labels = sample_examples(origins.model)
    assert labels == ["A sample: T-shirt", "A sample: Sneaker", "A sample: Bag", "A sample: Ankle boot"]
    assert all(len(origins.picture(origin, None).codes) == 20 for origin in tried)
