"""The check of one GPU runs whole at toy size on a CPU."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

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
