import pytest
import torch
from PIL import Image

from spectralar.analysis.statistics import write_statistics
from spectralar.demo.folder import model_card, model_folder, model_statistics
from spectralar.demo.model import Model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.pipe.save_pretrained(folder)
    return Model.load(folder, "cpu")


def test_a_model_made_in_memory_has_no_folder(model):
    assert model_folder(model) is None and model_statistics(model) is None and model_card(None) is None


def test_statistics_are_taken_if_they_fit(saved):
    folder = model_folder(saved)
    assert saved.source == folder.as_posix() and model_statistics(saved) is None
    codes = torch.randint(32, (7, 12))
    write_statistics(folder, codes[:, :5], 32, torch.zeros(5))  # of another model
    assert model_statistics(saved) is None
    write_statistics(folder, codes, 32, torch.arange(12) / 4)
    assert model_statistics(saved).code_counts.sum(dim=1).tolist() == [7] * 12


def test_card_shows_the_folders_images_and_no_others(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert model_card(folder) is None
    for path in (folder / "samples.png", tmp_path / "outside.png"):
        Image.new("L", (2, 2)).save(path)
    (folder / "notes.txt").write_text("secret")
    (folder / "README.md").write_text(
        "---\nlicense: mit\n---\n# Tiny\n\n| k | PSNR |\n| --- | --- |\n| 8 | 15.2 |\n\n"
        "![A sheet](samples.png 'title')\n![Up](../outside.png) ![Text](notes.txt) ![Badge](https://x.org/b.png)\n"
    )
    card = model_card(folder)
    assert card.startswith("# Tiny") and "| 8 | 15.2 |" in card
    assert card.count("](") == 1 and "![A sheet](data:image/png;base64,iVBOR" in card
    assert "Up Text Badge" in card
