"""The sheet of all classes, one sample each in the order of the ids; sheets of few images of many classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_pipeline
from train.data.images import to_float
from train.data.order import in_proportion
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
        labels = torch.arange(2 * classes) % classes
        draw_samples(pipe, tmp_path, {1.0: best, 2.0: other}, labels, best=1.0, lengths=[1, 12])
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


def test_rows_are_the_first_samples_of_their_class_in_any_proportions(tmp_path, monkeypatch):
    """30 of class 0, 12 of class 3, 4 of class 5, none of the others: three rows of four."""
    (tmp_path / "figures").mkdir()
    drawn = {}
    keep = lambda images, rows, columns, path: drawn.update({path.name: (images, rows)})  # noqa: E731
    monkeypatch.setattr(pictures, "draw_grid", keep)
    pipe = tiny_pipeline(id2label={i: f"class {i}" for i in range(11)}, dtype=torch.float32,
                         transformer={"num_classes": 11})  # fmt: skip
    labels = in_proportion(torch.tensor([15, 0, 0, 6, 0, 2] + [0] * 5), 46)
    codes = torch.randint(32, (46, 12), generator=torch.Generator().manual_seed(0))
    draw_samples(pipe, tmp_path, {1.0: codes}, labels, best=1.0, lengths=[1, 12])
    images, rows = drawn["samples-1.png"]
    assert rows == ["class 0", "class 3", "class 5"] and images.shape[:2] == (3, 4)
    for row, c in zip(images, (0, 3, 5), strict=True):
        torch.testing.assert_close(row, pipe.tokenizer.decode(codes[labels == c][:4]), rtol=0, atol=1e-5)
    sheet, _ = drawn["classes.png"]
    firsts = torch.stack([codes[labels == c][0] for c in (0, 3, 5)])
    torch.testing.assert_close(sheet[0, :3], pipe.tokenizer.decode(firsts), rtol=0, atol=1e-5)
    assert (sheet[0, 3:] == 1).all()


def test_few_images_of_many_classes_are_shown_too(tmp_path):
    """Three of a hundred classes, none of them among the ten that would be shown if all were there."""
    pipe = tiny_pipeline(dtype=torch.float32, id2label=None, transformer={"num_classes": 100})
    images, labels = torch.zeros(3, 1, 16, 16, dtype=torch.uint8), torch.tensor([13, 77, 77])
    (tmp_path / "figures").mkdir()
    with torch.no_grad():
        pictures.draw_reconstructions(pipe, tmp_path, images, labels, pipe.tokenizer.encode(to_float(images)), [1, 12])
    assert Image.open(tmp_path / "figures" / "reconstructions.png").size == (100 + 3 * 68, 24 + 2 * 68)
