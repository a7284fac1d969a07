"""What `pip install .` gives: a wheel with all the package's files, and a page that opens from it."""

import os
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.helpers import tiny_pipeline

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
SECONDS = 1200  # a page that hangs; on an idle machine it is there in ten


def sources(folder: Path) -> set[str]:
    """The package's files, relative to the root."""
    return {
        path.relative_to(folder).as_posix()
        for path in (folder / "spectralar").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyi"  # Python's and Gradio's own
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as from a clean clone: a build leaves folders beside its sources, and reads old ones."""
    source, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    for name in [*sources(ROOT), "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh virtual environment with the wheel; what it needs comes from the tests' own environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    scheme = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    site = Path(scheme["purelib"])
    python = folder / Path(scheme["scripts"]).name / "python"
    (site / "of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True)
    return python.parent


def test_a_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources(ROOT)
    assert {Path(name).suffix for name in names} >= {".html", ".css", ".js", ".jpg"}


@pytest.mark.parametrize("command", [["spectralar-demo"], ["python", "-m", "spectralar.demo"]], ids=" ".join)
def test_what_is_wrong_is_said_from_any_folder(installed, tmp_path, command):
    words = [installed / command[0], *command[1:], "--model", "./nowhere"]
    answer = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 2
    assert "there is no folder ./nowhere" in answer.stderr and "Traceback" not in answer.stderr


@pytest.mark.timeout(SECONDS + 60)
def test_the_page_opens_from_an_installed_wheel_with_a_model_that_it_finds(installed, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "assets" / "models" / "tiny")
    unset = ("PYTHONPATH", "SPECTRALAR_MODEL", "GRADIO_SERVER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.Popen(
        [installed / "spectralar-demo"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**environment, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "http://" in line:
                break
        else:
            pytest.fail("the page did not come:\n" + "".join(said))
        url = line.split()[-1].rstrip("/")
        config = httpx.get(f"{url}/config", timeout=120).json()
        scrubbers = [c["props"] for c in config["components"] if "scrub" in str(c["props"].get("html_template"))]
        assert scrubbers and all(props["js_on_load"] for props in scrubbers)  # what is not Python is there too
        example = next(path for path in installed.parent.rglob("cat.jpg"))
        assert "site-packages" in example.parts
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
