"""Flags, crash-safe files, metrics."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import ROOT

import runtime
from records import JsonLines, in_order
from runtime import (
    FLAGS,
    AppendLog,
    InputError,
    claim,
    fingerprint,
    flag,
    from_json,
    local_device,
    parse_cli,
    parse_command,
    parse_json,
    process_group,
    read_json,
    read_jsonl,
    read_whole_lines,
    run,
    write_atomic,
    write_json,
)
from train import TrainConfig


@dataclass(frozen=True)
class Config:
    """A small one."""

    lr: float = flag(0.1, "rate")
    steps: int = flag(3, "steps, 100 % of them")
    fast: bool = flag(False, "be fast")
    mode: Literal["a", "b"] = flag("a", "which")
    out: Path = flag(Path("x"), "folder")
    image: tuple[Path, ...] = flag((), "may be repeated")
    cache: Path | None = flag(None, "a folder, or none")
    share: float = flag(0.5, "a share", low=0, high=1)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")


def test_flags_have_the_types_of_their_fields():
    args = "--lr 2 --fast --mode b --out y --image p q".split()
    assert parse_cli(Config, args) == Config(2.0, 3, True, "b", Path("y"), (Path("p"), Path("q")))
    assert parse_cli(Config, ["--image", "p", "--image=q"]).image == (Path("p"), Path("q"))
    assert parse_cli(Config, ["--no-fast"]) == Config()
    assert parse_cli(Config, ["--cache", "c"]).cache == Path("c")
    assert parse_cli(Config, ["--cache", ""]).cache is None


def test_json_keeps_a_file_name_that_is_not_utf8_and_takes_nothing_but_paths_for_text(tmp_path):
    odd = Path(os.fsdecode(b"\xff\xe7\x8c\xab"))
    write_json(tmp_path / "a.json", {"file": odd})
    assert read_json(tmp_path / "a.json") == {"file": str(odd)}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"file": object()})


def test_a_saved_config_is_replayed_and_a_flag_wins_over_it(tmp_path):
    saved = Config(2.0, 5, True, "b", Path("y"), (Path("p"), Path("q")))
    write_json(tmp_path / "config.json", asdict(saved))
    config = ["--config", str(tmp_path / "config.json")]
    assert parse_cli(Config, config) == saved
    assert parse_cli(Config, [*config, "--steps", "7"]).steps == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "3"], "unknown flag --step; did you mean --steps?"),
        (["--learning_rate", "3"], "unknown flag --learning_rate; did you mean --lr?"),
        (["--learning-rat", "3"], "did you mean --lr?"),
        (["--lr", "0"], "lr must be > 0, got 0.0"),
        (["--lr", "fast"], "'lr' must be float, got 'fast'"),
        (["--mode", "c"], "'mode' must be one of ['a', 'b'], got 'c'"),
        (["--lr", "nan"], "lr must be a number, got nan"),
        (["--share", "-1"], "share must be >= 0 and <= 1, got -1.0"),
        (["--share", "inf"], "share must be >= 0 and <= 1, got inf"),
        (["--config", "nowhere.json"], "nowhere.json"),
        *([(["--image=--"], "-- is no value")] if sys.version_info < (3, 13) else []),
    ],
)
def test_wrong_usage_exits_with_status_2_and_says_why(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(Config, argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert error.startswith("error: ") and error.endswith(" --help\n")


def test_what_other_programs_call_a_flag_leads_to_one_of_train():
    flags = {f.name for f in fields(TrainConfig)}
    other_names = FLAGS["other names"]
    assert set(other_names.values()) <= flags and not flags & set(other_names)


def test_help_has_a_line_a_flag_under_headings(capsys):
    with pytest.raises(SystemExit):
        parse_cli(Config, ["--help"])
    text = capsys.readouterr().out
    assert re.search(r"optimisation:\n  --lr X +rate \[0.1\]\n  --steps N +steps, 100 % of", text)
    assert re.search(r"output:\n  --out PATH +folder \[x\]\n", text)
    assert "[()]" not in text and "[None]" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"learning_rate": 1}', "unknown key 'learning_rate'"),
        ('{"lr": [1, 2]}', "'lr' must be float, got (1, 2)"),
        ('{"lr": {"a": 1}}', "'lr' must be float, got {'a': 1}"),
    ],
)
def test_a_config_with_a_strange_key_or_value_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(SystemExit):
        parse_cli(Config, ["--config", str(tmp_path / "c.json")])
    assert message in capsys.readouterr().err


def test_an_unknown_command_gets_a_suggestion(capsys):
    assert parse_command({"go": Config}, ["go", "--lr", "3"]) == ("go", Config(3.0))
    with pytest.raises(SystemExit) as stop:
        parse_command({"sample": Config}, ["sampel"])
    assert stop.value.code == 2
    assert "did you mean sample?" in capsys.readouterr().err


def test_half_a_character_is_written_as_it_was_read():
    record = {"text": "half \ud800, whole \U0001f600"}
    assert parse_json(runtime.json_line(record), "x") == record


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(InputError, match=f"{name} is no file that can be replaced"):
            write_atomic(tmp_path / name, "new")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()


def test_a_torn_last_line_is_cut_and_a_broken_middle_line_is_an_error(tmp_path):
    path = tmp_path / "part.jsonl"
    log = AppendLog(path)
    log.append({"a": 1})
    log.append({"a": "ä"})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": 3')
    log = AppendLog(path)
    assert read_whole_lines(path) == [{"a": 1}, {"a": "ä"}]
    log.append({"a": 4})
    log.close()
    assert path.read_bytes() == whole + b'{"a": 4}\n'
    path.write_bytes(b'{"a": 1\n{"a": 2}\n')
    with pytest.raises(InputError, match="part.jsonl line 1: not valid JSON"):
        read_whole_lines(path)


@pytest.mark.parametrize(
    ("line", "got"), [('{"loss": 1}', None), ('{"step": 1.5}', 1.5), ('{"step": true}', True)]
)
def test_a_row_without_a_field_of_the_type_that_is_asked_for_is_named(tmp_path, line, got):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=f"metrics.jsonl line 2: 'step' must be int, got {got}"):
        read_whole_lines(path, step=int)


def test_a_line_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(InputError, match="a.jsonl line 3: expected a JSON object, got list"):
        list(read_jsonl(path))


@dataclass
class Entry:
    annotation: str
    repeat: float = flag(1.0, "copies of a record", low=0)
    tiles: int | None = None
    images: list[str] = field(default_factory=list)
    kind: Literal["photo", "chart"] = "photo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"repeat": 1}', "m: no 'annotation'"),
        ('{"annotation": 3}', "m: 'annotation' must be str, got 3"),
        ('{"annotation": "a", "repeat": true}', "m: 'repeat' must be float, got True"),
        ('{"annotation": "a", "repeat": -1}', "m: repeat must be >= 0, got -1"),
        ('{"annotation": "a", "repeat": NaN}', "m: repeat must be >= 0, got nan"),
        ('{"annotation": "a", "tiles": 1.5}', "m: .tiles. must be int | None, got 1.5"),
        ('{"annotation": "a", "images": ["b", 2]}', "m: 'images' must be list"),
        ('{"annotation": "a", "kind": "map"}', "m: 'kind' must be .*photo.*, got 'map'"),
        (
            '{"annotation": "a", "annotation": "b"}',
            "m: not valid JSON .the key 'annotation' stands there twice",
        ),
        ('{"a": ' + "[" * 100_000, "m: not valid JSON"),
        ('["a"]', "m: expected a JSON object, got list"),
        ('{"annotation": "a", "repeat": 1e999}', "m: 'repeat' must be float, got inf"),
        (
            '{"annotation": "a", "repeat": 1' + "0" * 400 + "}",
            "m: 'repeat' must be float, got 10",
        ),
        ('{"annotation": "a", "tiles": 1' + "0" * 20 + "}", "m: .tiles. must be int | None, got 1"),
        ("\ud800", "m: not valid JSON"),
    ],
)
def test_an_object_that_people_write_is_checked_key_by_key(text, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        from_json(Entry, parse_json(text, "m"), "m")


def test_a_good_object_gets_its_defaults():
    record = parse_json(b'\xef\xbb\xbf{"annotation": "a", "repeat": 2, "other": 1}', "m")
    assert from_json(Entry, record, "m") == Entry("a", 2, None, [], "photo")


def test_a_json_list_given_as_jsonl_is_told_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[{"a": 1},\n {"a": 2}]\n')
    for read in (read_jsonl, JsonLines):
        with pytest.raises(InputError, match="a.jsonl is a JSON list; write one object a line"):
            list(read(path))


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (lambda: read_json(Path("nowhere.json")), 2, "error: no file nowhere.json"),
        (lambda: open("nowhere"), 2, "No such file or directory: 'nowhere'"),
        (lambda: open("/"), 2, "Is a directory: '/'"),
        (lambda: open("/dev/null/x"), 2, "Not a directory: '/dev/null/x'"),
        (lambda: Path("/dev/null").mkdir(), 2, "File exists: '/dev/null'"),
        (lambda: open("a" * 300), 2, "File name too long"),
        (lambda: open("a\0b"), 2, "a text or file name is not valid: embedded null byte"),
        (lambda: b"\xff".decode(), 2, "a text or file name is not valid: 'utf-8' codec"),
        (lambda: open("/dev/full", "w", 1).write("x\n"), 1, "No space left on device"),
        (lambda: torch.empty(1 << 60), 1, "can't allocate memory"),
        (lambda: refuse_memory(), 1, "error: CUDA out of memory. Tried to allocate 2.00 GiB.\n"),
        (lambda: exec_recursion(), 2, "an input is nested too deeply"),
        (
            lambda: AppendLog(Path("/dev/full")).append({}),
            1,
            "No space left on device: '/dev/full'",
        ),
        (lambda: read_json(Path("/dev/zero")), 2, "error: no file /dev/zero"),
        (lambda: list(read_jsonl(Path("/"))), 2, "error: no file /"),
        (lambda: read_json(Path("a\0b")), 2, r"error: no file a\x00b"),
        (lambda: refuse("\x1b[31m red\nline 2"), 2, r"error: \x1b[31m red\nline 2"),
        (lambda: refuse("half \ud800, 猫\t"), 2, "error: half \\ud800, 猫\t"),
        (
            lambda: list(in_order(be_killed, [1, 2], 1, 2, "")),
            1,
            "out of memory? BrokenProcessPool",
        ),
    ],
)
def test_what_goes_wrong_outside_ends_in_one_line(failure, status, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(failure)
    error = capsys.readouterr().err
    assert stop.value.code == status
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_dev_null_and_no_file_gets_their_numbers(closed, tmp_path):
    code = """import runtime, sys
