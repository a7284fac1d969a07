"""What the documentation points to is there: files, headings, modules, commands."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("assets/**/*.md")])
PYTHON = sorted(path for part in ("spectralar", "train", "tests", "docs") for path in (ROOT / part).rglob("*.py"))


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named(page: Path) -> set[str]:
    """Paths and modules that a page names as code."""
    return set(re.findall(r"`([\w/.-]+)`", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target}: there is no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"(?:python|launch|torchrun) -m ((?:spectralar|train|tests)[\w.]*)", text):
        assert importlib.util.find_spec(module), f"there is no module {module}"
    for path in re.findall(r"(?:python|bash) ([\w/]+\.py|tests/\w+)\b", text):
        assert (ROOT / path).is_file(), f"there is no {path}"
    for name in named(page):
        if re.match(r"(spectralar|train|tests|docs|assets)/", name):
            assert (ROOT / name).exists(), f"there is no {name}"


def test_code_points_to_documents_that_users_have():
    """A page named in a docstring is one of the repository's."""
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"DESIGN\b|LIBRARY_NOTES", text.replace(r"DESIGN\b|LIBRARY_NOTES", "")), path
        for page, anchor in re.findall(r"(docs/\w+\.md)(?:#([\w-]+))?", text):
            assert (ROOT / page).is_file(), f"{path}: there is no {page}"
            assert not anchor or anchor in anchors(ROOT / page), f"{path}: {page} has no heading {anchor}"


def test_folders_that_examples_load_are_there():
    examples = [line for path in PYTHON for line in path.read_text(encoding="utf-8").splitlines() if ">>>" in line]
    folders = re.findall(r'from_pretrained\("([^"]+)"', "\n".join(examples))
    assert folders and not [folder for folder in folders if not (ROOT / folder).is_dir()]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_figures_are_those_the_code_draws(tmp_path):
    runpy.run_path(str(ROOT / "docs" / "draw.py"))["main"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert drawn == set(
        re.findall(r"\(figures/([\w.-]+)\)", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"))
    )
