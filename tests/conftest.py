"""What all tests share: no network, few threads, a fixed seed, and the browser."""

import os
import shutil
import subprocess

# Read by torch, the Hub client, Gradio and matplotlib on import, and by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.helpers import record_steps, sharing_weights, tiny_pipeline  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Tiny models. Files with others of these names have fixtures of their own.


@pytest.fixture(scope="module")
def shared():
    return tiny_pipeline()


@pytest.fixture
def pipe(shared):
    """The same models all through; the pipeline's own state is new in each test."""
    return sharing_weights(shared)


@pytest.fixture
def steps(monkeypatch):
    return record_steps(monkeypatch)


@pytest.fixture(scope="session")
def chromium():
    """Path of a Chromium that runs. Without one browser tests fail in CI and are skipped elsewhere."""
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    for path in filter(None, map(shutil.which, filter(None, names))):
        # Some systems ship a stub under this name that only says how to install the real one.
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    message = "no Chromium found: install the package chromium, or name the program in CHROMIUM"
    (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


def pytest_collection_modifyitems(items):
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
