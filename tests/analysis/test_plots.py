"""Every chart shows the numbers it was given, in the figure and in its table, in both palettes and from threads."""

import csv
import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from spectralar.analysis import plots
from spectralar.analysis.chart import DARK, LIGHT, Chart
from spectralar.spectral import band_energy, bands, cutoff_schedule, dct2, radial_power_spectrum

SIZE, N, K = 8, 12, 64
FREQUENCIES = round(math.sqrt(2) * (SIZE - 1)) + 1
CUTOFFS = cutoff_schedule(SIZE, N, 1.25)
OPENING = [k for k, (low, high) in enumerate(bands(CUTOFFS)) if high > low]
IMAGE = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
DIFFERENCES = torch.randn(N, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
INFLUENCE = torch.rand(N, FREQUENCIES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
STRIP = np.arange(3 * SIZE * SIZE * 3).reshape(3, SIZE, SIZE, 3).astype(np.uint8)
PSNR = {"reconstruction": [20.0 + k for k in range(N)], "JPEG": [None] * 10 + [21.5, 22.5], "WebP": [None] * N}
SSIM = {"reconstruction": [k / N for k in range(N)], "JPEG": [None] * 10 + [0.5, 0.6], "WebP": [None] * N}

CHARTS = {
    "cutoff_schedule": lambda p: plots.cutoff_schedule(CUTOFFS, p),
    "nested_squares": lambda p: plots.nested_squares(dct2(IMAGE).abs().mean(dim=0).log10(), CUTOFFS, p),
    "band_energies": lambda p: plots.band_energies({"image": band_energy(IMAGE, CUTOFFS)}, CUTOFFS, p),
    "radial_spectra": lambda p: plots.radial_spectra({"image": radial_power_spectrum(IMAGE)[1]}, p),
    "contribution_gallery": lambda p: plots.contribution_gallery(
        DIFFERENCES, torch.arange(N) * 1.0, torch.full((N,), 3.0), CUTOFFS, p
    ),
    "influence": lambda p: plots.influence(INFLUENCE, CUTOFFS, p),
    "quality": lambda p: plots.quality(PSNR, SSIM, p),
    "codebook_use": lambda p: plots.codebook_use(torch.arange(N) + 9, torch.arange(N) + 4.5, K, p),
    "image_strip": lambda p: plots.image_strip(STRIP, list("abc"), {"letter": list("abc"), "mean": [1, 2, 3]}, p),
    "next_token_entropy": lambda p: plots.next_token_entropy(torch.linspace(1, 4, N), K, p),
}


@pytest.fixture(params=CHARTS)
def draw(request):
    return CHARTS[request.param]


def table(chart: Chart) -> dict[str, list[str]]:
    """The chart's CSV by column."""
    heading, *rows = csv.reader(io.StringIO(chart.csv()))
    return {name: [row[i] for row in rows] for i, name in enumerate(heading)}


def curve(chart: Chart, label: str, axes: int = 0) -> np.ndarray:
    """(x, y) of the line with a label: (2, n)."""
    (line,) = (line for line in chart.axes[axes].lines if line.get_label() == label)
    return np.array(line.get_data(), dtype=float)


# What holds for all ----------------------------------------------------------------------------------------


def test_files_of_a_chart(draw):
    chart = draw(DARK)
    picture = Image.open(io.BytesIO(chart.png(dpi=50)))
    assert picture.size == pytest.approx(chart.get_size_inches() * 50, abs=1)
    assert picture.convert("RGB").getpixel((0, 0)) == (2, 6, 23)  # the palette's background
    dark, light = chart.svg().lower(), draw(LIGHT).svg().lower()
    for ours, others, palette in ((dark, light, DARK), (light, dark, LIGHT)):
        assert palette.muted in ours and palette.muted not in others
    root = ElementTree.fromstring(chart.svg())
    text = " ".join(root.itertext())
    for axes in chart.axes:
        for name in (axes.get_xlabel(), axes.get_ylabel()):
            assert name in text  # as text, not as outlines
    columns = table(chart)
    assert list(columns) == list(chart.columns)
    for name, cells in columns.items():
        expected = chart.columns[name]
        assert len(cells) == len(expected) > 1
        if isinstance(expected[0], str):
            assert cells == expected
            continue
        expected = [math.nan if value is None else value for value in expected]
        np.testing.assert_allclose([float(cell or "nan") for cell in cells], expected, rtol=1e-6)


def test_colours_of_a_palette_are_told_apart():
    for palette in (LIGHT, DARK):
        colours = [palette.background, palette.ink, palette.muted, palette.grid, *palette.series]
        assert len(set(colours)) == len(colours)
        assert all(len(colour) == 7 and colour == colour.lower() for colour in colours)


def test_threads_draw_side_by_side_and_leave_no_settings_behind():
    before = dict(matplotlib.rcParams)
    draw = [CHARTS[name] for name in ("cutoff_schedule", "next_token_entropy")] * 3
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda chart: chart(LIGHT).svg(), draw))
    assert files[0] == files[2] == files[4] and files[1] == files[3] == files[5]
    assert all("<text" in file for file in files)
    assert dict(matplotlib.rcParams) == before


