"""The page's endpoints, as gradio_client and agents use them."""

import base64
import io
import json
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from spectralar.analysis.quality import psnr
from spectralar.demo.page import TABS, build, launch_options
from spectralar.interface.image import to_model_input
from tests.demo.conftest import served


@pytest.fixture(scope="module")
def page(colour_model):
    with served(colour_model) as page:
        yield page


@pytest.fixture(scope="module")
def client(page, tmp_path_factory):
    return Client(page.url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


def image_of(data_url):
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2])))


def test_generate_is_the_pipeline(client, page):
    answer = client.predict("bag", count=2, seed=3, guidance_scale=1.5, top_k=9, api_name="/generate")
    pipe = page.model.pipe
    expected = pipe("bag", num_images_per_prompt=2, guidance_scale=1.5, top_k=9, generator=torch.manual_seed(3))
    assert answer["codes"] == expected.codes.tolist()
    for url, image in zip(answer["images"], expected.images, strict=True):
        np.testing.assert_allclose(np.asarray(image_of(url), int), np.asarray(image, int), atol=1)
    assert answer["model"] == "tiny" and answer["settings"]["seed"] == 3


def test_a_sheet_is_the_same_images_side_by_side(client):
    path, numbers = client.predict("bag", 2, 3, 1.5, 20, api_name="/generate_sheet")
    answer = client.predict("bag", count=2, seed=3, guidance_scale=1.5, api_name="/generate")
    assert numbers == {name: answer[name] for name in ("codes", "settings", "model")}
    sheet = np.asarray(Image.open(path))
    factor = sheet.shape[1] // 48
    assert sheet.shape == (24 * factor, 48 * factor, 3) and 48 * factor >= 256
    np.testing.assert_array_equal(sheet[::factor, 24 * factor :: factor], np.asarray(image_of(answer["images"][1])))


def test_generate_goes_on_from_given_tokens(client):
    answer = client.predict("1", count=1, num_tokens=6, prefix_codes=[5, 4, 3], api_name="/generate")
    assert answer["codes"][0][:3] == [5, 4, 3] and len(answer["codes"][0]) == 6


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_reconstruct_is_encode_and_decode(client, page, photo):
    path, numbers = client.predict(handle_file(photo), 7, api_name="/reconstruct")
    model = page.model
    codes = model.pipe.encode(Image.open(photo))
    assert numbers["codes"] == codes[0].tolist()
    with torch.no_grad():
        frame = model.pipe.tokenizer.decode(codes, 7)
    assert numbers["num_tokens"] == 7 and numbers["cutoff"] == model.cutoffs[6] and numbers["bits"] == 42
    expected = float(psnr(frame, to_model_input(Image.open(photo), 24, 3))[0])
    assert numbers["psnr"] == pytest.approx(expected, abs=1e-3)
    np.testing.assert_allclose(
        np.asarray(Image.open(path), int), np.asarray(model.pipe.decode(codes, 7, "pil")[0], int), atol=1
    )


def test_decode_gives_every_prefix_asked_for(client, page):
    codes = [[1, 2, 3, 4], [4, 3, 2, 1]]
    answer = client.predict(codes, [1, 4], api_name="/decode")
    frames = page.model.decode(codes, [1, 4])
    assert np.shape(answer) == (2, 2)
    np.testing.assert_array_equal(np.asarray(image_of(answer[1][1])), frames[1, 1])


