"""The house: which file may import which, and what may be imported at all."""

import ast
import sys

import pytest
from conftest import ROOT

FLOORS = {
    **dict.fromkeys(["runtime"], -1),  # the base: anyone may import it
    **dict.fromkeys(["vision", "losses", "tokenizer", "answers", "report"], 0),
    **dict.fromkeys(["model"], 1),
    **dict.fromkeys(["weights", "data"], 2),
    **dict.fromkeys(["generate", "bench"], 3),
    **dict.fromkeys(["pairs", "train", "eval"], 4),
    **dict.fromkeys(["toy"], 5),
}
PACKAGES = {"torch", "safetensors", "tokenizers", "PIL", "einops", "numpy", "tqdm", "matplotlib"}
DISTRIBUTED = {"runtime", "weights", "train"}
FILES = sorted(ROOT.glob("*.py"))


def imported(path):
    """(dotted module, line) of every import statement, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node.lineno


def test_every_file_has_its_floor():
    assert {p.stem for p in FILES} <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_import_only_from_floors_below(path):
    for module, line in imported(path):
        top = module.split(".")[0]
        if top in FLOORS:
            assert FLOORS[top] < FLOORS[path.stem], f"{path.name}:{line} imports {module} upwards"
        else:
            known = PACKAGES | set(sys.stdlib_module_names)
            assert top in known, f"{path.name}:{line} imports {module}"
            assert top not in ("pickle", "marshal", "shelve"), f"{path.name}:{line}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_only_three_files_know_of_processes(path):
    uses = any(module.startswith("torch.distributed") for module, _ in imported(path))
    assert not uses or path.stem in DISTRIBUTED


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nothing_evaluates_text_or_catches_everything(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in ("eval", "exec", "compile"), node.lineno
        if isinstance(node, ast.ExceptHandler):
            caught = getattr(node.type, "id", "")
            assert node.type is not None, f"{path.name}:{node.lineno} catches everything"
            assert caught not in ("BaseException",), f"{path.name}:{node.lineno}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno <= 90, f"{path.name}: {node.name} is too long"


def test_only_the_toy_knows_of_the_toy():
    for path in FILES:
        if path.stem != "toy":
            assert not any(m.split(".")[0] == "toy" for m, _ in imported(path)), path.name
