"""Pairs of other programs to the layout that train.py reads, and back.

    python tools/convert.py pairs.parquet --out mine             -> mine/meta.json for train.py
    python tools/convert.py MMPR/meta.json --out pairs.jsonl --to ms-swift

Records of TRL, ms-swift, LLaMA-Factory (ShareGPT or Alpaca) and plain ones (RLAIF-V, CSV, MMPR
itself) are told apart by their keys: see FORMATS.  What cannot be a pair is left out and listed
with its reason in `report.json` (of a file NAME.jsonl: NAME.report.json).  Nothing that is there
already is written over.
"""

import csv
import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from os.path import commonpath, relpath
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from runtime import InputError, flag, need, read_json, write_atomic, write_json


@runtime.command_line
class ConvertConfig:
    """Convert pairs of TRL, ms-swift, LLaMA-Factory, RLAIF-V or CSV to MMPR's layout, and back."""

    FIRST = "input"  # may stand without its flag
    input: Path = flag(Path("pairs.jsonl"), "json(l), csv, parquet or meta.json (may stand first)")
    out: Path = flag(Path("converted"), "a new folder for mmpr, else a new .jsonl file")
    to: Literal["mmpr", "trl", "ms-swift", "llama-factory", "plain"] = flag(
        "mmpr", "what is written; plain = question, chosen, rejected, image"
    )
    root: Path | None = flag(None, "folder that holds all images, or /; default: the input's")
    flatten: bool = flag(False, "write earlier turns into the question, else they are refused")

    def __post_init__(self) -> None:
        if (self.to == "mmpr") == (self.out.suffix == ".jsonl"):
            raise InputError(f"{self.out}: --to mmpr writes a folder, any other a .jsonl file")


from images import checked_images
from records import DataSet, PairRecord, read_meta
from tokenizer import IMAGE

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
REFUSED = """history videos video audios audio tools objects rejected_images columns_without_a_cell
cells_without_a_column"""
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


def turns_of(messages: Any, role: str) -> Turns:
    """The turns of a text that `role` says, of a message or of messages.

    A content is a text, or parts of which each image is a placeholder.
    """
    if isinstance(messages, str):
        return [(role, messages)]
    turns = []
    for message in messages if isinstance(messages, list) else [messages]:
        role, content = message.get("role", message.get("from")), message.get("content")
        content = message["value"] if content is None else content
        if not isinstance(content, str):
            parts = content if isinstance(content, list) else [content]
            texts = ({"image": f"{IMAGE}\n", "text": x.get("text")}[x["type"]] for x in parts)
            content = "".join(texts)
        turns.append((ROLES.get(role, role), content))
    return turns


def read_pair(raw: dict) -> tuple[Turns, str, str]:
    """(conversation up to the answers, chosen, rejected) of a record of any format."""
    for key in REFUSED.split():
        if raw.get(key):
            raise InputError(f"{key!r} is not supported")
    keys = next((keys for key, keys in FORMATS.items() if key in raw), None)
    if keys is None:
        raise InputError(f"keys of no known format: {', '.join(raw)}")
    for one, other in (("prompt", keys[0]), ("system_prompt", "system"), ("images", "image")):
        if one != other and raw.get(one) and raw.get(other):
            raise InputError(f"both {one!r} and {other!r}; keep one of them")
    conversation = turns_of(raw.get(keys[0]) or [], "user")
    if keys[0] == "instruction" and raw.get("input"):
        more = turns_of(raw["input"], "user")[-1][1]
        conversation[-1] = ("user", f"{conversation[-1][1]}\n{more}")
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


def read_record(raw: dict, name: str, root: Path, saved: Path, flatten: bool) -> PairRecord:
    """A record of any format, checked; images are in `root`, or bytes, which `saved` will hold.

    With `flatten` earlier turns stand before the question, each behind who says it.
    """
    turns, chosen, rejected = read_pair(raw)
    system = raw.get("system") or raw.get("system_prompt")
    if turns and turns[0][0] == "system":
        if system:
            raise InputError("a system prompt beside that of the conversation; keep one of them")
        system = turns.pop(0)[1]
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise InputError(f"the turns are not user, assistant, ..., user: {roles}")
    if len(roles) > 1 and not flatten:
        raise InputError("several turns; pass --flatten to write them into the question")
    question = turns[0][1]
    if len(roles) > 1:
        question = "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)
    if IMAGE in f"{chosen} {rejected}":
        raise InputError(f"{IMAGE} in an answer is not supported")
    images = raw.get("images") or raw.get("image") or raw.get("image_path") or []
    images = images if isinstance(images, list) else [images]
    images = [(x.get("path"), x.get("bytes")) if isinstance(x, dict) else (x, None) for x in images]
    root = saved if any(content for _, content in images) else root
    names = [image_name(path, content, root) for path, content in images]
    held = {name: content for name, (_, content) in zip(names, images) if content}
    line = {"question": question, "chosen": chosen, "rejected": rejected, "system_prompt": system}
    line |= {"image": names, "cut_off": raw.get("cut_off", False)}
    record = DataSet("", root).check(line, name)
    with ExitStack() as undo:
        for path in (root / file for file in held if not (root / file).exists()):
            write_atomic(path, held[path.name])
            undo.callback(path.unlink)
        checked_images(root, line, name)
        undo.pop_all()  # of a pair that is kept they stay
    return record


def image_name(path: str, content: bytes | None, root: Path) -> str:
    """The image relative to `root`; that of bytes is made of what they hold."""
    if content:
        ending = Path(path or "").suffix or ".jpg"
        return hashlib.blake2b(content, digest_size=16).hexdigest() + ending
    return relpath(Path(path).resolve(), root.resolve()) if Path(path).is_absolute() else path


