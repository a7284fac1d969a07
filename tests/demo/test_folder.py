import re

import pytest
import torch
from PIL import Image

from spectralar.analysis.statistics import write_statistics
from spectralar.demo.embedded import EMBEDDED
from spectralar.demo.folder import model_card, model_folder, model_statistics
from spectralar.demo.model import Model
from spectralar.demo.start import MODELS


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


def test_card_links_to_addresses_and_to_no_files(tmp_path):
    """The page does not have the files that lie beside a card in its repository."""
    kept = "[paper](https://arxiv.org/abs/2506.10962), [below](#data), `call[0](1)`\n```python\ncalls[name](x)\n```\n"
    lost = '[design](../../docs/design.md#cutoffs "title"), [sheet](samples.png) and [licence](/LICENSE)'
    (tmp_path / "README.md").write_text(kept + lost)
    assert model_card(tmp_path) == kept + "design, sheet and licence"


def test_cards_of_embedded_models_have_no_link_that_leads_nowhere():
    for name in EMBEDDED:
        links = re.findall(r"\]\(([^)]*)\)", re.sub("```.*?```", "", model_card(MODELS / name), flags=re.DOTALL))
        assert links and all(link.startswith(("https://", "data:image/", "#")) for link in links)
