"""The sheet of all classes: one sample each, in the order of the ids."""

import numpy as np
import torch
from PIL import Image

from tests.helpers import tiny_pipeline
from train.pictures import CLASSES_A_ROW, draw_samples


def test_sheet_of_all_classes(tmp_path):
    classes = CLASSES_A_ROW + 3
    names = {i: f"class {i}" for i in range(classes)}
    pipe = tiny_pipeline(id2label=names, dtype=torch.float32, transformer={"num_classes": classes})
    bank = torch.randint(32, (2 * classes, 12), generator=torch.Generator().manual_seed(0))
    (tmp_path / "figures").mkdir()
    draw_samples(pipe, tmp_path, {1.0: bank}, best=1.0, lengths=[1, 12])
    sheet = np.asarray(Image.open(tmp_path / "figures" / "classes.png").convert("L")).astype(float)
    side, gap, left, top = 64, 4, 100, 24
    assert sheet.shape == (top + 2 * (side + gap), left + CLASSES_A_ROW * (side + gap))
    tile = sheet[top + side + gap :, left + 2 * (side + gap) :][:side, :side]  # row 1, column 2: the last class
    expected = pipe.tokenizer.decode(bank[classes - 1 : classes])[0, 0].detach().clamp(-1, 1).numpy()
    expected = ((expected + 1) * 127.5).repeat(4, axis=0).repeat(4, axis=1)
    assert np.abs(tile - expected).max() < 2
    assert (sheet[top + side + gap :, left + 3 * (side + gap) :] == 255).all()
