"""Benchmarks of the MPO paper: Direct, chain of thought, and the difference; scored as published.

    python eval.py generate --bench pope --data D --model_dir M [--cot]   raw replies, resumable
    python eval.py judge    --bench mmvet --data D --answers A --out R    requests for any judge
    python eval.py score    --bench pope --data D --answers A --out R     R/score.json; no torch
    python eval.py report   R...                          the paper's Tables 2, 3, 4 beside ours

Four verbs over a table of benchmarks.  Each file of benchmarks/ says how its official files are
read, what is asked, how a reply is read and what is averaged, and whose rule it follows.  Replies
of any model in the official output formats can be scored.

`generate` keeps the raw reply: reading it is a matter of scoring.  A score names its n, standard
error, split, setting, extraction, judge and prompts; without all judgements it is "incomplete".
"""

import base64
import binascii
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import runtime
from benchmarks import (
    crpe,
    files,
    llava_bench,
    m3cot,
    mathvision,
    mathvista,
    mmhal,
    mmvet,
    object_halbench,
    own_rules,
    pope,
    tables,
)
from benchmarks.common import FINAL, PROMPTS_VERSION, Benchmark, Item, Readings, Replied, Reply
from benchmarks.tables import SETTINGS
from runtime import InputError, flag, write_atomic, write_json, write_jsonl

TABLE = (
    m3cot.BENCHMARK, mathvista.BENCHMARK, mathvision.BENCHMARK, mathvision.MINI, pope.BENCHMARK,
    crpe.BENCHMARK, mmvet.BENCHMARK, llava_bench.BENCHMARK, mmhal.BENCHMARK,
    object_halbench.BENCHMARK, own_rules.TEXT_MC, own_rules.TEXT_EM, own_rules.OWN, own_rules.GSM8K,
)  # fmt: skip
BENCHMARKS = {b.name: b for b in TABLE}
TEMPLATES = Path(__file__).parent / "benchmarks/templates"


@dataclass(frozen=True)
class Ask:
    """Shared flags of the verbs that read a benchmark."""

    bench: Literal[tuple(BENCHMARKS)] = flag("", "which benchmark")
    data: tuple[Path, ...] = flag((), "its official question file, or the folder with it")
    ids: Path | None = flag(None, "file with the ids of a subset [all]")
    cot: bool = flag(False, "chain of thought; else Direct")

    def __post_init__(self) -> None:
        if self.bench not in BENCHMARKS:
            raise ValueError(f"--bench is needed: one of {', '.join(BENCHMARKS)}")
        if self.cot and not self.benchmark.cot_tokens:
            raise ValueError(f"{self.bench} has no chain-of-thought setting")

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.bench]

    def items(self) -> list[Item]:
        return files.load_items(self.benchmark, self.data, self.ids)


