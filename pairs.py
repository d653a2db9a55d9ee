r"""The preference data engine: pairs without annotators (section 3 of arXiv 2411.10442).

    python pairs.py sample --model_dir M --questions q.jsonl --root images --out_dir samples
    python pairs.py correctness --samples samples --out_dir pairs     right against wrong answers
    python pairs.py dropout_ntp --samples samples --out_dir pairs --model_dir M     blind endings

`torchrun --nproc_per_node 8 pairs.py sample ...` shares the questions among processes.  A response
is a function of (seed, question, number) alone and every process appends to its own part file, so a
run may stop anywhere and go on with any number of processes; verbs that only judge and pair are
pure functions of the part files and write the same bytes again.  Output: jsonl files and the
meta.json that train.py reads, with all counts in pairs.report.json.  `tools/look.py` shows the
pairs and sets their numbers beside the paper's; `tools/rlaifv.py` makes the paper's baseline.

Differs from the official reasoning_data_pipeline: gold answers are never written into responses,
equal responses are dropped before the cap, 15 pairs a question over both kinds (--official_caps:
of each kind), groups are keyed by JSON values and not by printed forms, no bare except.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import runtime
from runtime import EngineConfig, InputError, claim, flag, from_json, read_json, read_jsonl

DOMAINS = {  # domain -> (prompt versions, tiles at most); the paper leaves the tiles of two open
    "general": (("en", "en_ground"), 6),
    "science": (("en", "en_bg"), 6),
    "chart": (("en", "en_vis"), 12),
    "math": (("en",), 6),
    "ocr": (("en", "en_vis"), 12),
    "document": (("en", "en_vis"), 12),
}


@dataclass(frozen=True)
class SampleConfig(EngineConfig):
    """Sample responses to questions, resumable, over any number of processes."""

    questions: Path = flag(Path("questions.jsonl"), 'jsonl of {"image", "question", "answer"}')
    root: Path = flag(Path("."), "folder of the images")
    domain: Literal[tuple(DOMAINS)] = flag("science", "decides the default prompts and tile limit")
    prompts: str = flag("", "prompt versions with commas, empty = by domain; none = as it is")
    num_samples: int = flag(32, "responses a question, shared among the prompt versions", 1, 1e5)
    max_tiles: int = flag(0, "tiles an image at most, 0 = by domain", 0, 128)
    max_questions: int = flag(0, "at most so many, chosen evenly; 0 = all (the authors: 20,000)", 0)
    modes: str = flag("", "answers.MODES to judge with, with commas; empty = by name")
    out_dir: Path = flag(Path("samples"), "responses go to out_dir/<name>/part-<r>-of-<R>.jsonl")
    name: str = flag("", "name of the data set, empty = name of the question file")


@dataclass(frozen=True)
class CorrectnessConfig:
    """Pair responses with right answers against wrong ones and format failures."""

    samples: Path = flag(Path("samples"), "folder of `sample`, or a jsonl file of responses")
    out_dir: Path = flag(Path("pairs"), "meta.json, annotations/ and pairs.report.json go here")
    root: Path | None = flag(None, "folder of the images, empty = as given to `sample`")
    modes: str = flag("", "answers.MODES; empty = as given to `sample`, else by name")
    pairs_per_query: int = flag(15, "pairs a question at most, of all kinds and prompt versions", 1)
    official_caps: bool = flag(False, "the cap for each kind")
    gold_rationales: Literal["off", "unsolved", "all"] = flag("off", "pair gold rationales, too")
    clean: bool = flag(True, "drop markdown marks around the answer line")
    max_format_share: float = flag(0.5, "fail above this share of format failures", low=0)
    workers: int = flag(0, "processes that judge, 0 = one a core; the output is the same", low=0)
    seed: int = flag(0, "decides which pairs the cap keeps")


@dataclass(frozen=True)
class DropoutConfig(EngineConfig):
    """DropoutNTP: keep the start of a response, continue it without the image.

    Responses with a chain of thought serve as well: after an opening that says what the picture
    shows, a blind continuation makes up more (section 4.2 of the paper).
    """

    samples: Path = flag(Path("samples"), "folder of `sample`, best with --prompts none")
    out_dir: Path = flag(Path("pairs"), "meta.json, annotations/ and pairs.report.json go here")
    root: Path | None = flag(None, "folder of the images, empty = as given to `sample`")
    keep_ratio: float = flag(0.5, "share of the response kept (paper: 0.25, 0.5, 0.75)", 0, 0.99)
    max_new_tokens: int = flag(2048, "longest continuation", low=1)
    max_responses: int = flag(500_000, "responses of a data set at most, 0 = all", low=0)


VERBS = {"sample": SampleConfig, "correctness": CorrectnessConfig, "dropout_ntp": DropoutConfig}

if __name__ == "__main__":
    runtime.parse_command(VERBS)  # --help and wrong flags need no torch, which takes seconds

from benchmarks import answers
from data import seeded
from generate import Generator, Prompt, Sample
from images import checked_images, image_names
from records import Line, grouped, in_order, part_files, read_parts
from tokenizer import IMAGE, with_image_placeholders
from weights import FLOATS, weight_files

NOT_SETTINGS = "out_dir samples model_dir cache_tokens workers".split()  # move no text
Group = tuple[str, list[Line]]  # a key and the lines of its records
Tally = dict[str, Counter]  # "counts", tokens as "cost", lines "written" by kind, "pairs_per_query"


def digest(*key: Any) -> str:
    """A hexadecimal hash of JSON values: the same in every process and version."""
    content = json.dumps(key, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


digest_again = functools.lru_cache(maxsize=64)(digest)  # the rows of a question stand together


def choose(items: list, count: int, *key: Any) -> list:
    """`count` items without replacement, uniform, in order; a function of `key` alone."""
    kept = seeded(*key).permutation(len(items))[:count]
    return [items[i] for i in sorted(kept.tolist())]


# --------------------------------------------------------------------------- questions and files


@dataclass(frozen=True, kw_only=True)
class QuestionLine:
    """The keys of a question that are read, by `from_json`, beside its images and gold answer."""

    question: str
    rationale: str | None = None
    system_prompt: str | None = None


def wrap_question(question: str, num_images: int, version: str) -> str:
    """The full prompt: instruction around the question, one placeholder an image."""
    if num_images == 1 and question.count(IMAGE) == 1:  # moved to the front
        question = question.replace(IMAGE + "\n", "").replace(IMAGE, "").strip()
    text = question if version == "none" else answers.strip_instruction(question)
    # plain replacement: questions contain braces
    prompt = answers.PROMPTS[version].replace("{question}", text)
    return with_image_placeholders(prompt, num_images)


def read_questions(
    path: Path, name: str, versions: list[str], max_tiles: int, seed: int = 0, limit: int = 0
) -> list[tuple[str, dict]]:
    """The file's line, for errors, and the fields of each question under each prompt version."""
    answers.check_known("prompt_version", versions, answers.PROMPTS)
    records = list(read_jsonl(path)) if path.is_file() else []
    if not records:
        raise InputError(f"no questions in {path}; expected one JSON object a line")
    if limit:  # an even choice, whatever the order of the file
        records, total = choose(records, limit, "choose", seed), len(records)
        print(f"{path}: kept {len(records)} of {total} questions", file=sys.stderr)
    questions, sources = [], {}  # sources: qid -> its line
    for source, record in records:
        question, gold = from_json(QuestionLine, record, source).question, record.get("answer")
        images = image_names(record, source)
        with runtime.named(source):
            if record.get("choices") or record.get("options"):  # the model would not see them
                raise InputError("choices or options of their own: write them into 'question'")
            f"{gold}{record.get('rationale')}".encode()  # fails at half a character
            if not answers.strip_instruction(without_image(question)):
                raise InputError("no 'question'")
            if gold is not None or versions != ["none"]:
                answers.check_gold(gold)
            prompts = [wrap_question(question, len(images), version) for version in versions]
        kept = picked(record, "image rationale answer system_prompt")
        # a number and its digits are the same answer
        identity = images, question, None if gold is None else str(gold)
        for version, prompt in zip(versions, prompts):
            qid = digest(name, *identity, version, max_tiles, *system_of(record))
            if (first := sources.setdefault(qid, source)) != source:
                raise InputError(f"{source}: the same question as {first}")
            fields = {"qid": qid, **kept, "question": prompt, "question_orig": question}
            questions.append((source, fields | {"prompt_version": version}))
    return questions


