r"""The preference data engine: pairs without annotators (section 3 of arXiv 2411.10442).

    python pairs.py sample --model_dir M --questions q.jsonl --root images --out_dir samples
    python pairs.py correctness --samples samples --out_dir pairs     right against wrong answers
    python pairs.py dropout_ntp --samples samples --out_dir pairs --model_dir M     (--prompts none)
    python pairs.py divide_and_conquer --samples samples --out_dir pairs --model_dir M   RLAIF-V

`tools/look.py` shows the pairs and sets their numbers beside the paper's.
`torchrun --nproc_per_node 8 pairs.py sample ...` shares the questions among processes.  A response
is a function of (seed, question, number) alone and every process appends to its own part file, so a
run may stop anywhere and go on with any number of processes; verbs that only judge and pair are
pure functions of the part files and write the same bytes again.  Output: jsonl files and the
meta.json that train.py reads, with all counts in pairs.report.json.

Differs from the official reasoning_data_pipeline: gold answers are never written into responses,
equal responses are dropped before the cap, 15 pairs a question over both kinds (--official_caps:
of each kind), groups are keyed by JSON values and not by printed forms, no bare except.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from benchmarks.answers import (
    PROMPTS,
    check_gold,
    fix_answer,
    get_mode,
    judge,
    split_prefix,
    strip_instruction,
)
from runtime import (
    AppendLog,
    InputError,
    flag,
    parse_command,
    parse_json_line,
    rank_and_world,
    read_jsonl,
    run,
    sync_folder,
    write_atomic,
)
from tokenizer import IMAGE, with_image_placeholders

NOT_SETTINGS = ("out_dir", "samples", "model_dir", "compile", "cache_tokens")  # of a report
PAPER_COST = {"dropout_ntp": 571.2, "divide_and_conquer": 992.7}  # tokens a pair on M3CoT
HUGE_FILE = 500_000  # response lines from which the official script caps at 3 pairs
BUCKET_BYTES = 64 << 20  # responses held in memory at once, as text


DOMAINS = {  # domain -> (prompt versions, tiles at most); the paper leaves the tiles of two open
    "general": (("en", "en_ground"), 6),
    "science": (("en", "en_bg"), 6),
    "chart": (("en", "en_vis"), 12),
    "math": (("en",), 6),
    "ocr": (("en", "en_vis"), 12),
    "document": (("en", "en_vis"), 12),
}


def digest(*key: Any) -> str:
    """A hexadecimal hash of JSON values: the same in every process and version."""
    text = json.dumps(key, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# --------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """One question under one prompt version."""

    number: int  # of its line, from 0: decides the process that samples it
    images: tuple[str, ...]
    fields: dict  # what every response line of this question repeats

    @property
    def qid(self) -> str:
        return self.fields["qid"]


def image_list(record: dict, where: str) -> list[str]:
    """Image paths of a record; absent, "" and [] all mean text only."""
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise InputError(f"{where}: 'image' must be a path or a list of paths")
    if record.get("video") or record.get("clip"):
        raise InputError(f"{where}: video records are not supported")
    for image in images:
        if "://" in image or Path(image).is_absolute() or ".." in Path(image).parts:
            raise InputError(
                f"{where}: image {image!r} leaves its root; give a path relative to it"
            )
    return images


def wrap_question(question: str, num_images: int, version: str) -> str:
    """The full prompt: instruction around the question, one placeholder an image."""
    text = question if version == "none" else strip_instruction(question)
    if num_images == 1 and text.count(IMAGE) == 1:  # moved to the front
        text = text.replace(IMAGE + "\n", "").replace(IMAGE, "").strip()
    # plain replacement: questions contain braces
    wrapped = PROMPTS[version].replace("{question}", text)
    return with_image_placeholders(wrapped, num_images) if num_images else wrapped


def read_questions(
    path: Path, name: str, versions: list[str], max_tiles: int, seed: int = 0, limit: int = 0
) -> list[Question]:
    """Questions of a prompt file under each prompt version.  Errors name the line."""
    if unknown := [v for v in versions if v not in PROMPTS]:
        raise InputError(f"unknown prompt version {unknown[0]!r}; known are {', '.join(PROMPTS)}")
    records = list(read_jsonl(path))
    if not records:
        raise InputError(f"{path}: no questions")
    if 0 < limit < len(records):  # an even choice, whatever the order of the file
        kept = sorted(range(len(records)), key=lambda i: digest("choose", seed, i))[:limit]
        records = [records[i] for i in sorted(kept)]
    questions, lines, ids = [], {}, {}
    for number, (line, record) in enumerate(records):
        where = f"{path} line {line}"
        question = record.get("question")
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"{where}: no 'question'")
        images = image_list(record, where)
        gold = record.get("answer")
        if gold is None and versions != ["none"]:
            raise InputError(f"{where}: no 'answer'; only --prompts none does without gold")
        if gold is not None and (wrong := check_gold(gold)):
            raise InputError(f"{where}: the gold answer {wrong}")
        for key in ("id", "question_id"):
            if key in record and (first := ids.setdefault((key, str(record[key])), line)) != line:
                raise InputError(f"{where}: {key} {record[key]!r} stands in line {first} already")
        for version in versions:
            qid = digest(name, images, question, gold_text(gold), version, max_tiles)
            if (first := lines.setdefault(qid, line)) != line:
                raise InputError(f"{where}: the same question as line {first}")
            kept = {k: record[k] for k in ("image", "rationale") if record.get(k)}
            kept |= {"answer": gold} if gold is not None else {}
            try:
                wrapped = wrap_question(question, len(images), version)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            kept |= {"question": wrapped, "question_orig": question, "prompt_version": version}
            questions.append(Question(number, tuple(images), {"qid": qid, **kept}))
    return questions


def gold_text(gold: Any) -> str | None:
    """Gold as text: a number and its digits are the same answer."""
    return None if gold is None else str(gold)


# --------------------------------------------------------------------------- part files


def read_part(path: Path) -> Iterator[tuple[int, bytes, dict]]:
    """(line number, line, record) of the whole lines; a torn last line is left out."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                return
            if line.strip():
                yield number, line, parse_json_line(path, number, line)


def part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*-of-*.jsonl"))


