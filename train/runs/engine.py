"""What both training stages share: step loop, schedule, optimiser, averaged weights, logs, and how a run ends.

All randomness of a step derives from (seed, step): data order, augmentation, prefix lengths, dropout. A resumed
run therefore continues exactly as the uninterrupted one. Nothing but dropout depends on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..configs.config import Config, StageConfig, config_to_dict
from ..configs.reading import save_config
from ..data.images import ImageSet, Prefetch
from .changes import check_changes
from .checkpoints import Checkpoints
from .clock import StepClock
from .hardware import fast_dtype, keep_freed_memory
from .optimizers import make_optimizer
from .sharding import ShardedAverage, averaged_copy, is_sharded, shard, shard_state, whole

STOP_EVERY = 10  # steps between the questions whether another process wants to stop: each one waits for the device
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
NEVER = torch.iinfo(torch.int64).max


# ------------------------------------------------------------------------------------------------ optimisation


def learning_rate(step: int, stage: StageConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine from `lr` to `lr * min_lr_ratio` at the last step."""
    if step < stage.warmup_steps:
        return stage.lr * (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - 1 - stage.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return stage.lr * (stage.min_lr_ratio + (1 - stage.min_lr_ratio) * cosine)


def make_ema(parameters: list[nn.Parameter], decay: float) -> EMAModel:
    """Exponential moving average of the weights; the decay of step s is min(decay, s / (9 + s)), 0 at the first."""
    sharded = any(hasattr(parameter, "full_tensor") for parameter in parameters)
    return (ShardedAverage if sharded else EMAModel)(parameters, decay=decay)


# ------------------------------------------------------------------------------------------------ a run


_PROCESS_GROUPS: list[dist.ProcessGroup | None] = []


def make_accelerator(**options: Any) -> Accelerator:
    """An accelerator of what there is. Not told that there are only CPUs, it would overlook torchrun's processes."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    # Held to the end of the program. The last one to let go of it would else be DistributedDataParallel, which waits
    # for gloo's thread without letting go of Python's lock, and that thread may be waiting for the lock.
    _PROCESS_GROUPS.append(dist.group.WORLD)
    return accelerator


class Steps(Protocol):
    """What a run trains on: it knows which images each step takes."""

    def step_indices(self, batch_size: int, seed: int, step: int) -> Tensor:
        """As `order.step_indices`: (batch_size,) int64, a function of its arguments alone."""
        ...


class Run:
    """One training stage in one folder: resumes from its newest whole checkpoint, saves, logs, keeps time.

    Nothing is written before `resume`.

    Args:
        stage_name: "tokenizer", "transformer" or "classifier": the section of the model, and part of the sub-folder.
        config: the whole configuration; a copy is written beside the checkpoints.
        stage: this stage's part of it.
        args: from `parse_arguments`.
    """

    def __init__(self, stage_name: str, config: Config, stage: StageConfig, args: argparse.Namespace) -> None:
        self.config, self.stage, self.args = config, stage, args
        self.folder = args.output / f"train_{stage_name}"
        self.dry = args.dry_run
        self.accelerator = make_accelerator(
            mixed_precision=stage.mixed_precision,
            log_with=None if self.dry else "tensorboard",
            project_dir=str(self.folder),
        )
        self.is_main = self.accelerator.is_main_process
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        if stage.mixed_precision == "bf16" and fast_dtype(self.accelerator.device) != torch.bfloat16:
            self.print(f"This CPU has no instructions for bfloat16: train_{stage_name}.mixed_precision=no is faster.")
        if self.accelerator.distributed_type in SHARDED:
            self.exit(
                f"{self.accelerator.distributed_type.value} is not supported as accelerate configures it: launch with "
                "plain data parallelism, and set train_tokenizer.fsdp or train_transformer.fsdp for shards."
            )
        slices = self.accelerator.num_processes * stage.grad_accumulation
        if stage.batch_size % slices:
            self.exit(
                f"batch_size {stage.batch_size} must be a multiple of processes x grad_accumulation "
                f"({self.accelerator.num_processes} x {stage.grad_accumulation})."
            )
        self.micro_batch = stage.batch_size // slices
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.accelerator)
        self.clock = StepClock()
        self._started = time.monotonic()
        self._stop_reason, self._stop_signal = "", 0
        self._first_bad: dict[str, Tensor] = {}
        self._timed_from, self._speed = 0, {"time/images_per_second": 0.0, "time/data_share": 0.0}
        sections = {stage_name, "tokenizer"} if stage_name == "transformer" else {stage_name}
        self._identity: dict[str, Any] = {name: config_to_dict(config)[name] for name in sections}
        set_seed(stage.seed % 2**32)  # of the initial weights

    # ---------------------------------------------------------------------------------------------- steps

    def steps(self, first: int) -> Iterator[int]:
        """Step numbers from `first` to the last, with a progress bar; ends early on a signal or out of time."""
        last = min(self.stage.steps, 3) if self.dry else self.stage.steps
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self._bar = tqdm(
            range(first, last), initial=first, total=last, desc=self.folder.name, disable=not self.is_main,
            unit="img", unit_scale=self.stage.batch_size, mininterval=2, smoothing=0.05,
        )  # fmt: skip
        for step in self._bar:
            if step <= first + 1:  # the first step compiles, allocates, fills caches: its speed says nothing
                self.clock.restart()
                self._timed_from = step
            # Dropout draws from the global generators: a function of the step and the process alone.
            torch.manual_seed(((self.stage.seed * 1_000_003 + step) * 4096 + self.accelerator.process_index) % 2**63)
            yield step
            if self._should_stop(step):
                break

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop_reason, self._stop_signal = f"got {signal.Signals(number).name}", number

    def _should_stop(self, step: int) -> bool:
        if not self._stop_reason and time.monotonic() - self._started > 60 * self.args.max_minutes:
            self._stop_reason = f"{self.args.max_minutes:g} minutes are over"
        if self.accelerator.num_processes > 1:  # signals and clocks differ: stop together
            if step % STOP_EVERY:
                return False
            flag = torch.tensor(float(bool(self._stop_reason)), device=self.accelerator.device)
            if self.accelerator.reduce(flag, "sum").item() and not self._stop_reason:
                self._stop_reason = "another process stops"
        return bool(self._stop_reason)

    def micro_batches(self, data: Steps, step: int) -> Iterator[tuple[Tensor, int, int]]:
        """This process's slices of the step's global batch, which `data` chooses.

        Yields (indices (b,), number of the slice in the global batch, number of slices in it).
        """
        try:
            chosen = data.step_indices(self.stage.batch_size, self.stage.seed, step)
        except ValueError as error:
            self.exit(str(error))
        for part in range(self.stage.grad_accumulation):
            # A process's parts are neighbours, so that parts and processes in order make up the global batch.
            slot = self.accelerator.process_index * self.stage.grad_accumulation + part
            mine = chosen[slot * self.micro_batch : (slot + 1) * self.micro_batch]
            yield mine, slot, self.stage.batch_size // self.micro_batch

    def prepare(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model, equal on all processes, with its optimiser: copied to each of them, or in shards (FSDP)."""
        if not getattr(self.stage, "fsdp", False) or self.accelerator.num_processes == 1:
            return self.accelerator.prepare(model, make_optimizer(model, self.stage))
        shard(model, self.accelerator.device, self.accelerator.num_processes)
        optimizer = make_optimizer(model, self.stage)
        shard_state(optimizer)
        model = self.accelerator.prepare_model(model, evaluation_mode=True)  # as it is, not wrapped for DDP
        return model, self.accelerator.prepare_optimizer(optimizer)

    @contextmanager
    def accumulation(self, model: nn.Module, last: bool) -> Iterator[None]:
        """A round of a step. Processes exchange gradients in the last one only."""
        if is_sharded(model):
            model.set_requires_gradient_sync(last)
            yield
        else:
            with nullcontext() if last else self.accelerator.no_sync(model):
                yield

    def prefetch(self, data: ImageSet) -> Prefetch:
        """Of a step, its images (b, C, H, H) by the number of the slice, on the way while another step is trained."""
        pin = self.accelerator.device.type == "cuda"

        def load(step: int) -> dict[int, Tensor]:
            data.expect(self.stage.batch_size, self.stage.seed, step)
            return {slot: data.gather(chosen, pin) for chosen, slot, _ in self.micro_batches(data, step)}

        return Prefetch(load)

    def generator(self, step: int, purpose: int) -> torch.Generator:
        """An equally seeded generator on every process, one for each step and purpose."""
        return torch.Generator().manual_seed(((self.stage.seed * 1_000_003 + step) * 16 + purpose) % 2**63)

    def to_device(self, x: Tensor) -> Tensor:
        """x on the accelerator, without waiting for what runs there."""
        device = self.accelerator.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)

    def optimise(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], losses: dict[str, Tensor], step: int
    ) -> Tensor:
        """Clips, sets the step's learning rate, steps and clears; the gradient norm before clipping."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.stage)
        norm = whole(self.accelerator.clip_grad_norm_(parameters, self.stage.grad_clip or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Under fp16 the gradient scaler skips steps of infinite gradients: part of its search for a scale.
        self._watch(losses if self.accelerator.scaler is not None else {**losses, "the gradient norm": norm}, step)
        return norm

    def _watch(self, terms: dict[str, Tensor], step: int) -> None:
        """Notes on the device the first step at which each term is not finite: nothing waits for it here."""
        for name, value in terms.items():
            known = self._first_bad.get(name)
            if known is None:
                known = torch.full((), NEVER, device=value.device)
            self._first_bad[name] = torch.where(value.detach().isfinite().all(), known, known.clamp(max=step))

    def check_finite(self) -> None:
        """Ends the run with one sentence if a step since the last look had a term that was not finite."""
        if not self._first_bad:
            return
        first_bad = self.accelerator.gather(torch.stack([*self._first_bad.values()])[None])  # (processes, terms)
        steps = first_bad.amin(dim=0).tolist()
        step, name = min(zip(steps, self._first_bad, strict=True), key=lambda pair: pair[0])  # first of equals
        if step < NEVER:
            self.exit(
                f"Step {step}: {name} is not finite. The last good state is in {self.checkpoints.folder}; a lower lr "
                "or another mixed_precision usually helps, and the same command with it goes on from there."
            )

    @contextmanager
    def averaged(self, model: nn.Module, ema: EMAModel, parameters: list[nn.Parameter]) -> Iterator[nn.Module]:
        """The model with averaged weights in place of the trained ones, and the clock of the steps halted.

        It is the model itself, or a whole copy if that is in shards. Called by all processes.
        """
        with self.clock.pause():
            if is_sharded(model):
                yield averaged_copy(model, ema, parameters)
                return
            ema.store(parameters)
            ema.copy_to(parameters)
            yield model
            ema.restore(parameters)

    # -------------------------------------------------------------------------------------------- logging

    def due(self, every: int, done: int) -> bool:
        """Whether something that comes every so many steps, and after the last one, comes after `done` steps."""
        return done % every == 0 or done == self.stage.steps

    def mean(self, losses: Tensor) -> Tensor:
        """Losses of any shape averaged over processes, each of which had an equal part of the batch.

        Ends the run if one of an earlier step was not finite.
        """
        self.check_finite()
        return self.accelerator.reduce(losses, "mean")

    def log_step(self, values: dict[str, float], done: int) -> None:
        """`log`, with the speed since the last time: images/s, and the share of the time that went into data."""
        self._read_clock(done)
        self.log(values | self._speed, done)

    def _read_clock(self, done: int) -> None:
        if done > self._timed_from:
            seconds, share = self.clock.read()
            images = (done - self._timed_from) * self.stage.batch_size
            self._speed = {"time/images_per_second": images / seconds, "time/data_share": share}
            self._timed_from = done

    def log(self, values: dict[str, float], done: int) -> None:
        """Scalars to TensorBoard and to metrics.jsonl; the first few onto the progress bar."""
        if self.dry:
            return
        self.accelerator.log(values, step=done)
        if self.is_main:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in list(values.items())[:4]}, refresh=False)
            line = {"step": done, **{k: float(f"{v:.6g}") for k, v in values.items()}}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def log_images(self, name: str, grid: Tensor, done: int) -> None:
        """A grid (C, H, W) in [0, 1] to TensorBoard and to samples/."""
        if self.dry or not self.is_main:
            return
        self.accelerator.get_tracker("tensorboard").writer.add_image(name, grid, done)
        pixels = (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        path = self.folder / "samples" / f"{name}-{done:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)

    def print(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)

    def exit(self, text: str) -> NoReturn:
        """Ends the program with a sentence, which one process says."""
        raise SystemExit(text if self.is_main else 1)

    # ------------------------------------------------------------------------------------- start, save and end

    def resume(self, images: int, **facts: Any) -> int:
        """Loads the newest whole checkpoint and opens the logs; the number of steps done, 0 in a fresh folder.

        Args:
            images: how many there are to train on: other ones than before need --allow-changes.
            facts: what else, beside the shape of the models, may not change between a checkpoint and its resumption.
        """
        section = self.folder.name
        self._identity |= facts | {section: {"optimizer": self.stage.optimizer, **facts.get(section, {})}}
        if self.dry:
            return 0
        if self.is_main:
            self._lock_folder()
        done = self.checkpoints.load(self._identity, self.print)
        self._identity["images"] = images
        path = self.folder / "config.yaml"
        try:
            before = self.checkpoints.manifest.get("images", images)
            changes = check_changes(path, self.config, before, images, self.args.allow_changes) if done else ""
        except ValueError as error:
            self.exit(str(error))
        if changes:
            self.print(f"Until step {done} it was {changes}.")
        if self.is_main:
            if changes:
                os.replace(path, path.with_name(f"config-until-{done:08d}.yaml"))
            save_config(self.config, path)
            self._cut_metrics(done)
        # What TensorBoard has of steps after the checkpoint is hidden: they come again.
        hidden = {"purge_step": done + 1} if done else {}
        self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": hidden})
        self.print(f"Checkpoints, metrics, samples and TensorBoard logs are in {self.folder}.")
        return done

    def _lock_folder(self) -> None:
        """Keeps a second run out, which would spoil the checkpoints. The lock goes with the process, killed or not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self.exit(f"Another run works in {self.folder}: wait for its end, stop it, or take another --output.")
        except NotImplementedError:  # a file system without locks
            pass

    def _cut_metrics(self, done: int) -> None:
        """Removes from metrics.jsonl what was logged after the checkpoint, and a line cut off by a kill."""
        path = self.folder / "metrics.jsonl"
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= done:
                    kept.append(line + "\n")
            except ValueError:
                pass
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)

    def save(self, done: int) -> None:
        """Writes a checkpoint of `done` steps, but never one of a state that is not finite."""
        self.check_finite()
        if not self.dry:
            with self.clock.pause():
                self.checkpoints.save(done, self._identity)

    def finish(self, done: int, early: bool = False, deliver: Callable[[], None] | None = None) -> bool:
        """Saves, says how the run ended; True when all steps are done, or as many as are wanted.

        deliver: what is to be made then, called by all processes while they can still exchange something.

        Raises:
            SystemExit: after a signal, with the exit code a shell expects: what was to come next must not.
        """
        self.save(done)
        complete = (early or done >= self.stage.steps) and not self.dry
        if self.dry:
            self._read_clock(done)
            rate, share = self._speed.values()
            self.print(f"Dry run: {rate:.1f} images/s, {share:.1%} of the time for data; nothing was written.")
        elif complete:
            minutes = (time.monotonic() - self._started) / 60
            self.print(f"Finished: {done} steps, {minutes:.1f} minutes since the last start.")
            if deliver:
                deliver()
        else:
            self.print(f"Stopped at step {done} of {self.stage.steps}: {self._stop_reason}. The same command goes on.")
        self.accelerator.end_training()
        if self._stop_signal and not complete:
            raise SystemExit(128 + self._stop_signal)
        return complete


def image_grid(rows: list[Tensor], gap: int = 2) -> Tensor:
    """Rows of images (n, C, H, W) in [-1, 1] as one picture (C, ..., ...) in [0, 1], white gaps."""
    lines = [torch.cat([nn.functional.pad(x, (0, gap, 0, gap), value=1.0) for x in row], dim=-1) for row in rows]
    return ((torch.cat(lines, dim=-2) + 1) / 2).clamp(0, 1)
