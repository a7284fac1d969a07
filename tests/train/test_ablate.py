"""Ablations: what differs in each run, that tables share runs, commands and their ends, a whole table at toy size."""

import json
import math
import shlex

import pytest

from train import ablate
from train.ablate import TABLES, Stage, folder_name, main, markdown, run_stage, tables
from train.configs.reading import available_presets, load_config

SMALL = ["--steps", "12", "--transformer-steps", "8"]


@pytest.mark.parametrize("preset", available_presets())
def test_every_run_of_every_table_is_a_configuration_of_its_own(preset):
    config = load_config(preset)
    for title, runs in tables(config).items():
        configs = [load_config(preset, settings) for settings in runs.values()]
        assert all(a != b for i, a in enumerate(configs) for b in configs[:i]), title
        others = {folder_name(settings) for settings in runs.values()}
        assert len(others) == len(runs)
        if title not in ("alpha", "losses"):
            assert "preset" in others  # what the other runs differ from


def test_only_what_differs_from_the_preset_is_set():
    runs = tables(load_config("fashion-mnist-32", ["tokenizer.alpha=2", "train_tokenizer.perceptual=lpips-vgg"]))
    assert runs["alpha"]["alpha 2"] == []
    assert runs["alpha"]["alpha 1"] == ["tokenizer.alpha=1.0"]
    listed = tables(load_config("fashion-mnist-32", ["tokenizer.num_tokens=2", "tokenizer.cutoffs=[9,32]"]))
    assert listed["alpha"]["alpha 1"] == ["tokenizer.cutoffs=[]", "tokenizer.alpha=1.0"]
    assert runs["losses"]["squared error"] == ["train_tokenizer.perceptual="]
    assert runs["seeds"]["seed 0"] == []
    assert runs["seeds"]["seed 2"] == ["train_tokenizer.seed=2", "train_transformer.seed=2"]


def test_finite_scalars_come_in_about_as_many_codes():
    for preset in available_presets():
        config = load_config(preset)
        (settings,) = (s for name, s in tables(config)["quantizer"].items() if name.startswith("FSQ"))
        ratio = load_config(preset, settings).tokenizer.codebook_size / config.tokenizer.codebook_size
        assert 0.9 < ratio < 1.1


