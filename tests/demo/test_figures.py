from pathlib import Path

import pytest

from spectralar.analysis import plots
from spectralar.analysis.chart import DARK, LIGHT
from spectralar.demo import figures
from spectralar.demo.figures import FORMATS, PAGE_COLOURS, chart_bytes, shown, tables


@pytest.fixture(scope="module")
def chart():
    return plots.cutoff_schedule([1, 1, 3, 8])


def test_a_chart_takes_the_colours_of_the_page(chart):
    svg = shown(chart)["svg"]
    assert svg.startswith("<svg") and "http" not in svg.replace("http://www.w3.org/", "")
    for colour, name in PAGE_COLOURS.items():
        assert colour not in svg and (name in svg) == (colour in chart.svg())
    assert LIGHT.background not in svg
    assert LIGHT.muted in chart.svg()  # the file to take away keeps its own


def test_further_series_take_those_of_the_page():
    svg = shown(plots.codebook_use([3, 4], [2.0, 3.0], 8))["svg"]
    assert "var(--series-1)" in svg and LIGHT.series[1] not in svg


def test_only_the_background_is_removed():
    svg = shown(plots.nested_squares([[0.0, -1], [-1, -2]], [1, 2]))["svg"]
    assert svg.count("#ffffff") >= 2  # the squares are white


@pytest.mark.parametrize(("name", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("csv", b"prefix_length,cutoff")])
def test_files(chart, name, start):
    assert name in FORMATS and chart_bytes(chart, name).startswith(start)


def test_no_other_formats(chart):
    with pytest.raises(ValueError, match="png, svg, csv, not as '__class__'"):
        chart_bytes(chart, "__class__")


def test_tables(chart):
    assert tables({"a": chart})["a"]["cutoff"] == [1, 1, 3, 8]


@pytest.mark.parametrize(("selector", "palette"), [(":root", LIGHT), (".dark", DARK)])
def test_the_page_has_the_colours_of_both_palettes(selector, palette):
    style = (Path(figures.__file__).parent / "style.css").read_text()
    colours = ", ".join(f"--series-{i}: {colour}" for i, colour in enumerate(palette.series[1:], start=1))
    assert f"{selector} {{ {colours.replace(', ', '; ')}; }}" in style