def model_fingerprint(model_dir: Path) -> str:
    """A hash of the config, tokenizer and weights (sizes, headers and ends of large files)."""
    files = sorted(
        p for p in model_dir.glob("*") if p.suffix in (".json", ".safetensors", ".model")
    )
    if not any(p.suffix == ".safetensors" for p in files):
        raise InputError(f"no *.safetensors in {model_dir}; pass --model_dir the folder of a model")
    whole = hashlib.blake2b(digest_size=16)
    for path in files:
        size, edge = path.stat().st_size, 1 << 20
        whole.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as f:
            whole.update(f.read(edge))
            f.seek(max(edge, size - edge))
            whole.update(f.read())
    return whole.hexdigest()


def claim_folder(folder: Path, settings: dict, info: dict) -> None:
    """Write run.json, or refuse a folder that was made with other settings."""
    path = folder / "run.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        old = json.loads(path.read_text())["settings"]
        if changed := [k for k in sorted(old | settings) if old.get(k) != settings.get(k)]:
            shown = "; ".join(f"{k} {old.get(k)!r}, now {settings.get(k)!r}" for k in changed)
            raise InputError(f"{path} was made with {shown}: use the same or another --out_dir")
    elif part_files(folder):
        raise InputError(f"{folder} has part files but no run.json: use another --out_dir")
    record = {"settings": settings, "settings_hash": digest(settings), "info": info}
    write_atomic(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class SampleSet:
    """The responses of one data set: a folder of part files, or a file in the official format."""

    name: str
    files: list[Path]
    info: dict  # of run.json


def find_sets(path: Path) -> list[SampleSet]:
    """Data sets at `path`: one file, one folder with part files, or a folder of such folders."""
    if path.is_file():
        return [SampleSet(path.stem, [path], {})]
    folders = [path] if part_files(path) else sorted(p for p in path.glob("*") if part_files(p))
    if not folders:
        raise InputError(
            f"no part files in {path}; run `pairs.py sample` with that --out_dir first"
        )
    sets = []
    for folder in folders:
        run_file = folder / "run.json"
        info = json.loads(run_file.read_text()).get("info", {}) if run_file.exists() else {}
        if "root" in info:  # it stands there relative to the folder
            info["root"] = str(folder / info["root"])
        sets.append(SampleSet(folder.name, part_files(folder), info))
    return sets


def grouped(
    files: list[Path], work: Path, key_of: Callable[[dict, str], str]
) -> Iterator[tuple[str, list[dict]]]:
    """(key, records of that key) in the order of the keys, holding one bucket in memory at a time.

    First pass: lines go to bucket files by the first bits of their (hexadecimal) key; second
    pass: each bucket is read, sorted and handed out.
    """
    count = 1 + sum(f.stat().st_size for f in files) // BUCKET_BYTES
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix=".buckets-") as folder:
        with contextlib.ExitStack() as stack:
            buckets = [stack.enter_context(open(Path(folder) / str(i), "wb")) for i in range(count)]
            for path in files:
                for number, line, record in read_part(path):
                    key = key_of(record, f"{path} line {number}")
                    buckets[int(key[:8], 16) * count >> 32].write(key.encode() + b"\t" + line)
        for i in range(count):
            groups = defaultdict(list)
            with open(Path(folder) / str(i), "rb") as f:
                for line in f:
                    key, _, text = line.partition(b"\t")
                    groups[key.decode()].append(json.loads(text))
            (Path(folder) / str(i)).unlink()
            for key in sorted(groups):
                yield key, groups.pop(key)


def drop_repeats(rows: list[dict], name: str) -> tuple[list[dict], int]:
    """Rows in the order of (qid, k), each response once; a response with two texts is an error."""
    kept: dict[tuple, dict] = {}
    for row in rows:
        rid = (row.get("qid", ""), row["k"])
        first = kept.setdefault(rid, row)
        if first is not row and first != row:
            raise InputError(f"{name}: response {rid} stands in two part files with different text")
    return [kept[rid] for rid in sorted(kept)], len(rows) - len(kept)


class WholeFile:
    """A jsonl file that appears complete or not at all, and not where it would be empty."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> "WholeFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.partial, "wb")  # noqa: SIM115  (closed on exit)
        return self

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.count += 1

    def __exit__(self, error: type | None, *_: object) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        if error is None and self.count:
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        else:
            self.partial.unlink()
            if error is None:
                self.path.unlink(missing_ok=True)


# --------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class EngineConfig:
    """How responses are generated; shared by the verbs that need the model."""

    model_dir: Path = flag(Path("weights/InternVL2-8B"), "folder with config.json and weights")
    seed: int = flag(0, "random seed of the run")
    temperature: float = flag(1.0, "sampling temperature")
    top_k: int = flag(50, "sample among the k likeliest tokens, 0 = all")
    top_p: float = flag(1.0, "sample within this probability mass")
    max_new_tokens: int = flag(4096, "longest response")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "auto = bf16 on GPU, fp32 on CPU")
    cache_tokens: int = flag(65536, "room of the KV cache: how many responses run at once")
    compile: bool = flag(False, "compile the decode step (on a GPU: a captured graph)")

    def __post_init__(self) -> None:
        if not 0 < self.temperature:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")


def load_generator(cfg: EngineConfig) -> Any:
    import torch  # noqa: PLC0415  (judging and pairing need no torch)

    from generate import Generator  # noqa: PLC0415  (the same)

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(cfg.dtype)
    names = ("seed", "temperature", "top_k", "top_p", "max_new_tokens", "cache_tokens", "compile")
    how = {name: getattr(cfg, name) for name in names}
    return Generator.load(cfg.model_dir, dtype=dtype, **how)


def make_prompt(**fields: Any) -> Any:
    from generate import Prompt  # noqa: PLC0415  (judging and pairing need no torch)

    return Prompt(**fields)


def text_settings(cfg: EngineConfig) -> dict:
    """The settings that a response's text depends on."""
    names = ("seed", "temperature", "top_k", "top_p", "max_new_tokens", "dtype")
    return {n: getattr(cfg, n) for n in names} | {"model": model_fingerprint(cfg.model_dir)}