# ------------------------------------------------------------------------------------------- one command


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Puts a shell script in the place of Python; it finds the name of the product in $PRODUCT."""

    def make(script: str, product) -> Stage:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\necho $OMP_NUM_THREADS $@ >> {tmp_path}/calls\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(ablate.sys, "executable", str(path))
        monkeypatch.setenv("PRODUCT", str(product))
        return Stage("train_tokenizer", ["preset", "key=a b"], product)

    return make


def test_a_command_is_done_when_its_product_is_new(python, tmp_path):
    product = tmp_path / "product"
    stage = python("echo > $PRODUCT.partial; mv $PRODUCT.partial $PRODUCT", product)
    assert run_stage(stage, 3, math.inf)
    assert run_stage(stage, 3, 1.5)
    assert not run_stage(python("exit 0", product), 3, -1.0)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"3 -m train.train_tokenizer preset key=a b{limit}"
        for limit in ("", " --max-minutes 1.50", " --max-minutes 0.00")
    ]
    assert stage.command == "python -m train.train_tokenizer preset 'key=a b'"


def test_a_product_is_new_though_the_clock_has_not_moved(python, tmp_path):
    product = tmp_path / "product"
    stage = python("echo > $PRODUCT.partial; touch -d @1 $PRODUCT.partial; mv $PRODUCT.partial $PRODUCT", product)
    assert run_stage(stage, 3, math.inf)
    assert run_stage(stage, 3, 1.5)
    assert product.stat().st_mtime == 1


@pytest.mark.parametrize("script, code", [("exit 3", 3), ("kill -9 $$", 137)])
def test_a_command_that_fails_ends_the_program_with_its_code(python, tmp_path, capsys, script, code):
    with pytest.raises(SystemExit) as ended:
        run_stage(python(script, tmp_path / "product"), 0, math.inf)
    assert ended.value.code == code
    assert "The same command goes on from there." in capsys.readouterr().err


def test_a_command_is_stopped_and_waited_for_when_the_program_is(python, tmp_path, monkeypatch):
    trap = f"trap 'sleep 0.2; echo saved > {tmp_path}/saved; exit 143' TERM"
    stage = python(f"{trap}; echo > {tmp_path}/trapped; sleep 30 & wait", tmp_path / "p")
    wait = ablate.subprocess.Popen.wait
    calls = []

    def interrupted(process, *args):
        calls.append(process)
        if len(calls) == 1:
            while not (tmp_path / "trapped").exists():
                pass
            raise SystemExit(143)
        return wait(process, *args)

    monkeypatch.setattr(ablate.subprocess.Popen, "wait", interrupted)
    with pytest.raises(SystemExit):
        run_stage(stage, 0, math.inf)
    assert (tmp_path / "saved").exists()


def test_a_finished_run_is_kept_as_long_as_its_commands_are_the_same(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(ablate, "run_stage", lambda stage, *limits: ran.append(stage.module) or True)
    monkeypatch.setattr(ablate, "measurements", lambda *of: {})
    (tmp_path / "preset").mkdir()

    def stages_run(*options: str) -> list[str]:
        ran.clear()
        args, _ = ablate.parse_arguments(["fashion-mnist-32", "--output", str(tmp_path), *options])
        assert ablate.run_all(args, {"preset": []})
        return ran.copy()

    everything = ["train_tokenizer", "encode_dataset", "train_transformer"]
    assert stages_run("--steps", "12") == everything
    assert stages_run("--steps", "12") == []
    assert stages_run("--steps", "24") == everything


# ------------------------------------------------------------------------------------------- tables


def test_numbers_come_out_in_their_columns():
    values = {"eval/perplexity": 100, "eval/usage": 0.5, "images_per_second_tokenizer": 70, "loss/seen": 1.0,
              "loss/heldout": 1.25, "rfd": 3, "fd": 4, "accuracy": 0.9}  # fmt: skip
    for k in (1, 2):
        values |= {f"eval/psnr_{k}": 10 + k, f"eval/psnr_low_pass_{k}": 20 + k, f"loss/heldout_{k}": 2 + k}
    text = markdown({"a": values, "b": {k: v + 2 for k, v in values.items()}}, [1, 2], "A note.", spread=True)
    assert "| run | k = 1 | k = 2 | perplexity | codes used | images/s | rFD |" in text
    assert "| a | 11.00 / 21.00 | 12.00 / 22.00 | 100 | 50% | 70 | 3.00 |" in text
    assert "| mean | 12.00 / 22.00 | 13.00 / 23.00 | 101 | 150% | 71 | 4.00 |" in text
    assert "| run | trained on | held out | difference | k = 1 | k = 2 | class accuracy | FD |" in text
    assert "| a | 1.000 | 1.250 | 0.250 | 3.000 | 4.000 | 90.0% | 4.00 |" in text
    assert "| standard deviation | 1.414 | 1.414 | 0.000 | 1.414" in text
    assert text.endswith("A note.\n")
    del values["fd"]
    assert "FD" not in markdown({"a": values}, [1, 2], "", spread=False)


@pytest.fixture(scope="module")
def classifier(scripts, preset, tmp_path_factory):
    output = tmp_path_factory.mktemp("judge")
    settings = [f"train_classifier.{key}" for key in ("steps=20", "batch_size=16", "warmup_steps=2")]
    code, text = scripts.run("train_classifier", [preset, "--output", output, *settings])
    assert code == 0, text
    return output / "classifier"


def test_a_table_at_toy_size_stops_goes_on_and_shares_runs(scripts, preset, classifier, tmp_path, monkeypatch, capsys):
    ran, allowed = [], 4

    def run_in_server(stage, threads, minutes):
        if len(ran) == allowed:
            return False
        code, text = scripts.run(stage.module, shlex.split(stage.command)[3:])
        assert code == 0, text
        ran.append((stage.arguments[-1], stage.module))
        return True

    monkeypatch.setattr(ablate, "run_stage", run_in_server)
    argv = [str(preset), *SMALL, "--output", str(tmp_path), "--classifier", str(classifier), "--samples", "20"]
    argv += ["--tables", "nesting", "prefixes"]
    whole = tables(load_config(str(preset)))
    nesting = {name: whole["nesting"][name] for name in whole["nesting"] if "weighted" not in name}
    fewer = {"nesting": nesting, "prefixes": {"half uniform, half powers of two": []}}
    monkeypatch.setattr(ablate, "tables", lambda config: fewer)
    main(argv)
    assert "Time is over" in capsys.readouterr().out
    report = (tmp_path / "ablation.md").read_text()
    assert "spectral targets" in report and "no nesting" not in report
    allowed = 100
    main(argv)
    assert "All runs in" in capsys.readouterr().out
    assert len(ran) == 4 * 3  # of 3 + 1 runs two are one
    main(argv)
    assert len(ran) == 4 * 3
    report, results = (tmp_path / "ablation.md").read_text(), json.loads((tmp_path / "ablation.json").read_text())
    assert list(results["tables"]) == ["nesting", "prefixes"]
    (shared,) = results["tables"]["prefixes"].values()
    assert results["tables"]["nesting"]["spectral targets"] == shared
    for runs in results["tables"].values():
        for name, run in runs.items():
            assert f"| {name} | " in report
            assert all(math.isfinite(value) for value in run["measured"].values())
            assert run["measured"]["eval/psnr_4"] > 0 and 0 <= run["measured"]["accuracy"] <= 1
    whole = results["tables"]["nesting"]["nested dropout without spectral targets"]["measured"]
    assert all(whole[f"eval/psnr_{k}"] == whole[f"eval/psnr_low_pass_{k}"] for k in (1, 2, 4))


# ------------------------------------------------------------------------------------------- command line


def test_a_dry_run_prints_the_commands(preset, tmp_path, capsys):
    output = tmp_path / "none"
    main([str(preset), "data.limit=40", *SMALL, "--tables", "alpha", "--output", str(output), "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 * 3 + 1 and printed[-1] == "Dry run: 4 runs, nothing was written."
    assert not output.exists()
    assert printed[0] == (
        f"python -m train.train_tokenizer {preset} data.limit=40 train_tokenizer.steps=12 "
        "train_tokenizer.eval_every=12 train_transformer.steps=8 train_transformer.eval_every=8 "
        f"tokenizer.alpha=0.5 --output {output}/alpha=0.5"
    )


@pytest.mark.parametrize("options, said", [
    (["--tables", "nothing"], f"choose from {', '.join(map(repr, TABLES))}"),
    (["--steps", "0"], "must be a number of at least 1, not '0'"),
    (["--classifier", "nowhere"], "There is no trained classifier in nowhere: run train.train_classifier first."),
    (["tokenizer.alpha=-1"], "tokenizer.alpha must be 0 or more, not -1.0."),
])  # fmt: skip
def test_what_cannot_be_is_said_at_once(capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        main(["fashion-mnist-32", *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
