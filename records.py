"""Preference pairs as they stand on disk: MMPR's meta.json and jsonl files.

    read_meta    meta.json -> data sets with repeat_time, tile limits, JPEG augmentation
    DataSet      its records by number, each read and checked when it is asked for
    JsonLines    the objects of any jsonl file, likewise; grouped by a key

`tools/look.py` checks and shows what is read here.  Differs from the official loader: a bad record
stops the run instead of being replaced by a random one, image paths cannot leave their root, and a
key that changes what a record means is obeyed or refused by name.
"""

import multiprocessing
import os
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import runtime
from images import image_paths
from runtime import InputError, flag, from_json, named, open_file, parse_json, read_json, read_lines
from tokenizer import with_image_placeholders


class JsonLines:
    """The objects of a jsonl file, each read when it is asked for; empty lines do not count."""

    def __init__(self, path: Path, part: bool = False) -> None:
        """part: written by a process that may be killed; a torn last line is left out."""
        self.file = open_file(path)  # read from at any time
        self.numbers, self.places, end = array("I"), array("q"), 0  # of lines, and where they begin
        self.checksums = array("Q")  # length and CRC of each line
        for number, place, line in read_lines(self.file, part):
            self.numbers.append(number)
            self.places.append(place)
            self.checksums.append(len(line) << 32 | zlib.crc32(line))
            end = place + len(line)
        self.places.append(end)
        self.checksum = zlib.crc32(self.checksums)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, n: int) -> "Line":
        return Line(self, n)

    def __iter__(self) -> Iterator["Line"]:
        return map(self.__getitem__, range(len(self)))


class Line(NamedTuple):
    """A line of a file, read when it is asked for; as text it is its name, for errors."""

    lines: JsonLines
    n: int

    def __str__(self) -> str:
        return f"{self.lines.file.name} line {self.lines.numbers[self.n]}"

    def record(self) -> dict:
        """Threads and forked processes may ask at once: no place in the file is moved."""
        start, end = self.lines.places[self.n : self.n + 2]
        return parse_json(os.pread(self.lines.file.fileno(), end - start, start), self)


PART = "part-*-of-*.jsonl"  # a process appends to it: its last line may be torn, others end whole


def part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(PART))


def read_parts(files: Iterable[Path], parse: Callable = parse_json) -> Iterator[tuple[str, Any]]:
    """("file line N", record) of all whole lines."""
    for path in files:
        yield from runtime.read_jsonl(path, path.match(PART), parse)


def grouped(files: list[Path], key_of: Callable, workers: int = 1) -> dict[str, list[Line]]:
    """Key -> the lines of its records, in the order of the keys: key_of(record, line)."""
    groups, lines = defaultdict(list), [x for p in files for x in JsonLines(p, p.match(PART))]
    keys = in_order(
        lambda part: [key_of(line.record(), line) for line in part], lines, 1000, workers, "reading"
    )
    for key, line in zip(chain.from_iterable(keys), lines):
        groups[key].append(line)
    return dict(sorted(groups.items()))


_WORK: list[Callable] = []  # what a worker process does, from before it was forked


def in_order(work: Callable, items: Sequence, size: int, workers: int, label: str) -> Iterator:
    """work(`size` items) of all items, in order, on `workers` forked processes (0 = one a core).

    They have all that `work` refers to; only results are sent.  A bar shows the time left.
    """
    starts = range(0, len(items), size)
    workers = min(workers or runtime.CORES, len(starts))
    _WORK[:] = [lambda start: work(items[start : start + size])]
    shown = {"desc": label, "total": len(starts), "unit_scale": size, "delay": 2}
    if workers <= 1:
        yield from runtime.bar(map(_WORK[0], starts), **shown)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, runtime.start_worker) as pool:
        yield from runtime.bar(pool.map(call_work, starts), **shown)


def call_work(start: int) -> Any:
    return _WORK[0](start)


@dataclass(frozen=True)
class PairRecord:
    """One preference pair, checked: a line of a jsonl file, and what its data set says of it."""

    question: str
    chosen: str
    rejected: str
    name: str  # "set name, file line N": for errors and the run record
    images: tuple[Path, ...]
    max_tiles: int
    augment: bool
    data_set: str  # its name
    system_prompt: str | None = None  # in the place of the model's system message, "" too
    cut_off: bool = False  # the rejected response never ended: no <|im_end|> of it is learned


