"""The check of one GPU runs whole at toy size on a CPU."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from toy import write_world

slow = pytest.mark.skipif(
    not os.environ.get("SLOW"), reason="87 s on two cores: set SLOW=1; make gpu runs it on a GPU"
)
PARTS = "start flex golden steps ids resume bench tiles mpo sample vit mmpr peers loader".split()


def check(out, *flags):
    script = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--out", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*script, *flags], env=environment, capture_output=True, text=True, check=False
    )


@slow
def test_every_part_runs_at_toy_size_and_every_row_has_a_verdict(tmp_path):
    write_world(tmp_path / "world", 16, 0)
    ended = check(tmp_path / "gpu", "--world", str(tmp_path / "world"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert {row["part"] for row in report["rows"]} == set(PARTS)
    assert {row["verdict"] for row in report["rows"]} <= {"ok", "measured", "skipped"}
    assert {"device", "torch", "commit", "command"} <= report.keys()
    lines = (tmp_path / "gpu" / "gpu.md").read_text().splitlines()
    assert len(lines) == 4 + len(report["rows"])


def test_the_golden_cases_are_a_part(tmp_path):
    ended = check(tmp_path, "--only", "golden")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert rows and {row["verdict"] for row in rows} == {"ok"}


@slow
def test_a_case_that_fails_is_a_row_and_the_next_still_runs(tmp_path):
    world = tmp_path / "world"
    (world / "model").mkdir(parents=True)  # no weights: nothing can train
    ended = check(tmp_path / "gpu", "--world", str(world), "--only", "start", "--only", "loader")
    assert ended.returncode == 1
    rows = json.loads((tmp_path / "gpu" / "gpu.json").read_text())["rows"]
    assert [(row["part"], row["verdict"]) for row in rows[:2]] == [
        ("start", "FAIL"),
        ("loader", "measured"),
    ]
