"""Pairs of other programs to the layout that train.py reads, and back.

    python tools/convert.py pairs.parquet --out mine             -> mine/meta.json for train.py
    python tools/convert.py MMPR/meta.json --out pairs.json --to ms-swift

Reads TRL (`prompt`, `chosen`, `rejected` as texts or messages), ms-swift (`messages`,
`rejected_response`), LLaMA-Factory (`conversations` of ShareGPT, or `instruction`), and plain keys
(`question`, `chosen`, `rejected`, `image`: RLAIF-V, CSV, MMPR itself), told apart by their keys,
from .jsonl, .json, .csv and .parquet.  What cannot be a pair is left out, counted by reason and
listed in `report.json` (of a file NAME.json: NAME.report.json).  Earlier turns are refused, or
written into the question by --flatten.  Nothing that is there already is written over.
"""

import csv
import hashlib
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from os.path import relpath
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import InputError, flag, need, parse_cli, parse_json, read_json, run, write_atomic


@dataclass(frozen=True)
class ConvertConfig:
    """Convert pairs of TRL, ms-swift, LLaMA-Factory, RLAIF-V or CSV to MMPR's layout, and back."""

    FIRST = "input"  # may stand without its flag
    input: Path = flag(Path("pairs.jsonl"), ".jsonl, .json, .csv or .parquet; or a meta.json")
    out: Path = flag(Path("converted"), "a folder for mmpr, else a file with one of these endings")
    to: Literal["mmpr", "trl", "ms-swift", "llama-factory", "plain"] = flag(
        "mmpr", "what is written; plain = question, chosen, rejected, image"
    )
    root: Path | None = flag(None, "folder of the images; default: that of the input")
    flatten: bool = flag(False, "write earlier turns into the question, else they are refused")


if __name__ == "__main__":
    parse_cli(ConvertConfig)  # --help and wrong flags need no torch, which takes seconds

from records import JsonLines, PairRecord, check_pair, read_meta
from tokenizer import IMAGE
from tools.figures import text_table

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")  # of files that are written
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
REFUSED = ("history", "videos", "video", "audios", "audio", "tools", "objects", "rejected_images")
# a key that tells a format -> the keys of its conversation and its answers; no key of chosen: it is
# the end of the conversation
FORMATS = {
    "question": ("question", "chosen", "rejected"),
    "conversations": ("conversations", "chosen", "rejected"),
    "instruction": ("instruction", "chosen", "rejected"),
    "rejected_response": ("messages", "", "rejected_response"),
    "rejected_messages": ("messages", "", "rejected_messages"),
    "chosen": ("prompt", "chosen", "rejected"),
}
Turns = list[tuple[str, str]]  # (user, assistant or system, text)


# --------------------------------------------------------------------------- a format to MMPR


