"""What every script shares: flags, the process group, JSON that people write, files that survive.

A closed list, never "utils": a thing enters here when two files need it.

    flag, parse_cli, parse_command   one frozen dataclass per script; a field is a flag
    Settings, EngineConfig           flags that several scripts have
    InputError, Failure, run         what people must know ends in one line
    process_group, say, all_of       the processes of a run: always a group, also alone
    read_json, read_jsonl, from_json JSON by line or whole, checked against a dataclass
    new_file, write_json, ...        whole files or none
    AppendLog, read_whole_lines      whole lines or none
    fingerprint, claim, alone_in     which weights; one run a folder; one run at a time
    bar                              how far a long pass is

torch is imported late, by what deals with devices and processes: flags are read without it.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tqdm import tqdm

# the headings of --help, by the flags that open them (any other flag stands with the one declared
# before it), and what other training programs call a flag
FLAGS = json.loads(Path(__file__).with_name("flags.json").read_text())
# processors that this process may use; macOS does not tell which, so all
CORES = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))


class InputError(ValueError):
    """A mistake in what the user gave: names the file, line, key or flag, and the remedy."""


class Failure(RuntimeError):
    """What went wrong while running, through nobody's input: told in one line, exit status 1."""


@contextlib.contextmanager
def named(name: object) -> Iterator[None]:
    """Errors of input inside begin with `name`; an OSError that names no file gets it."""
    try:
        yield
    except (InputError, UnicodeError) as error:
        raise InputError(f"{name}: {error}") from None
    except OSError as error:
        error.filename = error.filename or str(name)
        raise


# --------------------------------------------------------------------------- flags


def flag(default: Any, help: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """A dataclass field that is also a command line flag, a number within [low, high]."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (low, high)})


def need(package: str, use: str) -> None:
    """Raises InputError where a package is not installed that only `use` needs."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{use} needs {package}: pip install {package}")


# a million lines may be of one class
fields_of, type_hints = functools.cache(dataclasses.fields), functools.cache(typing.get_type_hints)