# --------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class Generate(Ask):
    """Answer a benchmark's questions greedily; run it again to go on where it stopped."""

    model_dir: Path | None = flag(None, "folder with config.json and weights")
    images: Path | None = flag(None, "folder that image paths start from [the data's]")
    out: Path | None = flag(None, "folder for replies [results/MODEL-WEIGHTS/BENCH-SETTING]")
    max_tiles: int = flag(6, "tiles per image without the thumbnail", 1, 128)
    max_new_tokens: int = flag(0, "longest reply; 0 = the benchmark's own", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data or self.model_dir is None:
            raise ValueError("--data and --model_dir are needed")
        if self.images and not self.benchmark.image:
            raise ValueError(f"{self.bench} shows no image: --images does nothing")


def generate(cfg: Generate) -> Path:
    """The verb: replies to `out`/answers.jsonl, the same file from any number of processes."""
    bench, (rank, world) = cfg.benchmark, runtime.rank_and_world()
    items = [item for item in cfg.items() if not item.get("_left_out")]
    model, weights = cfg.model_dir.resolve().name, weights_of(cfg.model_dir)
    out = cfg.out or Path(f"results/{model}-{weights[:8]}/{bench.name}-{SETTINGS[cfg.cot].lower()}")
    images = image_paths(bench, items, cfg.images, out)
    tokens = cfg.max_new_tokens or (bench.cot_tokens if cfg.cot else bench.new_tokens)
    shown = sorted([item["id"], runtime.fingerprint(paths)] for item, paths in zip(items, images))
    made_by = RunFile(
        bench.name, SETTINGS[cfg.cot], PROMPTS_VERSION, model, weights, cfg.max_tiles, tokens,
        asked(bench, items, cfg.cot), digest(shown),
    )  # fmt: skip
    runtime.claim(out, vars(made_by), "use another --out")
    # each process of one start has its own lock
    with runtime.alone_in(out, 0, "use another --out", name=f".lock-{rank}"):
        done = answered(out)
        left = [k for k in range(rank, len(items), world) if items[k]["id"] not in done]
        if left:
            from generate import Generator, Prompt  # noqa: PLC0415  (scoring needs neither)

            log = runtime.AppendLog(out / f"answers.{rank}-of-{world}.jsonl")
            asking = ((items[k]["id"], bench.ask(items[k], cfg.cot), images[k]) for k in left)
            prompts = (Prompt(*asked, max_tiles=cfg.max_tiles) for asked in asking)
            settings = {"temperature": 0.0, "max_new_tokens": tokens, "marks": False}
            samples = Generator.load(cfg.model_dir, **settings).run(prompts)
            for s in runtime.bar(samples, total=len(left), desc=bench.name):
                row = {"id": s.prompt_id, "response": s.text.strip()}
                log.append(row | {"finish_reason": s.finish_reason, "num_tokens": s.num_tokens})
            log.close()

    done = answered(out)
    replies = [done[item["id"]] for item in items if item["id"] in done]
    print(f"{out}: {len(replies)} of {len(items)} {made_by.setting} replies", file=sys.stderr)
    if len(replies) == len(items):  # the process that completes the set writes the file
        write_jsonl(out / "answers.jsonl", replies)
    return out


def asked(bench: Benchmark, items: list[Item], cot: bool) -> str:
    """A hash of what is asked, in any order, about which pictures: by name, or as base64."""
    images = [str(item.get("image") or "") for item in items]
    names = [image if len(image) > 1000 else Path(image).name for image in images]
    return digest(sorted([i["id"], bench.ask(i, cot), name] for i, name in zip(items, names)))


def digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def weights_of(model_dir: Path) -> str:
    """The fingerprint of everything in a model's folder that its answers depend on."""
    if not (model_dir / "config.json").is_file():
        raise InputError(f"no config.json in {model_dir}: --model_dir names a model's folder")
    kinds = (".json", ".safetensors", ".model", ".txt")
    return runtime.fingerprint(path for path in model_dir.iterdir() if path.suffix in kinds)


def image_paths(
    bench: Benchmark, items: list[Item], root: Path | None, out: Path
) -> list[tuple[Path, ...]]:
    """The picture of each item, or none; one error names all that are missing or forbidden."""
    if not bench.image:
        if shown := [item["id"] for item in items if item.get("image")]:
            problem = f"{bench.name} shows no image, but items have one"
            raise InputError(f"{problem}: {files.listed(shown)}; --bench own asks about images")
        return [()] * len(items)
    paths, bad = [], []
    for item in items:
        name, folder = item.get("image"), root or item["_file"].parent
        top = folder.resolve()
        if not isinstance(name, str) or not name:
            bad.append(f"{item['id']}: no image named")
        elif len(name) > 1000:  # MMHal's and RLAIF-V's files hold the picture itself, as base64
            paths.append((unpacked(item["id"], name, out),))
        elif (path := folder / name).exists() and not path.resolve().is_relative_to(top):
            bad.append(f"{item['id']}: image {name!r} leaves {folder}")
        elif not path.is_file():
            bad.append(f"{item['id']}: no {path}")
        else:
            paths.append((path,))
    if bad:
        head = f"{len(bad)} of {len(items)} images cannot be used; --images names their folder"
        raise InputError(f"{head}: {'; '.join(bad)}")
    return paths


def unpacked(name: str, text: str, out: Path) -> Path:
    """The picture that a file holds as base64, written to out/images; `name` is for errors."""
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise InputError(f"{name}: the image is neither a path nor base64 ({error})") from None
    path = out / "images" / f"{hashlib.sha256(content).hexdigest()[:24]}.jpg"
    if not path.exists():
        write_atomic(path, content)
    return path


def answered(out: Path) -> dict[str, dict]:
    """id -> reply from the part files of every process of every earlier start."""
    rows: dict[str, dict] = {}
    for path in sorted(out.glob("answers.*-of-*.jsonl")):
        for row in runtime.read_whole_lines(path, id=str, response=str):
            if rows.setdefault(row["id"], row)["response"] != row["response"]:
                raise InputError(f"{path}: a second, different reply to {row['id']!r}")
    return rows


# --------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Replies(Ask):
    """Shared flags of the verbs that read replies."""

    answers: tuple[Path, ...] = flag((), "replies: a folder of `generate`, or any official format")
    judgements: tuple[Path, ...] = flag((), "verdicts, as of `judge` or official [judge: of --out]")
    judge_name: str = flag("", "who judged, where the file does not say")
    out: Path | None = flag(None, "folder of the result [score: that of our own answers]")


@dataclass(frozen=True)
class Score(Replies):
    """Score replies to a benchmark: JSON on stdout, and score.json and items.jsonl in --out."""

    extraction: str = flag("", "how replies are read [judge if given, else by the default rule]")
    synonyms: Path | None = flag(None, "CHAIR's synonym list [synonyms.txt beside the data]")
    name: str = flag("", "the model's name in the report [of run.json, else of the file]")

    def __post_init__(self) -> None:
        super().__post_init__()
        bench = self.benchmark
        if self.extraction and self.extraction not in bench.modes:
            raise ValueError(f"no extraction {self.extraction!r}; known: {', '.join(bench.modes)}")
        if not self.answers and not (self.judgements and bench.modes == ("judge",)):
            raise ValueError("--answers is needed")
        if self.synonyms and self.bench != "object_halbench":
            raise ValueError(f"{self.bench} reads no --synonyms")
        if self.judgements and bench.judge is None:
            raise ValueError(f"{self.bench} is scored without a judge")
        if not self.data and not (self.judgements and bench.judgements_suffice):
            raise ValueError("--data is needed")

    def items(self) -> list[Item]:
        items = super().items()
        if blank := [i["id"] for i in items if i.get("golds", i.get("answer")) in ("", [])]:
            remedy = "a split whose answers are not published can be answered and judged alone"
            raise InputError(f"no gold answer to {files.listed(blank)}: {remedy}")
        given = {"synonyms": self.synonyms} if self.synonyms else {}
        return [item | given for item in items]


@dataclass(frozen=True)
class RunFile:
    """How answers were made: what `generate` says in its folder's run.json."""

    benchmark: str
    setting: Literal[SETTINGS]
    prompts: str
    model: str
    weights: str | None = None
    max_tiles: int | None = None
    max_new_tokens: int | None = None
    questions: str | None = None  # of what `asked` is the hash
    images: str | None = None  # of each item the content


def read_runs(cfg: Replies) -> tuple[RunFile, dict[Path, RunFile]]:
    """How the answers were made, and what each folder of ours says of its own."""
    folders, runs = {path if path.is_dir() else path.parent for path in cfg.answers}, {}
    for folder in sorted(folders):
        if (path := folder / "run.json").is_file():
            runs[folder] = runtime.from_json(RunFile, runtime.read_json(path), path)
    if not runs:
        model = (cfg.answers or cfg.judgements)[0].stem
        return RunFile(cfg.bench, SETTINGS[cfg.cot], "not ours", model), {}
    made_by, *others = {replace(run, questions=None, images=None) for run in runs.values()}
    if others or len(runs) < len(folders):
        alike = "model, benchmark and setting, tiles and new tokens"
        raise InputError(f"--answers: not all are of one {alike}, by the run.json beside them")
    if made_by.benchmark != cfg.bench:
        raise InputError(f"these answers are to {made_by.benchmark}, not to {cfg.bench}")
    if cfg.cot and made_by.setting != "CoT":
        raise InputError("--cot, but run.json beside the answers says Direct")
    return made_by, runs


def score(cfg: Score) -> dict:
    """The verb: what score.json holds."""
    bench, (made_by, runs) = cfg.benchmark, read_runs(cfg)
    replied = load(cfg, made_by, runs)
    items, cot = [item for item, _ in replied], made_by.setting == "CoT"
    judged = [reply for _, reply in replied if reply.judgement is not None]
    mode = cfg.extraction or (bench.judge.mode if judged or cfg.judgements else bench.modes[0])
    readings, missing = read_all(bench, replied, mode)
    no_score = {"score": None, "standard_error": None}
    total = bench.total(readings) if readings else no_score | {"n": 0}
    partial = {"score": total["score"], "n": total["n"]}
    seen = [reply for _, reply in replied] if cfg.answers else []
    used = judged if bench.is_judged(mode) else []
    others = [m for m in bench.modes if m != mode and not bench.is_judged(m)]
    n, expected = len(items), bench.n_expected
    part = f" ({n} of {expected} items)" * (expected not in (0, n)) + " by --ids" * bool(cfg.ids)
    absent = sorted({*bench.mean_of} - {item.get("category") for item in items})
    result = {
        "benchmark": bench.name,
        "model": cfg.name or made_by.model,
        "setting": made_by.setting,
        "status": "incomplete" if missing else "complete",
        **(total | no_score | {"partial": partial} if missing else total),
        "metric": bench.metric,
        "n_expected": expected or None,
        "split": bench.split + part,
        "extraction": mode,
        "other_extractions": {
            other: bench.total(read_all(bench, replied, other)[0])["score"] for other in others
        },
        "judge": ", ".join(sorted({reply.judge for reply in used})) or None,
        "judge_date": max((reply.judge_date for reply in used), default="") or None,
        "prompts": made_by.prompts,
        "weights": made_by.weights,
        "unparsed": sum(not reading.parsed for _, reading in readings),
        "empty_replies": sum(not reply.text.strip() for reply in seen),
        "without_final_answer": sum(not FINAL.search(r.text) for r in seen) if cot else None,
        "cut_off": sum(reply.cut_off for reply in seen),
        "missing_judgements": missing,
        "notes": bench.notes(items, mode, cot) + [f"without {', '.join(absent)}"] * bool(absent),
    }
    if out := cfg.out or (min(runs) if len(runs) == 1 else None):
        if len(items) < len(runtime.read_whole_lines(out / "items.jsonl")):
            raise InputError(f"{out} holds a score of more items; use another --out")
        write_jsonl(out / "items.jsonl", ({"id": i["id"], **vars(read)} for i, read in readings))
        write_json(out / "score.json", result)
    return result


def load(cfg: Replies, made_by: RunFile, runs: dict[Path, RunFile]) -> Replied:
    """Each item with what was replied to it, and what a judge said of that."""
    bench, cot = cfg.benchmark, made_by.setting == "CoT"
    if cfg.data:
        items = cfg.items()
    else:
        rows = [row for path in cfg.judgements for row in files.read_rows(path)]
        items = [{"id": str(files.raw_id(bench, r)), "category": r.get("category")} for r in rows]
    replies = files.load_replies(bench, items, cfg.answers)
    check_asked(cfg, runs, items, replies)
    said = files.load_judgements(bench, items, replies, cfg.judgements, cfg.judge_name)
    replied = []
    for item in items:
        if not item.get("_left_out"):
            row = replies.get(item["id"], {"reply": ""})
            cut_off = row.get("finish_reason") == "length"
            replied.append((item, Reply(row["reply"], cot, cut_off, **said.get(item["id"], {}))))
    check_judged(cfg, replied)
    return replied


def check_asked(cfg: Replies, runs: dict[Path, RunFile], items: list[Item], replies: dict) -> None:
    """InputError where replies of our own are to other questions."""
    for folder, run in runs.items() if cfg.data else ():
        own = {id for id, row in replies.items() if row["_file"].parent == folder}
        known = asked(cfg.benchmark, [i for i in items if i["id"] in own], run.setting == "CoT")
        if run.questions not in (None, known) and run.prompts == PROMPTS_VERSION:
            raise InputError(f"--data: run.json in {folder} says that other ones were asked")


def check_judged(cfg: Replies, replied: Replied) -> None:
    """InputError where judgements are, by the requests.jsonl beside them, about other replies."""
    about = {item["id"]: about_what(cfg.benchmark, item, reply) for item, reply in replied}
    for path, row in requests_for(cfg.judgements) if cfg.data and cfg.answers else ():
        if "about" in row and about.get(row["id"], row["about"]) != row["about"]:
            problem = f"{row['id']!r} had another reply or question when judgements were asked"
            raise InputError(f"{path}: {problem}; use another --out")


def requests_for(judgements: Iterable[Path]) -> list[tuple[Path, dict]]:
    """(file, request) of each requests.jsonl beside files of judgements."""
    paths = [path.with_name("requests.jsonl") for path in judgements]
    return [(p, r) for p in paths for r in runtime.read_whole_lines(p, id=str, messages=list)]


def about_what(bench: Benchmark, item: Item, reply: Reply) -> str:
    """A hash of an item's official fields and of the reply: what a judgement is about."""
    names = "|".join(bench.fields).split("|")
    return digest([reply.text, *map(item.get, names)])


def read_all(bench: Benchmark, replied: Replied, mode: str) -> tuple[Readings, list[str]]:
    """(items with their readings, ids that lack a judgement)."""
    readings, missing = [], []
    for item, reply in replied:
        unread = reply.judgement is None and bench.is_judged(mode)
        if unread and not bench.judge.settled(item, reply.text):
            missing.append(item["id"])
        else:
            readings.append((item, bench.read(item, reply, mode)))
    return readings, missing


# --------------------------------------------------------------------------- judge


@dataclass(frozen=True)
class Judge(Replies):
    """Write requests.jsonl for any judge; with judgements there, check and count them."""

    judge_template: Path | None = flag(None, "the official template [ours, in other words]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.benchmark.judge is None:
            raise ValueError(f"{self.bench} needs no judge")
        if not self.data or not self.answers or not self.out:
            raise ValueError("--data, --answers and --out are needed")


def judge(cfg: Judge) -> list[str]:
    """The verb: ids still without a judgement."""
    cfg = replace(cfg, judgements=cfg.judgements or tuple(cfg.out.glob("judgements.jsonl")))
    bench, replied = cfg.benchmark, load(cfg, *read_runs(cfg))
    with runtime.named(path := cfg.judge_template or TEMPLATES / f"{bench.name}.txt"):
        template = path.read_text("utf-8-sig")
    requests = [
        {"id": item["id"], "benchmark": bench.name,
         "messages": bench.judge.messages(item, reply, template),
         "max_tokens": bench.judge.max_tokens, "temperature": bench.judge.temperature,
         "template": cfg.judge_template.name if cfg.judge_template else "ours",
         "about": about_what(bench, item, reply)}
        for item, reply in replied
        if not bench.judge.settled(item, reply.text)
    ]  # fmt: skip
    known = {row["id"]: row for _, row in requests_for(cfg.judgements)}  # they stay as they are
    kept = [known.get(request["id"], request) for request in requests]
    if cfg.judge_template and [r["messages"] for r in kept] != [r["messages"] for r in requests]:
        raise InputError("--judge_template: judgements are by another one; use another --out")
    write_jsonl(cfg.out / "requests.jsonl", kept)
    _, left = read_all(bench, replied, bench.judge.mode)  # a judgement out of range ends here
    names = f": {files.listed(left)}" if left else ""
    counts = f"{len(requests)} requests, {len(left)} not judged yet{names}"
    print(f"{cfg.out / 'requests.jsonl'}: {counts}", file=sys.stderr)
    return left


# --------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Report:
    """Tables 2, 3 and 4 of the paper beside our scores: `report DIR... [--out DIR]`."""

    dir: tuple[Path, ...] = flag((), "folder with a score.json")
    out: Path = flag(Path("report"), "folder for report.txt and report.json")
    FIRST = "dir"  # may stand without its flag

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("name the folders with score.json: report DIR...")


def report(cfg: Report) -> str:
    """The verb: report.txt and report.json in `out`; returns the text."""
    scores = tables.load_scores(cfg.dir)
    text = tables.report_text(scores)
    write_atomic(cfg.out / "report.txt", text)
    write_json(cfg.out / "report.json", tables.report_json(scores))
    return text


def main(argv: list[str] | None = None) -> None:
    verb, cfg = runtime.parse_command(
        {"generate": Generate, "score": Score, "judge": Judge, "report": Report}, argv
    )
    result = {"generate": generate, "score": score, "judge": judge, "report": report}[verb](cfg)
    if verb == "score":
        print(json.dumps(result, indent=1))
        print(tables.footnote(result), file=sys.stderr)
    elif verb == "report":
        print(result, end="")


if __name__ == "__main__":
    runtime.run(main)