@dataclass(frozen=True, kw_only=True)
class SampledLine(QuestionLine):
    """The keys of a line of sampled responses, likewise."""

    response: str
    question_orig: str | None = None
    prompt_version: Literal[tuple(answers.PROMPTS)] = "none"
    qid: str = ""
    k: int = 0
    finish_reason: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    image_keys: list[str] | None = None


def system_of(record: dict) -> list[str]:
    """The system message of a record as a part of keys, which stay as they are without one."""
    return [] if record.get("system_prompt") is None else [record["system_prompt"]]


def split_names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@contextlib.contextmanager
def open_part(folder: Path) -> Iterator[runtime.AppendLog]:
    """This process's own part file, to append to; a second start at the same time is refused."""
    rank, world = runtime.rank_and_world()
    with runtime.alone_in(folder, 0, "use another --out_dir", name=f".lock-{rank}"):
        log = runtime.AppendLog(folder / f"part-{rank}-of-{world}.jsonl")
        yield log
        log.close()


def is_mine(key: str) -> bool:
    """Whether this process does the work named by a hexadecimal key."""
    rank, world = runtime.rank_and_world()
    return int(key, 16) % world == rank


def checked_rid(types: dict[str, Any], record: dict, name: object) -> str:
    """The key of a line that a model's verb wrote, whose fields have these types."""
    for key, hint in types.items():
        runtime.check_type(f"{name}: {key!r}", record.get(key, ...), hint)  # also None is a value
    return record["rid"]


