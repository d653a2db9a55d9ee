"""The RLAIF-V baseline of the paper (arXiv 2405.17220), small: divide an answer and conquer.

    python tools/rlaifv.py --samples samples --out_dir pairs --model_dir M

The same model splits each sampled answer into claims, turns claims into yes/no questions and
answers them with the image; of two answers to a question the one with fewer claims denied is
chosen.  `pairs.py sample` makes the samples; runs over any number of processes, resumable.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import EngineConfig, InputError, flag, from_json, parse_cli, run


@dataclass(frozen=True)
class DivideConfig(EngineConfig):
    """The RLAIF-V baseline, small: the same model splits answers into claims and checks them."""

    samples: Path = flag(
        Path("samples"),
        "folder of `sample --prompts none --num_samples 10 --temperature 0.7 --max_new_tokens 512`",
    )
    out_dir: Path = flag(Path("pairs"), "meta.json, annotations/ and pairs.report.json go here")
    root: Path | None = flag(None, "folder of the images, empty = as given to `sample`")
    temperature: float = flag(0.2, "sampling temperature of claims and questions", low=1e-3)
    max_new_tokens: int = flag(256, "longest list of claims or questions", low=1)
    pairs_per_query: int = flag(2, "pairs a question at most", low=1)


if __name__ == "__main__":
    parse_cli(DivideConfig)  # --help and wrong flags need no torch, which takes seconds

import pairs
from generate import Generator, Prompt
from images import check_images, image_names, image_paths
from records import grouped, new_lines, part_files, read_parts
from tokenizer import IMAGE

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


def fill(form: str, **texts: str) -> str:
    """The form with its {names} replaced in one pass: a text that holds braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], form)


def split_sentences(text: str) -> list[str]:
    """Claims by rule: one a sentence."""
    parts = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text)
    return [part.strip(" \t-*•") for part in parts if re.search(r"\w", part)]


def bullets(text: str) -> list[str]:
    """Lines that start as list items."""
    items = re.findall(r"(?m)^[ \t]*(?:[-*•]|[0-9]{1,2}[.)])[ \t]+(\S.*)$", text)
    return [item.strip() for item in items]


def score_pairs(rows: list[dict], count: int, *key: Any) -> list[tuple[dict, dict]]:
    """(chosen, rejected) of candidates whose scores differ, at most `count`, texts different."""
    scored = product([row for row in rows if row["score"] is not None], repeat=2)
    better = [(a, b) for a, b in scored if a["score"] > b["score"]]
    return pairs.choose([(a, b) for a, b in better if a["response"] != b["response"]], count, *key)


def length_threshold(lengths: list[tuple[int, int]]) -> float:
    """The limit on (rejected - chosen) / rejected words that brings the mean lengths closest."""
    best, best_gap = 0.98, math.inf
    for step in range(49, -1, -1):
        limit = step * 2 / 100
        kept = [(c, r) for c, r in lengths if (r - c) / max(r, 1) <= limit]
        gap = abs(sum(c - r for c, r in kept)) / len(kept) if kept else math.inf
        if gap < best_gap - 1e-12:
            best, best_gap = limit, gap
    return best


def candidate_rows(data_set: pairs.SampleSet) -> Iterator[dict]:
    """The sampled responses, each with its rid."""
    for name, row in read_parts(data_set.files):
        if not from_json(pairs.SampledLine, row, name).qid:
            raise InputError(f"{name}: no 'qid'; make the samples with `pairs.py sample`")
        yield row | {"rid": pairs.digest(row["qid"], row["k"])}


def add_claims(rows: list[dict], generator: Generator) -> None:
    """The model splits each response into claims, then turns the claims into questions."""

    def ask(step: str, text_of: Callable[[dict], str]) -> list[str]:
        prompts = [Prompt(f"{step} {row['rid']}", text_of(row)) for row in rows]
        samples = {s.prompt_id: s for s in generator.run(prompts)}
        for row, prompt in zip(rows, prompts):
            row.setdefault("split_cost", []).append(pairs.sample_cost(samples[prompt.id]))
        return [samples[prompt.id].text for prompt in prompts]

    def split(row: dict) -> str:
        return fill(CLAIMS, question=pairs.without_image(row["question"]), answer=row["response"])

    def turn(row: dict) -> str:
        return fill(AS_QUESTIONS, claims="\n".join(f"- {claim}" for claim in row["claims"]))

    for row, text in zip(rows, ask("claims", split)):
        row["claims"] = bullets(text) or split_sentences(row["response"])
    for row, text in zip(rows, ask("questions", turn)):
        row["questions"] = bullets(text)


