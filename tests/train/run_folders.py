"""What a training run left in its folder, and whether two runs are the same."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STAGES = ["tokenizer", "transformer"]


def newest_checkpoint(output: Path, stage: str) -> Path:
    return sorted((output / f"train_{stage}" / "checkpoints").glob("step-????????"))[-1]


def newest_step(output: Path, stage: str) -> int:
    return int(newest_checkpoint(output, stage).name[5:])


def training_state(output: Path, stage: str) -> dict:
    """Weights, optimisers, averaged weights and, in stage 1, idle steps of the codes: all that a step depends on."""
    folder = newest_checkpoint(output, stage)
    paths = [*folder.glob("custom_checkpoint_*.pkl"), *folder.glob("optimizer*.bin")]
    state = {path.name: torch.load(path, weights_only=True) for path in paths}
    for part in state["optimizer.bin"].get("parts", []):
        for group in part["param_groups"]:
            group.pop("adjust_lr_fn", None)  # a string, which assert_close cannot compare
    discriminator = {path.name: load_file(path) for path in folder.glob("model_1.safetensors")}
    return {"weights": load_file(folder / "model.safetensors"), **state, **discriminator}


def metrics(output: Path, stage: str) -> list[dict]:
    """All logged lines."""
    return [json.loads(line) for line in (output / f"train_{stage}" / "metrics.jsonl").read_text().splitlines()]


def logged(output: Path, stage: str) -> list[dict]:
    """All logged lines without their times."""
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in metrics(output, stage)]


def assert_same_run(output: Path, reference: Path, stage: str) -> None:
    """Equal training state, bit for bit, and an equal record of every logged step."""
    assert newest_step(output, stage) == newest_step(reference, stage)
    torch.testing.assert_close(training_state(output, stage), training_state(reference, stage), rtol=0, atol=0)
    # Revived codes are counted since the last line or the start, whichever is later.
    ours, theirs = ([{**line, "revived": 0} for line in logged(folder, stage)] for folder in (output, reference))
    assert ours == theirs


def assert_same_up_to_rounding(output: Path, reference: Path, stage: str, atol: float = 3e-4) -> None:
    """Weights and logged losses that differ only as sums in another order do; one step moves a weight by 1e-3."""
    assert newest_step(output, stage) == newest_step(reference, stage)
    ours, theirs = training_state(output, stage)["weights"], training_state(reference, stage)["weights"]
    for weights in (ours, theirs):
        for name in weights:
            if name.endswith("to_qkv.bias"):  # softmax cancels the keys' bias: Adam enlarges the rounding of a 0
                weights[name].view(3, -1)[1] = 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    for line, expected in zip(logged(output, stage), logged(reference, stage), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.002)


def stop_at(scripts, argv: list, stage: str, step: int, processes: int = 1) -> int:
    """Kills a run soon after its checkpoint of `step`; the step of its newest checkpoint."""
    run = scripts.start(f"train_{stage}", argv, processes=processes)
    output = argv[argv.index("--output") + 1]
    wait_for(output / f"train_{stage}" / "checkpoints" / f"step-{step:08d}")
    run.kill()
    code, text = run.wait()
    assert code == -9, text
    return newest_step(output, stage)
