"""The command line of the page: what can go wrong before it is served, and what it leaves behind."""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from spectralar.demo import start
from spectralar.demo.temporary import PREFIX, VARIABLE, own_temporary_folder
from tests.load.server import ROOT


@pytest.fixture
def saved(tmp_path):
    """What the checks before loading look at of a saved pipeline."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SpectralARPipeline"}))
    return folder


def refused(*arguments):
    with pytest.raises(start.StartError) as caught:
        start.check(start.parse_arguments([*map(str, arguments)]))
    text = str(caught.value)
    assert text.count("\n") == 0 and text.endswith(".")
    return text


def test_models_are_named_or_found(monkeypatch, saved):
    monkeypatch.delenv("SPECTRALAR_MODEL", raising=False)
    monkeypatch.setattr(start, "MODELS", saved.parent)
    assert start.parse_arguments([]).model == [saved]
    start.check(start.parse_arguments([]))
    monkeypatch.setenv("SPECTRALAR_MODEL", "one two")
    assert start.parse_arguments([]).model == ["one", "two"]
    assert start.parse_arguments(["--model", "three"]).model == ["three"]


def test_without_a_clone_models_of_the_current_folder_are_found(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECTRALAR_MODEL", raising=False)
    monkeypatch.setattr(start, "MODELS", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    for name in ("runs/b/pipeline", "runs/a/pipeline", "assets/models/c"):  # the last goes before those trained
        assert start.parse_arguments([]).model == sorted(Path("runs").glob("*/pipeline"))
        Path(name).mkdir(parents=True)
        Path(name, "model_index.json").write_text("{}")
    assert start.parse_arguments([]).model == [Path("assets/models/c")]


def test_what_is_missing_is_said(monkeypatch, saved, tmp_path):
    with monkeypatch.context() as nothing:
        nothing.setattr(start.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'gradio[mcp]'" in refused("--mcp", "--model", saved)
        assert refused("--model", saved) == "the page needs Gradio: pip install gradio."
    monkeypatch.delenv("SPECTRALAR_MODEL", raising=False)
    monkeypatch.setattr(start, "MODELS", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    assert "name a saved pipeline's folder" in refused()


def test_a_wrong_model_is_named(tmp_path, saved):
    (tmp_path / "note.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    for name, sentence in (
        ("gone", "there is no folder"), ("note.txt", "is a file"), ("empty", "holds no saved pipeline"),
        ("broken", "cannot be read"), ("other", "holds a DiTPipeline, not a SpectralARPipeline"),
    ):  # fmt: skip
        assert sentence in (text := refused("--model", saved, tmp_path / name)) and name in text


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("Name or service not known\nand more"), "cannot be reached (Name or service not known)"),
        ("unknown", "no model of this name"),
    ],
)
def test_a_wrong_hub_id_is_named(error, sentence, monkeypatch):
    def model_info(self, repo_id, timeout):
        if isinstance(error, str):
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    text = refused("--model", "some-owner/some-name")
    assert "some-owner/some-name" in text and sentence in text
    assert "it is no Hub id either" in refused("--model", "bad--/..name")


def test_a_port_that_cannot_be_had(saved, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} cannot be had" in refused("--model", saved, "--port", port)
        monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
        assert "with $GRADIO_SERVER_PORT" in refused("--model", saved)
    start.check(start.parse_arguments(["--model", str(saved), "--port", str(port)]))
    assert "--port must be a number between" in refused("--model", saved, "--port", 70000)
    assert "cannot be served at --host" in refused("--model", saved, "--host", "host.invalid", "--port", port)


def test_mistakes_end_the_process_before_anything_slow_is_imported(tmp_path):
    code = (
        "import sys; from spectralar.demo.start import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'gradio', 'diffusers') if m in sys.modules])"
    )
    arguments = ["--model", str(tmp_path / "gone")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.strip() == "[]"
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path / "gone") in done.stderr


# -------------------------------------------------------------------------------------------------- temporary files


def test_the_temporary_folder_is_ones_own_and_goes_at_the_end(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with own_temporary_folder() as folder:
        assert os.environ[VARIABLE] == str(folder) and folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "file").write_text("x")
    assert VARIABLE not in os.environ and list(tmp_path.iterdir()) == []
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    with own_temporary_folder() as folder:
        assert folder == tmp_path / "chosen"


@pytest.mark.skipif(sys.platform == "win32", reason="locks are those of POSIX")
def test_only_what_a_dead_page_has_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, other, target = tmp_path / f"{PREFIX}dead", tmp_path / f"{PREFIX}other", tmp_path / "target"
    for folder in (left, other, target):
        folder.mkdir()
    for folder in (left, target):
        (folder / "in-use").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    with own_temporary_folder() as first:
        monkeypatch.delenv(VARIABLE)
        with own_temporary_folder():  # a second page beside it
            assert first.is_dir() and not left.exists()
    # One without a lock was not made by a page, or is just being made.
    assert other.is_dir() and (target / "in-use").exists()