def test_one_thread_draws(monkeypatch):
    """Matplotlib keeps open fonts for each thread that has drawn: a server would fill up."""
    threads = set()
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kw: (threads.add(threading.get_ident()), save(*args, **kw)))
    chart = CHARTS["cutoff_schedule"](LIGHT)
    for _ in range(3):
        thread = threading.Thread(target=chart.svg)
        thread.start()
        thread.join()
    assert len(threads) == 1


def test_pyplot_keeps_no_figure():
    """It would keep them until it is told to close them: a server would fill up."""
    CHARTS["cutoff_schedule"](LIGHT).png(40)
    assert pyplot.get_fignums() == []


# What each one shows ---------------------------------------------------------------------------------------


def test_schedule():
    chart = CHARTS["cutoff_schedule"](LIGHT)
    assert curve(chart, "this model").tolist() == [list(range(N + 1)), [0, *CUTOFFS]]
    columns = chart.columns
    assert sum(columns["coefficients_opened"]) == SIZE**2
    assert [columns["cutoff"][k] - columns["band_from"][k] > 0 for k in range(N)] == [k in OPENING for k in range(N)]


def test_squares_have_the_cutoffs_of_their_labels():
    chart = CHARTS["nested_squares"](LIGHT)
    axes = chart.axes[0]
    sides = [patch.get_width() for patch in axes.patches]
    labels = [int(text.get_text()) for text in axes.texts]
    assert labels[-1] == N and sides[-1] == SIZE and len(labels) > 4
    assert sides == [CUTOFFS[k - 1] for k in labels] == [patch.get_height() for patch in axes.patches]
    assert all(k == N or CUTOFFS[k] > CUTOFFS[k - 1] for k in labels)  # the longest prefix of that cutoff
    rows = zip(*chart.columns.values(), strict=True)
    for u, v, value, token in rows:
        assert bands(CUTOFFS)[token - 1][0] <= max(u, v) < CUTOFFS[token - 1]
        assert value == pytest.approx(float(dct2(IMAGE)[:, u, v].abs().mean().log10()))


def test_band_energies_leave_out_empty_bands():
    chart = CHARTS["band_energies"](LIGHT)
    assert len(OPENING) < N
    expected = band_energy(IMAGE, CUTOFFS)[OPENING]
    np.testing.assert_allclose(curve(chart, "image")[1], expected)
    assert chart.columns["token"] == [k + 1 for k in OPENING]


def test_the_line_of_natural_images_has_slope_minus_two():
    frequency = np.arange(20)
    natural = np.r_[5.0, 7.0 / frequency[1:] ** 2.0]
    chart = plots.radial_spectra({"image": natural, "k = 1": np.where(frequency < 3, natural, 0)})
    np.testing.assert_allclose(curve(chart, "1/f²")[1], natural[1:], rtol=1e-12)
    np.testing.assert_allclose(curve(chart, "image"), [frequency[1:], natural[1:]])
    assert np.isnan(curve(chart, "k = 1")[1]).tolist() == [False] * 2 + [True] * 17  # a gap where nothing is
    assert chart.columns["one_over_f_squared"][0] is None
    assert (chart.axes[0].get_xscale(), chart.axes[0].get_yscale()) == ("log", "log")


