import math

import pytest
import torch

from spectralar.analysis.statistics import write_statistics
from spectralar.demo.card import charts, facts, mask_value
from spectralar.demo.model import Model
from spectralar.demo.page import TABS, build
from spectralar.demo.scrubber import StripEncoder
from spectralar.spectral import square_frequency
from tests.helpers import tiny_pipeline


def test_facts(colour_model):
    told = facts(colour_model)
    assert told["Model"] == "tiny" and told["Runs on"] == "CPU, float32"
    assert told["Images"] == "24 × 24, colour" and told["Spectral tokens"] == "20 of 64 codes, 120 bits an image"
    count = sum(p.numel() for p in colour_model.pipe.tokenizer.parameters())
    assert float(told["Tokenizer"].split("M")[0]) == pytest.approx(count / 1e6, rel=0.01)
    assert told["Transformer"].endswith("3 layers, 4 classes")


def test_charts_of_stored_statistics(model, tmp_path):
    assert list(charts(model)) == ["cutoff_schedule"]
    model.pipe.save_pretrained(tmp_path / "tiny")
    codes = torch.arange(8)[:, None] % torch.arange(1, 13)  # position t uses min(t, 8) codes
    write_statistics(tmp_path / "tiny", codes, 32, torch.full((12,), math.log(8)))
    drawn = charts(Model.load(tmp_path / "tiny", "cpu"))
    assert drawn["codebook_use"].columns["entries_used"] == [min(t, 8) for t in range(1, 13)]
    assert drawn["next_token_entropy"].columns["entropy_bits"] == pytest.approx([3] * 12)


def test_facts_say_where_cutoffs_come_from(model, tmp_path):
    assert facts(model)["Cutoffs"] == "by alpha = 1.5"
    given = [3, 3, 4, 6, 6, 7, 8, 8, 9, 10, 12, 16]
    listed = Model("tiny", tiny_pipeline(dtype=torch.float32, tokenizer={"cutoffs": given}), "tiny")
    assert facts(listed)["Cutoffs"].endswith("3, 3, 4, 6, .. 16")


def test_measured_psnr_stands_beside_its_bound(model, tmp_path):
    assert "PSNR / Gaussian bound" not in facts(model)
    model.pipe.save_pretrained(tmp_path / "tiny")
    psnr, bound = [10.0 + k for k in range(12)], [9.5 + k for k in range(12)]
    write_statistics(tmp_path / "tiny", torch.zeros(5, 12, dtype=torch.long), 32, torch.zeros(12), psnr, bound)
    loaded = Model.load(tmp_path / "tiny", "cpu")
    drawn = charts(loaded)["prefix_psnr"].columns
    assert (drawn["psnr"], drawn["gaussian_bound"]) == (psnr, bound)
    said = "10.0 / 9.5 dB at k = 1, 21.0 / 20.5 dB at k = 12"
    assert facts(loaded)["PSNR / Gaussian bound"] == said
    texts = [b.value for b in build(loaded).blocks.values() if getattr(b, "elem_id", None) == "bands-law"]
    assert texts == [f"Cutoffs by alpha = 1.5. PSNR / Gaussian bound on held-out images: {said}."]


def test_mask_shows_what_is_open(model, monkeypatch):
    strips = []
    monkeypatch.setattr(StripEncoder, "encode", lambda self, tiles: strips.append(tiles) or "")
    value = mask_value(model)
    assert len(value["frames"]) == 12 and len(value["groups"][0]["captions"]) == len(strips[0])
    frequency, k = square_frequency(16), 6
    before, now = model.cutoffs[k - 2 : k]
    assert now > before
    mask = torch.from_numpy(strips[k - 1][0])
    assert set(mask[frequency >= now].tolist()) == {20} and set(mask[frequency < before].tolist()) == {140}
    assert set(mask[(frequency >= before) & (frequency < now)].tolist()) == {255}
    disc = strips[-1][1]
    assert set(disc.ravel().tolist()) == {0, 255} and len(set(strips[0][1].ravel().tolist())) == 1


def test_a_page_for_each_model(model, colour_model):
    demo = build(model, Model("tiny colour", colour_model.pipe, "models/colour"))
    assert [path for path, *_ in demo.pages] == ["", "tiny-colour"]
    names = {fn.api_name for fn in demo.fns.values() if fn.api_visibility == "public"}
    first, second = (sorted(name for name in names if name.endswith("_tiny_colour") == last) for last in (False, True))
    assert "generate" in first and second == sorted(f"{name}_tiny_colour" for name in first)
    sizes = {}  # the page that a component belongs to is the model's that it shows
    for block in demo.blocks.values():
        if getattr(block, "elem_id", None) == "mask":
            sizes[block.page] = block.value["image_size"]
    assert sizes == {"": 16, "tiny-colour": 24}
    assert len(TABS) == 5
