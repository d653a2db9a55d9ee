"""The lecture runs from its first cell to its last, and its page is made of these cells."""

import html
import json
import re

import pytest
from conftest import ROOT
from test_layout import FIRST, PACKAGES

from runtime import Failure
from tools.lecture import main as write_page
from tools.lecture import read_cells, run_cells

NOTEBOOK = ROOT / "docs/lecture.ipynb"
PAGE = (ROOT / "docs/lecture.html").read_text()


def test_every_cell_runs_and_the_page_shows_what_it_prints(tmp_path, monkeypatch):
    out = tmp_path / "lecture.html"
    monkeypatch.setattr("sys.argv", ["lecture.py", "--out", str(out)])
    write_page()
    page = out.read_text()
    assert page.count("data:image/png;base64,") == 4 and page.count("<h2>") == 12
    assert "dpo   by hand 0.693147   losses.py 0.693147" in page  # policy == reference
    losses = [float(x) for x in re.findall(r"step \d   loss (\S+)", page)]
    assert len(losses) == 8 and losses[-1] < losses[0] / 2
    after, right = (re.search(rf"^{w}    ([^<\n]*)", page, re.M)[1] for w in ("after", "right"))
    assert after == right
    assert len(page) < 1_500_000


def test_the_committed_page_is_of_the_committed_notebook():
    for kind, text in read_cells(NOTEBOOK):
        if kind == "code":
            assert html.escape(text) in PAGE, text
        else:
            assert html.escape(text.splitlines()[0].lstrip("# ")) in PAGE, text
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_the_lecture_imports_the_first_ring_and_its_figures_alone():
    known = {path.stem for path in FIRST} | PACKAGES
    for kind, text in read_cells(NOTEBOOK):
        for module in (
            re.findall(r"^(?:from|import) ([\w.]+)", text, re.M) if kind == "code" else ()
        ):
            ours = (ROOT / module.replace(".", "/")).with_suffix(".py").exists()
            assert module in known or module == "tools.figures" or not ours, module


def test_a_cell_that_fails_is_named():
    with pytest.raises(Failure, match="cell 2 of code failed(.|\n)*ZeroDivisionError"):
        run_cells(["print(1)", "1 / 0"])
