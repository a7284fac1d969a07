"""What both training stages share: command line, step loop, schedule, checkpoints, logs.

All randomness of a step derives from (seed, step): data order, augmentation, prefix lengths, dropout. A resumed
run therefore continues exactly as the uninterrupted one, on any number of processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from .config import Config, StageConfig, config_to_dict, load_config, save_config

CHECKPOINTS_KEPT = 2  # the newest, and one to fall back on when the newest is damaged
# Parameters that are looked up or added, not multiplied: no weight decay on them.
NO_DECAY = ("position", "queries", "mask_tokens", "codebook", "embed.weight", "embedding", "table")


def parse_arguments(description: str, argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """The command line of a training stage: PRESET, --output, --max-minutes, --dry-run, key=value overrides."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("preset", help="a name in train/configs, or the path of a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. train_tokenizer.lr=5e-4")
    parser.add_argument("--output", type=Path, help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf,
        help="stop after so many minutes with a checkpoint; the same command goes on from there",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="three steps, printed throughput, nothing written")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load_config(args.preset, args.overrides)
    except ValueError as error:
        parser.error(str(error))
    args.output = args.output or Path("runs") / config.name
    return args, config


def learning_rate(step: int, stage: StageConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from `lr` to `lr * min_lr_ratio` at the last step."""
    if step < stage.warmup_steps:
        return stage.lr * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - 1 - stage.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * cosine)


def make_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: none on norms, biases, embeddings, positions and the codebook."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and not any(part in name for part in NO_DECAY)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": stage.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=stage.lr,
        betas=(stage.beta1, stage.beta2),
        fused=True,
    )


class Run:
    """One training stage in one folder: resumes from its newest whole checkpoint, saves, logs, keeps time.

    Args:
        stage_name: "tokenizer" or "transformer"; names the sub-folder.
        config: the whole configuration; a copy is written beside the checkpoints.
        stage: this stage's part of it.
        args: from `parse_arguments`.
    """

    def __init__(self, stage_name: str, config: Config, stage: StageConfig, args: argparse.Namespace) -> None:
        self.config, self.stage, self.args = config, stage, args
        self.folder = args.output / f"train_{stage_name}"
        self.dry = args.dry_run
        self.accelerator = Accelerator(
            mixed_precision=stage.mixed_precision,
            log_with=None if self.dry else "tensorboard",
            project_dir=str(self.folder),
        )
        world = self.accelerator.num_processes
        if stage.batch_size % (world * stage.grad_accumulation):
            raise SystemExit(
                f"batch_size {stage.batch_size} must be a multiple of processes x grad_accumulation "
                f"({world} x {stage.grad_accumulation})."
            )
        self.micro_batch = stage.batch_size // (world * stage.grad_accumulation)
        self.is_main = self.accelerator.is_main_process
        self.started = time.monotonic()
        self.stop_reason = ""
        set_seed(stage.seed)
        if not self.dry:
            self.accelerator.init_trackers("tensorboard")
            if self.is_main:
                save_config(config, self.folder / "config.yaml")

    # ---------------------------------------------------------------------------------------------- steps

    def steps(self, first: int) -> Iterator[int]:
        """Step numbers from `first` to the last, with a progress bar; ends early on a signal or out of time."""
        last = min(self.stage.steps, first + 3) if self.dry else self.stage.steps
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        bar = tqdm(
            range(first, last), initial=first, total=last, desc=self.folder.name, disable=not self.is_main,
            unit="img", unit_scale=self.stage.batch_size, mininterval=2, smoothing=0.05,
        )  # fmt: skip
        self._bar = bar
        for step in bar:
            # Dropout draws from the global generators: a function of the step and the process alone.
            torch.manual_seed((self.stage.seed * 1_000_003 + step) * 4096 + self.accelerator.process_index)
            yield step
            if self._should_stop():
                break

    def _on_signal(self, number: int, frame: Any) -> None:
        self.stop_reason = f"got {signal.Signals(number).name}"

    def _should_stop(self) -> bool:
        if not self.stop_reason and time.monotonic() - self.started > 60 * self.args.max_minutes:
            self.stop_reason = f"{self.args.max_minutes:g} minutes are over"
        if self.accelerator.num_processes > 1:  # clocks differ: stop together
            flag = torch.tensor(float(bool(self.stop_reason)), device=self.accelerator.device)
            if self.accelerator.reduce(flag, "sum").item() and not self.stop_reason:
                self.stop_reason = "another process stops"
        return bool(self.stop_reason)

    def micro_batches(self, n: int, step: int, indices: Callable[..., Tensor]) -> Iterator[tuple[Tensor, int]]:
        """This process's slices of the step's global batch: (indices (b,), slice number in the global batch)."""
        chosen = indices(n, self.stage.batch_size, self.stage.seed, step)
        for part in range(self.stage.grad_accumulation):
            # A process's parts are neighbours, so that parts and processes in order make up the global batch.
            slot = self.accelerator.process_index * self.stage.grad_accumulation + part
            yield chosen[slot * self.micro_batch : (slot + 1) * self.micro_batch], slot

    def generator(self, step: int, purpose: int) -> torch.Generator:
        """An equally seeded generator on every process, one for each step and purpose."""
        return torch.Generator().manual_seed((self.stage.seed * 1_000_003 + step) * 16 + purpose)

    def optimise(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int) -> float:
        """Clips, sets the step's learning rate, steps and clears; the gradient norm before clipping."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.stage)
        norm = self.accelerator.clip_grad_norm_(parameters, self.stage.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def check_finite(self, losses: dict[str, Tensor], step: int) -> None:
        """Ends the run with one sentence at the first loss that is not finite; the last checkpoint stays as it is."""
        for name, value in losses.items():
            if not torch.isfinite(value).all():
                raise SystemExit(
                    f"Step {step}: {name} is {value.item()}. The last good state is in "
                    f"{self.folder / 'checkpoints'}; a lower lr or another mixed_precision usually helps."
                )

    # -------------------------------------------------------------------------------------------- logging

    def log(self, values: dict[str, float], step: int) -> None:
        """Scalars to TensorBoard and to metrics.jsonl; the first few onto the progress bar."""
        if self.dry:
            return
        self.accelerator.log(values, step=step)
        if self.is_main:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in list(values.items())[:4]}, refresh=False)
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **{k: round(float(v), 6) for k, v in values.items()}}) + "\n")

    def log_images(self, name: str, grid: Tensor, step: int) -> None:
        """A grid (C, H, W) in [0, 1] to TensorBoard and to samples/."""
        if self.dry or not self.is_main:
            return
        from PIL import Image

        self.accelerator.get_tracker("tensorboard").writer.add_image(name, grid, step)
        pixels = (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        path = self.folder / "samples" / f"{name}-{step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)

    # ---------------------------------------------------------------------------------------- checkpoints

    def save(self, step: int) -> None:
        """Writes a checkpoint that says: `step` steps are done. Whole or not there at all."""
        if self.dry:
            return
        final = self.folder / "checkpoints" / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        if final.exists():
            return
        if self.is_main and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(partial), safe_serialization=True)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise SystemExit(
                f"Step {step}: no checkpoint could be written ({error}); earlier ones are whole."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.is_main:
            sizes = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
            (partial / "manifest.json").write_text(json.dumps({"step": step, "sizes": sizes, **self._identity()}))
            os.replace(partial, final)
            for old in self._checkpoints()[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Loads the newest whole checkpoint; the number of steps done, 0 in a fresh folder."""
        if self.dry:
            return 0
        for folder in reversed(self._checkpoints()):
            manifest = self._manifest(folder)
            if manifest is None:
                self.print(f"{folder} is damaged; falling back on the one before.")
                continue
            different = [key for key, value in self._identity().items() if manifest.get(key) != value]
            if different:
                raise SystemExit(
                    f"{folder} was trained with another {' and '.join(different)} section: use the settings of "
                    f"{self.folder / 'config.yaml'} as it was, or another --output."
                )
            self.accelerator.load_state(str(folder))
            self.print(f"Resumed from {folder}.")
            return manifest["step"]
        return 0

    def _identity(self) -> dict[str, Any]:
        """What may not change between a checkpoint and its resumption, as JSON gives it back."""
        config = config_to_dict(self.config)
        names = ("tokenizer",) if self.folder.name == "train_tokenizer" else ("tokenizer", "transformer")
        return json.loads(json.dumps({name: config[name] for name in names}))

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in (self.folder / "checkpoints").glob("step-*") if p.suffix != ".partial")

    @staticmethod
    def _manifest(folder: Path) -> dict[str, Any] | None:
        """The checkpoint's manifest, None if a file is missing or has another size than was written."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            whole = all((folder / name).stat().st_size == size for name, size in manifest["sizes"].items())
        except (OSError, ValueError, KeyError):
            return None
        return manifest if whole else None

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def finish(self, step: int) -> bool:
        """Saves, says how the run ended; True when all steps are done."""
        self.save(step)
        done = step >= self.stage.steps
        if self.dry:
            self.print("Dry run: nothing was written.")
        elif done:
            minutes = (time.monotonic() - self.started) / 60
            self.print(f"Finished: {step} steps, {minutes:.1f} minutes since the last start.")
        else:
            self.print(f"Stopped at step {step} of {self.stage.steps}: {self.stop_reason}. The same command goes on.")
        if not self.dry:
            self.accelerator.end_training()
        return done and not self.dry


def make_ema(parameters: list[nn.Parameter], decay: float) -> EMAModel:
    """Exponential moving average of the weights, warmed up as (1 + step) / (10 + step)."""
    return EMAModel(parameters, decay=decay)


def image_grid(rows: list[Tensor], gap: int = 2) -> Tensor:
    """Rows of images (n, C, H, W) in [-1, 1] as one picture (C, ..., ...) in [0, 1], white gaps."""
    lines = [torch.cat([nn.functional.pad(x, (0, gap, 0, gap), value=1.0) for x in row], dim=-1) for row in rows]
    return ((torch.cat(lines, dim=-2) + 1) / 2).clamp(0, 1)
