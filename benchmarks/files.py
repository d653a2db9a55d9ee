"""Official files of questions, replies and judgements, as rows that are paired by id.

Replies of any model in the official output formats can be scored: a row is about the item whose id
it has under one of the official names, never about the one at its place in the file.
"""

import contextlib
import datetime
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import Benchmark, Item
from runtime import InputError, check_type, named, read_json, read_jsonl

ID_KEYS = "id pid question_id image_id index image_path".split()
# the raw reply first: official files may also hold the read answer, the question or the gold
REPLY_KEYS = "response answer_orig model_answer caption messages prediction text answer".split()
JUDGEMENT_KEYS = "tuple score judgement content review text".split()


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Names for an error message: the first few, and how many there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def near(folder: Path, name: str) -> list[Path]:
    """The files of that name in a folder and one level below it."""
    return [*sorted(folder.glob(name)), *sorted(folder.glob(f"*/{name}"))]


def read_rows(path: Path, categories: tuple[str, ...] = ()) -> list[dict]:
    """The rows of a .json or .jsonl file, each with its file and where it stands ("_source").

    An object of objects gives rows with "id".  Rows without a category take the one of
    `categories` that the file's name holds.
    """
    try:
        content = read_json(path, object) if path.suffix == ".json" else None
    except InputError as error:
        if "Extra data" not in str(error):
            raise
        content = None  # POPE's question files are one object a line despite their name
    if isinstance(content, dict) and all(isinstance(v, dict | str) for v in content.values()):
        rows = [(f"{path} key {k!r}", {"id": k, **(v if isinstance(v, dict) else {"text": v})})
                 for k, v in content.items()]  # fmt: skip
    elif isinstance(content, list):  # MMHal's judge files are lists of texts
        rows = [(f"{path} entry {i}", v if isinstance(v, dict) else {"index": i, "text": v})
                 for i, v in enumerate(content)]  # fmt: skip
    else:
        rows = list(read_jsonl(path))
    category = next((c for c in categories if c in path.name), None)
    for name, row in rows:
        row |= {"_file": path, "_source": name, "category": row.get("category") or category}
    return [row for _, row in rows]


def raw_id(bench: Benchmark, row: dict) -> Any:
    """The id of a row under an official name, that of the benchmark's own field first, or None."""
    keys = sorted(ID_KEYS, key=lambda key: key not in bench.fields)  # LLaVA's reviews count in "id"
    return next((row[k] for k in keys if row.get(k) is not None), None)


# --------------------------------------------------------------------------- questions


def load_items(bench: Benchmark, given: tuple[Path, ...], ids: Path | None = None) -> list[Item]:
    """The items in file order, ids unique; those that `ids` leaves out are marked "_left_out"."""
    items = [
        read_item(bench, row, index)
        for path in find_data(bench, given)
        for index, row in enumerate(read_rows(path, bench.categories))
    ]
    if not items:
        raise InputError(f"no items in {listed(given)}")
    if repeated := [k for k, n in Counter(item["id"] for item in items).items() if n > 1]:
        raise InputError(f"{listed(given)}: duplicate ids: {listed(repeated)}")
    if ids is None and bench.ids_file and len(items) > bench.n_expected:
        ids = items[0]["_file"].parent / bench.ids_file
    if ids is not None:
        if not ids.is_file():
            raise InputError(f"no file {ids}: pass --ids a file with the ids of {bench.name}")
        with named(ids):
            wanted = set(ids.read_text("utf-8-sig").split())
        if not wanted:
            raise InputError(f"{ids}: names no item of the data")
        if unknown := wanted - {item["id"] for item in items}:
            raise InputError(f"{ids}: ids that the data lacks: {listed(sorted(unknown))}")
        for item in items:
            item["_left_out"] = item["id"] not in wanted
    return items


def find_data(bench: Benchmark, given: tuple[Path, ...]) -> list[Path]:
    """The question files: as given, or found in a given folder by their official names."""
    files: list[Path] = []
    for path in given:
        matches = [sorted(path.glob(name)) for name in bench.files if path.is_dir()]
        if path.is_dir() and not any(matches):
            raise InputError(f"no {' or '.join(bench.files)} in {path}: name the file of it")
        files += next(filter(None, matches), [path])
    return files


def read_item(bench: Benchmark, row: dict, index: int) -> Item:
    """A row of an official file, checked and completed in place."""
    try:
        for names, kind in bench.fields.items():
            name = next((name for name in names.split("|") if name in row), names)
            check_type(repr(name), row.get(name), kind)
        row |= {"_index": index, "_aliases": [], "_left_out": False}
        row["id"] = str(index if bench.ordered or (id := raw_id(bench, row)) is None else id)
        bench.item(row)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        problem = error if isinstance(error, InputError) else repr(error)
        raise InputError(f"{row['_source']}: not a file of {bench.name}: {problem}") from None
    return row


