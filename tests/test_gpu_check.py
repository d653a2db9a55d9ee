"""The check of one GPU runs whole at toy size on a CPU."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from runtime import Failure
from tools import gpu_check, gpu_parts
from tools.gpu_check import PARTS, run_case
from tools.gpu_parts import Row

slow = pytest.mark.skipif(
    not os.environ.get("SLOW"), reason="87 s on two cores: set SLOW=1; make gpu runs it on a GPU"
)
DOCUMENTED = "start flex golden steps ids resume bench tiles mpo sample vit mmpr peers loader"


def check(out, *flags):
    script = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--out", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*script, *flags], env=environment, capture_output=True, text=True, check=False
    )


@slow
def test_every_part_runs_at_toy_size_and_every_row_has_a_verdict(tmp_path):
    ended = check(tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(PARTS) == DOCUMENTED.split()
    assert {row["part"] for row in report["rows"]} == set(PARTS)
    assert {row["verdict"] for row in report["rows"]} <= {"ok", "measured", "skipped"}
    assert {"device", "torch", "commit", "command"} <= report.keys()
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert len(lines) == 4 + len(report["rows"])


def test_the_golden_cases_are_a_part(tmp_path):
    ended = check(tmp_path, "--only", "golden")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert rows and {row["verdict"] for row in rows} == {"ok"}


def crash(case):
    yield Row("before", 1.0)
    raise ValueError(f"no luck with {case}")


def hang(case):
    yield Row("before", 1.0)
    time.sleep(60)


@pytest.mark.parametrize(
    "part, limit, words",
    [
        (crash, 30, "ended with 1: ValueError: no luck with 8b"),
        (hang, 1, "still running after 1 s"),
    ],
)
def test_a_case_that_fails_is_a_row_after_those_that_it_gave(part, limit, words, tmp_path, capfd):
    with capfd.disabled():  # so that a traceback goes to the log
        rows = run_case(tmp_path, part, "8b", limit, tmp_path / "log")
    assert rows == [Row("before", 1.0), Row(words, None, "", "FAIL")]


def calm(case):
    yield Row("after", 2.0)


def test_the_next_part_runs_after_one_that_fails(tmp_path, monkeypatch, capfd):
    parts = {"crash": crash, "hang": hang, "calm": calm, "make_world": calm}
    for name, part in parts.items():
        monkeypatch.setattr(gpu_parts, name, part, raising=False)
    limits = {"crash": (30, ("8b",)), "hang": (1, ("8b",)), "calm": (30, ("8b",))}
    monkeypatch.setattr(gpu_check, "PARTS", limits)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    with capfd.disabled(), pytest.raises(Failure, match="2 of 5 rows failed"):
        gpu_check.main()
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["part"], row["verdict"]) for row in rows] == [
        ("crash", "measured"), ("crash", "FAIL"), ("hang", "measured"), ("hang", "FAIL"),
        ("calm", "measured"),
    ]  # fmt: skip
