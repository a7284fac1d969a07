"""The benchmark suite: ratios and counts on known input, and a toy-sized run from end to end. No time is asserted."""

import json
import subprocess
import sys
import time

import pytest
import torch

from spectralar import SpectralARTransformer, SpectralTokenizer
from tests.helpers import tiny_pipeline, tiny_transformer
from train.benchmark import __main__ as benchmark
from train.benchmark import models, program, sampling, suite, training
from train.benchmark.measure import (
    Machine,
    Result,
    count_flops,
    faster,
    interleave,
    medians,
    not_measured,
    rate,
    share,
)
from train.benchmark.models import Shape
from train.benchmark.suite import Figure, Suite
from train.configs.config import TransformerStage
from train.objectives.next_token import drawn_positions
from train.runs.costs import FeedbackCost, TransformerCost

CPU = torch.device("cpu")
TINY = {"num_tokens": 9, "codebook_size": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2.0}
TOY = Shape(
    "toy",
    TINY | {"image_size": 16, "patch_size": 4, "codebook_dim": 8, "encoder_layers": 1, "decoder_layers": 1},
    TINY | {"num_classes": 3, "num_layers": 2},
)
TOY_COLOUR = Shape("colour toy", TOY.tokenizer | {"in_channels": 3}, TOY.transformer)
TOY_FEEDBACK = Shape(
    "toy with feedback",
    TOY.tokenizer | {"spectral_shortcut": True, "encoder_layers": 0},
    TOY.transformer | {"codebook_dim": 8, "decoder_feedback": True},
)
TOY_LARGE = Shape("large toy", TOY.tokenizer, TOY.transformer | {"num_layers": 3})


# ------------------------------------------------------------------------------------------------ ratios


def test_faster_is_the_baselines_time_over_ours():
    comparison = faster(2.0, "slow", 9.0, target=4.0)
    assert (comparison.ratio, comparison.met) == (4.5, True)
    assert faster(2.0, "slow", 7.0, target=4.0).met is False
    assert faster(2.0, "slow", 7.0).met is None


def test_share_of_time_is_bounded_above_and_rate_below():
    assert share(6.0, "whole", 10.0, target=0.65).met is True
    assert share(7.0, "whole", 10.0, target=0.65).met is False
    assert rate(6.0, "whole", 10.0, target=0.65).met is False
    assert rate(7.0, "whole", 10.0, target=0.65).met is True
    assert share(7.0, "whole", 10.0).ratio == rate(7.0, "whole", 10.0).ratio == 0.7


def test_over_floor():
    assert Result(30.0, "ms", floor=10.0).over_floor == 3.0
    assert Result(30.0, "ms").over_floor is None
    assert not_measured("no CUDA device").over_floor is None


def test_functions_take_turns_and_each_round_starts_with_another():
    calls = []
    samples = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, 0.0, CPU)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # the first call of each is not in the samples
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_cpu_time_leaves_out_what_the_process_waits_for():
    samples = interleave({"sleep": lambda: time.sleep(0.05), "work": lambda: sum(range(10**6))}, 0.0, CPU, "cpu")
    assert max(samples["sleep"]) < 0.03 and min(samples["work"]) > 0