# --------------------------------------------------------------------------- what is about them


def rows_by_id(bench: Benchmark, items: list[Item], files: Iterable[Path]) -> dict[str, dict]:
    """id -> the one row of `files` that is about this item."""
    known: dict[str, set[str]] = defaultdict(set)
    for item in items:
        for name in (item["id"], *item.get("_aliases", ())):
            known[str(name)].add(item["id"])
    rows: dict[str, dict] = {}
    for order, row in (pair for f in files for pair in enumerate(read_rows(f, bench.categories))):
        key, source = raw_id(bench, row), row["_source"]
        if bench.ordered:  # a chat API's raw answer has an id of its own
            key = order if "choices" in row else row.get("id", row.get("index", order))
        if key is None:
            raise InputError(f"{source}: no id ({', '.join(ID_KEYS)})")
        ids = known.get(f"{row.get('category') or ''}/{key}") or known.get(str(key), set())
        if len(ids) != 1:
            problem = "is not in the data: another benchmark's file?"
            if ids:
                problem = f"may be {listed(sorted(ids))}: the row needs its 'category' or 'id'"
            raise InputError(f"{source}: id {key!r} {problem}")
        (name,) = ids
        if name in rows:
            raise InputError(f"{source}: duplicate id {name!r}")
        rows[name] = row
    return rows


def load_replies(bench: Benchmark, items: list[Item], given: tuple[Path, ...]) -> dict[str, dict]:
    """id -> row with "reply", from our answers.jsonl or the official output formats."""
    files = [path / "answers.jsonl" if path.is_dir() else path for path in given]
    for folder, path in zip(given, files):
        if folder != path and not path.exists():
            raise InputError(f"no {path}: `generate` writes it when every item is answered")
    replies = rows_by_id(bench, items, files)
    questions, fields = {item.get("_file") for item in items}, "|".join(bench.fields).split("|")
    asked = {item["id"]: item.get("question") for item in items if bench.ordered}
    for id, row in replies.items():
        key = next((k for k in REPLY_KEYS if k in row), None)
        if key is None:
            raise InputError(f"{row['_source']}: no reply; needs one of {', '.join(REPLY_KEYS)}")
        if row["_file"] in questions and key in fields:
            raise InputError(f"{row['_source']}: {key!r} is the data's own, no reply to it")
        if asked and asked[id] not in str(row.get("question", asked[id])):  # maybe with <image>
            raise InputError(f"{row['_source']}: 'question' is not the data's at this place")
        reply = row[key]
        if isinstance(reply, list) and reply:  # the turns of M3CoT's own outputs
            reply = reply[-1].get("content") if isinstance(reply[-1], dict) else reply[-1]
        check_type(f"{row['_source']}: {key!r}", reply, str | int | float | None)
        row["reply"] = "" if reply is None else str(reply)
    wanted = [item["id"] for item in items if not item.get("_left_out")]
    if given and (missing := [id for id in wanted if id not in replies]):
        raise InputError(f"no reply for {len(missing)} of {len(wanted)} items: {listed(missing)}")
    return replies


def load_judgements(
    bench: Benchmark, items: list[Item], replies: dict[str, dict], given: Iterable[Path], judge: str
) -> dict[str, dict]:
    """id -> "judgement" (text, or an official file's numbers), "judge" and "judge_date".

    Without any: what a judge has extracted, in a column of MathVista's outputs.
    """
    judgements = {}
    for id, row in rows_by_id(bench, items, given).items():
        content = next((row[k] for k in JUDGEMENT_KEYS if k in row), None)
        if content is None and "choices" in row:  # a chat API's raw answer
            with contextlib.suppress(KeyError, TypeError, IndexError):
                content = row["choices"][0]["message"]["content"]
        if content is None:
            raise InputError(f"{row['_source']}: no judgement; expected 'judgement' with a text")
        reply = replies.get(id, {})
        if (row["_file"], content) == (reply.get("_file"), reply.get("reply")):
            raise InputError(f"{row['_source']}: the reply itself, no judgement of it")
        written = datetime.datetime.fromtimestamp(row["_file"].stat().st_mtime, datetime.UTC)
        who = row.get("judge") or row.get("reviewer_id") or judge or "not named"
        date = row.get("date") or f"{written:%Y-%m-%d}"
        judgements[id] = {"judgement": content, "judge": str(who), "judge_date": str(date)}
    if judgements or bench.judge is None:
        return judgements
    for id, row in replies.items():
        if "extraction" in row:
            text = "" if row["extraction"] is None else row["extraction"]
            who = judge or "extraction column of the answers"
            judgements[id] = {"judgement": text, "judge": who}
    return judgements
