"""The evaluation of few images, of one class, of names that are anything; and what a figure that fails costs."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers import tiny_pipeline
from train.evaluate import main
from train.evaluation import report_figures
from train.evaluation.classifier import Classifier, save_classifier
from train.evaluation.report import code, plain

ODD = [
    "$a_$",
    "100% #1",
    "<b>bold",
    "\"q'",
    "\N{GRINNING FACE}",
    "שלום",
    "y" * 200,
    "Case",
    "case",
    "a | b",
    "`c`",
]


@pytest.fixture
def folder_of(tmp_path):
    """Makes a pipeline, a judge, a preset and its images: so many a class to train on, and held out."""

    def make(classes: list[str], train: int, heldout: int, name: str = "tiny"):
        random = np.random.default_rng(0)
        for split, count in (("train", train), ("test", heldout)):
            for label in classes:
                (tmp_path / "images" / split / label).mkdir(parents=True)
                for i in range(count):
                    pixels = random.integers(0, 256, (16, 16), dtype=np.uint8)
                    Image.fromarray(pixels).save(tmp_path / "images" / split / label / f"{i}.png")
        data = {"source": str(tmp_path / "images"), "image_size": 16, "channels": 1, "cache": str(tmp_path / "cache")}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"name": name, "data": data}))
        names = sorted(classes)
        pipe = tiny_pipeline(
            dtype=torch.float32, id2label=dict(enumerate(names)), transformer={"num_classes": len(names)}
        )
        pipe.save_pretrained(tmp_path / "pipeline")
        torch.manual_seed(1)
        judge = Classifier(16, 1, num_classes=len(names), width=4)
        save_classifier(judge, tmp_path / "classifier", class_names=names, accuracy=0.25)
        return tmp_path

    return make


def evaluate(folder, *options) -> dict:
    arguments = [
        folder / "pipeline", "--config", folder / "tiny.yaml", "--samples", 10, "--prefix-images", 10, "--threads", 1,
        "--perceptual", "none", *options, "--guidance-scales", 1,
    ]  # fmt: skip
    main([str(argument) for argument in arguments])
    return json.loads((folder / "evaluation" / "results.json").read_text())


@pytest.mark.parametrize("classes, train, heldout", [(["a"], 3, 2), (["a", "b"], 1, 40), (["a"], 40, 3)])
def test_what_few_images_allow_is_measured(folder_of, capsys, classes, train, heldout):
    folder = folder_of(classes, train, heldout)
    results = evaluate(folder)
    counts = f"{len(classes) * heldout} held-out and {len(classes) * train} training images"
    said = f"precision, recall, density, coverage take 6 images of each kind: with {counts} they are left out."
    out = capsys.readouterr().out
    assert said in out and out.index(said) < out.index("encoding")
    judged = results["samples"][0]["judged"]["classifier"]
    assert judged["fd"] > 0 and judged["recall"] is None and judged["errors"]["recall"] is None
    assert results["neighbours"]["images"] == {
        "samples": 10, "heldout": len(classes) * heldout, "train": len(classes) * train
    }  # fmt: skip
    page = (folder / "evaluation" / "report.html").read_text()
    assert "could not be drawn" not in page and "recall</span>" not in page


def test_the_floor_is_of_the_samples_classes(folder_of):
    folder = folder_of(["a", "b"], 40, 12)
    for path in sorted((folder / "images" / "train" / "b").iterdir())[3:]:
        path.unlink()
    results = evaluate(folder, "--classes", "even", "--samples", 20)
    floor = results["references"]["train"]["classifier"]
    assert floor["images"] == 10 + 3
    assert floor["manifold_images"] == results["samples"][0]["judged"]["classifier"]["manifold_images"] == 13


def test_too_few_images_are_said_at_once(folder_of):
    folder = folder_of(["a"], 1, 1)
    with pytest.raises(SystemExit, match="take two images of each kind or more, and there are 1 held-out and 1"):
        evaluate(folder)
    assert not (folder / "evaluation").exists()


def test_names_may_be_anything(folder_of):
    folder = folder_of(ODD, 2, 2, name="$x_$ <i>&amp; `y` | *z*")
    evaluate(folder)
    page, text = ((folder / "evaluation" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "could not be drawn" not in page and "<i>" not in page
    assert "Evaluation of $x_$ &lt;i&gt;&amp;amp; `y` | *z*" in page.replace("&#36;", "$").replace("&#124;", "|")
    figures = {path.stem for path in (folder / "evaluation" / "figures").iterdir()}
    assert figures >= {"samples-1", "sample-prefixes", "reconstructions", "neighbours", "closest", "guidance"}
    assert all(f"figures/{name}.png" in text for name in figures)


def test_names_in_figures_are_literal(tmp_path):
    """$a_$ would not parse as mathematics, and $a$ would lose its signs."""
    images = torch.zeros(2, 1, 1, 8, 8)
    drawn = []
    for i, names in enumerate((["$a$", "$a_$"], ["a", "a_"])):
        report_figures.draw_grid(images, names, ["$k$"], tmp_path / f"{i}.png")
        drawn.append(np.asarray(Image.open(tmp_path / f"{i}.png")))
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("broken", ["_guidance", "draw_grid"])
def test_a_figure_that_fails_costs_that_figure_alone(folder_of, monkeypatch, capsys, broken):
    def fail(*arguments, **options):
        raise RuntimeError("no such glyph\nand more")

    where = "train.evaluation.report_figures" if broken == "_guidance" else "train.evaluation.pictures"
    monkeypatch.setattr(f"{where}.{broken}", fail)
    folder = folder_of(["a", "b"], 4, 4)
    results = evaluate(folder)
    assert results["best_guidance_scale"] == 1 and results["samples"]
    page = (folder / "evaluation" / "report.html").read_text()
    left_out = 1 if broken == "_guidance" else 5
    assert page.count("This figure could not be drawn.") == left_out
    assert page.count("<svg") == 6 - (broken == "_guidance")
    assert "is left out, RuntimeError: no such glyph." in capsys.readouterr().out


def test_results_are_written_before_figures_are_drawn(folder_of, monkeypatch):
    """Even where drawing ends the program."""

    def die(*arguments, **options):
        raise SystemExit("killed")

    monkeypatch.setattr("train.evaluation.pictures.draw_grid", die)
    folder = folder_of(["a", "b"], 4, 4)
    with pytest.raises(SystemExit, match="killed"):
        evaluate(folder)
    assert json.loads((folder / "evaluation" / "results.json").read_text())["samples"]


@pytest.mark.parametrize("text", ODD)
def test_text_is_shown_as_it_is(text):
    from html import unescape

    from markdown import markdown

    assert unescape(markdown(plain(text))) == f"<p>{text}</p>"
    assert unescape(markdown(f"of {code(text)}.")) == f"<p>of <code>{text}</code>.</p>"
    cells = unescape(markdown(f"| a |\n| --- |\n| {plain(text)} |", extensions=["tables"]))
    assert f"<td>{text}</td>" in cells