def image_paths(root: Path, images: Iterable[str], where: str) -> tuple[Path, ...]:
    from data import resolve_image  # noqa: PLC0415  (judging and pairing need no torch)

    try:
        paths = tuple(resolve_image(root, image) for image in images)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for path in paths:
        if not path.is_file():
            raise InputError(f"{where}: no image {path}")
    return paths


def generate_into(
    log: AppendLog,
    generator: Any,
    requests: Iterable[tuple[Any, int, Any]],
    finish: Callable[[Any, Any], dict],
    total: int,
    label: str,
) -> None:
    """Run (prompt, its number of samples, context) and append finish(context, sample) of each.

    Requests are drawn lazily: only those under way are held.
    """
    from tqdm import tqdm  # noqa: PLC0415  (only the long verbs show a bar)

    under_way: dict[str, list] = {}

    def prompts() -> Iterator[Any]:
        for prompt, count, context in requests:
            under_way[prompt.id] = [context, count]
            yield prompt

    rank, tokens = rank_and_world()[0], 0
    with tqdm(total=total, desc=label, unit="response", disable=rank != 0 or not total) as bar:
        for sample in generator.run(prompts()):
            entry = under_way[sample.prompt_id]
            log.append(finish(entry[0], sample))
            entry[1] -= 1
            if entry[1] == 0:
                del under_way[sample.prompt_id]
            tokens += sample.num_tokens
            bar.update()
            elapsed = bar.format_dict["elapsed"] or 1
            bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
    log.sync()


def sample_fields(sample: Any) -> dict:
    """What a part file keeps of a sample beside its text."""
    return {
        "finish_reason": sample.finish_reason,
        "tokens": sample.num_tokens,
        "prompt_tokens": sample.prompt_tokens,
        "image_tokens": sample.image_tokens,
    }


@dataclass(frozen=True)
class SampleConfig(EngineConfig):
    """Sample responses to questions, resumable, over any number of processes."""

    questions: Path = flag(Path("questions.jsonl"), 'jsonl of {"image", "question", "answer"}')
    root: Path = flag(Path("."), "folder of the images")
    out_dir: Path = flag(Path("samples"), "responses go to out_dir/<name>/part-<r>-of-<R>.jsonl")
    name: str = flag("", "name of the data set, empty = name of the question file")
    domain: Literal["general", "science", "chart", "math", "ocr", "document"] = flag(
        "science", "decides the default prompts and tile limit"
    )
    prompts: str = flag("", "prompt versions with commas, empty = by domain; none = as it is")
    num_samples: int = flag(32, "responses a question, shared evenly among the prompt versions")
    max_tiles: int = flag(0, "tiles an image at most, 0 = by domain")
    max_questions: int = flag(20_000, "questions of the file at most (chosen evenly), 0 = all")
    modes: str = flag("", "matching modes with commas, kept for judging; empty = by name")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be >= 1, got {self.num_samples}")


