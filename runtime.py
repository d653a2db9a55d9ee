"""What every script shares: flags from a dataclass, the process group, files that survive a crash.

A closed list, never "utils": a thing enters here when two rooms on different floors need it.

    flag, parse_cli, parse_command   one frozen dataclass per script; a field is a flag
    InputError, run                  the user's mistakes end in one line and exit status 2
    start_process, Process           the process group: always one, also alone
    write_atomic, read_jsonl,        whole files or none; whole lines or none
    AppendLog
    MetricsLog                       one JSON line a step in out_dir/metrics.jsonl, one for the eye

torch is imported only where a process group is made, so that scoring scripts start without it.
"""

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal


class InputError(ValueError):
    """A mistake in what the user gave: names the file, line, key or flag, and the remedy."""


def flag(default: Any, help: str) -> Any:
    """A dataclass field that is also a command line flag."""
    return dataclasses.field(default=default, metadata={"help": help})


def parse_cli(cls: type, argv: list[str] | None = None, prog: str | None = None) -> Any:
    """Build dataclass `cls` from the command line.  Precedence: default < --config FILE < flag.

    Field types: str, int, float, bool (--x / --no-x), Path, Literal, and tuple[Path, ...] or
    tuple[str, ...] for a flag that may be repeated.  Wrong usage exits with status 2.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=cls.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="config.json of an earlier run, replayed")
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        shown = "" if f.default in ("", ()) else f" [{f.default}]"
        options: dict[str, Any] = {"help": (f.metadata["help"] + shown).replace("%", "%%")}
        if hints[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hints[f.name]) is Literal:
            options["choices"] = typing.get_args(hints[f.name])
            options["type"] = type(options["choices"][0])
        elif typing.get_origin(hints[f.name]) is tuple:
            options |= {"type": typing.get_args(hints[f.name])[0], "action": "append"}
        else:
            options["type"] = hints[f.name]
        # SUPPRESS, then fill in below: an appended flag must not grow on top of its default
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **options)

    argv = sys.argv[1:] if argv is None else argv
    if (path := getattr(parser.parse_known_args(argv)[0], "config", None)) is not None:
        argv = _config_as_flags(parser, path, set(hints)) + argv
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, [f"--{n}" for n in hints], n=1)
        parser.error(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else ""))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items()}
    values.pop("config", None)
    try:
        return cls(**values)
    except ValueError as error:
        parser.error(str(error))


def _config_as_flags(parser: argparse.ArgumentParser, path: Path, known: set[str]) -> list[str]:
    """A saved config replayed as flags, so a saved value meets the same checks as a typed one."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        parser.error(f"--config {path}: {error}")
    if not isinstance(saved, dict):
        parser.error(f"--config {path}: expected one JSON object of flag names and values")
    if stray := [k for k in saved if k not in known]:
        parser.error(f"--config {path}: unknown key {stray[0]!r}; see --help for the flags")
    flags = []
    for name, value in saved.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}={v}" for v in (value if isinstance(value, list) else [value])]
    return flags


def parse_command(commands: dict[str, type], argv: list[str] | None = None) -> tuple[str, Any]:
    """`script.py VERB --flags`: pick the dataclass of the verb and parse the rest with it."""
    argv = sys.argv[1:] if argv is None else argv
    script = Path(sys.argv[0]).name
    usage = (
        f"usage: {script} {{{','.join(commands)}}} [flags]; {script} VERB --help lists the flags"
    )
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        for verb, cls in commands.items():
            print(f"  {verb:<20} {(cls.__doc__ or '').strip().splitlines()[0]}")
        raise SystemExit(0)
    if not argv or argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1) if argv else []
        print(usage, file=sys.stderr)
        what = f"unknown command {argv[0]!r}" if argv else "no command given"
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"{script}: error: {what}{hint}", file=sys.stderr)
        raise SystemExit(2)
    return argv[0], parse_cli(commands[argv[0]], argv[1:], prog=f"{script} {argv[0]}")


def config_json(cfg: Any) -> str:
    """The dataclass as the text of a config.json that `--config` replays."""
    return json.dumps(dataclasses.asdict(cfg), indent=1, default=str) + "\n"


