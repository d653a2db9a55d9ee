"""The house: two rings, which file may import which, and what may be imported at all."""

import ast
import importlib
import inspect
import sys

import pytest
from conftest import ROOT

# the first ring, in reading order: each file imports only what stands before it
ORDER = """runtime images vision tokenizer losses config model cache layouts weights
records data generate plain memory train pairs eval toy""".split()
FOLDERS = ("benchmarks", "tools", "paper")  # the second ring
PACKAGES = {"torch", "safetensors", "tokenizers", "PIL", "einops", "numpy", "tqdm", "matplotlib"}
PACKAGES |= {"wandb", "pyarrow", "jinja2"}  # extras, and what comes with torch: imported late
DISTRIBUTED = {"runtime.py", "train.py"}
FIRST = sorted(ROOT.glob("*.py"))
FILES = FIRST + sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """(dotted module, line, at the top of the file) of every import statement."""
    for node in ast.walk(ast.parse(path.read_text())):
        top = getattr(node, "col_offset", 1) == 0
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno, top) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node.lineno, top


@pytest.mark.parametrize("path", FIRST, ids=name_of)
def test_a_file_of_the_first_ring_imports_only_what_is_read_before_it(path):
    place = ORDER.index(path.stem)
    for module, line, at_top in imported(path):
        first = module.split(".")[0]
        if first in ORDER:
            assert ORDER.index(first) < place, f"{path.name}:{line} imports {module} upwards"
        if first in FOLDERS and at_top:
            answers = first == "benchmarks" and path.stem in ("pairs", "eval", "toy")
            assert answers, f"{path.name}:{line} imports the folder {first}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_known_packages_are_imported(path):
    for module, line, _ in imported(path):
        first = module.split(".")[0]
        if first not in ORDER and first not in FOLDERS:
            known = PACKAGES | set(sys.stdlib_module_names)
            assert first in known, f"{path}:{line} imports {module}"
            assert first not in ("pickle", "marshal", "shelve"), f"{path}:{line}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_two_files_know_of_processes(path):
    uses = any(module.startswith("torch.distributed") for module, _, _ in imported(path))
    assert not uses or name_of(path) in DISTRIBUTED


@pytest.mark.parametrize("path", FILES, ids=name_of)
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


def test_only_the_paper_knows_of_the_toy():
    for path in FILES:
        if path.stem != "toy" and path.parent.name != "paper":
            assert not any(m.split(".")[0] == "toy" for m, _, _ in imported(path)), path.name


# what programs outside of this repository call; positions count, too
CONTRACTS = {
    "vision.tile_grid": "width height max_tiles min_tiles=1 tile_size=448",
    "vision.preprocess": "image max_tiles=12 tile_size=448 thumbnail=True",
    "tokenizer.load_tokenizer": "model_dir",
    "weights.load_model": "model_dir device='cpu' dtype=torch.float32",
    "weights.save_model": "model out_dir like",
    "losses.token_logps": "logits labels",
    "losses.parse_objective": "text",
    "losses.PairLogps": "policy_chosen policy_rejected reference_chosen reference_rejected "
    "chosen_length rejected_length",
    "benchmarks.answers.parse_answer": "response prompt_version",
    "benchmarks.answers.is_correct": "answer gold modes",
    "benchmarks.answers.get_mode": "filename",
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_what_others_call_keeps_its_name_and_its_arguments(name):
    module, function = name.rsplit(".", 1)
    parameters = inspect.signature(
        getattr(importlib.import_module(module), function)
    ).parameters.values()
    bare = (p.replace(annotation=p.empty, kind=p.POSITIONAL_OR_KEYWORD) for p in parameters)
    assert " ".join(map(str, bare)) == CONTRACTS[name]


# lines that a room may have today; these numbers only go down (aims: 5,000, 2,000, 2,900, 700)
AT_MOST = {"reading ring": 5951, "benchmarks": 2678, "tools": 3417, "paper": 700}

AT_MOST |= {"pairs.py": 800, "eval.py": 480, "toy.py": 350}  # rooms of one file


def test_no_room_grows():
    """The reading ring is all flat files but the three that make data, scores and a world."""
    lines = {name_of(path): path.read_text().count("\n") for path in FILES}
    rooms = dict.fromkeys(AT_MOST, 0)
    for name, count in lines.items():
        room = name.split("/")[0] if "/" in name else "reading ring"
        rooms[name if name in rooms else room] += count
    print(*(f"{count:6} {name}" for name, count in (lines | rooms).items()), sep="\n")
    assert {room: count for room, count in rooms.items() if count > AT_MOST[room]} == {}