def text_of(content: Any) -> str:
    """A message's content: a text, or parts of which each image is a placeholder."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image") or not isinstance(part.get("text") or "", str):
            raise InputError(f"content is no text and no list of texts and images: {part!r:.60}")
        texts.append(f"{IMAGE}\n" if kind == "image" else part.get("text") or "")
    return "".join(texts)


def turns_of(messages: Any, role: str) -> Turns:
    """The turns of a text that `role` says, of a message or of messages."""
    if isinstance(messages, str):
        return [(role, messages)]
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        if not isinstance(message, dict):
            raise InputError(f"expected a text or messages, got {message!r:.60}")
        role = message.get("role", message.get("from"))
        turns.append((ROLES.get(role, role), text_of(message.get("content", message.get("value")))))
    return turns


def read_pair(raw: dict) -> tuple[Turns, str, str]:
    """(conversation up to the answers, chosen, rejected) of a record of any format."""
    for key in REFUSED:
        if raw.get(key):
            raise InputError(f"{key!r} is not supported")
    keys = next((keys for key, keys in FORMATS.items() if key in raw), None)
    if keys is None:
        raise InputError(f"keys of no known format: {', '.join(raw)}")
    conversation = turns_of(raw.get(keys[0]) or [], "user")
    if keys[0] == "instruction" and raw.get("input"):
        conversation[-1] = ("user", f"{conversation[-1][1]}\n{text_of(raw['input'])}")
    before = conversation if keys[1] else conversation[:-1]
    both = []
    for key in keys[1:]:
        if key and not raw.get(key):
            raise InputError(f"no {key!r}")
        turns = turns_of(raw[key], "assistant") if key else conversation[-1:]
        both.append(turns if turns[0][0] in ("user", "system") else before + turns)
    chosen, rejected = both
    if chosen[:-1] != rejected[:-1] or any(turns[-1][0] != "assistant" for turns in both):
        raise InputError("chosen and rejected are not one answer each to one conversation")
    return chosen[:-1], chosen[-1][1], rejected[-1][1]


def mmpr_line(raw: dict, root: Path, saved: Path, flatten: bool) -> tuple[dict, Path]:
    """A line of MMPR, and the folder of its images: `root`, or `saved` for those that were bytes.

    With `flatten` earlier turns stand before the question, each behind who says it.
    """
    turns, chosen, rejected = read_pair(raw)
    system = raw.get("system_prompt") or raw.get("system")
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise InputError(
            f"the turns are not user, assistant, ..., user: {', '.join(map(str, roles))}"
        )
    if len(roles) > 1 and not flatten:
        raise InputError("several turns; pass --flatten to write them into the question")
    question = turns[0][1]
    if len(roles) > 1:
        question = "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)
    line = {"question": question, "chosen": chosen, "rejected": rejected}
    line |= {"system_prompt": system} if system else {}
    images = raw.get("images") or raw.get("image") or raw.get("image_path") or []
    if isinstance(images, str) and images.startswith("["):  # several in a cell of a CSV
        images = parse_json(images, "image", list)
    images = images if isinstance(images, list) else [images]
    if any(isinstance(image, dict) and image.get("bytes") for image in images):
        root = saved
    names = [image_name(image, root) for image in images]
    line |= {"image": names[0] if len(names) == 1 else names} if names else {}
    return line, root


def image_name(image: Any, root: Path) -> str:
    """The image relative to `root`; bytes are written there, under a name from what they hold."""
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        ending = Path(image.get("path") or "").suffix or ".jpg"
        name = hashlib.blake2b(image["bytes"], digest_size=16).hexdigest() + ending
        if not (root / name).exists():
            write_atomic(root / name, image["bytes"])
        return name
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str):
        raise InputError(f"an image is no path and no bytes: {image!r:.60}")
    return relpath(path, root) if Path(path).is_absolute() else path


# --------------------------------------------------------------------------- MMPR to a format


def written(record: PairRecord, to: str) -> dict:
    """The record as another program reads it; image paths are absolute."""
    images = [str(path.resolve()) for path in record.images]
    both, system = {"chosen": record.chosen, "rejected": record.rejected}, record.system_prompt
    if to == "plain":
        image = images[0] if len(images) == 1 else json.dumps(images) if images else ""
        return {"question": record.question, **both, "image": image, "system_prompt": system or ""}
    if to == "llama-factory":
        question = [{"from": "human", "value": record.question}]
        both = {key: {"from": "gpt", "value": text} for key, text in both.items()}
        return {"conversations": question, **both, "system": system or "", "images": images}
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": record.question}]
    both = {key: [{"role": "assistant", "content": text}] for key, text in both.items()}
    if to == "trl":
        return {"prompt": messages, **both, "images": images}
    messages += both["chosen"]
    return {"messages": messages, "rejected_response": record.rejected, "images": images}


# --------------------------------------------------------------------------- files


def arrow() -> Any:
    """The package that reads and writes parquet files."""
    need("pyarrow", ".parquet")
    import pyarrow.parquet  # noqa: PLC0415

    return pyarrow


def read_file(path: Path) -> Iterator[tuple[str, dict]]:
    """("file line N", record) of each record."""
    if path.suffix == ".jsonl":
        yield from JsonLines(path)
    elif path.suffix == ".parquet":
        batches = arrow().parquet.ParquetFile(path).iter_batches()
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path} row {n}", row) for n, row in enumerate(rows, 1))
    elif path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            try:
                yield from ((f"{path} line {rows.line_num}", row) for row in rows)
            except csv.Error as error:
                raise InputError(f"{path} line {rows.line_num}: {error}") from None
    elif path.suffix == ".json":
        rows = read_json(path, list)
        if not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: expected a list of objects")
        yield from ((f"{path} record {n}", row) for n, row in enumerate(rows, 1))
    else:
        raise InputError(f"{path}: expected .jsonl, .json, .csv or .parquet")


def write_file(path: Path, rows: list[dict]) -> None:
    """The rows in the form that the file's ending says."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if path.suffix == ".jsonl":
        write_atomic(path, "\n".join(lines) + "\n")
    elif path.suffix == ".json":
        write_atomic(path, "[\n" + ",\n".join(lines) + "\n]\n")
    elif path.suffix == ".parquet":
        buffer = io.BytesIO()
        arrow().parquet.write_table(arrow().Table.from_pylist(rows), buffer)
        write_atomic(path, buffer.getvalue())
    elif path.suffix == ".csv":
        if not all(isinstance(value, str) for value in rows[0].values()):
            raise InputError(f"{path}: messages do not fit into a CSV; pass --to plain")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(path, text.getvalue())


