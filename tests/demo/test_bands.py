import numpy as np
import pytest
import torch

from spectralar.analysis.contributions import energy, influence_matrix
from spectralar.analysis.statistics import code_marginals, write_statistics
from spectralar.demo.bands import FIGURES, INFLUENCE_DRAWS, INFLUENCE_IMAGES, MARGINAL_SAMPLES, Analysis, Influence
from spectralar.demo.model import Model
from spectralar.demo.source import Origins
from spectralar.spectral import band_energy, radial_power_spectrum


@pytest.fixture(scope="module")
def analysis(colour_model):
    return Analysis(colour_model, Origins(colour_model).picture("sample:1:3", None))


def test_figures_have_the_numbers_of_the_picture(analysis):
    charts = dict(analysis.charts())
    assert list(charts) == list(FIGURES)[:-1]
    image, frames = analysis.picture.image, analysis.frames
    columns = charts["band_energies"].columns
    opened = [k - 1 for k in columns["token"]]
    np.testing.assert_allclose(columns["energy_image"], band_energy(image, analysis.model.cutoffs)[opened], rtol=1e-5)
    np.testing.assert_allclose(
        columns["energy_reconstruction"], band_energy(frames[-1], analysis.model.cutoffs)[opened], rtol=1e-5
    )
    columns = charts["radial_spectra"].columns
    assert [name for name in columns if name.startswith("power_k")] == [f"power_k = {k}" for k in (2, 5, 10, 20)]
    np.testing.assert_allclose(columns["power_k = 10"], radial_power_spectrum(frames[9])[1], rtol=1e-5)
    columns = charts["contributions"].columns
    step = torch.cat([frames[:1], frames[1:] - frames[:-1]])
    total = np.add(columns["energy_refining"], columns["energy_opening"])
    np.testing.assert_allclose(total, energy(step), rtol=1e-4)


def test_scrubber_has_a_strip_for_every_token(analysis):
    value = analysis.value()
    assert len(value["frames"]) == 20
    (series,) = value["charts"][0]["series"]
    share = analysis.opening / (analysis.refining + analysis.opening)
    np.testing.assert_allclose(series["values"], share, atol=1e-4)


def measured(model):
    influence = Influence(model, Origins(model))
    parts = [part for part, _ in influence.steps()]
    assert parts == sorted(parts) and parts[0] == 0 and parts[-1] == 1
    return influence


def matrix_of(influence):
    n = influence.model.num_tokens
    return torch.tensor(influence.charts["influence"].columns["influence"]).view(n, -1)


def test_influence_with_marginals_of_samples(model, monkeypatch):
    influence = measured(model)
    assert influence.marginals == f"{MARGINAL_SAMPLES} sampled images"
    classes = [i * 4 // MARGINAL_SAMPLES for i in range(MARGINAL_SAMPLES)]  # all alike often
    codes = torch.tensor(Origins(model).codes(classes, seed=0))
    some = codes[:: MARGINAL_SAMPLES // INFLUENCE_IMAGES]
    expected = influence_matrix(model.pipe.tokenizer, some, code_marginals(codes, 32), INFLUENCE_DRAWS)
    torch.testing.assert_close(matrix_of(influence), expected, rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(influence, "_measure", lambda *arguments: pytest.fail("measured twice"))
    assert list(influence.steps()) == []


def test_influence_goes_on_where_a_visitor_has_left_it(model):
    influence = Influence(model, Origins(model))
    steps = influence.steps()
    assert [next(steps)[1] for _ in range(5)][-1] == "Token 4 of 12"
    steps.close()
    assert [text for _, text in influence.steps()] == [f"Token {k} of 12" for k in range(5, 13)]
    torch.testing.assert_close(matrix_of(influence), matrix_of(measured(model)), rtol=0, atol=0)


def test_influence_with_marginals_of_held_out_images(model, tmp_path):
    model.pipe.save_pretrained(tmp_path / "tiny")
    certain = torch.full((6, 12), 3)  # a code that is the same on all images: nothing to be told from it
    write_statistics(tmp_path / "tiny", certain, 32, torch.zeros(12))
    saved = Model.load(tmp_path / "tiny", "cpu")
    influence = measured(saved)
    assert influence.marginals == "held-out images"
    codes = torch.tensor(Origins(saved).codes([i * 4 // INFLUENCE_IMAGES for i in range(INFLUENCE_IMAGES)], seed=0))
    moved = matrix_of(influence).sum(dim=1) > 1e-9
    assert moved.tolist() == (codes != 3).any(dim=0).tolist() and moved.any()