def judge_claims(rows: list[dict], generator: Generator, root: Path, max_tiles: int) -> None:
    """Ask each claim's question with the image; the score is minus the number of claims denied.

    A response whose questions are not as many as its claims gets no score, as in the original.
    """
    prompts, owners = [], []
    for row in rows:
        row["yes_no"], name = [], row["question"][:60]
        paths = image_paths(root, image_names(row, row["rid"]), name)
        check_images(paths, name)
        each = max(1, max_tiles // max(1, len(paths)))
        matched = len(row["questions"]) == len(row["claims"])
        for i, question in enumerate(row["questions"] if matched else ()):
            text = f"{IMAGE}\n" * len(paths) + fill(YES_NO, question=question)
            prompts.append(Prompt(f"judge {row['rid']} {i}", text, paths, max_tiles=each))
            owners.append(row)
    probs = generator.first_token_probs(prompts, ["Yes", "yes", "No", "no"]) if prompts else []
    for row, p in zip(owners, probs, strict=True):
        row["yes_no"].append((p["Yes"] + p["yes"], p["No"] + p["no"]))
    for row in rows:
        denied = sum(no > yes for yes, no in row["yes_no"])
        row["score"] = -denied if row["yes_no"] else None


def check_candidates(cfg: DivideConfig, data_set: pairs.SampleSet, folder: Path) -> int:
    """Score this process's candidates, a chunk at a time; the number that others still owe."""
    done = {record["rid"] for _, record in read_parts(part_files(folder))}
    todo = (r for r in candidate_rows(data_set) if r["rid"] not in done and pairs.is_mine(r["rid"]))
    while chunk := list(islice(todo, CHUNK)):
        log, generator = pairs.open_part(folder), pairs.load_generator(cfg)
        add_claims(chunk, generator)
        judge_claims(chunk, generator, data_set.root(cfg.root), data_set.info.max_tiles)
        for row in chunk:
            log.append(row)
        log.close()
    done = {record["rid"] for _, record in read_parts(part_files(folder))}
    return sum(row["rid"] not in done for row in candidate_rows(data_set))


def pair_candidates(
    cfg: DivideConfig, data_set: pairs.SampleSet, folder: Path, stem: str
) -> tuple[dict, dict | None]:
    """Pairs by score, then without those that would teach length; report and meta entry."""
    counts, cost, drawn = Counter(), Counter(), []
    for group in grouped(part_files(folder), lambda record, _: pairs.digest(record["qid"])):
        rows = pairs.drop_repeats(group.records(), data_set.name)
        for row in rows:
            for spent in (row, *row.get("split_cost", ())):
                pairs.spend(cost, spent)
            cost["generated"] += len(row["yes_no"])
            counts["candidates"] += 1
            counts["claims and questions do not match"] += row["score"] is None
        drawn += score_pairs(rows, cfg.pairs_per_query, cfg.seed, group.key)
    lengths = [(len(c["response"].split()), len(r["response"].split())) for c, r in drawn]
    limit = length_threshold(lengths)
    kept = [pair for pair, (c, r) in zip(drawn, lengths) if (r - c) / max(r, 1) <= limit]
    counts["pairs before the length limit"] = len(drawn)
    with new_lines(pairs.annotation_file(cfg, stem)) as write:
        for chosen, rejected in kept:
            names = ("image", "system_prompt", "question")
            record = {n: chosen[n] for n in names if chosen.get(n)}
            record |= {"chosen": chosen["response"], "rejected": rejected["response"]}
            names = ("qid", "k", "finish_reason", "score", "claims", "yes_no")
            for side, row in (("chosen_meta", chosen), ("rejected_meta", rejected)):
                record[side] = {n: row[n] for n in names if n in row}
            write(record)
    report = {"responses": counts["candidates"], "length_limit": limit}
    report |= pairs.report_of({"divide_and_conquer": len(kept)}, counts, cost)
    return report, pairs.meta_entry(cfg, data_set, stem, len(kept))


def main() -> None:
    divide_and_conquer(parse_cli(DivideConfig))


def divide_and_conquer(cfg: DivideConfig) -> None:
    names = ("divide/{}", "{}_pairs_divide_and_conquer")
    pairs.pair_with_model(cfg, "divide_and_conquer", names, {}, (check_candidates, pair_candidates))


if __name__ == "__main__":
    run(main)
