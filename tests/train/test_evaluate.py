"""The evaluation from end to end on a tiny pipeline, checked against the same numbers computed apart."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from spectralar import SpectralARPipeline
from spectralar.analysis.chart import LIGHT
from spectralar.analysis.quality import psnr, ssim
from spectralar.analysis.statistics import read_statistics
from spectralar.spectral import gaussian_psnr, nested_targets
from tests.helpers import tiny_pipeline
from train import evaluate as program
from train.configs.reading import load_config
from train.data.codes import shard_identity
from train.data.images import load_images, to_float
from train.data.variances import dct_variances
from train.evaluate import main
from train.evaluation import sample_bank
from train.evaluation.classifier import Classifier, load_classifier, save_classifier
from train.evaluation.judges import ClassifierJudge, compare
from train.evaluation.metrics import frechet_distance
from train.evaluation.report import markdown

CLASSES = ["bag", "boot", "shirt", "sneaker"]
SAMPLES, MANY, SCALES = 22, 40, [1.0, 2.5]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pipeline, a judge, a preset and its images: 12 a class to train on, 8 held out, which are far brighter."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for split, count, light in (("train", 12, 0), ("test", 8, 100)):
        for label, name in enumerate(CLASSES):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(light, 156 + light, (16, 16))
                pixels[4 * label : 4 * label + 4] //= 2
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / name / f"{i}.png")
    data = {"source": str(folder / "images"), "image_size": 16, "channels": 1, "cache": str(folder / "cache")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"name": "tiny", "data": data}))
    pipe = tiny_pipeline(dtype=torch.float32, id2label=dict(enumerate(CLASSES)))
    pipe.save_pretrained(folder / "pipeline")
    torch.manual_seed(1)
    judge = Classifier(16, 1, num_classes=4, width=4)
    images = load_images(load_config(str(folder / "tiny.yaml")).data, "train")
    optimizer = torch.optim.AdamW(judge.parameters(), lr=0.01)
    for _ in range(30):  # so that it does not say the same of all images
        loss = torch.nn.functional.cross_entropy(judge(to_float(images.images)), images.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_classifier(judge, folder / "classifier", class_names=CLASSES, accuracy=0.25)
    return folder


def assert_same(result: dict, expected: dict, rel: float) -> None:
    """Of one judge's measures and their errors."""
    result, expected = dict(result), dict(expected)
    assert result.pop("errors") == pytest.approx(expected.pop("errors"), rel=10 * rel)
    assert result == pytest.approx(expected, rel=rel)


def evaluate(files, output, *options) -> dict:
    arguments = [
        files / "pipeline", "--config", files / "tiny.yaml", "--output", output,  # the judge lies beside the pipeline
        "--samples", SAMPLES, "--images", 1000, "--prefix-images", 10, "--threads", 1, *options,
        *([] if "--perceptual" in options else ["--perceptual", "none"]),
        *([] if "--guidance-scales" in options else ["--guidance-scales", *SCALES]),
    ]  # fmt: skip
    main([str(argument) for argument in arguments])
    return json.loads((output / "results.json").read_text())


class MeanDistance(torch.nn.Module):
    """A perceptual distance that is known: how far the images' means are apart."""

    def forward(self, images, targets):
        return (images - targets).mean(dim=(1, 2, 3)).abs()


@pytest.fixture(scope="module")
def evaluated(files, tmp_path_factory):
    """A run with two judges, the second one a stand-in that knows no classes and gives no map."""
    output = tmp_path_factory.mktemp("evaluated")

    def stand_in(name, *, device, classifier, class_names):
        judge = ClassifierJudge(classifier, device)
        if name == "inception":
            look, nothing = judge._look, torch.empty(1, 0)

            def poorer(images):
                features, _, logits, _ = look(images)
                return features[:, :3], nothing.expand(len(images), 0), logits, nothing.expand(len(images), 0)

            judge._look = poorer
            judge.card = {"title": "a stand-in", "sha256": "0" * 64, "features": 3, "known_classes": 0}
        return judge

    patch = pytest.MonkeyPatch()
    patch.setattr(sample_bank, "SHARD", 8)
    patch.setattr(program, "make_judge", stand_in)
    results = evaluate(files, output, "--npz", "--judge", "classifier", "inception")
    patch.undo()
    return output, results


