"""The sheet of all classes: one sample each, in the order of the ids."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_pipeline
from train.evaluation import pictures
from train.evaluation.pictures import CLASSES_A_ROW, ROWS, draw_samples


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws samples of some classes at two guidance scales: the pipeline, the bank of the better, rows by file."""
    (tmp_path / "figures").mkdir()
    named = {}

    def draw_grid(images, rows, columns, path):
        named[path.name] = rows
        draw_it(images, rows, columns, path)

    draw_it = pictures.draw_grid
    monkeypatch.setattr(pictures, "draw_grid", draw_grid)

    def make(classes: int):
        names = {i: f"class {i}" for i in range(classes)}
        pipe = tiny_pipeline(id2label=names, dtype=torch.float32, transformer={"num_classes": classes})
        best, other = torch.randint(32, (2, 2 * classes, 12), generator=torch.Generator().manual_seed(0))
        draw_samples(pipe, tmp_path, {1.0: best, 2.0: other}, best=1.0, lengths=[1, 12])
        return pipe, best, named

    return make


def test_sheet_of_all_classes(draw, tmp_path):
    classes = CLASSES_A_ROW + 3
    pipe, bank, named = draw(classes)
    assert named["classes.png"] == ["class 0", f"class {CLASSES_A_ROW}"]
    sheet = np.asarray(Image.open(tmp_path / "figures" / "classes.png").convert("L")).astype(float)
    side, gap, left, top = 64, 4, 100, 24
    assert sheet.shape == (top + 2 * (side + gap), left + CLASSES_A_ROW * (side + gap))
    tile = sheet[top + side + gap :, left + 2 * (side + gap) :][:side, :side]  # row 1, column 2: the last class
    expected = pipe.tokenizer.decode(bank[classes - 1 : classes])[0, 0].detach().clamp(-1, 1).numpy()
    expected = ((expected + 1) * 127.5).repeat(4, axis=0).repeat(4, axis=1)
    assert np.abs(tile - expected).max() < 2
    assert (sheet[top + side + gap :, left + 3 * (side + gap) :] == 255).all()


def test_no_sheet_of_classes_that_all_have_a_row_of_samples(draw):
    assert draw(ROWS)[2].keys() == {"samples-1.png", "samples-2.png", "sample-prefixes.png"}
