"""Arrows point down: which file may import which. The folders' docstrings say the same in words."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("spectralar", "train", "app")

# From the ground up. A file may import its own room and the floors below, not its neighbours on the same floor.
# A room is a folder or a file; the longest name counts.
LIBRARY = [
    {"spectralar.checks"},
    {"spectralar.spectral", "spectralar.quantizer", "spectralar.layers", "spectralar.sampling"},
    {"spectralar.inference.compiled", "spectralar.shortcut"},
    {"spectralar.entries"},
    {"spectralar.tokenizer", "spectralar.transformer"},
    {"spectralar.inference", "spectralar.interface", "spectralar.analysis"},
    {"spectralar.pipeline"},
    {"spectralar"},
]
DEMO = [*LIBRARY, {"spectralar.demo"}, {"app"}]
TRAINING = [
    *LIBRARY,
    {"train"},
    {"train.configs"},
    {"train.data"},
    {"train.objectives", "train.runs"},
    {"train.evaluation"},
    {"train.train_tokenizer", "train.encode_dataset", "train.train_transformer", "train.train_classifier",
     "train.cutoffs", "train.evaluate", "train.ablate", "train.plan", "train.benchmark"},
]  # fmt: skip


def modules(*roots: str) -> dict[str, Path]:
    """Files by the names they are imported by."""
    files = [file for root in roots for file in (*ROOT.glob(f"{root}.py"), *(ROOT / root).rglob("*.py"))]
    parts = {file: file.relative_to(ROOT).with_suffix("").parts for file in files}
    return {".".join(name[:-1] if name[-1] == "__init__" else name): file for file, name in parts.items()}


def imports(name: str, file: Path) -> Iterator[str]:
    """Full names of all that a file imports, inside functions and for type checkers too."""
    package = name.split(".") if file.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)


def own_imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Which of the files each of them imports."""
    found = {}
    for name, file in files.items():
        targets = {target if target in files else target.rpartition(".")[0] for target in imports(name, file)}
        found[name] = targets & files.keys() - {name}
    return found


def room(name: str, floors: list[set[str]]) -> tuple[int, str] | None:
    """Floor and room of a file, None if it has none. A top-level package as a room is its __init__ alone."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for number, rooms in enumerate(floors):
            if prefix in rooms and (prefix == name or length > 1):
                return number, prefix
    return None


def wrong_arrows(floors: list[set[str]], *roots: str) -> list[str]:
    wrong = []
    for name, targets in own_imports(modules(*PACKAGES)).items():
        if name.split(".")[0] not in roots:
            continue
        own = room(name, floors)
        if own is None:
            wrong.append(f"{name} stands in no room")
            continue
        for target in targets:
            other = room(target, floors)
            if other is None or not (other == own or other[0] < own[0]):
                wrong.append(f"{name} imports {target}")
    return wrong


def test_the_library_and_the_demo_import_downwards_and_nothing_of_training():
    assert wrong_arrows(DEMO, "spectralar", "app") == []


def test_training_imports_downwards_and_nothing_of_the_demo():
    assert wrong_arrows(TRAINING, "train") == []


def test_there_are_no_circles():
    TopologicalSorter(own_imports(modules(*PACKAGES))).prepare()  # raises a CycleError that names them


def test_gradio_is_imported_by_the_demo_alone():
    for name, file in modules("spectralar", "train").items():
        if not name.startswith("spectralar.demo"):
            assert not [target for target in imports(name, file) if target.split(".")[0] == "gradio"], name