# --------------------------------------------------------------------------- all pairs of a file


def sources(cfg: ConvertConfig) -> Iterator[tuple[str, Path, dict]]:
    """(record name, folder of its images, record) of the input."""
    runtime.open_file(cfg.input).close()  # refused where it is none, or a pipe
    if cfg.input.suffix == ".json" and cfg.input.read_text("utf-8-sig").lstrip()[:1] == "{":
        for data_set in read_meta(cfg.input, 12):
            yield from ((name, data_set.root, raw) for name, raw in data_set.lines)
        return
    root = cfg.root or cfg.input.parent
    yield from ((name, root, raw) for name, raw in read_file(cfg.input))


def convert(cfg: ConvertConfig) -> dict:
    """Write what can be converted; the report: pairs kept, and of the others reasons and names."""
    folder, report_file = cfg.out, cfg.out / "report.json"
    taken = sorted(folder.glob("*.json*"))  # also the input, if it lies there
    if cfg.to != "mmpr":
        if cfg.out.suffix not in ENDINGS:
            raise InputError(f"{cfg.out}: expected a name with {', '.join(ENDINGS)}")
        folder, report_file = cfg.out.parent, cfg.out.with_suffix(".report.json")
        taken = [path for path in (cfg.out, report_file) if path.exists()]
    if taken:
        raise InputError(f"{taken[0]} is there already; pass another --out, or remove it")
    saved, dropped = folder / "images", defaultdict(list)
    lines: dict[Path, list[dict]] = defaultdict(list)  # one data set a folder of images
    for name, root, raw in sources(cfg):
        try:
            line, place = mmpr_line(raw, root, saved, cfg.flatten)
            record = check_pair(line, name, place)
            for path in record.images:
                if not path.is_file():
                    raise InputError(f"no image {path}")
        except InputError as error:
            why = str(error).removeprefix(f"{name}: ")
            dropped[re.split(r"[:;'\"(]| [./\d]", why)[0]].append(f"{name}: {why}")
            continue
        lines[place].append(line if cfg.to == "mmpr" else written(record, cfg.to))
    kept = sum(map(len, lines.values()))
    report = {"kept": kept, "dropped": {why: len(names) for why, names in dropped.items()}}
    write_atomic(report_file, json.dumps(report | {"records": dropped}, indent=1) + "\n")
    if not kept:
        raise InputError(f"{cfg.input}: no pair can be kept; {report_file} says why")
    if cfg.to != "mmpr":
        write_file(cfg.out, [line for rows in lines.values() for line in rows])
        return report
    meta = {}
    for number, (place, rows) in enumerate(lines.items(), 1):
        name = cfg.input.stem + (f"_{number}" if number > 1 else "")
        write_file(cfg.out / f"{name}.jsonl", rows)
        root = relpath(place.resolve(), cfg.out.resolve())
        meta[name] = {"root": root, "annotation": f"{name}.jsonl", "length": len(rows)}
    write_atomic(cfg.out / "meta.json", json.dumps(meta, indent=1) + "\n")
    return report


def main() -> None:
    report = convert(parse_cli(ConvertConfig))
    rows = [("kept", report["kept"]), *report["dropped"].items()]
    print(text_table(("pairs", ""), rows))


if __name__ == "__main__":
    run(main)