def main():
    with open("result", "w") as file:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
runtime.run(main)"""
    (tmp_path / "script.py").write_text(code)
    command = f"{sys.executable} script.py {closed}"
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "input": ""}
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, **options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result").read_text() == "True ''"
    assert done.stdout == ("" if " >&-" in f" {closed}" else "to stdout\n")
    assert done.stderr == ("" if "2>&-" in closed else "to stderr\n")


def refuse_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nC++ stack: ...")


def refuse(text):
    raise InputError(text)


def be_killed(items):
    os.kill(os.getpid(), signal.SIGKILL)


def exec_recursion():
    return exec_recursion()


@pytest.mark.parametrize("rank", [8, 9])
def test_every_process_refuses_too_few_gpus_and_the_first_of_its_machine_tells_first(
    monkeypatch, capsys, rank
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    waits, handlers = [], {}
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("signal.signal", handlers.__setitem__)
    names = {"RANK": rank, "LOCAL_RANK": rank - 8, "WORLD_SIZE": 10, "LOCAL_WORLD_SIZE": 2}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        run(local_device)
    # what one process alone meets is told, too; meanwhile torchrun may end it by any signal
    assert "2 processes for 1 GPUs: pass --nproc_per_node 1" in capsys.readouterr().err
    assert waits == [3] * (rank - 8) and set(handlers.values()) <= {signal.SIG_DFL}


def test_the_gpu_of_a_process_is_the_current_one(monkeypatch):
    """A graph captured beside another current device holds no kernel: old logits for new ones."""
    current = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device().index == 1 and current == [1]


@pytest.mark.parametrize("known", [{}, {"RANK": "0"}, {"RANK": "0", "MASTER_ADDR": "localhost"}])
def test_a_process_of_several_that_torchrun_did_not_start_says_so(known, monkeypatch, capsys):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (known | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        run(lambda: process_group(0).__enter__())
    assert "expected, but not set; start several processes by torch" in capsys.readouterr().err


def test_a_fingerprint_sees_every_byte_and_a_claim_refuses_other_facts(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3_000_000))
    first = fingerprint([weights])
    assert fingerprint([weights]) == first and len(first) == 32
    weights.write_bytes(bytes(1_500_000) + b"\1" + bytes(1_499_999))
    os.utime(weights, ns=(1, 1))
    second = fingerprint([weights])
    assert second != first
    claim(tmp_path / "run", {"weights": first, "tiles": 12}, "pass another --out")
    claim(tmp_path / "run", {"weights": first, "tiles": 12}, "pass another --out")
    with pytest.raises(InputError, match="run was made with another weights .*; pass another"):
        claim(tmp_path / "run", {"weights": second, "tiles": 12}, "pass another --out")


def test_a_folder_of_lines_that_has_lost_its_run_json_is_not_claimed_anew(tmp_path):
    claim(tmp_path, {"weights": "a"}, "pass another --out")
    (tmp_path / "run.json").unlink()
    claim(tmp_path, {"weights": "a"}, "pass another --out")  # it holds nothing yet
    (tmp_path / "run.json").unlink()
    (tmp_path / "answers.0-of-1.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="another weights .run.json does not say, now b.; pass"):
        claim(tmp_path, {"weights": "b"}, "pass another --out")


EARLY = "train generate pairs toy plain".split() + [
    f"tools/{name}" for name in "look lab convert export doctor gpu_check rlaifv race".split()
]


@pytest.mark.parametrize("name", [*EARLY, "eval", "paper.story"])
def test_wrong_flags_are_told_before_torch_is_imported(name):
    script = ["-m", name] if "." in name else [str(ROOT / f"{name}.py")]
    command = [sys.executable, "-X", "importtime", *script, "--hlep", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--hlep" in done.stderr
    assert not re.search(r"\| +(torch|numpy|PIL)$", done.stderr, re.MULTILINE)


def test_a_lock_of_a_file_that_its_holder_has_just_removed_counts_for_nothing(
    tmp_path, monkeypatch
):
    flock = fcntl.flock

    def flock_late(file, operation):
        (tmp_path / ".lock").unlink()
        flock(file, operation)

    with monkeypatch.context() as patched, pytest.raises(InputError, match="another run works"):
        patched.setattr(fcntl, "flock", flock_late)
        with runtime.alone_in(tmp_path, 0, "end it"):
            pass
    with runtime.alone_in(tmp_path, 0, "end it"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_system_has_no_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with runtime.alone_in(tmp_path, 0, "end it"):
        assert "has no locks; never start two runs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("told", [True, False])
def test_cores_are_those_that_the_process_may_use_or_all_where_nobody_tells(told):
    code = "import os; " + "del os.sched_getaffinity; " * (not told) + "import runtime"
    output = subprocess.check_output(
        [sys.executable, "-c", f"{code}; print(runtime.CORES)"], cwd=ROOT, text=True
    )
    assert int(output) == (len(os.sched_getaffinity(0)) if told else os.cpu_count())