@dataclass(frozen=True)
class DataSet:
    """An entry of meta.json, opened."""

    name: str
    root: Path
    lines: JsonLines | None = None  # none: to check records of elsewhere
    repeat_time: Fraction = Fraction(1)
    max_tiles: int = 12
    augment: bool = False

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> PairRecord:
        """Read and check one record.  Raises InputError naming set, file, line and key."""
        line = self.lines[number]
        return self.check(line.record(), f"{self.name}, {line}")

    def check(self, raw: dict, name: str) -> PairRecord:
        """A record as it stands in a file, checked; `name` is for errors."""
        images = image_paths(self.root, raw, name)
        ours = {"name": name, "images": images, "augment": self.augment, "data_set": self.name}
        ours["max_tiles"] = max(1, self.max_tiles // max(1, len(images)))  # they share the limit
        record = from_json(PairRecord, raw | ours, name)
        for key in ("question", "chosen", "rejected"):
            if not raw[key].strip():
                raise InputError(f"{name}: {key} is empty")
        if record.chosen.strip() == record.rejected.strip():
            raise InputError(f"{name}: chosen and rejected are the same text; remove the record")
        with named(name):
            # fails at half a character
            f"{record.question}{record.chosen}{record.rejected}{record.system_prompt}".encode()
            return replace(record, question=with_image_placeholders(record.question, len(images)))


@dataclass(frozen=True)
class Entry:
    """An entry of meta.json as it stands there: the keys that are read."""

    annotation: str
    root: str = ""
    repeat_time: float = flag(1, "copies of each record; of a fraction so many are drawn", 0, 1e6)
    length: int | None = None
    max_dynamic_patch: int | None = flag(None, "tiles of an image at most", low=1, high=128)
    data_augment: bool = False


def read_meta(path: Path, max_tiles: int) -> list[DataSet]:
    """Data sets of a meta.json, or of a .jsonl; max_tiles holds where no max_dynamic_patch is."""
    path, notes = Path(path), []
    alone = path.suffix == ".jsonl" and {path.stem: {"annotation": path.name}}
    meta = alone or path.suffix not in (".csv", ".tsv", ".parquet") and read_json(path, object)
    if not isinstance(meta, dict) or not meta or "chosen" in meta:  # a record alone
        raise InputError(f"{path}: no data set (name -> entry) in it; see tools/convert.py")
    sets = []
    for name, raw in meta.items():
        place = f"{path}: {name}"
        runtime.check_type(place, raw, dict)
        entry = from_json(Entry, raw, place)
        for key in sorted(raw.keys() - vars(entry)):
            runtime.say(f"{place}: {key!r} is not read")
        annotation = find_beside(path, entry.annotation, place, notes)
        with named(place):
            lines = JsonLines(annotation)
        if entry.length not in (None, len(lines)):
            runtime.say(f"{place}: length says {entry.length}, {annotation} has {len(lines)}")
        root = find_beside(path, entry.root, place, notes)
        repeat = Fraction(str(entry.repeat_time))  # exactly as it stands there: 0.07 * 100 is 7
        limit = entry.max_dynamic_patch or max_tiles
        sets.append(DataSet(name, root, lines, repeat, limit, entry.data_augment))
    if notes:
        runtime.say("\n".join(notes[:3] + ["..."] * (len(notes) > 3)))
    return sets


def find_beside(meta: Path, path: str, name: str, notes: list[str]) -> Path:
    """A path of meta.json: beside it, else from the working folder, else its longest tail.

    MMPR was published with paths of its authors' disks, or from above the folder.  Two tails that
    name different files are an error; `notes` gets a line when a tail is taken.
    """
    beside = meta.parent / path
    if os.path.lexists(beside):  # also of "", the folder itself
        return beside
    if os.path.lexists(path):
        return Path(path)
    parts = Path(path).parts
    tails = [meta.parent.joinpath(*parts[n:]) for n in range(1, len(parts))]
    there = [tail for tail in tails if ".." not in tail.parts and tail.exists()]
    if any(not there[0].samefile(tail) for tail in there):
        raise InputError(f"{name}: {path} could be {' or '.join(map(str, there))}; write which")
    if there:
        notes.append(f"{name}: {path} found by its tail as {there[0]}")
    return there[0] if there else beside
