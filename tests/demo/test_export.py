import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from spectralar.demo.export import EXPORTS, animation, export_bytes, export_file, sheet, snippet
from spectralar.demo.model import Model
from spectralar.demo.runs import Settings, stream


def run_of(model, **changes):
    settings = Settings(**{"class_label": "Sneaker", "count": 3, "seed": 11, "num_tokens": model.num_tokens} | changes)
    *_, run = stream(model, settings)
    return run


@pytest.mark.parametrize("changes", [{}, {"guidance_schedule": "cosine", "top_k": 5, "prefix_codes": [1, 2, 3]}])
def test_the_code_makes_the_same_files(changes, colour_model, tmp_path, monkeypatch):
    colour_model.pipe.save_pretrained(tmp_path / "model")
    model = Model.load(tmp_path / "model", "cpu")
    run = run_of(model, **changes)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet(run), "snippet.py", "exec"), {})
    shown = Image.open(io.BytesIO(base64.b64decode(run.value["frames"][-1].partition(",")[2])))
    for i in range(3):
        image = np.asarray(Image.open(tmp_path / f"image-{i + 1}.png"), int)
        np.testing.assert_allclose(image, np.asarray(shown, int)[:, 24 * i : 24 * i + 24], atol=1)


def test_the_code_of_a_stopped_run_stops_there_too(model):
    runs = stream(model, Settings("Bag", num_tokens=12))
    next(runs)
    run = next(runs)
    runs.close()
    assert f"num_tokens={run.num_frames}," in snippet(run) and run.num_frames < 12


def test_sheet_has_every_image_once():
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None] * np.ones((5, 4, 4), np.uint8)
    pixels = np.asarray(sheet(images))
    assert pixels.shape == (8, 12)
    assert [int(pixels[4 * (i // 3), 4 * (i % 3)]) for i in range(6)] == [1, 2, 3, 4, 5, 255]


@pytest.mark.parametrize("file_format", ["WEBP", "GIF"])
def test_animation_goes_from_coarse_to_fine(file_format, model):
    run = run_of(model)
    frames = run.frames()
    film = Image.open(io.BytesIO(animation(frames, file_format)))
    assert film.n_frames == 12 and max(film.size) >= 256 and film.info["loop"] == 0
    side = film.width // 2  # a sheet of two by two
    for k in (0, 11):
        film.seek(k)
        first = film.convert("L").crop((0, 0, side, side)).resize((16, 16), 0)
        np.testing.assert_allclose(np.asarray(first, int), frames[k][0].astype(int), atol=2)
    assert film.info["duration"] == 1500


def test_record_can_be_decoded_again(model):
    run = run_of(model)
    record = json.loads(export_bytes(run, "json"))
    assert record["settings"]["seed"] == 11 and record["model"] == "tiny"
    assert record["tokenizer"]["cutoffs"] == list(model.cutoffs)
    again = model.decode(record["codes"], [12])[:, 0]
    np.testing.assert_allclose(again.astype(int), run.frames()[-1].astype(int), atol=1)


def test_files_carry_the_settings_in_their_names(model, tmp_path):
    run = run_of(model)
    names = [export_file(run, name, str(tmp_path)).rpartition("/")[2] for name in EXPORTS]
    assert names == [f"sneaker-seed11.{name}" for name in EXPORTS]
