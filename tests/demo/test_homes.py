"""A page that was killed, folders of somebody else, a full disk: with the real program, in a process of its own."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys

import httpx
import pytest
import torch

from spectralar.demo.temporary import PREFIX
from tests.helpers import tiny_pipeline
from tests.load.server import serving
from tests.load.wire import Page, RefusedError, Session, result_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="signals, capabilities and mounts are those of Linux"),
    pytest.mark.timeout(1200),  # each starts the page once or twice, which takes minutes on a busy machine
]
WITHOUT_PRIVILEGES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")  # root then is a user like any other
STRANGER = 12345


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(1, 16, dtype=torch.float32).save_pretrained(folder)
    return folder


def clicked(url, elem_id="generate", endpoint=None):
    """What the page answers to a click on Generate, or to a call of an endpoint with the values that it opens with."""

    async def run():
        async with httpx.AsyncClient(timeout=240, trust_env=False) as client:
            config = (await client.get(url + "config")).json()
            page, session = Page(config), Session(client, url)
            function = page.functions[page.endpoint(endpoint) if endpoint else page.click(elem_id)]
            values = {c["id"]: c["props"].get("value") for c in config["components"]}
            event_id = await session.join(function["id"], [values[i] for i in function["inputs"]])
            async with session.events() as events:
                async for event in events:
                    if event.ends(event_id):
                        return result_of(event)

    return asyncio.run(run())


def generates(url):
    value = clicked(url)[0]
    return not value["busy"] and len(value["frames"]) == 12


def test_what_a_killed_page_leaves_is_gone_with_the_next(saved, tmp_path):
    with serving(tmp_path, ["--model", saved]) as server:
        (left,) = server.temporary.glob(f"{PREFIX}*")
        server.process.kill()  # -9
        server.process.wait()
        assert left.is_dir()
    with serving(tmp_path, ["--model", saved]) as server:
        (folder,) = server.temporary.glob(f"{PREFIX}*")
        assert folder != left and generates(server.url)
    assert list(server.temporary.glob(f"{PREFIX}*")) == [] and server.troubles() == []


@pytest.mark.skipif(os.name == "posix" and os.getuid() != 0, reason="only root can make a folder of somebody else")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="without setpriv root may read every folder")
def test_folders_of_somebody_else_do_not_matter(saved, tmp_path):
    theirs = [tmp_path / "tmp" / name for name in ("gradio", f"{PREFIX}theirs")]
    for folder in theirs:
        folder.mkdir(parents=True, mode=0o700)
        (folder / "in-use").touch()
        os.chown(folder, STRANGER, STRANGER)
    looks = [*WITHOUT_PRIVILEGES, sys.executable, "-c", f"import os; os.listdir({str(theirs[0])!r})"]
    assert "PermissionError" in subprocess.run(looks, capture_output=True, text=True).stderr
    with serving(tmp_path, ["--model", saved], before=WITHOUT_PRIVILEGES) as server:
        assert generates(server.url) and clicked(server.url, endpoint="generate_sheet")[0]["path"]
        assert server.troubles() == []
    assert all((folder / "in-use").exists() for folder in theirs)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_does_not_stop_generation(saved, tmp_path, small_disk):
    with serving(tmp_path, ["--model", saved], TMPDIR=str(small_disk)) as server:
        with (small_disk / "rest").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert generates(server.url)
        with pytest.raises(RefusedError, match="did not work"):  # this one is a file
            clicked(server.url, endpoint="generate_sheet")
        assert generates(server.url)
        assert server.troubles() == []
        (small_disk / "rest").unlink()
        assert clicked(server.url, endpoint="generate_sheet")[0]["path"]