def parts_of(text: str) -> list[dict]:
    """A text as parts; <image> is literal text to TRL, which adds parts for images of its own."""
    pieces = re.split(f"({IMAGE})\n?", text)
    return [{"type": "image"} if x == IMAGE else {"type": "text", "text": x} for x in pieces if x]


def written(record: PairRecord, to: str, root: Path) -> dict:
    """The record as another program reads it; image paths are absolute, those of MMPR in `root`."""
    images = [str(path.resolve()) for path in record.images]
    both, system = {"chosen": record.chosen, "rejected": record.rejected}, record.system_prompt
    if to in ("plain", "mmpr"):
        line = {"question": record.question, **both} | ({"cut_off": True} if record.cut_off else {})
        line |= {} if system is None else {"system_prompt": system}
        images = images if to == "plain" else [relpath(image, root) for image in images]
        return line | ({"image": images[0] if len(images) == 1 else images} if images else {})
    if to == "llama-factory":
        question = [{"from": "human", "value": record.question}]
        both = {key: {"from": "gpt", "value": text} for key, text in both.items()}
        return {"conversations": question, **both, "system": system or "", "images": images}
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": "user", "content": record.question}]
    both = {key: [{"role": "assistant", "content": text}] for key, text in both.items()}
    if to == "trl":
        if images:
            messages = [message | {"content": parts_of(message["content"])} for message in messages]
        return {"prompt": messages, **both, "images": images}
    messages += both["chosen"]
    return {"messages": messages, "rejected_response": record.rejected, "images": images}


def read_file(path: Path, root: Path | None) -> Iterator[tuple[str, Path, dict]]:
    """(record name, folder of its images, record) of each record."""
    with runtime.open_file(path) as file:  # refused where it is none, or a pipe
        first = file.read(99).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if path.suffix == ".jsonl" or (path.suffix == ".json" and first == b"{"):
        for data_set in read_meta(path, 0):
            if (data_set.repeat_time, data_set.max_tiles, data_set.augment) != (1, 0, False):
                runtime.say(f"{data_set.name}: repeat_time, tiles, augmentation are not written")
            place = root or data_set.root
            yield from ((str(line), place, line.record()) for line in data_set.lines)
    elif path.suffix in (".json", ".csv", ".parquet"):
        rows = read_json(path, list) if path.suffix == ".json" else read_table(path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise InputError(f"{path}: expected a list of objects, got {row!r:.60}")
            yield f"{path} record {number}", root or path.parent, row
    else:
        raise InputError(f"{path}: expected .jsonl, .json, .csv or .parquet")


def read_table(path: Path) -> Iterator[dict]:
    """The rows of a parquet file, for which pyarrow is needed, or of a CSV."""
    if path.suffix == ".parquet":
        need("pyarrow", ".parquet")
        from pyarrow import ArrowInvalid, parquet  # noqa: PLC0415

        try:
            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        except ArrowInvalid as error:
            raise InputError(f"{path}: no whole parquet file ({error})") from None
        return
    # half of a character that is no UTF-8 is found in its record
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, restkey=REFUSED.split()[-1], strict=True)
        try:
            if len(names := rows.fieldnames or []) > len(set(names)):
                raise csv.Error(f"two columns of one name: {', '.join(names)}")
            yield from (row | {"columns_without_a_cell": None in row.values()} for row in rows)
        except csv.Error as error:
            raise InputError(f"{path} line {rows.line_num}: {error}") from None


def convert(cfg: ConvertConfig) -> dict:
    """Write what can be converted; the report: how many pairs, and why which others are none."""
    mmpr = cfg.to == "mmpr"
    lines = cfg.out / f"{cfg.input.stem}.jsonl" if mmpr else cfg.out
    folder = lines.parent
    report_file = folder / ("report.json" if mmpr else f"{lines.stem}.report.json")
    for path in (cfg.out, report_file):
        if path.exists():
            raise InputError(f"{path} is there already; pass another --out, or remove it")
    kept, dropped = [], []
    for name, root, raw in read_file(cfg.input, cfg.root):
        try:
            kept.append(read_record(raw, name, root, folder / "images", cfg.flatten))
        except InputError as error:
            dropped.append(f"{name}: {str(error).removeprefix(f'{name}: ')}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            dropped.append(f"{name}: a text, a message or an image is none ({error!r:.80})")
    report = {"kept": len(kept), "dropped": dropped}
    write_json(report_file, report)
    if not kept:
        raise InputError(f"{cfg.input}: no pair can be kept; {report_file} says why")
    folders = {path.resolve().parent for record in kept for path in record.images}
    root = Path(commonpath(folders or {folder.resolve()}))
    runtime.write_jsonl(lines, (written(record, cfg.to, root) for record in kept))
    if cfg.to not in ("plain", "mmpr") and (cut := sum(record.cut_off for record in kept)):
        runtime.say(f"{cut} rejected answers never ended; in this format an end is learned")
    inline = sum(bool(re.search(f"{IMAGE}(?!\n)", record.question)) for record in kept)
    if cfg.to == "trl" and inline:
        runtime.say(f"{inline} questions go on behind an image; in this format a line ends there")
    if mmpr:
        entry = {"root": relpath(root, folder.resolve()), "annotation": lines.name}
        write_json(folder / "meta.json", {cfg.input.stem: entry | {"length": len(kept)}})
    return report


def main() -> None:
    cfg = runtime.parse_cli(ConvertConfig)
    with runtime.alone_in(cfg.out.parent, 0, "pass another --out", f".{cfg.out.name}.lock"):
        report = convert(cfg)
    print(f"kept {report['kept']} pairs, left out {len(report['dropped'])}: see report.json there")


if __name__ == "__main__":
    runtime.run(main)