def test_cpu_time_takes_one_thread(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--cpu-time"])
    assert "--threads 1" in capsys.readouterr().err
    assert benchmark.parse_arguments(["--cpu-time", "--threads", "1"]).cpu_time


def test_medians_are_not_moved_by_one_slow_call():
    assert medians({"a": [1.0, 2.0, 60.0]}) == {"a": 2.0}


def test_floor_is_what_takes_longer():
    machine = Machine(CPU, torch.float32)
    machine.matmul_rate, machine.read_rate = lambda: 10.0, lambda size: 1000.0 / size
    assert machine.floor(flops=50.0, size=10, traffic=100.0) == 5.0  # 50 / 10 against 100 / (1000 / 10)
    assert machine.floor(flops=5.0, size=10, traffic=100.0) == 1.0


# ------------------------------------------------------------------------------------------------ counts


def test_flops_of_products_and_of_attention():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    q, k, v = torch.rand(2, 3, 4, 8), torch.rand(2, 3, 6, 8), torch.rand(2, 3, 6, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    products = 2 * (2 * 3) * (4 * 8 * 6 + 4 * 6 * 8)
    assert count_flops(lambda: attention(q, k, v)) == products
    q.requires_grad_()  # backward: the two again for the weights, and four for the gradients of q, k and v
    assert count_flops(lambda: attention(q, k, v).sum().backward()) == products * 3.5


def test_flops_of_a_sample_are_those_of_its_weights():
    transformer = tiny_transformer().eval()
    config = transformer.config
    read = [*transformer.blocks.parameters(), *transformer.head.parameters()]
    matrices = sum(p.numel() for p in read if p.ndim == 2)
    steps = torch.no_grad()(lambda: transformer(torch.zeros(1, config.num_tokens - 1).long(), torch.tensor([0])))
    counted = count_flops(steps)
    attention = 4 * config.num_layers * config.hidden_size * config.num_tokens**2
    adaln = 2 * (transformer.adaln.weight.numel() + transformer.final_adaln.weight.numel())
    assert counted == 2 * matrices * config.num_tokens + attention + adaln


def test_weights_and_cache_that_a_sample_reads():
    transformer = tiny_transformer()
    config = transformer.config
    everything = sum(p.numel() for p in transformer.parameters()) * 4
    hoisted = [transformer.adaln, transformer.final_adaln, transformer.class_embed, transformer.token_embed]
    hoisted = sum(p.numel() for module in hoisted for p in module.parameters())
    hoisted += transformer.adaln_table.numel() + transformer.position.numel()
    assert models.weights_read(transformer) == everything - 4 * hoisted
    step_one = tiny_transformer(num_tokens=1)  # one position written and one read
    assert models.cache_traffic(step_one, 2) == 2 * 2 * (2 * config.num_layers * config.hidden_size * 4)


# ------------------------------------------------------------------------------------------------ baselines


def test_recomputing_gives_the_tokens_of_the_pipeline():
    pipeline = tiny_pipeline()
    recomputed = models.recomputing_sampler(pipeline, 3)()
    labels = models.labels_of(pipeline.transformer, 3)
    uniforms = torch.Generator().manual_seed(0)
    codes = pipeline(labels, guidance_scale=models.GUIDANCE, generator=uniforms, output_type="latent").codes
    assert torch.equal(recomputed, codes)


def test_the_plain_loop_gives_the_tokens_of_the_pipeline():
    pipeline = tiny_pipeline()
    assert torch.equal(models.plain_sampler(pipeline, 3)(), models.sampler(pipeline, 3)())


def test_the_plain_loop_asks_for_feedback_too():
    pipeline = TOY_FEEDBACK.build(CPU, torch.float32)
    maps = pipeline.transformer.entry_maps
    maps.adopt(pipeline.tokenizer.quantizer.codebook, pipeline.tokenizer.shortcut)
    codes = models.plain_sampler(pipeline, 3)()
    assert torch.equal(codes, models.sampler(pipeline, 3)())
    maps.expected.data.zero_()
    assert not torch.equal(codes, models.plain_sampler(pipeline, 3)())


def test_a_training_step_with_feedback_costs_the_decoder_and_less_of_the_head():
    stage = TransformerStage(batch_size=4)
    counts = []
    for shape in (
        TOY_FEEDBACK,
        Shape("", TOY_FEEDBACK.tokenizer, TOY_FEEDBACK.transformer | {"decoder_feedback": False}),
    ):
        tokenizer, transformer = SpectralTokenizer(**shape.tokenizer), SpectralARTransformer(**shape.transformer)
        step = training.transformer_step(transformer, tokenizer, stage, CPU)
        step.whole()
        counts.append(count_flops(step.backward))
    places = drawn_positions(9, torch.Generator().manual_seed(0))
    own = [TransformerCost(SpectralARTransformer(**TOY_FEEDBACK.transformer), len(places)).all().training]
    own.append(TransformerCost(transformer, 9).all().training)
    assert counts[0] == pytest.approx(4 * (own[0] + FeedbackCost(tokenizer, places).flops()), rel=0.02)
    assert counts[1] == pytest.approx(4 * own[1], rel=1e-6)
    assert training.training(toy_suite(), TOY_FEEDBACK, "transformer", stage).value > 0


@torch.no_grad()
def test_next_scale_sees_all_scales_so_far_and_its_own():
    transformer = tiny_transformer()
    assert models.next_scale_sampler(transformer, 2, (1, 2, 3))().shape == (2, 9)
    cache = models.KVCache(3, 2, 2, 5, 16, like=transformer.position)
    modulation = transformer.condition(torch.tensor([0, 1])).blocks[:, 0]
    first, second = torch.randn(2, 1, 32), torch.randn(2, 4, 32)
    for x, position in ((first, 0), (second, 1)):
        out = models._next_scale_block(transformer.blocks[0], x, modulation, cache, 0, position)
    whole = models.KVCache(3, 2, 2, 5, 16, like=transformer.position)
    expected = models._next_scale_block(
        transformer.blocks[0], torch.cat([first, second], 1), modulation, whole, 0, 0
    )  # in one piece, where the first scale sees the second too, which the second's outputs do not tell
    torch.testing.assert_close(out, expected[:, 1:])


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_llama_has_our_size(cache):
    pytest.importorskip("transformers")
    transformer = tiny_transformer(hidden_size=96, num_layers=4, mlp_ratio=4.0, codebook_size=64)
    sample = models.llama_sampler(transformer, 2, cache)
    assert sample().shape == (2, transformer.config.num_tokens)
    per_token = 2 * models.weights_read(transformer) / 4
    assert count_flops(sample) == pytest.approx(2 * transformer.config.num_tokens * per_token, rel=0.15)


def test_shapes():
    paper = models.d16()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SpectralARTransformer(**paper.transformer).parameters())
    assert parameters == pytest.approx(310e6, rel=0.03)
    assert models.d16(num_layers=4).name == "d16, 4 of 16 layers"
    longer = models.with_tokens(TOY, 64)
    assert longer.tokenizer["num_tokens"] == longer.transformer["num_tokens"] == 64
    assert TOY.tokenizer["num_tokens"] == 9


def test_a_saved_pipeline_is_measured_as_it_is(tmp_path):
    pipeline = TOY.build(CPU, torch.float32)
    pipeline.save_pretrained(tmp_path)
    saved = Shape("saved", folder=tmp_path)
    loaded = saved.build(CPU, torch.float32)
    assert torch.equal(loaded.transformer.head.weight, pipeline.transformer.head.weight)
    assert models.with_tokens(saved, 12).build(CPU, torch.float32).transformer.config.num_tokens == 12


# ------------------------------------------------------------------------------------------------ the whole suite


def toy_suite() -> Suite:
    return Suite(CPU, quick=True, small=TOY, large=TOY_LARGE, budget_s=0.0, colour=TOY_COLOUR)


def test_the_suite_runs_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "REPEATS", 1)
    monkeypatch.setattr(suite, "fast_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(sampling, "has_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes minutes: inference/test_compiled.py
    monkeypatch.setattr(
        benchmark, "Suite", lambda device, clock, **_: Suite(device, True, TOY, TOY_LARGE, 0.0, clock, TOY_COLOUR)
    )
    monkeypatch.setattr(benchmark, "DEVICES", ("cpu",))
    output = tmp_path / "reports" / "benchmark.json"
    benchmark.main(["--quick", "--output", str(output)])
    report = json.loads(output.read_text())

    assert report["run"]["threads"] == torch.get_num_threads() and report["run"]["quick"] is True
    device = report["devices"][0]["device"]
    assert device["device"] == "cpu" and device["memory_bytes_per_s"] > 0 and device["matmul_flops_per_s"] > 0
    entries = {(entry["figure"], entry["setting"]): entry for entry in report["devices"][0]["figures"]}
    assert len(entries) == len(report["devices"][0]["figures"])
    for entry in entries.values():
        measured = entry["value"] is not None and entry["value"] > 0
        assert measured or entry["note"].startswith("not measured: ")
        for comparison in entry["comparisons"]:
            assert comparison["ratio"] > 0 and comparison["baseline_value"] > 0
        assert entry["floor"] is None or entry["over_floor"] == entry["value"] / entry["floor"]

    promised = {
        ("cached sampling", "toy, N = 64, batch 8"): "times fewer operations",
        ("weights read", "large toy, batch 1"): "",
        ("sampling", "toy, batch 8"): "images/s",
        ("encode", "toy, batch 64"): "images/s",
        ("all prefix frames", "toy"): "of their operations",
        ("streaming", "toy, batch 1"): "first image after",
        ("all prefix frames, bfloat16", "toy"): "dB PSNR to float32's frames",
        ("sampling, bfloat16", "toy, batch 1"): "",
        ("sampling, compiled", "toy, batch 1"): "",
        ("training step", "toy, transformer, batch 64"): "GFLOP a step",
        ("training step", "colour toy, tokenizer, batch 32"): "GFLOP a step",
        ("all prefix frames", "colour toy"): "of their operations",
        ("import", "spectralar"): "",
        ("page", "start to ready"): "",
        ("page", "first image of 4 through the API"): "",
        ("page", "peak memory"): "",
    }
    for key, note in promised.items():
        assert entries[key]["value"] > 0 and note in entries[key]["note"], key
    backward, update = entries["training step", "colour toy, tokenizer, batch 32"]["comparisons"]
    assert (backward["kind"], backward["target"]) == ("rate", 0.75) and "the matrix rate" in backward["baseline"]
    assert (update["kind"], update["target"]) == ("share", 0.1) and 0 < update["ratio"] < 1
    assert update["baseline_value"] == entries["training step", "colour toy, tokenizer, batch 32"]["value"]
    fewer = entries["cached sampling", "toy, N = 64, batch 8"]["note"]
    assert float(fewer.split()[0]) > 20  # 32.5 times the positions

    printed = capsys.readouterr().out
    assert printed.count("\n| ") == len(entries) + 2  # with the head of the table
    assert "times faster than whole prefix at each step" in printed


def test_a_missing_device_has_all_the_rows():
    suite = toy_suite()
    figures = benchmark.plan(suite)
    part = benchmark.without_device(suite, "cuda", figures)
    assert [e["setting"] for e in part["figures"]] == [f.setting for f in figures]
    assert {e["note"] for e in part["figures"]} == {"not measured: no CUDA device"}
    assert "not measured" in benchmark.table({"run": {}, "devices": [part]})


def test_skipped_figures_say_why():
    def fail():
        raise AssertionError("a figure that is left out must not run")

    assert Figure("a", "b", fail, skip="too slow").run().note == "not measured: too slow"


def test_a_page_that_does_not_start_is_an_error(tmp_path):
    app = tmp_path / "app.py"
    app.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="status 3"):
        program.Page(app, toy_suite()).result("ready")
    assert program.Page(tmp_path / "none.py", toy_suite()).result("ready").value is None


def test_the_command_line_explains_itself():
    shown = subprocess.run(
        [sys.executable, "-m", "train.benchmark", "--help"], capture_output=True, text=True, check=True
    )
    assert "--quick" in shown.stdout
