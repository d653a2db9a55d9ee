"""Flags, crash-safe files, metrics."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from runtime import (
    AppendLog,
    InputError,
    MetricsLog,
    Process,
    clock,
    config_json,
    flag,
    parse_cli,
    parse_command,
    read_jsonl,
    write_atomic,
)


@dataclass(frozen=True)
class Config:
    """A small one."""

    lr: float = flag(0.1, "rate")
    steps: int = flag(3, "steps, 100 % of them")
    fast: bool = flag(False, "be fast")
    mode: Literal["a", "b"] = flag("a", "which")
    out: Path = flag(Path("x"), "folder")
    image: tuple[Path, ...] = flag((), "may be repeated")

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")


def test_flags_have_the_types_of_their_fields():
    args = "--lr 2 --fast --mode b --out y --image p --image q".split()
    assert parse_cli(Config, args) == Config(2.0, 3, True, "b", Path("y"), (Path("p"), Path("q")))
    assert parse_cli(Config, ["--no-fast"]) == Config()


def test_a_saved_config_is_replayed_and_a_flag_wins_over_it(tmp_path):
    saved = Config(2.0, 5, True, "b", Path("y"), (Path("p"), Path("q")))
    (tmp_path / "config.json").write_text(config_json(saved))
    config = ["--config", str(tmp_path / "config.json")]
    assert parse_cli(Config, config) == saved
    assert parse_cli(Config, [*config, "--steps", "7"]).steps == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "3"], "unknown flag --step; did you mean --steps?"),
        (["--lr", "0"], "lr must be > 0, got 0.0"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--mode", "c"], "invalid choice: 'c'"),
        (["--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_usage_exits_with_status_2_and_says_why(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(Config, argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_with_a_strange_key_is_refused(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"learning_rate": 1}')
    with pytest.raises(SystemExit):
        parse_cli(Config, ["--config", str(tmp_path / "c.json")])
    assert "unknown key 'learning_rate'" in capsys.readouterr().err


def test_an_unknown_command_gets_a_suggestion(capsys):
    assert parse_command({"go": Config}, ["go", "--lr", "3"]) == ("go", Config(3.0))
    with pytest.raises(SystemExit) as stop:
        parse_command({"sample": Config}, ["sampel"])
    assert stop.value.code == 2
    assert "did you mean sample?" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_torn_last_line_is_cut_and_a_broken_middle_line_is_an_error(tmp_path):
    path = tmp_path / "part.jsonl"
    log = AppendLog(path)
    log.append({"a": 1})
    log.append({"a": "ä"})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": 3')
    log = AppendLog(path)
    assert log.records == [{"a": 1}, {"a": "ä"}]
    log.append({"a": 4})
    log.close()
    assert path.read_bytes() == whole + b'{"a": 4}\n'
    path.write_bytes(b'{"a": 1\n{"a": 2}\n')
    with pytest.raises(InputError, match="part.jsonl line 1: not valid JSON"):
        AppendLog(path)


def test_a_line_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(InputError, match="a.jsonl line 3: expected a JSON object, got list"):
        list(read_jsonl(path))


def test_resumed_metrics_hold_each_step_once(tmp_path, capsys):
    process = Process(0, 1, torch.device("cpu"))
    log = MetricsLog(tmp_path, process, 4)
    for step in (1, 2, 3):
        log(step, {"loss": step / 2}, ["loss"])
    log.close()
    log = MetricsLog(tmp_path, process, 4, done=2)
    assert [r["step"] for r in log.kept] == [1, 2]
    log(3, {"loss": 9.0}, ["loss"])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert "step 3/4  loss 9" in capsys.readouterr().err


def test_the_clock_reads_as_hours_minutes_seconds():
    assert clock(3723.9) == "1:02:03"