def drop_repeats(lines: list[Line], number: str = "k") -> list[dict]:
    """Records in the order of (qid, `number`), each once; one with two texts is an error."""
    kept: dict[tuple, dict] = {}
    for i, line in enumerate(lines):
        row = line.record()
        rid = row.get("qid", ""), row.setdefault("k", row.get(number, i))
        if kept.setdefault(rid, row) != row:
            problem = "stands in two part files, or on two lines, with different text"
            raise InputError(f"{line}: response {rid} {problem}; give each line a 'k' or none one")
    return [kept[rid] for rid in sorted(kept)]


def picked(record: dict, names: str) -> dict:
    """Those of these fields that a record has."""
    return {name: record[name] for name in names.split() if name in record}


@dataclass(frozen=True)
class SampleInfo:
    """info.json, which `sample` writes beside the part files."""

    root: str = ""  # folder of the images, from this very folder
    modes: list[str] = field(default_factory=list)
    responses: int = 0  # when all are there
    max_tiles: int = 6


@dataclass(frozen=True)
class SampleSet:
    """The responses of one data set: a folder of part files, or a file in the official format."""

    name: str
    files: list[Path]
    info: SampleInfo = SampleInfo()

    def root(self, given: Path | None) -> Path:
        """Folder of the images."""
        if given and not given.is_dir():
            raise InputError(f"--root {given} is no folder")
        return given or (self.files[0].parent / self.info.root if self.info.root else Path.cwd())


def find_sets(path: Path) -> list[SampleSet]:
    """Data sets at `path`: one file, one folder with part files, or a folder of such folders."""
    if path.is_file():
        return [SampleSet(path.stem, [path])]
    sets = []
    for folder in [path] if part_files(path) else sorted(path.glob("*")):
        about, files = folder / "info.json", part_files(folder)
        if files:
            known = read_json(about) if about.exists() or (folder / "run.json").exists() else {}
            sets.append(SampleSet(folder.name, files, from_json(SampleInfo, known, about)))
        elif about.exists():
            print(f"{folder}: left out, without a response so far", file=sys.stderr)
    if not sets:
        raise InputError(f"no part files in {path}; run `pairs.py sample` with that --out_dir")
    return sets


# --------------------------------------------------------------------------- sampling


def text_settings(cfg: EngineConfig) -> dict:
    """What a response's text depends on, beside its prompt."""
    weights = set(weight_files(cfg.model_dir).values())
    others = (p for p in cfg.model_dir.iterdir() if p.suffix in (".json", ".model", ".txt"))
    facts = {"model": runtime.fingerprint(weights.union(others)), "dtype": cfg.dtype}
    return {k: v for k, v in (facts | cfg.settings()).items() if k not in NOT_SETTINGS}


@functools.cache
def load_generator(cfg: EngineConfig) -> Generator:
    """The model, loaded once however many data sets it works on."""
    return Generator.load(cfg.model_dir, dtype=FLOATS.get(cfg.dtype), **cfg.settings())


def generate_into(
    folder: Path, cfg: EngineConfig, prompts: list[Prompt], record_of: Callable, label: str
) -> None:
    """Append record_of(sample) and the cost of each sample of the prompts to our part file."""
    if not (total := sum(len(prompt.samples) for prompt in prompts)):
        return
    with open_part(folder) as log:
        samples = load_generator(cfg).run(prompts)
        for sample in runtime.bar(samples, total=total, desc=label, unit="response"):
            log.append(record_of(sample) | sample_cost(sample))


def sample_cost(sample: Sample) -> dict:
    """What a part file keeps of a sample beside its text."""
    cost = {"finish_reason": sample.finish_reason, "tokens": sample.num_tokens}
    return cost | {"prompt_tokens": sample.prompt_tokens, "image_tokens": sample.image_tokens}


