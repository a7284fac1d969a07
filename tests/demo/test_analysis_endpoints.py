"""The endpoints of the Frequency bands, Remix and Model tabs, as gradio_client and agents use them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from spectralar.spectral import band_energy
from tests.demo.conftest import served


@pytest.fixture(scope="module")
def page(colour_model):
    with served(colour_model) as page:
        yield page


@pytest.fixture(scope="module")
def client(page, tmp_path_factory):
    return Client(page.url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [folder / f"{i}.png" for i in range(2)]


def codes_of(page, photo):
    return page.model.pipe.encode(Image.open(photo))[0].tolist()


def test_bands_are_numbers(client, page, photos):
    answer = client.predict(handle_file(photos[0]), api_name="/bands")
    assert answer["codes"] == codes_of(page, photos[0])
    assert set(answer["figures"]) == {"nested_squares", "band_energies", "radial_spectra", "contributions"}
    with torch.no_grad():
        frame = page.model.pipe.tokenizer.decode(torch.tensor([answer["codes"]]))[0]
    columns = answer["figures"]["band_energies"]
    expected = band_energy(frame, page.model.cutoffs)[[k - 1 for k in columns["token"]]]
    np.testing.assert_allclose(columns["energy_reconstruction"], expected, rtol=1e-4)


@pytest.mark.parametrize(("file_format", "start"), [("png", b"\x89PNG"), ("csv", b"token,band_from,band_to,energy")])
def test_a_figure_is_a_file(client, photos, file_format, start):
    path = client.predict(handle_file(photos[0]), "contributions", file_format, api_name="/band_figure")
    assert Path(path).name == f"contributions.{file_format}" and Path(path).read_bytes().startswith(start)


def test_influence_is_measured_once(client, page):
    first = client.predict(api_name="/influence")
    assert len(first["influence"]["influence"]) == 20 * 34 and first["marginals"] == "128 sampled images"
    steps = page.steps
    assert client.predict(api_name="/influence") == first and page.steps == steps


@pytest.mark.parametrize("k", [0, 8, 20])
def test_mix(client, page, photos, k):
    path, answer = client.predict(handle_file(photos[0]), handle_file(photos[1]), k, api_name="/mix")
    assert answer["codes"] == codes_of(page, photos[0])[:k] + codes_of(page, photos[1])[k:]
    expected = page.model.decode([answer["codes"]], [20])[0, 0]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)


def test_continue_as(client, page, photos):
    path, answer = client.predict(handle_file(photos[0]), "bag", 6, 3, 5, 1.5, api_name="/continue_as")
    expected = page.model.pipe(
        "bag", num_images_per_prompt=3, guidance_scale=1.5, prefix_codes=[codes_of(page, photos[0])[:6]],
        generator=torch.manual_seed(5),
    )  # fmt: skip
    assert answer["codes"] == expected.codes.tolist()
    sheet = np.asarray(Image.open(path), int)  # two by two, the last place empty
    for i, image in enumerate(expected.images):
        y, x = 24 * (i // 2), 24 * (i % 2)
        np.testing.assert_allclose(sheet[y : y + 24, x : x + 24], np.asarray(image, int), atol=1)


def test_model_is_described(client, page):
    answer = client.predict(api_name="/model")
    assert answer["cutoffs"] == list(page.model.cutoffs) and answer["classes"] == page.model.class_names
    assert answer["facts"]["Model"] == "tiny" and answer["figures"]["cutoff_schedule"]["cutoff"] == answer["cutoffs"]


@pytest.mark.parametrize(
    ("endpoint", "arguments", "sentence"),
    [
        ("/bands", (None,), "Send an image."),
        ("/band_figure", ("A", "contributions", "exe"), "not in the list of choices"),
        ("/mix", ("A", None, 3), "Send image B."),
        ("/mix", ("A", "B", 21), "The number of tokens must be between 0 and 20, got 21."),
        ("/mix", ("A", "B", 2.5), "The number of tokens must be a whole number"),
        ("/continue_as", ("A", "bagg", 3, 1, 0, 2), "No class is named 'bagg': did you mean 'Bag'?"),
        ("/continue_as", ("A", "bag", 20, 1, 0, 2), "The number of tokens must be between 1 and 19, got 20."),
        ("/continue_as", ("A", "bag", 3, 17, 0, 2), "The number of variations must be between 1 and 16, got 17."),
        ("/continue_as", ("A", "bag", 3, 1, 0, -2), "guidance_scale must be a finite number"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence(client, photos, endpoint, arguments, sentence):
    files = {"A": handle_file(photos[0]), "B": handle_file(photos[1])}
    sent = [files.get(argument, argument) for argument in arguments]
    with pytest.raises(AppError) as caught:
        client.predict(*sent, api_name=endpoint)
    assert sentence.lower() in str(caught.value).lower()