def run(main: Callable[[], None]) -> None:
    """Run a script's main: InputError and missing files end in one line and exit status 2."""
    try:
        main()
    except (InputError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


# --------------------------------------------------------------------------- processes


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun set them; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclasses.dataclass(frozen=True)
class Process:
    """This process within the group."""

    rank: int
    world: int
    device: Any  # torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def agree(self, number: int) -> int:
        """Rank 0's number, on every rank; all of them wait for each other here."""
        import torch  # noqa: PLC0415  (see the module docstring)
        import torch.distributed as dist  # noqa: PLC0415

        shared = torch.tensor(int(number) if self.is_main else 0, device=self.device)
        dist.all_reduce(shared)
        return int(shared)

    def say(self, *words: Any) -> None:
        """Print on rank 0 only, to stderr: stdout belongs to results."""
        if self.is_main:
            print(*words, file=sys.stderr, flush=True)


def start_process(seed: int) -> Process:
    """Join the process group (a group of one without torchrun), pick the device, seed torch."""
    import torch  # noqa: PLC0415  (see the module docstring)
    import torch.distributed as dist  # noqa: PLC0415

    rank, world = rank_and_world()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        if world == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    torch.manual_seed(seed)
    return Process(rank, world, device)


def stop_process() -> None:
    """Leave the process group, so that torchrun ends without a warning."""
    import torch.distributed as dist  # noqa: PLC0415

    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------- files


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside `path`, fsync, rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of each non-empty line; a broken line is an InputError."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, parse_json_line(path, number, line)


def parse_json_line(path: Path, number: int, line: bytes) -> dict:
    """One line of a jsonl file as an object; the error names file and line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path} line {number}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise InputError(f"{path} line {number}: expected a JSON object, got {kind}")
    return record


class AppendLog:
    """A jsonl part file of one process: whole lines, flushed, safe to kill and to reopen.

    Opening cuts a torn last line (what a kill during a write leaves); a broken line anywhere
    else is an InputError.  `records` holds what was there.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records, good = read_whole_lines(path)
        self.file = open(path, "ab")  # noqa: SIM115  (lives as long as the log)
        if self.file.tell() != good:
            self.file.truncate(good)
        self.fsync_at = time.monotonic()

    def append(self, record: dict) -> None:
        self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        if time.monotonic() - self.fsync_at > 1:  # at most a second of work on a power cut
            self.sync()

    def sync(self) -> None:
        os.fsync(self.file.fileno())
        self.fsync_at = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(ValueError):
            self.file.flush()
            self.sync()
            self.file.close()


def read_whole_lines(path: Path) -> tuple[list[dict], int]:
    """(records, bytes of whole lines) of a part file; a torn last line is left out.

    Torn: no newline at its end.  Such a line is never trusted, even if it happens to parse.
    """
    path = Path(path)
    if not path.exists():
        return [], 0
    records, good = [], 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                break
            records.append(parse_json_line(path, number, line))
            good += len(line)
    return records, good


# --------------------------------------------------------------------------- metrics


def clock(seconds: float) -> str:
    """1:02:03"""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class MetricsLog:
    """One JSON object a step in out_dir/metrics.jsonl, one short line on stderr; silent off rank 0.

    A resumed run drops the lines past its checkpoint, so each step stands in the file once.
    """

    def __init__(self, out_dir: Path, process: Process, total_steps: int, done: int = 0) -> None:
        self.process, self.total, self.done, self.start = process, total_steps, done, time.time()
        path = Path(out_dir) / "metrics.jsonl"
        self.kept = [r for r in read_whole_lines(path)[0] if r["step"] <= done]
        if not process.is_main:
            return
        write_atomic(path, "".join(json.dumps(r) + "\n" for r in self.kept))
        self.log = AppendLog(path)

    def __call__(self, step: int, metrics: dict[str, float], shown: list[str]) -> None:
        """Log `metrics` of `step` (1..total); `shown` names the ones for the terminal."""
        if not self.process.is_main:
            return
        self.log.append({"step": step, **metrics})
        left = (time.time() - self.start) / (step - self.done) * (self.total - step)
        words = [f"{name} {metrics[name]:.4g}" for name in shown if name in metrics]
        self.process.say(f"step {step}/{self.total} ", *words, f" left {clock(left)}")

    def close(self) -> None:
        if self.process.is_main:
            self.log.close()