@pytest.mark.parametrize(
    ("endpoint", "arguments", "sentence"),
    [
        ("/generate", {"class_label": "Bagg"}, "No class is named 'Bagg': did you mean 'Bag'?"),
        ("/generate", {"class_label": ""}, "Choose a class first."),
        ("/generate", {"class_label": "Bag", "count": 17}, "The number of images must be between 1 and 16, got 17."),
        ("/generate", {"class_label": "Bag", "temperature": -1}, "Temperature must be a finite number >= 0"),
        ("/generate", {"class_label": "Bag", "num_tokens": 21}, "The number of tokens must be between 1 and 20"),
        ("/generate", {"class_label": "Bag", "prefix_codes": [64]}, "Each fixed token must be between 0 and 63"),
        ("/reconstruct", {"image": None, "num_tokens": 3}, "Send an image."),
        ("/decode", {"codes": [[1, 2], [3]]}, "Codes must be a rectangular array of integers"),
        ("/decode", {"codes": [[1, 64]]}, "between 0 and 63"),
        ("/decode", {"codes": [[1, 2]], "num_tokens": [3]}, "between 1 and 2"),
        ("/decode", {"codes": 5}, "Codes must be a list of lists"),
        ("/decode", {"codes": [[1]], "num_tokens": [1] * 1025}, "At most 1024 images"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence(client, endpoint, arguments, sentence):
    with pytest.raises(AppError) as caught:
        client.predict(**arguments, api_name=endpoint)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("k", [0, 21, 2.5])
def test_prefix_length_out_of_range(client, photo, k):
    with pytest.raises(AppError, match="The number of tokens must be"):
        client.predict(handle_file(photo), k, api_name="/reconstruct")


def test_a_text_file_with_an_images_name(client, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    with pytest.raises(AppError, match="not an image that can be read"):
        client.predict(handle_file(tmp_path / "note.png"), None, api_name="/reconstruct")


def test_endpoints_are_named_typed_and_documented(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    parameters = {p["parameter_name"]: p for p in endpoints["/generate"]["parameters"]}
    assert parameters["seed"]["python_type"]["type"] == "int" and parameters["seed"]["parameter_default"] == 0
    assert all(endpoint["description"] for endpoint in endpoints.values())
    # docs/page.md lists them all with their parameters, and none of the page's own handlers is among them.
    page = (Path(__file__).parents[2] / "docs" / "page.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(/\w+)` \| ([^|]*) \|", page, flags=re.MULTILINE))
    listed = {name: re.findall(r"`(\w+)`", row) for name, row in rows.items()}
    assert listed == {name: [p["parameter_name"] for p in e["parameters"]] for name, e in endpoints.items()}


def test_functions_of_one_queue_have_one_limit(model):
    """Gradio takes the least of them for all: a function without any would make it 1."""
    limits = {}
    for function in build(model).fns.values():
        limits.setdefault(function.concurrency_id, set()).add(function.concurrency_limit)
    assert all(len(each) == 1 for each in limits.values()), limits
    assert {"sample", "tokenizer", "preview"} <= limits.keys()


def test_nothing_is_stored_watched_or_fetched_from_elsewhere(page):
    options = launch_options()
    assert options["run_history"] is False and options["enable_monitoring"] is False and options["max_file_size"]
    assert options["mcp_server"] is False and launch_options(mcp=True)["mcp_server"] is True
    assert httpx.get(page.url + "monitoring/summary").status_code in (403, 404)
    html = httpx.get(page.url).text
    assert "fonts.googleapis" not in html
    head = httpx.get(page.url + "config").json()["head"]
    assert '<link rel="icon" href="data:image/svg+xml,' in head  # no request, which behind a sub-path goes astray


def test_behind_a_proxy_all_addresses_are_below_the_sub_path(model):
    with served(model, root_path="/demo") as page:
        seen_outside = {"Host": "example.org", "X-Forwarded-Proto": "https"}
        config = httpx.get(page.url + "config", headers=seen_outside).json()
        assert config["root"] == "https://example.org/demo"
        addresses = re.findall(r'https?://[^"\s<]*gradio_api[^"\s<]*', json.dumps(config))
        assert addresses and all(address.startswith("https://example.org/demo/") for address in addresses)


def test_a_tab_is_a_title_and_a_layout():
    for tab in TABS:
        assert tab.TITLE and callable(tab.build)