def check_fields(cls: type, values: dict[str, Any], begin: str = "") -> None:
    """InputError unless each value is of its field's type and range; `begin`: of the error."""
    hints, keys = type_hints(cls), getattr(cls, "KEYS", {})
    for f in fields_of(cls):
        if f.name not in values or type(values[f.name]) is str and hints[f.name] is str:
            continue
        value, hint, key = values[f.name], hints[f.name], keys.get(f.name, f.name)
        low, high = f.metadata.get("range", (-math.inf, math.inf))
        if type(value) in (int, float) and not low <= value <= high:
            limits = [f">= {low:g}"] * (low > -math.inf) + [f"<= {high:g}"] * (high < math.inf)
            wanted = " and ".join(limits) or "a number"
            raise InputError(f"{begin}{key} must be {wanted}, got {value!r:.40}")
        check_type(f"{begin}{key!r}", value, hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """InputError unless the value called `name` is of the type."""
    if not fits(value, hint):
        wanted = re.sub(r"(typing\.)?Literal", "one of ", inspect.formatannotation(hint))
        raise InputError(f"{name} must be {wanted}, got {value!r:.80}")


def check_flags(cfg: Any) -> None:
    """InputError for a wrong value, or for a flag without any of those that `cfg.NEEDS` names."""
    check_fields(type(cfg), vars(cfg))
    given = {f"--{name} {value}" for name, value in vars(cfg).items()}
    given |= {f"--{f.name}" for f in fields_of(type(cfg)) if getattr(cfg, f.name) != f.default}
    for name, ways in cfg.NEEDS.items():
        if f"--{name}" in given and given.isdisjoint(ways.split(", or ")):
            raise InputError(f"--{name} does nothing without {ways}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; a whole number is a float, true is no number, NaN neither."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is types.UnionType:
        return any(fits(value, one) for one in inner)
    if kind is Literal:
        return value in inner
    if kind in (list, tuple):
        return isinstance(value, kind) and all(fits(v, one) for one in inner[:1] for v in value)
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and abs(value) < (math.inf if isinstance(value, float) else 1 << 63)
    return kind is Any or isinstance(value, kind)


class FlagParser(argparse.ArgumentParser):
    """One line about a wrong flag instead of the usage of them all."""

    def error(self, message: str) -> typing.NoReturn:
        let_rank_0_tell()
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def parse_cli(cls: type, argv: list[str] | None = None, prog: str | None = None) -> Any:
    """Build dataclass `cls` from the command line.  Precedence: default < --config FILE < flag.

    Field types: str, int, float, Path, these or None (empty text = None), bool (--x / --no-x),
    Literal, and a tuple for a flag of several values.  The flag named by `cls.FIRST` may come first
    without its name.  Wrong usage exits with status 2.
    """
    layout = functools.partial(argparse.RawTextHelpFormatter, max_help_position=42, width=200)
    text = inspect.cleandoc(cls.__doc__)
    parser = FlagParser(prog, "%(prog)s [flags]", text, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="config.json of an earlier run, replayed")
    hints = type_hints(cls)
    headings, other_names = FLAGS["headings"], FLAGS["other names"]
    titles = dict.fromkeys(headings.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    group = groups["model and data"]
    for f in fields_of(cls):
        group = groups.get(headings.get(f.name), group)
        add_flag(group, f, hints[f.name])

    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-") and hasattr(cls, "FIRST"):
        argv = [f"--{cls.FIRST}", *argv]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        ours = dict(zip(hints, hints)) | {k: v for k, v in other_names.items() if v in hints}
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), ours, n=1)
        hint = f"; did you mean --{ours[near[0]]}?" if near else ""
        parser.error(f"unknown flag {name}{hint}")
    try:
        given, saved = vars(args), {}
        if [] in given.values():
            raise InputError("-- is no value: argparse takes it away")  # until Python 3.13
        if path := given.pop("config"):
            with named(f"--config {path}"):
                saved = field_values(cls, read_json(path))
        return cls(**saved | field_values(cls, given))
    except (OSError, ValueError) as error:
        parser.error(str(error))


@typing.dataclass_transform(frozen_default=True)
def command_line(cls: type) -> type:
    """A frozen dataclass of flags, parsed at once in the script itself: --help needs no torch."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    if cls.__module__ == "__main__":
        parse_cli(cls)
    return cls


def add_flag(group: Any, f: dataclasses.Field, hint: Any) -> None:
    """Tell argparse of a field; `field_values` reads the text that it hands back."""
    text, _, values = f.metadata["help"].partition("\n")  # a line a value, where they need one
    default = str(f.default) if hint is not bool else "on" if f.default else "off"
    shown = "" if default in ("", "()", "None", ".") else f" [{default}]"
    options: dict[str, Any] = {"help": f"{text}{shown}\n{values}".replace("%", "%%")}
    if typing.get_origin(hint) is tuple:
        options["action"], options["nargs"], hint = "extend", "+", typing.get_args(hint)[0]
    kinds = typing.get_args(hint) or (hint,)
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is Literal:
        options["metavar"] = "|".join(kinds)
    else:
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}.get(kinds[0], "PATH")
    group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **options)


def field_values(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Flags as they were typed or saved, as values of the fields of `cls`, checked."""
    hints = type_hints(cls)
    if unknown := values.keys() - hints:
        raise InputError(f"unknown key {min(unknown)!r}; see --help for the flags")
    read = {name: read_text(value, hints[name]) for name, value in values.items()}
    check_fields(cls, read)
    return read


def read_text(value: Any, hint: Any) -> Any:
    """A text as the number or path that its field wants; as it is where it is none."""
    if isinstance(value, list):
        return tuple(read_text(one, hint) for one in value)
    kind, *others = typing.get_args(hint) or (hint,)
    if value == "" and types.NoneType in others:
        return None
    if isinstance(value, str) and kind in (int, float, Path):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def parse_command(commands: dict[str, type], argv: list[str] | None = None) -> tuple[str, Any]:
    """`script.py VERB --flags`: pick the dataclass of the verb and parse the rest with it."""
    argv = sys.argv[1:] if argv is None else argv
    script, verb = Path(sys.argv[0]).name, argv[0] if argv else ""
    if verb in ("-h", "--help"):
        print(f"usage: {script} VERB [flags]; {script} VERB --help lists the flags")
        for name, cls in commands.items():
            print(f"  {name:<20} {cls.__doc__.strip().splitlines()[0]}")
        raise SystemExit(0)
    if verb not in commands:
        near = difflib.get_close_matches(verb, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(commands)}"
        FlagParser(script).error(f"no command {verb!r}; {hint}")
    return verb, parse_cli(commands[verb], argv[1:], prog=f"{script} {verb}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn: flags of generate.py and pairs.py, keywords of a Generator."""

    max_new_tokens: int = flag(1024, "tokens of an answer, at most", 1)
    temperature: float = flag(0.0, "0 = greedy", 0, 1e6)
    top_k: int = flag(0, "sample from the k most probable tokens; 0 = off", 0)
    top_p: float = flag(1.0, "sample from the smallest set with this probability; 1 = off", 1e-6, 1)
    seed: int = flag(0, "with the prompt and the sample's number it decides the text")
    stop: tuple[str, ...] = flag((), "text that ends an answer; may be repeated")
    marks: bool = flag(True, "show grounding marks: <ref>, <box>, <quad> and their ends")
    cache_tokens: int = flag(0, "room of the KV cache; 0 = a GPU's free memory, 65536 on a CPU", 0)
    exact_batches: bool = flag(True, "sampling on a CPU: round alike in any batch, a bit slower")
    NEEDS = {}  # of a subclass, for check_flags

    def __post_init__(self) -> None:
        check_flags(self)
        if "" in self.stop:
            raise InputError("stop: an empty text would end every answer; leave it out")

    def settings(self) -> dict[str, Any]:
        """These alone, of a class with more fields."""
        return {f.name: getattr(self, f.name) for f in fields_of(Settings)}


@dataclasses.dataclass(frozen=True)
class EngineConfig(Settings):
    """How responses are generated: of the verbs that need the model, in pairs.py and rlaifv.py."""

    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder with config.json and weights")
    temperature: float = flag(1.0, "sampling temperature", 1e-3, 1e6)
    top_k: int = flag(50, "sample among the k likeliest tokens, 0 = all", low=0)
    max_new_tokens: int = flag(4096, "longest response", low=1)
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "auto = bf16 on GPU, fp32 on CPU")


# errors of the file system that are about what the user named; all others are failures
NAMED_WRONGLY = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
NAMED_WRONGLY |= {errno.EEXIST}  # a file where a folder is to be


def run(main: Callable[[], None]) -> None:
    """Run a script's main: what goes wrong outside the program ends in one line, no traceback.

    Exit status 2: wrong input or usage; 1: a failure while running (disk full, ...); 130: Ctrl-C.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`: no file is to get its number
            setattr(sys, name, open(os.devnull, mode))
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:  # `| head` has read enough
        message, status = "", 1
    except (InputError, Failure) as error:
        message, status = str(error), 2 if isinstance(error, InputError) else 1
    except OSError as error:
        message = str(error).removeprefix(f"[Errno {error.errno}] ")
        status = 2 if error.errno in NAMED_WRONGLY else 1
    except RecursionError:
        message, status = "an input is nested too deeply", 2
    except (MemoryError, BrokenExecutor) as error:  # a worker that the kernel has killed
        message, status = f"out of memory? {type(error).__name__}: {error}", 1
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory", str(error)):  # on a GPU, on a CPU
            raise
        message, status = str(error).splitlines()[0], 1
    except ValueError as error:
        if not isinstance(error, UnicodeError) and "embedded null" not in str(error):
            raise
        message, status = f"a text or file name is not valid: {error}", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # what it does not take would end Python in a traceback of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message := printable(message):
        let_rank_0_tell()
        print(f"error: {message}" if status < 130 else message, file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def printable(text: str) -> str:
    """Control characters of somebody's data, and halves of characters, spelled out as \\x1b."""
    odd = r"[^\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]"
    return re.sub(odd, lambda match: repr(match[0])[1:-1], text)


def let_rank_0_tell() -> None:
    """Wait where this is another: ranks mostly fail alike, and torchrun ends all when one ends."""
    if int(os.environ.get("LOCAL_RANK", rank_and_world()[0])):  # each machine has a first one
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # train.py's handlers would go on
        time.sleep(3)


# --------------------------------------------------------------------------- processes


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun set them; (0, 1) alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process tells and writes what one must for all."""
    return rank_and_world()[0] == 0


def say(*words: Any) -> None:
    """Print on rank 0 only, to stderr: stdout belongs to results."""
    if is_main():
        print(*words, file=sys.stderr, flush=True)


def group() -> Any:
    """torch.distributed where this process is in a group, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_initialized() else None


def all_of(here: bool) -> bool:
    """Whether it holds in every process of the group, if there is one; all wait for each other."""
    if not (dist := group()):
        return here
    import torch  # noqa: PLC0415  (see the module docstring)

    votes = torch.tensor(float(here))  # gloo counts them, also beside NCCL
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


def local_device() -> Any:
    """This process's own GPU, or the CPU where there is none; a torch.device."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    processes = max(number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if processes > cards:  # the first process stops, too: it is the one that tells
        raise InputError(f"{processes} processes for {cards} GPUs: pass --nproc_per_node {cards}")
    torch.cuda.set_device(number)  # CUDA graphs and pinned memory are of the current one
    return torch.device("cuda", number)


@contextlib.contextmanager
def process_group(seed: int) -> Iterator[Any]:  # torch.device
    """This process's device within the group, a group of one without torchrun; torch is seeded."""
    import torch  # noqa: PLC0415  (see the module docstring)
    import torch.distributed as dist  # noqa: PLC0415

    device = local_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = rank_and_world()[1] == 1
    place = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    try:
        dist.init_process_group(backend, **place)
    except ValueError as error:  # WORLD_SIZE is set, and not all else that torchrun sets
        raise InputError(f"{error}; start several processes by torchrun") from None
    torch.manual_seed(seed)
    try:
        yield device
    finally:
        if alone or sys.exc_info()[0] is None:  # else it would wait for peers in a collective
            dist.destroy_process_group()


def start_worker() -> None:
    """A worker ends with its parent, however that ends; Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# --------------------------------------------------------------------------- JSON


def _each_once(pairs: list[tuple[str, Any]]) -> dict:
    if len(record := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"the key {twice!r} stands there twice; keep one of them")
    return record


_EACH_KEY_ONCE = json.JSONDecoder(object_pairs_hook=_each_once)  # made once for millions of lines


def parse_json(content: str | bytes, name: object, kind: type = dict) -> Any:
    """One JSON object or list: equal keys refused, a byte-order mark taken; `name`: for errors."""
    try:
        text = content.decode() if isinstance(content, bytes) else content
        record = _EACH_KEY_ONCE.decode(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        more = "Extra data" in str(error)  # also where only \r ends the lines
        hint = r"; in jsonl write one object a line, ended by \n" if more else ""
        raise InputError(f"{name}: not valid JSON ({error}){hint}") from None
    if not isinstance(record, kind):
        wanted, got = "object" if kind is dict else "list", type(record).__name__
        raise InputError(f"{name}: expected a JSON {wanted}, got {got}")
    return record


def open_file(path: Path) -> BinaryIO:
    """A file to read; InputError for none, a folder, or a pipe that would never answer."""
    if not os.path.isfile(path):
        raise InputError(f"no file {path}" + ", but a folder" * os.path.isdir(path))
    return open(path, "rb")


def read_json(path: Path, kind: type = dict) -> Any:
    """The one JSON object (or list) of a file."""
    with open_file(path) as file:
        return parse_json(file.read(), path, kind)


def read_lines(file: BinaryIO, part: bool = False) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, place in the file, line) of each non-empty line of a jsonl file.

    part: written by a process that may be killed; a last line without its end is never trusted.
    """
    place = 0
    for number, line in enumerate(file, 1):
        if number == 1 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise InputError(f"{file.name} is a JSON list; write one object a line")
        if not line.isspace() and (not part or line.endswith(b"\n")):
            yield number, place, line
        place += len(line)


def read_jsonl(path: Path, part: bool = False, parse: Callable = parse_json) -> Iterator[tuple]:
    """("file line N", object) of each non-empty line; a broken line is an InputError.

    part: see read_lines.  parse: what reads a line, given its name for errors.
    """
    with open_file(path) as file:
        for number, _, line in read_lines(file, part):
            name = f"{path} line {number}"
            yield name, parse(line, name)


def read_whole_lines(path: Path, **types: Any) -> list[dict]:
    """The records of a part file so far, none where it is not there; `types`: of their fields."""
    records = []
    for name, record in read_jsonl(path, part=True) if Path(path).is_file() else ():
        for key, hint in types.items():
            check_type(f"{name}: {key!r}", record.get(key), hint)
        records.append(record)
    return records


_encode = json.JSONEncoder(ensure_ascii=False).encode


def json_line(record: dict) -> bytes:
    return _encode(record).encode(errors="backslashreplace") + b"\n"  # half a character: \ud800


def from_json(cls: type, record: dict, name: object) -> Any:
    """Build dataclass `cls` from a JSON object: type, default and range of each field.

    `cls.KEYS`: fields that have another name in the file.  Keys that are no field are ignored.
    """
    values, keys = {}, getattr(cls, "KEYS", {})
    for f in fields_of(cls):
        key = keys.get(f.name, f.name)
        if key in record:
            values[f.name] = record[key]
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InputError(f"{name}: no {key!r}")
    check_fields(cls, values, f"{name}: ")
    return cls(**values)


# --------------------------------------------------------------------------- files


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written: readers of `path` see the old one until the new one is whole."""
    if path.exists() and not path.is_file():  # the rename would put a file in a device's place
        raise InputError(f"{path} is no file that can be replaced; pass another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:  # a full disk names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or none, see `new_file`."""
    with new_file(Path(path)) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: dict, **options: Any) -> None:
    """One JSON object in lines that people read, paths as text; a whole file or none."""
    write_atomic(path, json.dumps(content, indent=1, default=os.fspath, **options) + "\n")


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """One JSON object a line; a whole file or none."""
    write_atomic(path, b"".join(map(json_line, records)))


