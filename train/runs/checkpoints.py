"""Checkpoints of a run: each one whole or not there at all, and the way back to the newest whole one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from ..configs.config import Config, config_to_dict, flatten

# Facts that nobody has set and nobody can read.
IN_WORDS = {
    "tokenizer_weights": "another tokenizer than the one that is beside it now",
    "class_names": "other classes than the data has now",
}
KEPT = 2  # the newest, and one to fall back on when the newest is damaged


class Checkpoints:
    """The folder `checkpoints` of a run: step-00000500, ..., each of which says that so many steps are done.

    A checkpoint is written under another name, flushed to the disk and renamed. Its manifest.json, written last,
    has the size of every file, and what the run may not change afterwards. All methods are called by all processes.

    Args:
        folder: holds the checkpoints; on several machines they have to share it.
        accelerator: what it has prepared and registered is what is saved.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self._newest = -1  # step of the newest whole checkpoint
        self.manifest: dict[str, Any] = {}  # of the one that was loaded

    def save(self, step: int, identity: dict[str, Any]) -> None:
        """Writes a checkpoint of `step` steps, unless that is there, and removes all but the newest `KEPT`.

        Raises:
            SystemExit: if the disk does not take it. What was written before stays whole.
        """
        if step == self._newest:
            return
        final = self.folder / f"step-{step:08d}"
        partial = final.with_name(final.name + ".partial")
        try:
            self._on_main(shutil.rmtree, partial, ignore_errors=True)
            self.accelerator.save_state(str(partial), safe_serialization=True)
            self.accelerator.wait_for_everyone()
            self._on_main(self._complete, partial, final, {"step": step, **identity})
        except (OSError, RuntimeError, SafetensorError) as error:  # each library's own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free / 2**20
            raise SystemExit(
                f"Step {step}: no checkpoint could be written to {self.folder}, where {free:.0f} MiB are free "
                f"({first_line(error)}); earlier ones are whole, and the same command goes on from the newest."
            ) from error
        self._newest = step

    def load(self, identity: dict[str, Any], say: Callable[[str], None]) -> int:
        """Loads the newest whole checkpoint: the number of its steps, 0 if there is none.

        Raises:
            SystemExit: if it belongs to another model, or its files have the right size but cannot be read.
        """
        self._on_main(self._remove_partial)
        folders = self._all()
        for folder in reversed(folders):
            manifest = read_manifest(folder)
            if manifest is None:
                say(f"{folder} is damaged (files are missing or cut off): falling back on the one before.")
                continue
            changes = _changes(manifest, identity)
            if changes:
                raise SystemExit(
                    f"{folder} was trained with {changes}: set that back, take another --output, or delete "
                    f"{self.folder.parent} to train this stage anew."
                )
            try:
                self.accelerator.load_state(str(folder))
            except Exception as error:  # unpickling damaged files raises all there is
                raise SystemExit(
                    f"{folder} cannot be read ({first_line(error)}): delete it, and the same command falls back on "
                    "the one before."
                ) from error
            self._newest, self.manifest = manifest["step"], manifest
            say(f"Resumed from {folder}.")
            return self._newest
        if folders:
            say("No whole checkpoint is left: starting anew.")
        return 0

    def _complete(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
        (partial / "manifest.json").write_text(json.dumps({**manifest, "sizes": sizes}))
        for path in [*partial.rglob("*"), partial]:  # or a power cut could leave the name and not the bytes
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if final.exists():  # a damaged one, or it would have been loaded
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _remove_partial(self) -> None:
        for folder in self.folder.glob("*.partial"):
            shutil.rmtree(folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".partial")

    def _on_main(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """One process acts, the others wait until it has."""
        if self.accelerator.is_main_process:
            action(*args, **kwargs)
        self.accelerator.wait_for_everyone()


def publish(folder: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` fill a folder beside `folder` and puts it in the place of that: never half a model there."""
    partial, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write(partial)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest; None if a file is missing or has another size than was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["sizes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return manifest if whole else None


def first_line(error: Exception) -> str:
    """What an exception says, without the stack of calls that some carry along."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _changes(manifest: dict[str, Any], identity: dict[str, Any]) -> str:
    """Where a checkpoint's identity differs from the run's, as "a=1, not 2 and b=3, not 4"; "" where nowhere."""
    # A setting that came later than the checkpoint had its default then.
    before = flatten(config_to_dict(Config())) | flatten(manifest)
    now = flatten(json.loads(json.dumps(identity)))
    return " and ".join(
        IN_WORDS.get(key) or f"{key}={str(before[key])[:16]}, not {str(value)[:16]}"
        for key, value in now.items()
        if key in before and before[key] != value
    )
