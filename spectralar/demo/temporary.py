"""A temporary folder of the page's own: on a shared machine Gradio's default one may belong to somebody else."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where every user has a temporary folder of their own
    fcntl = None

VARIABLE = "GRADIO_TEMP_DIR"  # Gradio reads it on import
PREFIX = "spectralar-page-"
LOCK = "in-use"


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Makes a folder that nobody else may read, tells Gradio of it, and removes it at the end.

    Where the variable is set already, that folder is taken and left as it is. What a page has left that was killed is
    removed by the next one: each holds a lock on its folder, which ends with the process, however that ends.

    Raises:
        OSError: if no folder can be made.
    """
    if os.environ.get(VARIABLE):
        yield Path(os.environ[VARIABLE])
        return
    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # of mode 0700
    lock = _lock(folder)
    os.environ[VARIABLE] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(folder, ignore_errors=True)
        if lock:
            lock.close()


def remove_leftovers() -> None:
    """Removes the folders of pages that run no more; never one of another user, and never through a link."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / LOCK).is_file():
                continue
            if lock := _lock(folder):
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()


def _lock(folder: Path) -> IO[bytes] | None:
    """Takes the lock of a folder until it is closed; None if another process holds it."""
    if fcntl is None:
        return None
    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
