"""The report as one HTML file that needs nothing else: pictures inside, curves as SVG, light and dark."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import Any

from markdown import markdown as to_html

from spectralar.analysis.chart import DARK, LIGHT, Chart, Palette

from .report import markdown, shown
from .report_figures import charts

TEMPLATE = Path(__file__).with_name("report_page.html")


def page(results: dict[str, Any], folder: Path) -> str:
    """The whole report, with the sheets in folder/figures."""
    drawn = charts(results, inline)

    def picture(match: re.Match[str]) -> str:
        text, name = match["text"], match["name"]
        sheet = folder / "figures" / f"{name}.png"
        if name in drawn:
            inside = drawn[name]
        elif sheet.exists():
            data = base64.b64encode(sheet.read_bytes()).decode()
            inside = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        else:
            inside = "This figure could not be drawn."
        kind = "chart" if name in drawn else "sheet"
        return f'<figure class="{kind}">{inside}<figcaption>{text}</figcaption></figure>'

    body = to_html(markdown(results), extensions=["tables", "toc"], extension_configs={"toc": {"baselevel": 1}})
    body = re.sub(r'<p><img alt="(?P<text>[^"]*)" src="figures/(?P<name>[^"]*)\.png" /></p>', picture, body)
    summary = "".join(f"<div><b>{value}</b><span>{text}</span></div>" for text, value in tiles(results).items())
    body = body.replace("</h2>", f'</h2><div class="tiles">{summary}</div>', 1)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    headings = re.findall(r'<h3 id="([^"]*)">(.*?)</h3>', body)
    values = {
        "TITLE": html.escape(f"Evaluation of {results['model']['name']}"),
        "LIGHT": _variables(LIGHT), "DARK": _variables(DARK),
        "NAVIGATION": "".join(f'<a href="#{place}">{text}</a>' for place, text in headings),
        "BODY": body,
    }  # fmt: skip
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def tiles(results: dict[str, Any]) -> dict[str, str]:
    """The figures that are asked for first, by what they are."""
    judge = next(iter(results["judges"]))
    scale = results["best_guidance_scale"]
    best = next(m for m in results["samples"] if m["guidance_scale"] == scale)["judged"][judge]
    full = results["reconstruction"]
    found = {
        "PSNR, all tokens": f"{full['psnr']:.2f} dB",
        "reconstruction FD": f"{full['judged'][judge]['fd']:.2f}",
        f"FD of samples, guidance {scale:g}": f"{best['fd']:.2f}",
    }
    if best["recall"] is not None:
        found["recall"] = f"{best['recall']:.2f}"
    if best["accuracy"] is not None:
        found["class accuracy of samples"] = shown(best["accuracy"], 1, True)
    return found


def inline(chart: Chart) -> str:
    """A chart as SVG in the page's own colours."""
    svg = chart.svg()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(f"fill: {LIGHT.background}", "fill: none", 1)  # the figure's background, drawn first
    for name, colour in _colours(LIGHT).items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _colours(palette: Palette) -> dict[str, str]:
    series = {f"series-{i}": colour for i, colour in enumerate(palette.series)}
    return {"ink": palette.ink, "muted": palette.muted, "grid": palette.grid, **series}


def _variables(palette: Palette) -> str:
    colours = {"background": palette.background, **_colours(palette)}
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