def test_gallery_shares():
    refining, opening = torch.tensor([0.0, 1, 3, 0]), torch.tensor([2.0, 1, 0, 0])
    chart = plots.contribution_gallery(DIFFERENCES[:4], refining, opening, CUTOFFS)
    assert chart.columns["share_opening"] == [1, 0.5, 0, 0]
    opens, refine = chart.axes[0].collections
    widths = [[np.ptp(path.vertices[:, 0]) / 0.7 for path in part.get_paths()] for part in (opens, refine)]
    np.testing.assert_allclose(widths, [[1, 0.5, 0, 0], [0, 0.5, 1, 1]], atol=1e-12)
    for image, delta in zip(chart.axes[0].images, DIFFERENCES[:4].mean(dim=1), strict=True):
        np.testing.assert_allclose(image.get_array(), delta / delta.abs().max(), rtol=1e-12)
        assert image.get_clim() == (-1, 1)


def test_strip_shows_the_images_as_they_are():
    images = np.concatenate([STRIP] * 4)[:9]
    chart = plots.image_strip(images, [str(i) for i in range(9)], {"i": list(range(9))})
    for image, pixels in zip(chart.axes[0].images, images, strict=True):
        np.testing.assert_array_equal(image.get_array(), pixels)
    corners = [tuple(image.get_extent()[::3]) for image in chart.axes[0].images]  # left, top
    assert len(set(corners)) == 9 and len({top for _, top in corners}) == 2  # eight in a row
    grey = plots.image_strip(STRIP[..., 0], list("abc"), {"i": [1, 2, 3]})
    assert grey.axes[0].images[0].get_clim() == (0, 255)


def test_influence_is_drawn_as_it_is_on_a_log_scale():
    matrix = INFLUENCE.clone()
    matrix[0] = 0
    chart = plots.influence(matrix, CUTOFFS)
    (image,) = chart.axes[0].images
    np.testing.assert_allclose(image.get_array()[1:], matrix[1:])
    assert image.norm.vmax == matrix.max() and image.norm(image.get_array()).data[0].max() <= 0
    (steps,) = chart.axes[0].patches
    assert steps.get_data().values.tolist() == [r - 0.5 for r in CUTOFFS]
    rows = list(zip(*chart.columns.values(), strict=True))
    assert rows[FREQUENCIES + 3] == (2, 3, float(matrix[1, 3]))


def test_quality_says_what_cannot_go_so_low():
    chart = CHARTS["quality"](LIGHT)
    assert curve(chart, "reconstruction").tolist() == [list(range(1, N + 1)), PSNR["reconstruction"]]
    assert np.isnan(curve(chart, "JPEG", 1)[1]).tolist() == [True] * 10 + [False] * 2
    assert "WebP: cannot go this low" in chart.svg()
    assert table(chart)["ssim_JPEG"] == [""] * 10 + ["0.5", "0.6"]
    perfect = plots.quality({"low-pass": [20.0, 100.0]}, {"low-pass": [0.5, 1.0]})
    assert perfect.axes[0].get_ylim()[1] < 30 and perfect.columns["psnr_low-pass"] == [20, 100]


def test_codebook_and_entropy_against_their_limits():
    use, entropy = CHARTS["codebook_use"](LIGHT), CHARTS["next_token_entropy"](LIGHT)
    assert curve(use, "seen at least once")[1].tolist() == list(range(9, 9 + N))
    assert curve(use, f"all {K}")[1].tolist() == [K, K]
    np.testing.assert_allclose(curve(entropy, "model")[1], np.linspace(1, 4, N) / math.log(2), rtol=1e-6)
    assert curve(entropy, f"log₂ {K}")[1].tolist() == [6, 6]