class AppendLog:
    """A jsonl part file of one process: whole lines, flushed, safe to kill and to reopen.

    Opening cuts a torn last line, which a kill during a write leaves.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115  (lives as long as the log)
        if path.is_file():  # no device
            start = max(0, self.file.tell() - (1 << 24))  # bytes of a line, at most
            self.file.seek(start)
            self.file.truncate(start + self.file.read().rfind(b"\n") + 1)

    def append(self, record: dict) -> None:
        with named(self.file.name):
            self.file.write(json_line(record))
            self.file.flush()

    def close(self) -> None:
        with named(self.file.name), self.file:
            os.fsync(self.file.fileno())


# --------------------------------------------------------------------------- one run a folder


def fingerprint(paths: Iterable[Path]) -> str:
    """32 hex digits of what files hold, every byte; read again only if size or time changed."""
    digests = []
    for path in sorted(map(Path, paths)):
        state = path.stat()
        digests.append(f"{path.name} {_digest(path.resolve(), state.st_size, state.st_mtime_ns)}")
    return hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()


@functools.lru_cache(maxsize=4096)  # images are many, and asked for twice in a row
def _digest(path: Path, size: int, time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def claim(folder: Path, facts: dict[str, Any], remedy: str) -> None:
    """Say in `folder`/run.json what its content depends on; refuse other values by name."""
    about = Path(folder) / "run.json"
    if not about.exists() and not any(Path(folder).glob("*.jsonl")):  # else nobody knows whose
        write_json(about, facts)
    known = read_json(about) if about.exists() else {}
    for key, value in json.loads(json.dumps(facts)).items():
        if known.get(key) != value:
            before = known.get(key, "run.json does not say")
            told = f"{folder} was made with another {key} ({before}, now {value})"
            raise InputError(f"{told}; {remedy}, or delete that folder")


@contextlib.contextmanager
def alone_in(folder: Path, seconds: float, remedy: str, name: str = ".lock") -> Iterator[None]:
    """One run at a time: wait `seconds` for another one that works in `folder`, then refuse.

    The kernel lifts the lock when its process ends, however it ends.  Rank 0 takes it for its
    group, and all vote again and again: one that waited in a single collective would be taken for
    dead by NCCL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        end, waiting = time.monotonic() + seconds, False
        while not all_of((group() and not is_main()) or _lock(folder / name, held)):
            if all_of(time.monotonic() >= end):
                raise InputError(f"{folder}: another run works there; wait for it, or {remedy}")
            if not waiting:
                say(f"{folder}: waiting for another run that works there")
            waiting = True
            time.sleep(0.1)
        yield


def _lock(path: Path, held: contextlib.ExitStack) -> bool:
    """Take a file's lock until `held` ends, unless another process has it or just removed it."""
    with contextlib.ExitStack() as end, contextlib.suppress(BlockingIOError, FileNotFoundError):
        file = end.enter_context(open(path, "wb"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP):  # as of Lustre without -o flock
                raise
            say(f"{path.parent}: this file system has no locks; never start two runs there at once")
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            end.callback(path.unlink, missing_ok=True)
            held.push(end.pop_all())
            return True
    return False


def bar(items: Iterable, **options: Any) -> tqdm:
    """A bar of tqdm on rank 0; in a file or a pipe it is drawn every ten seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 10
    return tqdm(items, disable=not is_main(), mininterval=seconds, **options)