def sample(cfg: SampleConfig) -> None:
    name = cfg.name or cfg.questions.stem
    default_versions, default_tiles = DOMAINS[cfg.domain]
    versions = split_names(cfg.prompts) or list(default_versions)
    if "_zh_" in cfg.questions.name and not cfg.prompts:
        versions = ["zh"]
    tiles = cfg.max_tiles or default_tiles
    questions = read_questions(cfg.questions, name, versions, tiles, cfg.seed, cfg.max_questions)
    folder = cfg.out_dir / name
    share = math.ceil(cfg.num_samples / len(versions))
    rank, world = rank_and_world()
    info = {
        "root": os.path.relpath(cfg.root.resolve(), folder.resolve()),
        "domain": cfg.domain,
        "modes": split_names(cfg.modes),
        "responses": share * len(questions),
        "max_tiles": tiles,
    }
    claim_folder(folder, text_settings(cfg) | {"name": name, "max_tiles": tiles}, info)
    done = defaultdict(set)
    for path in part_files(folder):
        for _, _, record in read_part(path):
            done[record["qid"]].add(record["k"])
    todo = []
    for q in questions:
        missing = tuple(k for k in range(share) if k not in done[q.qid])
        if missing and q.number % world == rank:
            where = f"{cfg.questions}, question {q.fields['question_orig'][:60]!r}"
            todo.append((q, image_paths(cfg.root, q.images, where), missing))
    if not todo:
        print(f"{name}: all {share * len(questions)} responses are there", file=sys.stderr)
        return

    def requests() -> Iterator[tuple[Any, int, Question]]:
        for q, paths, missing in todo:
            fields = {"id": q.qid, "question": q.fields["question"], "images": paths}
            each = max(1, tiles // max(1, len(paths)))
            yield make_prompt(**fields, max_tiles=each, samples=missing), len(missing), q

    def finish(q: Question, s: Any) -> dict:
        line = {**q.fields, "k": s.sample, "seed": cfg.seed, "response": s.text}
        return line | sample_fields(s) | {"tiles": tiles}

    log = open_part(folder, rank, world)
    total = sum(len(missing) for _, _, missing in todo)
    generate_into(log, load_generator(cfg), requests(), finish, total, name)
    log.close()


def open_part(folder: Path, rank: int, world: int) -> AppendLog:
    log = AppendLog(folder / f"part-{rank}-of-{world}.jsonl")
    log.records.clear()  # already read line by line
    return log


def split_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


# --------------------------------------------------------------------------- judging and pairing


@dataclass
class Judged:
    """The responses of one question by verdict, each distinct text once, in sampling order."""

    correct: list[dict] = field(default_factory=list)
    wrong: list[dict] = field(default_factory=list)
    ambiguous: list[dict] = field(default_factory=list)  # perhaps meant right: in no pair
    format: list[dict] = field(default_factory=list)  # no clear final answer
    counts: Counter = field(default_factory=Counter)


def judge_group(
    rows: list[dict], modes: list[str], rationales: str = "off", clean: bool = True
) -> Judged:
    """Verdicts of all responses to one question."""
    judged = Judged()
    seen = set()
    for number, row in enumerate(rows):
        gold, text = str(row["answer"]), row["response"]
        version, finish = row["prompt_version"], row.get("finish_reason")
        verdict = judge(text, gold, modes, version, finish)
        judged.counts[f"{verdict.label} responses"] += 1
        judged.counts["cut off"] += finish == "length"
        if verdict.label == "format":
            judged.counts[f"format: {verdict.reason}"] += 1
        elif clean and verdict.answer is not None:
            text = fix_answer(text)
        if not text.strip():  # nothing to train on
            judged.counts["empty responses"] += 1
            continue
        if (verdict.label, text) in seen:
            judged.counts["duplicate responses"] += 1
            continue
        seen.add((verdict.label, text))
        if verdict.mode:
            judged.counts[f"mode: {verdict.mode}"] += 1
        judged.counts["guarded responses"] += verdict.ambiguous
        meta = {"k": row.get("k", number), "verdict": verdict.label, "reason": verdict.reason}
        meta |= {"answer": verdict.answer, "prompt_version": version}
        meta |= {k: row[k] for k in ("qid", "finish_reason", "tokens") if k in row}
        getattr(judged, verdict.label).append({"number": number, "text": text, "meta": meta})
    wanted = rationales == "all" or (rationales == "unsolved" and not judged.correct)
    if wanted and rows and isinstance(rows[0].get("rationale"), str):
        text = f"{rows[0]['rationale'].strip()}\nFinal answer: {rows[0]['answer']}"
        meta = {"k": None, "verdict": "correct", "reason": "gold rationale"}
        judged.correct.append({"number": len(rows), "text": text, "meta": meta})
        judged.counts["gold rationales"] += 1
    return judged


def candidates(judged: Judged) -> tuple[list[tuple[dict, dict]], list[tuple[dict, dict]]]:
    """(chosen, rejected) of all possible pairs: against wrong answers, against format failures."""
    correctness, format_pairs = (
        [(c, r) for c in judged.correct for r in group if c["text"] != r["text"]]
        for group in (judged.wrong, judged.format)
    )
    return correctness, format_pairs


def choose(items: list, count: int, *key: Any) -> list:
    """`count` items without replacement, uniform, in order; a function of `key` alone."""
    if len(items) <= count:
        return items
    kept = sorted(range(len(items)), key=lambda i: digest(*key, i))[:count]
    return [items[i] for i in sorted(kept)]


def draw_pairs(
    judged: Judged, key: str, seed: int, cap: int, official_caps: bool = False
) -> tuple[list[tuple[dict, dict]], list[tuple[dict, dict]]]:
    """Pairs of one question under the cap: over both kinds, wrong answers first.

    `official_caps` gives each kind the whole cap.
    """
    correctness, format_pairs = candidates(judged)
    correctness = choose(correctness, cap, "correctness", seed, key)
    left = cap if official_caps else cap - len(correctness)
    return correctness, choose(format_pairs, left, "format", seed, key)


KINDS = ("correctness", "format")


@dataclass(frozen=True)
class CorrectnessConfig:
    """Pair responses with right answers against wrong ones and format failures."""

    samples: Path = flag(Path("samples"), "folder of `sample`, or a jsonl file of responses")
    out_dir: Path = flag(Path("pairs"), "meta.json, annotations/ and pairs.report.json go here")
    root: str = flag("", "folder of the images, empty = as given to `sample`")
    modes: str = flag("", "matching modes with commas; empty = as given to `sample`, else by name")
    pairs_per_query: int = flag(15, "pairs a question at most, over both kinds")
    official_caps: bool = flag(False, "the cap for each kind, and 3 above 500,000 responses")
    gold_rationales: Literal["off", "unsolved", "all"] = flag(
        "off", "let gold rationales join the right responses"
    )
    clean: bool = flag(True, "drop markdown marks around the answer line")
    max_format_share: float = flag(0.5, "fail above this share of format failures")
    seed: int = flag(0, "decides which pairs the cap keeps")

    def __post_init__(self) -> None:
        if self.pairs_per_query < 1:
            raise ValueError(f"pairs_per_query must be >= 1, got {self.pairs_per_query}")


def response_key(record: dict, where: str) -> str:
    """The group of a response: (images, wrapped question, gold as text)."""
    for name in ("question", "response", "prompt_version"):
        if not isinstance(record.get(name), str):
            raise InputError(f"{where}: no text {name!r}")
    if record.get("answer") is None:
        raise InputError(f"{where}: no 'answer'; correctness pairs need gold answers")
    if wrong := check_gold(record["answer"]):
        raise InputError(f"{where}: the gold answer {wrong}")
    return digest(image_list(record, where), record["question"], str(record["answer"]))


def correctness(cfg: CorrectnessConfig) -> None:
    entries, reports, bad = {}, {}, []
    for data_set in find_sets(cfg.samples):
        modes = split_names(cfg.modes) or data_set.info.get("modes") or get_mode(data_set.name)
        report, made = pair_set(cfg, data_set, modes)
        reports[data_set.name] = report
        entries |= {f"{data_set.name}_pairs_vqa_{k}_rules": made.get(k) for k in KINDS}
        share = report["counts"].get("format responses", 0) / max(report["responses"], 1)
        if share > cfg.max_format_share:
            bad.append(f"{data_set.name}: {share:.0%} of the responses are format failures")
        if report["responses"] < (expected := data_set.info.get("responses", 0)):
            print(f"{data_set.name}: {report['responses']} of {expected} responses so far")
    finish_verb(cfg, "correctness", entries, reports, bad)


def pair_set(
    cfg: CorrectnessConfig, data_set: SampleSet, modes: list[str]
) -> tuple[dict, dict[str, dict]]:
    """Judge and pair one data set; its report, and an entry for meta.json of each kind."""
    counts, per_query, cost = Counter(), Counter(), Counter()
    total = sum(1 for f in data_set.files for _ in read_part(f)) if cfg.official_caps else 0
    cap = 3 if total > HUGE_FILE else cfg.pairs_per_query
    with contextlib.ExitStack() as stack:
        files = {}
        for kind in KINDS:
            path = cfg.out_dir / "annotations" / f"{data_set.name}_pairs_vqa_{kind}_rules.jsonl"
            files[kind] = stack.enter_context(WholeFile(path))
        aside = stack.enter_context(WholeFile(cfg.out_dir / "all_wrong" / f"{data_set.name}.jsonl"))
        for key, rows in grouped(data_set.files, cfg.out_dir, response_key):
            for i, row in enumerate(rows):
                row.setdefault("k", i)
            rows, repeats = drop_repeats(rows, data_set.name)
            judged = judge_group(rows, modes, cfg.gold_rationales, cfg.clean)
            pairs = draw_pairs(judged, key, cfg.seed, cap, cfg.official_caps)
            for row in rows:
                spend(cost, row)
            counts += judged.counts + query_counts(judged, pairs)
            counts["responses"] += len(rows)
            counts["repeated lines"] += repeats
            per_query[sum(map(len, pairs))] += 1
            if not judged.correct:
                names = ("qid", "image", "question", "question_orig", "answer", "prompt_version")
                aside.write({n: rows[0][n] for n in names if n in rows[0]})
            for kind, drawn in zip(KINDS, pairs):
                for chosen, rejected in drawn:
                    files[kind].write(pair_record(rows[0], chosen, rejected))
    entries = {k: meta_entry(cfg, data_set, file) for k, file in files.items() if file.count}
    report = {"modes": modes, "cap": cap, "responses": counts.pop("responses", 0)}
    report["pairs_per_query"] = {str(k): per_query[k] for k in sorted(per_query)}
    written = {kind: file.count for kind, file in files.items()}
    return report | report_of(written, counts, cost), entries


def query_counts(judged: Judged, pairs: tuple[list, list]) -> Counter:
    """Counts about one question as a whole."""
    correctness, format_pairs = candidates(judged)
    guarded = len(judged.correct) * len(judged.ambiguous)
    counts = Counter({"questions": 1, "guarded pairs": guarded})
    counts["possible correctness pairs"] = len(correctness)
    counts["possible format pairs"] = len(format_pairs)
    if not judged.wrong and not judged.ambiguous and not judged.format:
        counts["questions all right"] = 1
    elif not judged.correct:
        counts["questions never right"] = 1
        counts["questions never parsed"] = int(not judged.wrong + judged.ambiguous)
    counts["questions without a pair"] = int(not any(pairs))
    return counts


def pair_record(row: dict, chosen: dict, rejected: dict) -> dict:
    """A line of the output, in MMPR's format."""
    record = {"image": row["image"]} if row.get("image") else {}
    return record | {
        "question": row["question"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "answer_gt": str(row["answer"]),
        "chosen_meta": chosen["meta"],
        "rejected_meta": rejected["meta"],
    }


# --------------------------------------------------------------------------- output and cost


def meta_entry(cfg: Any, data_set: SampleSet, file: WholeFile) -> dict:
    """An entry of meta.json; paths are relative to the folder of meta.json."""
    base = cfg.out_dir.resolve()
    root = Path(cfg.root or data_set.info.get("root", "")).resolve()
    return {
        "root": Path(os.path.relpath(root, base)).as_posix(),
        "annotation": file.path.resolve().relative_to(base).as_posix(),
        "data_augment": False,
        "repeat_time": 1,
        "length": file.count,
    }


def report_of(pairs: dict[str, int], counts: Counter, cost: Counter) -> dict:
    """The part of a report that all pipelines share."""
    tokens = token_cost(cost, sum(pairs.values()))
    return {"pairs": pairs, "counts": dict(sorted(counts.items())), "tokens": tokens}


def finish_verb(cfg: Any, verb: str, entries: dict, reports: dict, bad: Iterable[str] = ()) -> None:
    """Write meta.json and pairs.report.json, print the cost; exit 1 where there is no pair.

    Entries and reports of other verbs stay; an entry of None goes.
    """
    if not reports:  # other processes are still at work
        return
    report = {"settings": {k: v for k, v in asdict(cfg).items() if k not in NOT_SETTINGS}}
    report["sets"] = reports
    for name, new in (("meta.json", entries), ("pairs.report.json", {verb: report})):
        path = cfg.out_dir / name
        whole = (json.loads(path.read_text()) if path.exists() else {}) | new
        whole = {k: v for k, v in whole.items() if v is not None}
        text = json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True, default=str)
        write_atomic(path, text + "\n")
    print_cost(verb, reports)
    empty = [n for n, r in reports.items() if not sum(r["pairs"].values())]
    bad = [f"{n}: no pair from {reports[n]['responses']} responses" for n in empty] + list(bad)
    if bad:
        print("\n".join(["error: data sets to look at:", *bad]), file=sys.stderr)
        raise SystemExit(1)


def spend(cost: Counter, record: dict) -> None:
    """Add the tokens of one sample; a prompt counts once, as one prefill serves all its samples."""
    if "tokens" not in record:
        cost["unknown"] += 1
        return
    cost["generated"] += record["tokens"]
    if record.get("k", 0) == 0:
        cost["prompt"] += record.get("prompt_tokens", 0)
        cost["image"] += record.get("image_tokens", 0)


def token_cost(cost: Counter, pairs: int) -> dict:
    """Tokens a kept pair in three readings; None where the responses do not say."""
    per_pair = dict.fromkeys(("generated", "with_prompt", "with_prompt_and_image"))
    if pairs and not cost["unknown"]:
        text = cost["prompt"] - cost["image"]
        totals = (cost["generated"], cost["generated"] + text, cost["generated"] + cost["prompt"])
        per_pair = {k: round(total / pairs, 1) for k, total in zip(per_pair, totals)}
    spent = {k: cost[k] for k in ("generated", "prompt", "image", "unknown")}
    return {"spent": spent, "per_pair": per_pair}


def print_cost(verb: str, reports: dict) -> None:
    """Pairs and tokens a kept pair of each data set, beside the paper's two figures."""
    paper = ", ".join(f"{k} {v}" for k, v in PAPER_COST.items())
    print(f"{verb}: tokens a kept pair (paper, on M3CoT: {paper}; how it counted is not stated)")
    print(f"  {'data set':<32}{'pairs':>9}{'generated':>11}{'+ prompt':>11}{'+ image':>11}")
    for name, report in reports.items():
        shown = ["-" if v is None else f"{v:.1f}" for v in report["tokens"]["per_pair"].values()]
        columns = "".join(f"{v:>11}" for v in shown)
        print(f"  {name:<32}{sum(report['pairs'].values()):>9}{columns}")


# --------------------------------------------------------------------------- DropoutNTP

MAX_DRAWS = 4  # a continuation and up to three redraws


@dataclass(frozen=True)
class DropoutConfig(EngineConfig):
    """DropoutNTP: keep the start of a response, continue it without the image."""

    samples: Path = flag(Path("samples"), "folder of `sample --prompts none`")
    out_dir: Path = flag(Path("pairs"), "meta.json, annotations/ and pairs.report.json go here")
    root: str = flag("", "folder of the images, empty = as given to `sample`")
    keep_ratio: float = flag(0.5, "share of the response that is kept (paper: 0.25, 0.5, 0.75)")
    max_new_tokens: int = flag(2048, "longest continuation")
    max_responses: int = flag(500_000, "responses of a data set at most, 0 = all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.keep_ratio < 1:
            raise ValueError(f"keep_ratio must be in [0, 1), got {self.keep_ratio}")


def without_image(question: str) -> str:
    """The question without placeholders; wordings such as "Image 1:" keep their text."""
    return re.sub(rf"(?m)^{IMAGE}\n", "", question).replace(IMAGE, "").strip()


def continuation_prefix(response: str, keep_ratio: float) -> tuple[str, str, str]:
    """(kept part, blanks at the cut, what the model is given as the start of its turn).

    A line break at the cut is given along; a blank is not, since word pieces carry their own.
    """
    kept, glue = split_prefix(response, keep_ratio)
    return kept, glue, kept + (glue if "\n" in glue else "")


def rejected_text(chosen: str, prefix: str, text: str) -> tuple[str | None, str]:
    """(the rejected response or None, reason): kept part and continuation, decoded together."""
    if not text.startswith(prefix):
        return None, "the kept part came back changed"
    if not text[len(prefix) :].strip():
        return None, "empty continuation"
    if text.split() == chosen.split():
        return None, "same as chosen"
    return text, "ok"


def chosen_rows(
    data_set: SampleSet, cfg: "DropoutConfig", counts: Counter
) -> Iterator[tuple[str, dict, tuple[str, str, str]]]:
    """(rid, row, its continuation_prefix) of the responses to continue; each response once."""
    seen = set()
    for path in data_set.files:
        for number, _, row in read_part(path):
            where = f"{path} line {number}"
            text = row.get("response", row.get("chosen"))
            if not isinstance(text, str) or not isinstance(row.get("question"), str):
                raise InputError(f"{where}: no text 'response' (or 'chosen') and 'question'")
            if (version := row.get("prompt_version", "none")) != "none":
                raise InputError(
                    f"{where}: prompt_version {version!r}, but DropoutNTP continues answers to "
                    "plain questions: run `pairs.py sample --prompts none`"
                )
            images = image_list(row, where)
            rid = digest(images, row["question"], row.get("qid"), row.get("k"), text)
            if rid in seen:
                continue
            if cfg.max_responses and len(seen) == cfg.max_responses:
                counts["beyond max_responses"] += 1
                continue
            seen.add(rid)
            prefix = continuation_prefix(text, cfg.keep_ratio)
            if not images:
                counts["without an image"] += 1
            elif not prefix[0] and cfg.keep_ratio > 0:
                counts["empty kept part"] += 1
            else:
                yield rid, row | {"response": text}, prefix


def continuation_state(folder: Path) -> dict[str, tuple[int, bool]]:
    """rid -> (draws so far, one of them is usable)."""
    state: dict[str, tuple[int, bool]] = {}
    for path in part_files(folder):
        for _, _, record in read_part(path):
            draws, usable = state.get(record["rid"], (0, False))
            usable |= record["reason"] == "ok"
            state[record["rid"]] = (max(draws, record["draw"] + 1), usable)
    return state


def continue_responses(cfg: DropoutConfig, data_set: SampleSet, folder: Path) -> int:
    """Draw this process's continuations; the number that other processes still owe."""
    rank, world = rank_and_world()
    state = continuation_state(folder)
    root = Path(cfg.root or data_set.info.get("root", ""))
    generator = log = None

    def pending(draw: int) -> Iterator[tuple[str, dict, tuple[str, str, str]]]:
        for rid, row, prefix in chosen_rows(data_set, cfg, Counter()):
            if int(rid, 16) % world == rank and state.get(rid, (0, False)) == (draw, False):
                yield rid, row, prefix

    def request(rid: str, row: dict, prefix: tuple[str, str, str], draw: int) -> tuple:
        fields = {"id": f"{rid} keep {cfg.keep_ratio}", "samples": (draw,), "prefix": prefix[2]}
        prompt = make_prompt(question=without_image(row["question"]), **fields)
        return prompt, 1, (rid, row, prefix)

    def finish(context: tuple[str, dict, tuple[str, str, str]], s: Any) -> dict:
        rid, row, (kept, glue, prefix) = context
        rejected, reason = rejected_text(row["response"], prefix, s.text)
        state[rid] = (s.sample + 1, reason == "ok")
        names = ("image", "question", "qid", "k", "finish_reason", "tokens", "prompt_tokens")
        source = {n: row[n] for n in (*names, "image_tokens") if n in row}
        record = {"rid": rid, "draw": s.sample, "reason": reason, "source": source}
        record |= {"chosen": row["response"], "rejected": rejected}
        return record | {"kept": len(kept), "glue": glue} | sample_fields(s)

    for draw in range(MAX_DRAWS):
        if not (total := sum(1 for _ in pending(draw))):
            continue
        if log is None:
            for _, row, _ in pending(draw):  # before the model is loaded
                image_paths(root, image_list(row, data_set.name), data_set.name)
            generator, log = load_generator(cfg), open_part(folder, rank, world)
        requests = (request(*item, draw) for item in pending(draw))
        label = data_set.name + (f" redraw {draw}" if draw else "")
        generate_into(log, generator, requests, finish, total, label)
    if log is not None:
        log.close()
    state = continuation_state(folder)  # with what others have written meanwhile
    rows = chosen_rows(data_set, cfg, Counter())
    states = (state.get(rid, (0, False)) for rid, _, _ in rows)
    return sum(1 for draws, usable in states if not usable and draws < MAX_DRAWS)


def pair_continuations(
    cfg: DropoutConfig, data_set: SampleSet, folder: Path, stem: str
) -> tuple[dict, dict | None]:
    """Pairs from complete continuations; report and entry for meta.json."""
    counts, cost = Counter(), Counter()
    responses = sum(1 for _ in chosen_rows(data_set, cfg, counts))
    with WholeFile(cfg.out_dir / "annotations" / f"{stem}.jsonl") as file:
        for _, rows in grouped(part_files(folder), cfg.out_dir, lambda r, _: r["rid"]):
            draws = {row["draw"]: row for row in rows}
            spend(cost, source := rows[0]["source"])
            for row in draws.values():
                counts[f"continuations: {row['reason']}"] += 1
                spend(cost, {**row, "k": row["draw"]})
            row = next((r for _, r in sorted(draws.items()) if r["reason"] == "ok"), None)
            if row is None:
                counts["dropped after redraws"] += 1
                continue
            counts["cut off"] += row["finish_reason"] == "length"
            record = {n: source[n] for n in ("image", "question")}
            record |= {n: row[n] for n in ("chosen", "rejected")}
            names = ("qid", "k", "finish_reason", "tokens")
            record["chosen_meta"] = {n: source[n] for n in names if n in source}
            names = ("kept", "glue", "draw", "finish_reason", "tokens")
            record["rejected_meta"] = {"keep_ratio": cfg.keep_ratio} | {n: row[n] for n in names}
            file.write(record)
    report = {"responses": responses} | report_of({"dropout_ntp": file.count}, counts, cost)
    return report, meta_entry(cfg, data_set, file) if file.count else None


def dropout_ntp(cfg: DropoutConfig) -> None:
    reports, entries = {}, {}
    for data_set in find_sets(cfg.samples):
        folder = cfg.out_dir / "continuations" / f"{data_set.name}_sr{cfg.keep_ratio}"
        settings = {"name": data_set.name, "keep_ratio": cfg.keep_ratio}
        claim_folder(folder, text_settings(cfg) | settings, {})
        if owed := continue_responses(cfg, data_set, folder):
            print(f"{data_set.name}: {owed} continuations are left to other processes")
            continue
        stem = f"{data_set.name}_prefix_pair_sr{cfg.keep_ratio}_wo_image"
        reports[data_set.name], entries[stem] = pair_continuations(cfg, data_set, folder, stem)
    finish_verb(cfg, f"dropout_ntp sr{cfg.keep_ratio}", entries, reports)


# --------------------------------------------------------------------------- divide and conquer

CHUNK = 256  # candidates that go through the steps together
CLAIMS = (
    "Split the answer into single factual claims that can each be understood alone. One claim a "
    'line, each line starting with "- ". Leave opinions out.\n\nQuestion: {question}\n'
    "Answer: {answer}"
)
AS_QUESTIONS = (
    "Turn each claim into a yes/no question. Keep negations, add nothing. One question a line, "
    'each line starting with "- ".\n\n{claims}'
)
YES_NO = "{question} Please answer yes or no."


@dataclass(frozen=True)
class DivideConfig(EngineConfig):
    """The RLAIF-V baseline, small: the same model splits answers into claims and checks them."""

    samples: Path = flag(
        Path("samples"),
        "folder of `sample --prompts none --num_samples 10 --temperature 0.7 --max_new_tokens 512`",
    )
    out_dir: Path = flag(Path("pairs"), "meta.json, annotations/ and pairs.report.json go here")
    root: str = flag("", "folder of the images, empty = as given to `sample`")
    split: Literal["model", "rule"] = flag("model", "who finds claims; rule: one a sentence")
    temperature: float = flag(0.2, "sampling temperature of claims and questions")
    max_new_tokens: int = flag(256, "longest list of claims or questions")
    pairs_per_query: int = flag(2, "pairs a question at most")


def split_sentences(text: str) -> list[str]:
    """Claims by rule: one a sentence."""
    parts = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text)
    return [part.strip(" \t-*•") for part in parts if re.search(r"\w", part)]


def bullets(text: str) -> list[str]:
    """Lines that start as list items."""
    found = re.findall(r"(?m)^[ \t]*(?:[-*•]|[0-9]{1,2}[.)])[ \t]+(\S.*)$", text)
    return [line.strip() for line in found]


def as_question(claim: str) -> str:
    """A claim as a yes/no question, by rule: negations stay, nothing is added."""
    return f'Is this statement about the picture true? "{claim}"'


def claims_score(yes_no: list[tuple[float, float]]) -> int:
    """Minus the number of claims judged no."""
    return -sum(no > yes for yes, no in yes_no)


def score_pairs(rows: list[dict], count: int, *key: Any) -> list[tuple[dict, dict]]:
    """(chosen, rejected) of candidates whose scores differ, at most `count`, texts different."""
    usable = [r for r in rows if r["score"] is not None]
    possible = [
        (a, b)
        for a in usable
        for b in usable
        if a["score"] - b["score"] >= 1 and a["response"] != b["response"]
    ]
    return choose(possible, count, *key)


def length_threshold(lengths: list[tuple[int, int]]) -> float:
    """The limit on (rejected - chosen) / rejected words that brings the mean lengths closest."""
    best, best_gap = 0.98, math.inf
    for step in range(49, -1, -1):
        limit = step * 2 / 100
        kept = [(c, r) for c, r in lengths if (r - c) / max(r, 1) <= limit]
        if kept:
            gap = abs(sum(c - r for c, r in kept)) / len(kept)
            if gap < best_gap - 1e-12:
                best, best_gap = limit, gap
    return best


def candidate_rows(data_set: SampleSet) -> Iterator[dict]:
    """The sampled responses, each with its rid."""
    for path in data_set.files:
        for number, _, row in read_part(path):
            if not isinstance(row.get("response"), str) or "qid" not in row:
                raise InputError(f"{path} line {number}: no 'response' and 'qid'; run `sample`")
            yield row | {"rid": digest(row["qid"], row["k"])}


def add_claims(rows: list[dict], generator: Any) -> None:
    """The model splits each response into claims, then turns the claims into questions."""

    def ask(step: str, text: Callable[[dict], str]) -> list[Any]:
        prompts = [make_prompt(id=f"{step} {row['rid']}", question=text(row)) for row in rows]
        found = {s.prompt_id: s for s in generator.run(prompts)}
        return [found[prompt.id] for prompt in prompts]

    def split(row: dict) -> str:
        text = CLAIMS.replace("{question}", without_image(row["question"]))
        return text.replace("{answer}", row["response"])

    def turn(row: dict) -> str:
        return AS_QUESTIONS.replace("{claims}", "\n".join(f"- {c}" for c in row["claims"]))

    for row, s in zip(rows, ask("claims", split)):
        row["claims"] = bullets(s.text) or split_sentences(row["response"])
        row["split_cost"] = [sample_fields(s)]
    for row, s in zip(rows, ask("questions", turn)):
        row["questions"] = bullets(s.text)
        row["split_cost"].append(sample_fields(s))


def judge_claims(rows: list[dict], generator: Any, root: Path, max_tiles: int) -> None:
    """Ask each claim's question with the image; compare the probabilities of yes and no."""
    prompts, owners = [], []
    for row in rows:
        row["yes_no"] = []
        images = image_list(row, row["rid"])
        paths = image_paths(root, images, row["question"][:60])
        each = max(1, max_tiles // max(1, len(images)))
        if len(row["questions"]) != len(row["claims"]):
            continue  # discarded, as in the original
        for i, question in enumerate(row["questions"]):
            text = f"{IMAGE}\n" * len(images) + YES_NO.replace("{question}", question)
            fields = {"id": f"judge {row['rid']} {i}", "images": paths, "max_tiles": each}
            prompts.append(make_prompt(question=text, **fields))
            owners.append(row)
    found = generator.first_token_probs(prompts, ["Yes", "yes", "No", "no"]) if prompts else []
    for row, p in zip(owners, found, strict=True):
        row["yes_no"].append((p["Yes"] + p["yes"], p["No"] + p["no"]))
    for row in rows:
        row["score"] = claims_score(row["yes_no"]) if row["yes_no"] else None


def check_candidates(cfg: DivideConfig, data_set: SampleSet, folder: Path) -> int:
    """Score this process's candidates, a chunk at a time; the number that others still owe."""
    rank, world = rank_and_world()
    done = {r["rid"] for path in part_files(folder) for _, _, r in read_part(path)}
    root = Path(cfg.root or data_set.info.get("root", ""))
    mine = (
        row
        for row in candidate_rows(data_set)
        if row["rid"] not in done and int(row["rid"], 16) % world == rank
    )
    generator = log = None
    while chunk := list(islice(mine, CHUNK)):
        if log is None:
            generator, log = load_generator(cfg), open_part(folder, rank, world)
        if cfg.split == "model":
            add_claims(chunk, generator)
        else:
            for row in chunk:
                row["claims"] = split_sentences(row["response"])
                row["questions"] = [as_question(claim) for claim in row["claims"]]
        judge_claims(chunk, generator, root, data_set.info.get("max_tiles", 6))
        for row in chunk:
            log.append(row)
        print(f"{data_set.name}: {len(chunk)} more candidates scored", file=sys.stderr)
    if log is not None:
        log.close()
    done = {r["rid"] for path in part_files(folder) for _, _, r in read_part(path)}
    return sum(row["rid"] not in done for row in candidate_rows(data_set))


def divide_and_conquer(cfg: DivideConfig) -> None:
    reports, entries = {}, {}
    for data_set in find_sets(cfg.samples):
        folder = cfg.out_dir / "divide" / data_set.name
        settings = text_settings(cfg) | {"name": data_set.name, "split": cfg.split}
        claim_folder(folder, settings, {})
        if owed := check_candidates(cfg, data_set, folder):
            print(f"{data_set.name}: {owed} candidates are left to other processes")
            continue
        stem = f"{data_set.name}_pairs_divide_and_conquer"
        reports[data_set.name], entries[stem] = pair_candidates(cfg, data_set, folder, stem)
    finish_verb(cfg, "divide_and_conquer", entries, reports)


def pair_candidates(
    cfg: DivideConfig, data_set: SampleSet, folder: Path, stem: str
) -> tuple[dict, dict | None]:
    """Pairs by score, then without those that would teach length; report and meta entry."""
    counts, cost, drawn = Counter(), Counter(), []
    by_question = grouped(part_files(folder), cfg.out_dir, lambda r, _: digest(r["qid"]))
    for key, rows in by_question:
        rows, _ = drop_repeats(rows, data_set.name)
        for row in rows:
            for spent in (row, *row.get("split_cost", ())):
                spend(cost, spent)
            cost["generated"] += len(row["yes_no"])
            counts["candidates"] += 1
            counts["claims and questions do not match"] += row["score"] is None
        drawn += score_pairs(rows, cfg.pairs_per_query, cfg.seed, key)
    lengths = [(len(c["response"].split()), len(r["response"].split())) for c, r in drawn]
    limit = length_threshold(lengths)
    counts["pairs before the length limit"] = len(drawn)
    with WholeFile(cfg.out_dir / "annotations" / f"{stem}.jsonl") as file:
        for (chosen, rejected), (c, r) in zip(drawn, lengths):
            if (r - c) / max(r, 1) > limit:
                continue
            record = {n: chosen[n] for n in ("image", "question") if chosen.get(n)}
            record |= {"chosen": chosen["response"], "rejected": rejected["response"]}
            names = ("qid", "k", "finish_reason", "score", "claims", "yes_no")
            for side, row in (("chosen_meta", chosen), ("rejected_meta", rejected)):
                record[side] = {n: row[n] for n in names if n in row}
            file.write(record)
    report = {"responses": counts["candidates"], "length_limit": limit}
    report |= report_of({"divide_and_conquer": file.count}, counts, cost)
    return report, meta_entry(cfg, data_set, file) if file.count else None


COMMANDS = {
    "sample": SampleConfig,
    "correctness": CorrectnessConfig,
    "dropout_ntp": DropoutConfig,
    "divide_and_conquer": DivideConfig,
}


def main() -> None:
    verb, cfg = parse_command(COMMANDS)
    verbs = (sample, correctness, dropout_ntp, divide_and_conquer)
    {f.__name__: f for f in verbs}[verb](cfg)


if __name__ == "__main__":
    run(main)
