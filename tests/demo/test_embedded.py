"""The order of the models that come with the project, and the classes that the page shows of each."""

import json
from pathlib import Path

import pytest
import torch

from spectralar.demo.embedded import EMBEDDED, place, shown
from spectralar.demo.export import png_data_url
from spectralar.demo.mixing import VARIATIONS, continuations
from spectralar.demo.model import NUM_EXAMPLES, Model
from spectralar.demo.page import build
from spectralar.demo.source import Origins
from spectralar.demo.start import MODELS, find_models
from spectralar.demo.tiles import SEED, samples
from tests.helpers import tiny_pipeline


def named(name, class_names):
    pipe = tiny_pipeline(
        dtype=torch.float32, id2label=dict(enumerate(class_names)), transformer={"num_classes": len(class_names)}
    )
    return Model(name, pipe, name)


def test_the_embedded_models_are_those_named_in_their_order():
    assert [path.name for path in find_models(MODELS)] == list(EMBEDDED)


def test_others_come_behind_in_alphabetical_order():
    names = ["zebra", "fashion-mnist-32", "ants", "products-64"]
    assert sorted(names, key=place) == ["products-64", "fashion-mnist-32", "ants", "zebra"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_all_classes_to_try_are_there(name):
    index = json.loads((Path(MODELS) / name / "model_index.json").read_text(encoding="utf-8"))
    assert set(shown(name).examples) <= set(index["id2label"].values())
    assert shown(f"somebody/{name}") == shown(name) and shown(name).trained_on


def test_classes_to_try_stand_in_the_order_given():
    names = ["Bag", "Coat", "Sneaker", "Dress"]
    model = named("fashion-mnist-32", names)
    assert [names[i] for i in model.examples] == ["Sneaker", "Bag", "Dress", "Coat"]


def test_all_that_samples_does_so_as_suits_the_model():
    model = named("products-64", ["handbag", "watch", "belt", "cap"])
    assert model.temperature == EMBEDDED["products-64"].temperature != named("mine", ["a", "b"]).temperature == 1.0
    demo = build(model)
    scale, components = model.guidance_scale, demo.get_config_file()["components"]
    assert scale == EMBEDDED["products-64"].guidance_scale != named("mine", ["a", "b"]).guidance_scale == 2.0
    shown = [(c["props"].get("label"), c["props"].get("value")) for c in components]
    assert [v for label, v in shown if label == "Temperature"] == [model.temperature]
    assert {v for label, v in shown if label in ("Guidance", "guidance_scale")} == {scale}
    how = {"guidance_scale": scale, "temperature": model.temperature, "output_type": "latent"}
    expected = model.pipe(1, **how, generator=torch.manual_seed(3)).codes.tolist()
    functions = {fn.api_name: fn.fn for fn in demo.fns.values() if fn.api_visibility == "public"}
    assert functions["generate"]("watch", 1, 3)["codes"] == expected
    assert functions["generate_sheet"]("watch", 1, 3, scale, model.num_tokens)[1]["codes"] == expected
    assert [Origins(model).picture("sample:1:3", None).codes] == expected
    (image,) = model.last(1, 1, SEED, guidance_scale=scale, temperature=model.temperature)[1]
    assert samples(model)[1] == png_data_url(image)
    (rows, _) = next(news for news in continuations(model, 1, expected[0], 5, scale) if news)
    again = {"generator": torch.manual_seed(5), "num_images_per_prompt": VARIATIONS}
    assert rows == model.pipe(1, **how, **again, prefix_codes=[expected[0][:1]]).codes.tolist()


def test_of_an_unknown_model_some_from_all_classes():
    model = named("mine", [f"class {i}" for i in range(40)])
    assert len(model.examples) == NUM_EXAMPLES and model.examples[0] == 0 and model.examples[-1] >= 32
    assert named("mine", ["a", "b"]).examples == [0, 1] and model.trained_on == ""
