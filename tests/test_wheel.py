"""What `pip install .` gives: a wheel with all the package's files, nothing missing."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
SOURCES = {".py", ".html", ".css", ".js", ".png", ".jpg", ".webp", ".md"}  # not what Python and Gradio leave behind


def tracked(folder: Path) -> set[str]:
    """The package's files, relative to the root."""
    return {
        path.relative_to(folder).as_posix()
        for path in (folder / "spectralar").rglob("*")
        if path.suffix in SOURCES and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as from a clean clone: a build leaves folders beside its sources, and reads old ones."""
    source, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    for name in [*tracked(ROOT), "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_a_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == tracked(ROOT)
    assert {Path(name).suffix for name in names} >= {".html", ".css", ".js", ".jpg"}