def sample(cfg: SampleConfig) -> None:
    """The verb: draw the responses that are missing, of the questions that are this process's."""
    name = cfg.name or cfg.questions.stem
    if Path(name).name != name or name.startswith(".") or not name.strip():
        raise InputError(f"--name {name}: expected the name of one folder, without separators")
    answers.check_known("mode", split_names(cfg.modes), answers.MODES)
    default_versions, default_tiles = DOMAINS[cfg.domain]
    chinese = "_zh_" in cfg.questions.name  # the official script's rule
    versions = split_names(cfg.prompts) or (["zh"] if chinese else list(default_versions))
    tiles = cfg.max_tiles or default_tiles
    questions = read_questions(cfg.questions, name, versions, tiles, cfg.seed, cfg.max_questions)
    folder, share = cfg.out_dir / name, math.ceil(cfg.num_samples / len(versions))
    claim(folder, text_settings(cfg) | {"name": name, "max_tiles": tiles}, "use another --out_dir")
    done, pixels = set(), {}  # (qid, k); qid -> keys of the images that were shown
    for source, row in read_parts(part_files(folder)):
        line = from_json(SampledLine, row, source)
        done.add((line.qid, line.k))
        pixels[line.qid] = line.image_keys
    wanted = {(question["qid"], k) for _, question in questions for k in range(share)}
    root = os.path.relpath(cfg.root.resolve(), folder.resolve())  # where they are as they were
    if more := len(done - wanted):
        if pixels.keys() - {q for q, _ in wanted} and find_sets(folder)[0].info.root != root:
            raise InputError(f"{folder}: {more} responses have their images elsewhere; pass --name")
        print(f"{folder}: {more} responses not asked for now are paired, too", file=sys.stderr)
    if wanted <= done:
        print(f"{name}: all {len(wanted)} responses are there", file=sys.stderr)
    prompts, asked = [], {}  # asked: qid -> fields of the question
    for source, question in questions:
        qid = question["qid"]
        if is_mine(qid):
            paths = checked_images(cfg.root, question, source)
            keys = question["image_keys"] = [runtime.fingerprint([path]) for path in paths]
            if (pixels.get(qid) or keys) != keys:
                raise InputError(f"{source}: an image has changed since; use another --out_dir")
            if not (missing := tuple(k for k in range(share) if (qid, k) not in done)):
                continue
            each = max(1, tiles // max(1, len(paths)))
            settings = {"max_tiles": each, "samples": missing, "name": source}
            settings["system_prompt"] = question.get("system_prompt")
            prompts.append(Prompt(qid, question["question"], paths, **settings))
            asked[qid] = question
    info = SampleInfo(root, split_names(cfg.modes), len(wanted), tiles)
    runtime.write_json(folder / "info.json", asdict(info))

    def record_of(s: Sample) -> dict:
        drawn = {"k": s.sample, "seed": cfg.seed, "response": s.text, "tiles": tiles}
        return asked[s.prompt_id] | drawn

    generate_into(folder, cfg, prompts, record_of, name)


# --------------------------------------------------------------------------- judging and pairing


class Response(NamedTuple):
    """A judged response: what a pair takes from it."""

    question: str  # the prompt: a question may be asked under several prompt versions
    verdict: str  # correct, wrong, ambiguous (makes no pair), or format: no clear final answer
    text: str
    meta: dict


Pairs = list[tuple[Response, Response]]  # (chosen, rejected)
KINDS = {"correctness": "wrong", "format": "format"}  # kind of pair -> verdict of the rejected


def judge_group(
    rows: list[dict], modes: list[str], rationales: str = "off", clean: bool = True
) -> tuple[list[Response], Counter]:
    """The responses to one question, each text once a prompt and verdict; what was counted."""
    judged: dict[tuple[str, str, str], Response] = {}
    counts = Counter(questions=1, responses=len(rows))
    for number, row in enumerate(rows):
        text, gold = row["response"], str(row["answer"])
        version = row.get("prompt_version", SampledLine.prompt_version)
        finish = row.get("finish_reason")
        if "mc_score" in modes:
            gold = answers.with_wording(gold, row["question"])
        verdict = answers.judge(text, gold, modes, version, finish)
        counts.update((f"{verdict.label} responses", f"{verdict.label}: {verdict.reason}"))
        counts["cut off"] += finish == "length"
        if clean and verdict.answer is not None:
            text = answers.fix_answer(text)
        meta = {"k": row.get("k", number), "verdict": verdict.label, "reason": verdict.reason}
        meta |= {"answer": verdict.answer, "prompt_version": version}
        meta |= picked(row, "qid finish_reason tokens")
        key = row["question"], verdict.label, text
        if not text.strip():  # nothing to train on
            counts["empty responses"] += 1
        elif key in judged:
            counts["duplicate responses"] += 1
        else:
            judged[key] = Response(*key, meta)
    labels = {label for _, label, _ in judged}
    solved = "correct" in labels
    counts["questions all right"] += labels <= {"correct"}
    counts["questions never right"] += not solved
    wanted = rationales == "all" or (rationales == "unsolved" and not solved)
    given = filter(None, ((row.get("rationale") or "").strip() for row in rows))
    if wanted and (rationale := next(given, "")):
        text = f"{rationale}\nFinal answer: {rows[0]['answer']}"
        meta = {"k": None, "verdict": "correct", "reason": "gold rationale"}
        for question in sorted({row["question"] for row in rows}):
            judged[question, "correct", text] = Response(question, "correct", text, meta)
            counts["gold rationales"] += 1
    return list(judged.values()), counts


def possible_pairs(judged: list[Response], kind: str) -> Pairs:
    """Each right response against each one to the same prompt that the kind rejects."""
    right, bad = ([r for r in judged if r.verdict == v] for v in ("correct", KINDS[kind]))
    both = [(c, r) for c in right for r in bad if c.question == r.question]
    return [(c, r) for c, r in both if c.text.strip() != r.text.strip()]


def draw_pairs(
    judged: list[Response], key: str, seed: int, cap: int, official_caps: bool = False
) -> dict[str, Pairs]:
    """Pairs of one question: the cap holds over both kinds, wrong answers first, or for each."""
    drawn, left = {}, cap
    for kind in KINDS:
        drawn[kind] = choose(possible_pairs(judged, kind), left, kind, seed, key)
        left -= 0 if official_caps else len(drawn[kind])
    return drawn


_SHAPES: set[tuple] = set()  # prompt versions, and types of the fields, of lines that were checked


def images_of(record: dict, name: str) -> list[str]:
    """Image names of a line of samples; InputError where no pair could be made of it."""
    types = [type(record.get(key, ...)) for key in SampledLine.__dataclass_fields__]
    if (shape := (str(record.get("prompt_version")), *types)) not in _SHAPES:
        from_json(SampledLine, record, name)
        _SHAPES.add(shape)
    images = image_names(record, name)
    with runtime.named(name):
        question = with_image_placeholders(record["question"], len(images))
        text = f"{question}{record['response']}{record.get('rationale')}{record.get('answer')}"
        text.encode()  # fails at half a character
    return images


def response_key(record: dict, name: str) -> str:
    """The group of a response: (images, question before it was wrapped, gold as text)."""
    images, gold = tuple(images_of(record, name)), record.get("answer")
    with runtime.named(name):
        answers.check_gold(gold)
    question = record.get("question_orig") or record["question"]
    return digest_again(images, question, str(gold), *system_of(record))


def correctness(cfg: CorrectnessConfig) -> None:
    plans = (plan_correctness(cfg, data_set) for data_set in find_sets(cfg.samples))
    make_pairs(cfg, "correctness", plans, cfg.max_format_share)


def plan_correctness(cfg: CorrectnessConfig, data_set: SampleSet) -> "Plan":
    name = data_set.name
    modes = split_names(cfg.modes) or data_set.info.modes or answers.get_mode(name)
    answers.check_known("mode", modes, answers.MODES)
    files = {kind: f"annotations/{name}_pairs_vqa_{kind}_rules.jsonl" for kind in KINDS}
    files["all wrong"] = f"all_wrong/{name}.jsonl"
    groups = grouped(data_set.files, response_key, cfg.workers)
    lines, wanted = sum(map(len, groups.values())), data_set.info.responses
    if lines < wanted:
        print(f"{name}: {lines} of {wanted} responses so far")
    pair = functools.partial(pair_question, cfg, modes)
    return Plan(data_set, files, [*groups.items()], pair, {"modes": modes}, cfg.workers)


def pair_question(
    cfg: CorrectnessConfig, modes: list[str], group: Group, tally: Tally
) -> dict[str, list[dict]]:
    """Kind -> pairs of the responses to one question."""
    (key, lines), counts = group, tally["counts"]
    rows = drop_repeats(lines)
    spend(tally["cost"], *rows)
    judged, judged_counts = judge_group(rows, modes, cfg.gold_rationales, cfg.clean)
    drawn = draw_pairs(judged, key, cfg.seed, cfg.pairs_per_query, cfg.official_caps)
    counts += judged_counts
    counts["repeated lines"] += len(lines) - len(rows)
    counts["questions without a pair"] += not any(drawn.values())
    tally["pairs_per_query"][str(sum(map(len, drawn.values())))] += 1
    gold, made = {"answer_gt": str(rows[0]["answer"])}, {}
    for kind, pairs in drawn.items():
        sides = [(c.question, (c.text, c.meta), (r.text, r.meta)) for c, r in pairs]
        made[kind] = [pair_record(rows[0], *side, gold) for side in sides]
    if all(response.verdict != "correct" for response in judged):
        names = "qid image question question_orig answer prompt_version system_prompt"
        made["all wrong"] = [picked(rows[0], names)]
    return made


# --------------------------------------------------------------------------- output and cost


@dataclass
class Plan:
    """How the pairs of one data set are made, and what is counted meanwhile."""

    data_set: SampleSet
    files: dict[str, str]  # kind of records -> its file in out_dir; those in annotations/ are pairs
    items: list  # what is paired: groups of records, in the order of the output
    pair: Callable[[Any, Tally], dict[str, list[dict]]]  # the records of an item, by kind
    facts: dict[str, Any] = field(default_factory=dict)  # more for the report
    workers: int = 1
    tally: Tally = field(default_factory=lambda: defaultdict(Counter))

    def write(self, out_dir: Path) -> None:
        """Write the records of all items, and count them; a kind without any has no file."""
        with contextlib.ExitStack() as stack:
            paths = {kind: out_dir / name for kind, name in self.files.items()}
            for left in (x for p in paths.values() for x in p.parent.glob(f".{p.name}.*.partial")):
                left.unlink()  # by a run that was killed
            files = {k: stack.enter_context(runtime.new_file(path)) for k, path in paths.items()}
            label = self.data_set.name
            for lines, part in in_order(self.lines_of, self.items, 50, self.workers, label):
                for kind, text in lines.items():
                    files[kind].write(text)
                for name, counter in part.items():
                    self.tally[name].update(counter)
        for kind, path in paths.items():
            if not self.tally["written"][kind]:
                path.unlink()

    def lines_of(self, items: list) -> tuple[dict[str, bytes], Tally]:
        """The lines of some items, by kind, and what was counted."""
        lines, tally = defaultdict(list), defaultdict(Counter)
        for item in items:
            for kind, records in self.pair(item, tally).items():
                lines[kind] += map(runtime.json_line, records)
                tally["written"][kind] += len(records)
        return {kind: b"".join(made) for kind, made in lines.items()}, tally


def pair_record(row: dict, question: str, chosen: tuple, rejected: tuple, more: dict) -> dict:
    """A line in MMPR's format; chosen, rejected: (text, what is known of it, behind `more`)."""
    record = {n: row[n] for n in ("image", "system_prompt") if row.get(n) not in (None, [])}
    record |= {"question": question, "chosen": chosen[0], "rejected": rejected[0]}
    return record | more | {"chosen_meta": chosen[1], "rejected_meta": rejected[1]}


def make_pairs(cfg: Any, verb: str, plans: Iterable[Plan], max_format_share: float = 1.0) -> None:
    """Write what the plans make; each is made in its turn.

    Entries and reports of other verbs and sets stay; the entry of an empty annotation file goes.
    Paths are relative to the folder of meta.json.
    """
    settings, reports = {k: v for k, v in asdict(cfg).items() if k not in NOT_SETTINGS}, {}
    with runtime.alone_in(cfg.out_dir, math.inf, "end it"):
        paths = [cfg.out_dir / name for name in ("meta.json", "pairs.report.json")]
        entries, verbs = (read_json(path) if path.exists() else {} for path in paths)
        known = verbs.get(verb, {}).get("sets", {})
        for plan in plans:
            name, lengths = plan.data_set.name, {}
            folders = plan.data_set.root(cfg.root), plan.data_set.files[0].parent
            root, samples = (os.path.relpath(f.resolve(), cfg.out_dir.resolve()) for f in folders)
            if (before := known.get(name, {}).get("samples", samples)) != samples:
                print(f"{name}: the pairs of {before} are written over", file=sys.stderr)
            plan.write(cfg.out_dir)
            written, cost = (plan.tally.pop(name, Counter()) for name in ("written", "cost"))
            for kind, file in plan.files.items():
                if file.startswith("annotations/"):
                    lengths[kind] = length = written[kind]
                    entry = {"root": root, "annotation": file, "data_augment": False}
                    entry |= {"repeat_time": 1, "length": length}
                    entries[Path(file).stem] = entry if length else None
            report = {"pairs": lengths, "tokens": token_cost(cost, sum(lengths.values()))}
            report["responses"] = plan.tally["counts"].pop("responses", 0)
            report |= {"settings": settings, "samples": samples}
            reports[name] = {**plan.facts, **report, **plan.tally}
        entries = {name: entry for name, entry in entries.items() if entry}
        verbs[verb] = {"sets": known | reports}
        for path, content in zip(paths, (entries, verbs)):
            runtime.write_json(path, content, sort_keys=True, ensure_ascii=False)
    print(f"wrote {' and '.join(map(str, paths))}")
    conclude(verb, reports, max_format_share)


def pair_with_model(
    cfg: Any, verb: str, place: str, facts: dict, work: Callable, plan_of: Callable
) -> None:
    """Let all processes work(cfg, data set, folder) on each data set; the last one to end pairs.

    place: the folder of a data set's part files in out_dir, with {} for its name.
    """
    ready = []
    for data_set in find_sets(cfg.samples):
        folder = cfg.out_dir / place.format(data_set.name)
        claim(folder, text_settings(cfg) | {"name": data_set.name} | facts, "use another --out_dir")
        if owed := work(cfg, data_set, folder):
            print(f"{data_set.name}: {owed} responses are left to other processes")
        else:
            ready.append((data_set, folder))
    if ready:
        make_pairs(cfg, verb, (plan_of(cfg, *one) for one in ready))


def spend(cost: Counter, *records: dict) -> None:
    """Add the tokens of samples; a prompt counts once, as one prefill serves all its samples."""
    for record in records:
        cost["unknown"] += "tokens" not in record
        cost["generated"] += record.get("tokens", 0)
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


def conclude(verb: str, reports: dict, max_format_share: float) -> None:
    """Print pairs and tokens a kept pair of each data set, beside the paper's two figures.

    How the paper counted is not stated.  Exit 1 where one has no pair, or too many format failures.
    """
    bad = []
    print("tokens a kept pair in the paper, on M3CoT: dropout_ntp 571.2, divide_and_conquer 992.7")
    for name, report in reports.items():
        total, pairs = report["responses"], sum(report["pairs"].values())
        tokens = ", ".join(f"{k} {n or '-'}" for k, n in report["tokens"]["per_pair"].items())
        print(f"{verb}: {name}: {pairs} pairs; tokens a pair here: {tokens}")
        if not pairs:
            bad.append(f"{name}: no pair from {total} responses")
        share = report["counts"].get("format responses", 0) / max(total, 1)
        if share > max_format_share:
            bad.append(f"{name}: {share:.0%} are format failures: above --max_format_share")
    if bad:
        raise runtime.Failure(f"all is written, but look at {'; '.join(bad)}")


# --------------------------------------------------------------------------- DropoutNTP

MAX_DRAWS = 4  # a continuation and up to three redraws


def without_image(question: str) -> str:
    """The question without placeholders; wordings such as "Image 1:" keep their text."""
    return re.sub(rf"(?m)^{IMAGE}\n", "", question).replace(IMAGE, "").strip()


def useless(row: dict, text: str) -> str:
    """Why kept part and continuation, decoded together, make no rejected response; "" = they do."""
    if not text.startswith(row["prefix"]):
        return "the kept part came back changed"
    if not text[len(row["prefix"]) :].strip():
        return "empty continuation"
    return "same as chosen" if text.split() == row["response"].split() else ""


def cut_responses(data_set: SampleSet, cfg: DropoutConfig, counts: Counter) -> Iterator[dict]:
    """The responses to continue, each once, with `rid`, `kept` part and the model's `prefix`.

    A line break at the cut is given along in the prefix; a blank is not, since word pieces carry
    their own.
    """
    seen, usable = set(), 0
    for name, row in read_parts(data_set.files):
        if "response" not in row and "chosen" in row:  # a file of pairs
            row["response"] = row["chosen"]
        images, text = images_of(row, name), row["response"]
        rid = digest(images, row["question"], row.get("qid"), row.get("k"), text, *system_of(row))
        if rid in seen:
            continue
        seen.add(rid)
        kept, glue = answers.split_prefix(text, cfg.keep_ratio)
        if not images:
            counts["without an image"] += 1
        elif not text.strip() or (not kept and cfg.keep_ratio > 0):
            counts["empty kept part"] += 1
        elif cfg.max_responses and usable == cfg.max_responses:
            counts["beyond max_responses"] += 1
        else:
            usable += 1
            prefix = kept + (glue if "\n" in glue else "")
            yield row | {"rid": rid, "kept": kept, "glue": glue, "prefix": prefix, "line": name}


DRAWN = {"rid": str, "draw": int, "reason": str, "source": dict, "chosen": str, "rejected": str}
DRAWN |= {"kept": int, "glue": str, "finish_reason": str, "tokens": int}


def draws_so_far(folder: Path) -> Counter:
    """rid -> continuations drawn; MAX_DRAWS where one of them is usable."""
    draws: Counter[str] = Counter()
    for name, record in read_parts(part_files(folder)):
        rid = checked_rid(DRAWN, record, name)
        draws[rid] = max(draws[rid], MAX_DRAWS if record["reason"] == "ok" else record["draw"] + 1)
    return draws


def continue_responses(cfg: DropoutConfig, data_set: SampleSet, folder: Path) -> int:
    """Draw this process's continuations; the number that other processes still owe."""
    draws, todo = draws_so_far(folder), {}  # todo: prompt id -> row
    for row in cut_responses(data_set, cfg, Counter()):
        if is_mine(row["rid"]) and draws[row["rid"]] < MAX_DRAWS:
            checked_images(data_set.root(cfg.root), row, row["line"])
            todo[f"{row['rid']} keep {cfg.keep_ratio}"] = row

    def prompt_of(id: str, row: dict, draw: int) -> Prompt:
        settings = {"prefix": row["prefix"], "system_prompt": row.get("system_prompt")}
        settings |= {"samples": (draw,), "name": row["line"]}
        return Prompt(id, without_image(row["question"]), **settings)

    def record_of(s: Sample) -> dict:
        row = todo[s.prompt_id]
        reason = useless(row, s.text)
        draws[row["rid"]] = s.sample + 1 if reason else MAX_DRAWS
        names = "image question qid k finish_reason tokens prompt_tokens image_tokens system_prompt"
        record = {"rid": row["rid"], "draw": s.sample, "reason": reason or "ok"}
        record |= {"source": picked(row, names), "chosen": row["response"], "rejected": s.text}
        return record | {"kept": len(row["kept"]), "glue": row["glue"]}

    for draw in range(MAX_DRAWS):
        prompts = [prompt_of(*x, draw) for x in todo.items() if draws[x[1]["rid"]] == draw]
        generate_into(folder, cfg, prompts, record_of, f"{data_set.name}, draw {draw + 1}")
    draws = draws_so_far(folder)  # with what others have written meanwhile
    return sum(draws[row["rid"]] < MAX_DRAWS for row in cut_responses(data_set, cfg, Counter()))


def plan_continuations(cfg: DropoutConfig, data_set: SampleSet, folder: Path) -> Plan:
    tally = defaultdict(Counter)
    # of these samples alone: others may have been continued there before
    wanted = {row["rid"] for row in cut_responses(data_set, cfg, tally["counts"])}
    tally["counts"]["responses"] = len(wanted)
    groups = grouped(part_files(folder), functools.partial(checked_rid, DRAWN))
    items = [group for group in groups.items() if group[0] in wanted]
    name = f"annotations/{data_set.name}_prefix_pair_sr{cfg.keep_ratio}_wo_image.jsonl"
    pair = functools.partial(pair_draws, cfg)
    return Plan(data_set, {"dropout_ntp": name}, items, pair, tally=tally)


def pair_draws(cfg: DropoutConfig, group: Group, tally: Tally) -> dict[str, list[dict]]:
    """The pair of a response and the first of its continuations that is usable."""
    draws, counts = drop_repeats(group[1], "draw"), tally["counts"]
    source = draws[0]["source"]
    spend(tally["cost"], source, *draws)
    counts.update(f"continuations: {row['reason']}" for row in draws)
    good = next((row for row in draws if row["reason"] == "ok"), None)
    counts["dropped after redraws"] += good is None
    if good is None:
        return {}
    cut = {"cut_off": True} if good["finish_reason"] == "length" else {}
    counts["cut off"] += len(cut)
    chosen = good["chosen"], picked(source, "qid k finish_reason tokens")
    known = picked(good, "kept glue draw finish_reason tokens")
    rejected = good["rejected"], {"keep_ratio": cfg.keep_ratio} | known
    return {"dropout_ntp": [pair_record(source, source["question"], chosen, rejected, cut)]}


def dropout_ntp(cfg: DropoutConfig) -> None:
    ratio, facts = f"sr{cfg.keep_ratio}", {"keep_ratio": cfg.keep_ratio}
    steps = (continue_responses, plan_continuations)
    pair_with_model(cfg, f"dropout_ntp {ratio}", f"continuations/{{}}_{ratio}", facts, *steps)


def main() -> None:
    verb, cfg = runtime.parse_command(VERBS)
    {"sample": sample, "correctness": correctness, "dropout_ntp": dropout_ntp}[verb](cfg)


if __name__ == "__main__":
    runtime.run(main)