@pytest.fixture(scope="module")
def all_prefixes(files, tmp_path_factory):
    """Results with prefixes and neighbours of all images: their order, the evaluation's own, matters no more."""
    patch = pytest.MonkeyPatch()
    patch.setattr(program, "make_perceptual_loss", lambda name: MeanDistance())
    options = ["--prefix-images", 1000, "--samples", MANY, "--perceptual", "lpips-vgg",
               f"data.mix.dark.source={files / 'images'}", "data.mix.dark.eval_split=train",
               "data.mix.dark.train_split=test"]  # fmt: skip
    results = evaluate(files, tmp_path_factory.mktemp("all"), *options)
    patch.undo()
    return results


@pytest.fixture(scope="module")
def truth(files):
    """The pipeline, the judge, and both splits, all read anew: held-out images and labels, codes."""
    pipe = SpectralARPipeline.from_pretrained(files / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    data = load_config(str(files / "tiny.yaml")).data
    return pipe, ClassifierJudge(files / "classifier", torch.device("cpu")), {
        split: load_images(data, split) for split in ("train", "eval")
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- numbers


def test_reconstruction_is_that_of_all_held_out_images(all_prefixes, truth):
    result, (pipe, judge, splits) = all_prefixes["reconstruction"], truth
    x = to_float(splits["eval"].images)
    with torch.no_grad():
        decoded = pipe.tokenizer.decode(pipe.tokenizer.encode(x))
    assert result["images"] == len(x) == 32
    assert result["psnr"] == pytest.approx(float(psnr(decoded, x).mean()), rel=1e-5)
    assert result["ssim"] == pytest.approx(float(ssim(decoded, x).mean()), abs=1e-5)
    assert result["errors"]["psnr"] == pytest.approx(float(psnr(decoded, x).std()) / 32**0.5, rel=1e-4)
    expected = compare(judge(x), judge(decoded), splits["eval"].labels, 32, paired=True)
    assert_same(result["judged"]["classifier"], expected, rel=1e-4)


def test_every_prefix_length_is_measured_against_the_image_and_its_low_pass(evaluated, all_prefixes, truth):
    pipe, _, splits = truth
    tokenizer, x = pipe.tokenizer, to_float(splits["eval"].images)
    result = evaluated[1]["prefixes"]
    assert result["images"] == 10
    assert result["length"] == list(range(1, 13)) and result["cutoff"] == list(tokenizer.cutoffs)
    assert result["psnr_image"][-1] == pytest.approx(result["psnr_low_pass"][-1])  # x_N is the image
    assert result["shown"] == [m["length"] for m in result["judged"]["classifier"]] == [1, 2, 4, 8, 12]
    assert all_prefixes["prefixes"]["images"] == 32
    with torch.no_grad():
        frames = tokenizer.decode(tokenizer.encode(x), list(range(1, 13)))
    targets = nested_targets(x, tokenizer.cutoffs)
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        for against, reference in (("image", x.unsqueeze(1).expand_as(targets)), ("low_pass", targets)):
            expected = measure(frames, reference).mean(dim=0).tolist()
            assert all_prefixes["prefixes"][f"{name}_{against}"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_other_sources_of_the_tokenizer_have_figures_of_their_own(evaluated, all_prefixes, truth):
    """Here the training split stands for one."""
    pipe, _, splits = truth
    x, result = to_float(splits["train"].images), all_prefixes["other_sources"]["dark"]
    with torch.no_grad():
        codes = pipe.tokenizer.encode(x)
        frames = pipe.tokenizer.decode(codes, list(range(1, 13)))
    assert result["reconstruction"]["images"] == len(x) == 48 and result["heldout"] == "train"
    assert result["reconstruction"]["psnr"] == pytest.approx(float(psnr(frames[:, -1], x).mean()), rel=1e-5)
    expected = psnr(frames, x.unsqueeze(1).expand_as(frames)).mean(dim=0).tolist()
    assert result["prefixes"]["psnr_image"] == pytest.approx(expected, rel=1e-4)
    assert result["codebook"]["usage"] == pytest.approx(len(codes.unique()) / 32)
    text = markdown(all_prefixes)
    assert "### Also learnt by the tokenizer: dark" in text and "split 'train' of images: PSNR" in text
    assert f"| 8 | {expected[7]:.2f} |" in text.split("learnt by the tokenizer: dark")[1]
    assert evaluated[1]["other_sources"] == {} and "Also learnt" not in (evaluated[0] / "report.md").read_text()


def test_samples_have_the_classes_of_the_held_out_images(files, tmp_path):
    """Of uneven ones in their proportions, unless they are to be even."""
    for path in sorted((files / "images" / "test").rglob("*.png")):
        if path.parent.name == "bag" or path.stem in "01":
            (tmp_path / "images" / "test" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "images" / "test" / path.parent.name)
    shutil.copytree(files / "images" / "train", tmp_path / "images" / "train")
    for classes, counts in (("heldout", [12, 3, 3, 3]), ("even", [6, 5, 5, 5])):
        results = evaluate(
            files, tmp_path / classes, f"data.source={tmp_path / 'images'}", "--classes", classes,
            "--guidance-scales", 1, "--samples", 21, "--temperature", 0.8,
        )  # fmt: skip
        shards = sorted((tmp_path / classes).rglob("guidance-1/*"))
        assert {shard_identity(path)["temperature"] for path in shards} == {"0.8"}
        assert torch.cat([load_file(path)["labels"] for path in shards]).bincount().tolist() == counts
        text = " ".join((tmp_path / classes / "report.md").read_text().split())
        assert {"heldout": "in the proportions of the held-out images", "even": "every class equally often"}[
            classes
        ] in text
        assert results["data"]["sampled_classes"] == classes
        assert results["temperature"] == 0.8 and "Sampling: temperature 0.8, no top-k" in text


@torch.no_grad()
def test_the_mean_error_of_prefixes_stands_beside_the_gaussian_bound(evaluated, all_prefixes, truth):
    pipe, _, splits = truth
    x, result = to_float(splits["eval"].images), all_prefixes["prefixes"]
    frames = pipe.tokenizer.decode(pipe.tokenizer.encode(x), [1, 4]).clamp(-1, 1)  # (n, 2, C, H, H)
    error = ((frames - x.unsqueeze(1)) / 2).square().mean(dim=(0, 2, 3, 4))
    measured = [result["psnr_mean_error"][k - 1] for k in (1, 4)]
    assert measured == pytest.approx((-10 * error.log10()).tolist(), abs=1e-3)
    bound = gaussian_psnr(dct_variances([splits["train"]]), pipe.tokenizer.prefix_bits).tolist()
    assert result["gaussian_bound"] == pytest.approx(bound, abs=1e-6)
    kept = read_statistics(evaluated[0])
    assert kept.gaussian_psnr.tolist() == pytest.approx(bound, abs=1e-4)
    assert kept.psnr.tolist() == pytest.approx(evaluated[1]["prefixes"]["psnr_mean_error"], abs=1e-4)


def test_perceptual_distances_are_to_the_image_and_to_its_low_pass(all_prefixes, truth):
    pipe, _, splits = truth
    x, result = to_float(splits["eval"].images), all_prefixes["perceptual"]
    assert result["network"] == "lpips-vgg" and not result["trained_on_it"] and result["images"] == 32
    with torch.no_grad():
        frames = pipe.tokenizer.decode(pipe.tokenizer.encode(x), [1, 2, 4, 8, 12])
    targets = nested_targets(x, pipe.tokenizer.cutoffs)[:, [0, 1, 3, 7, 11]]
    for to, reference in (("image", x.unsqueeze(1)), ("low_pass", targets)):
        distances = (frames - reference).mean(dim=(2, 3, 4)).abs()
        assert result[to] == pytest.approx(distances.mean(dim=0).tolist(), rel=1e-3, abs=1e-6)
        assert result[f"{to}_errors"] == pytest.approx((distances.std(dim=0) / 32**0.5).tolist(), rel=1e-3, abs=1e-6)


def test_judged_prefixes_are_compared_with_low_passes_of_the_same_cutoff(all_prefixes, truth):
    pipe, judge, splits = truth
    x, labels = to_float(splits["eval"].images), splits["eval"].labels
    generators = [torch.Generator().manual_seed(i) for i in range(MANY)]
    classes = torch.arange(MANY) % 4
    codes = pipe(classes, guidance_scale=2.5, generator=generators, output_type="latent").codes
    for column, k in enumerate((1, 2, 4, 8, 12)):
        target = judge(nested_targets(x, pipe.tokenizer.cutoffs)[:, k - 1])
        rebuilt = judge(pipe.tokenizer.decode(pipe.tokenizer.encode(x), k).detach())
        generated = judge(pipe.tokenizer.decode(codes[:32], k).detach())  # as many as there are images
        assert all_prefixes["prefixes"]["judged"]["classifier"][column] == pytest.approx(
            {
                "length": k, "accuracy_low_pass": target.accuracy(labels), "accuracy": rebuilt.accuracy(labels),
                "fd": frechet_distance(target.features, rebuilt.features),
            },
            rel=1e-3, abs=1e-6,
        )  # fmt: skip
        measured = all_prefixes["samples"][1]["prefixes"]["classifier"][column]
        assert measured["images"] == 32
        assert measured["accuracy"] == generated.accuracy(classes[:32])
        assert measured["fd"] == pytest.approx(frechet_distance(target.features, generated.features), rel=1e-3)


def test_next_token_loss_and_codebook_are_by_position_and_split(evaluated, truth):
    loss, (pipe, _, splits) = evaluated[1]["next_token_loss"], truth
    codes = {name: pipe.tokenizer.encode(to_float(data.images)) for name, data in splits.items()}
    for name, split in (("train", "train"), ("heldout", "eval")):
        with torch.no_grad():
            logits = pipe.transformer(codes[split][:, :-1], splits[split].labels)
        p = logits.log_softmax(-1).gather(-1, codes[split][..., None])[..., 0]  # (n, N)
        assert loss[f"{name}_by_position"] == pytest.approx((-p).mean(dim=0).tolist(), rel=1e-4)
        assert loss[name] == pytest.approx(float(-p.mean()), rel=1e-4)
    assert loss["train_images"] == 48 and loss["heldout_images"] == 32
    assert loss["train"] != pytest.approx(loss["heldout"], rel=1e-3)

    book = evaluated[1]["codebook"]
    for position, perplexity in enumerate(book["perplexity_by_position"]):
        p = torch.bincount(codes["eval"][:, position], minlength=32) / 32
        assert perplexity == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=1e-5)
    assert max(book["perplexity_by_position"]) > 2
    assert book["usage"] == pytest.approx(len(codes["eval"].unique()) / 32)


def test_samples_are_measured_in_full_at_every_guidance_scale(evaluated, all_prefixes, truth):
    pipe, judge, splits = truth
    classes = torch.arange(MANY) % 4
    assert [m["guidance_scale"] for m in all_prefixes["samples"]] == SCALES
    for m in all_prefixes["samples"]:
        generators = [torch.Generator().manual_seed(i) for i in range(MANY)]
        out = pipe(classes, guidance_scale=m["guidance_scale"], generator=generators, output_type="pt")
        expected = compare(judge(to_float(splits["eval"].images)), judge(out.images * 2 - 1), classes, 32)
        assert_same(m["judged"]["classifier"], expected, rel=1e-3)
        pixels = np.load(evaluated[0] / f"samples-{m['guidance_scale']:g}.npz")["arr_0"]
        assert pixels.shape == (SAMPLES, 16, 16, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels[..., 0] / 255 - out.images[:SAMPLES, 0].numpy()).max() < 0.51 / 255
    best = min(all_prefixes["samples"], key=lambda m: m["judged"]["classifier"]["fd"])
    assert all_prefixes["best_guidance_scale"] == best["guidance_scale"]


def test_all_sets_of_a_report_have_their_neighbours_among_equally_many(evaluated):
    results = evaluated[1]
    sets = [results["reconstruction"], *results["samples"]]
    sets = [results["references"]["train"]["classifier"], *(m["judged"]["classifier"] for m in sets)]
    assert [m["manifold_images"] for m in sets] == [SAMPLES] * 4
    assert [m["images"] for m in sets] == [SAMPLES, 32, SAMPLES, SAMPLES]


def test_a_second_judge_has_all_figures_that_it_can_give(evaluated):
    output, results = evaluated
    for m in (results["reconstruction"], *results["samples"]):
        first, second = m["judged"]["classifier"], m["judged"]["inception"]
        assert second["accuracy"] is None and second["sfd"] is None and second["errors"]["sfd"] is None
        assert second["fd"] < first["fd"]  # in three of the first one's features
        assert second["inception_score"] == first["inception_score"]
    text = (output / "report.md").read_text()
    assert f"`inception`: a stand-in; weights' SHA-256 `{'0' * 64}`" in text
    tables = text.split("**Judge: inception**")[1:]
    assert len(tables) == 2 and all("accuracy" not in table.split("![")[0] for table in tables)


def test_the_judge_sees_8_bits(truth):
    _, judge, splits = truth
    images = to_float(splits["eval"].images)
    noisy = images + 0.9 / 255 * (2 * torch.rand(images.shape) - 1)
    torch.testing.assert_close(judge(noisy).features, judge(images).features)
    assert not torch.equal(judge(images + 2 / 255).features, judge(images).features)


# ------------------------------------------------------------------------------------------- several processes


def test_two_processes_measure_what_one_does(files, scripts, tmp_path):
    """To the last bit: sample bank (two shards), prefixes, judged samples; a part that is too small to share too."""
    results = {}
    for processes in (1, 2):
        argv = [
            files / "pipeline", "--config", files / "tiny.yaml", "--output", tmp_path / str(processes), "--npz",
            "--samples", 260, "--guidance-scales", 2, "--threads", 1, "--perceptual", "none",
        ]  # fmt: skip
        code, text = scripts.run("evaluate", argv, processes=processes)
        assert code == 0, text
        assert text.count("Results in") == 1
        result = json.loads((tmp_path / str(processes) / "results.json").read_text())
        assert result.pop("processes") == processes
        results[processes] = {key: value for key, value in result.items() if key not in ("seconds", "command")}
    assert results[1] == results[2]
    one, two = (np.load(tmp_path / str(n) / "samples-2.npz")["arr_0"] for n in (1, 2))
    assert np.array_equal(one, two)
    assert [len(list((tmp_path / str(n)).rglob("guidance-2/*"))) for n in (1, 2)] == [2, 2]


def test_dry_run_goes_through_all_of_it_and_leaves_nothing(files, scripts, tmp_path):
    output = tmp_path / "output"
    argv = [
        files / "pipeline", "--config", files / "tiny.yaml", "--output", output, "--perceptual", "none", "--dry-run",
        "--guidance-scales", 3,
    ]  # fmt: skip
    code, text = scripts.run("evaluate", argv, processes=2)
    assert code == 0, text
    assert text.count("samples at guidance scale 3:") == text.count("Dry run: nothing was written.") == 1
    assert not output.exists()


# ------------------------------------------------------------------------------------------- the report


def test_report_has_every_number_that_it_depends_on_and_every_figure(evaluated, files):
    output, results = evaluated
    text = (output / "report.md").read_text()
    card = json.loads((files / "classifier" / "classifier.json").read_text())
    for part in (card["sha256"], results["command"], f"torch {torch.__version__.split('+')[0]}", "seed 0", "2.5"):
        assert part in text
    assert f"--samples {SAMPLES}" in results["command"]
    assert f"| {results['reconstruction']['psnr']:.2f} ± " in text
    for m in (m["judged"]["classifier"] for m in results["samples"]):
        cells = [(m["fd"], m["errors"]["fd"], 3), (m["sfd"], m["errors"]["sfd"], 3)]
        fd, sfd = (f"{value:.{digits}f} ± {1.96 * error:.{digits}f}" for value, error, digits in cells)
        assert f"| {SAMPLES} | {fd} | {sfd} |" in text and f"| {100 * m['accuracy']:.2f} ± " in text
    best = next(m for m in results["samples"] if m["guidance_scale"] == results["best_guidance_scale"])
    ratio = best["judged"]["classifier"]["accuracy"] / results["references"]["heldout"]["classifier"]["accuracy"]
    assert f"samples at the best guidance scale have {100 * ratio:.1f} %" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # every row as long as its head
        assert len({line.count("|") for line in block.splitlines()}) == 1
    linked = re.findall(r"\]\((figures/.*?)\)", text)
    assert len(linked) == 13
    for name in (*linked, "figures/samples-1.png", "figures/samples-2.5.png"):
        image = np.asarray(Image.open(output / name).convert("L"))
        assert image.std() > 5, name


def test_page_is_one_file_with_all_of_the_report_in_it(evaluated):
    output, results = evaluated
    text = (output / "report.html").read_text()
    report = (output / "report.md").read_text()
    linked = re.findall(r'(?:src|href)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert linked and all(link.startswith(("data:image/png;base64,", "#")) for link in linked)
    pictures = re.findall(r"\(figures/(.*?)\)", report)
    sheets = ("reconstructions", "samples-", "sample-prefixes", "neighbours", "closest")
    for name in (name for name in pictures if name.startswith(sheets)):
        assert base64.b64encode((output / "figures" / name).read_bytes()).decode() in text
    assert text.count("<img") == 5
    assert text.count("<svg") == len(pictures) - 5
    assert text.count("<table>") == len(re.findall(r"^\| ---", report, re.MULTILINE))
    assert f"<b>{results['reconstruction']['psnr']:.2f} dB</b>" in text
    assert "prefers-color-scheme: dark" in text and "{{" not in text
    assert LIGHT.series[0] not in text.split("</style>")[1]  # curves are in the page's colours, light or dark


def test_sheets_show_the_first_samples_of_each_class(evaluated, truth):
    """Pixel for pixel: row 1 of the sheet is class 1, column 2 its third sample."""
    pipe, _, _ = truth
    sheet = np.asarray(Image.open(evaluated[0] / "figures" / "samples-2.5.png").convert("L")).astype(float)
    index = 2 * 4 + 1
    out = pipe([1], guidance_scale=2.5, generator=torch.Generator().manual_seed(index), output_type="np")
    side, gap, left, top = 64, 4, 100, 24
    tile = sheet[top + side + gap :, left + 2 * (side + gap) :][:side, :side]
    assert sheet.shape == (top + 4 * (side + gap), left + 5 * (side + gap))
    expected = out.images[0, ..., 0].repeat(4, axis=0).repeat(4, axis=1) * 255
    assert np.abs(tile - expected).max() < 2


# ------------------------------------------------------------------------------------------- what is refused


def edit_classifier(files, folder, **changes):
    model, card = load_classifier(files / "classifier")
    arguments = {**card["architecture"], **{k: v for k, v in changes.items() if k in card["architecture"]}}
    names = changes.get("class_names", CLASSES)
    save_classifier(Classifier(**arguments), folder / "other", class_names=names, accuracy=0.5)
    return folder / "other"


def test_what_does_not_belong_together_is_refused(files, tmp_path):
    with pytest.raises(SystemExit, match="The model takes 16-pixel images of 1 channels, and the data's have 32"):
        evaluate(files, tmp_path / "out", "data.image_size=32")
    judge = edit_classifier(files, tmp_path, image_size=32)
    with pytest.raises(SystemExit, match="The classifier takes 32-pixel images"):
        evaluate(files, tmp_path / "out", "--classifier", judge)
    judge = edit_classifier(files, tmp_path, class_names=["bag", "boot", "sneaker", "shirt"])
    with pytest.raises(SystemExit, match="The classifier knows 4 classes and .*, with 'sneaker' for 'shirt'"):
        evaluate(files, tmp_path / "out", "--classifier", judge)
    with pytest.raises(SystemExit, match="no trained classifier in"):
        evaluate(files, tmp_path / "out", "--classifier", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "3"], "must be a number of at least 10, not '3'"),
        (["--guidance-scales", "nan"], "must be a number of at least 0, not 'nan'"),
        (["--temperature", "-1"], "temperature must be a finite number >= 0"),
        (["--guidance-scales", "2", "data.limit=3"], "settings come before --guidance-scales"),
        (["--config", "nowhere"], "There is no preset 'nowhere'"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["data.imagesize=3"], "did you mean data.image_size"),
    ],
)
def test_unfit_options_are_refused(files, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        evaluate(files, tmp_path, *options)
    assert message in capsys.readouterr().err
