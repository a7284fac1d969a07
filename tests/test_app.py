"""The command line of the page."""

import pytest

import app


def test_models_are_named_or_found(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECTRALAR_MODEL", raising=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model_index.json").write_text("{}")
    monkeypatch.setattr(app, "MODELS", tmp_path)
    assert app.parse_arguments([]).model == [tmp_path / "b"]
    monkeypatch.setenv("SPECTRALAR_MODEL", "one two")
    assert app.parse_arguments([]).model == ["one", "two"]
    assert app.parse_arguments(["--model", "three"]).model == ["three"]


@pytest.mark.parametrize(
    ("arguments", "sentence"), [(["--mcp"], "pip install 'gradio[mcp]'"), ([], "name a saved pipeline's folder")]
)
def test_what_is_missing_is_said(arguments, sentence, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("SPECTRALAR_MODEL", raising=False)
    monkeypatch.setattr(app, "MODELS", tmp_path)
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        app.parse_arguments(arguments)
    assert sentence in capsys.readouterr().err
