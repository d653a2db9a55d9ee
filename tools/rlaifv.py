"""The RLAIF-V baseline of the paper (arXiv 2405.17220), small: divide an answer and conquer.

    python tools/rlaifv.py --samples samples --out_dir pairs --model_dir M

The same model splits each sampled answer into claims, turns claims into yes/no questions and
answers them with the image; of two answers to a question the one with fewer claims denied is
chosen.  `pairs.py sample --prompts none --num_samples 10 --temperature 0.7 --max_new_tokens 512`
makes the samples; runs over any number of processes, resumable.
"""

import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice, permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import EngineConfig, InputError, command_line, flag, parse_cli, run


@command_line
class DivideConfig(EngineConfig):
    """The RLAIF-V baseline, small: the same model splits answers into claims and checks them."""

    samples: Path = flag(Path("samples"), "folder of `sample`, best with --prompts none")
    out_dir: Path = flag(Path("pairs"), "meta.json, annotations/ and pairs.report.json go here")
    root: Path | None = flag(None, "folder of the images, empty = as given to `sample`")
    temperature: float = flag(0.2, "sampling temperature of claims and questions", low=1e-3)
    top_p: float = flag(0.9, "of claims and questions: as in RLAIF-V's script", 1e-6, 1)
    max_new_tokens: int = flag(256, "longest list of claims or questions", low=1)
    pairs_per_query: int = flag(2, "pairs a question at most", low=1)


import pairs
from generate import Generator, Prompt, prefill
from images import checked_images
from records import Line, grouped, part_files, read_parts
from tools.figures import TEMPLATES, render

KIND = "divide_and_conquer"
SCORED = {"rid": str, "qid": str, "k": int, "response": str, "score": float | None}
SCORED |= {"claims": list[str], "yes_no": list[list[float]], "split_cost": list[dict]}


def bullets(text: str) -> list[str]:
    """Lines that start as list items."""
    return re.findall(r"(?m)^[ \t]*(?:[-*•]|[0-9]{1,2}[.)])[ \t]+(\S.*?)\s*$", text)


def split_sentences(text: str) -> list[str]:
    """Claims by rule: one a sentence."""
    parts = re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text)
    return [part.strip(" \t-*•") for part in parts if re.search(r"\w", part)]


def add_claims(rows: list[dict], generator: Generator) -> None:
    """The model splits each response into claims, then turns the claims into questions."""

    def ask(step: str) -> Iterator[tuple[dict, str]]:
        """Each row with the answer to templates/STEP.txt."""
        prompts = []
        for row in rows:
            known = {"row": row, "question": pairs.without_image(row["question"])}
            text = render(TEMPLATES / f"{step}.txt", **known)
            prompts.append(Prompt(f"{step} {row['rid']}", pairs.without_image(text)))
        samples = {sample.prompt_id: sample for sample in generator.run(prompts)}
        for row, prompt in zip(rows, prompts):
            row.setdefault("split_cost", []).append(pairs.sample_cost(samples[prompt.id]))
            yield row, samples[prompt.id].text

    for row, text in ask("claims"):
        row["claims"] = bullets(text) or split_sentences(row["response"])
    for row, text in ask("questions"):
        row["questions"] = bullets(text)


def word_probs(generator: Generator, prompt: Prompt, words: list[str]) -> list[float]:
    """The probability of each word's first token as the answer's."""
    ids, tiles = generator.encode(prompt).ids, generator.tiles(prompt)
    [probs] = prefill(generator.model, [ids], tiles).softmax(-1)
    return [probs[generator.tokenizer.encode_plain(word)[0]].item() for word in words]


def judge_claims(rows: list[dict], generator: Generator, root: Path, max_tiles: int) -> None:
    """Ask each claim's question with the image; the score is minus the number of claims denied.

    A response whose questions are not as many as its claims gets no score, as in the original.
    """
    for row in rows:
        row["yes_no"] = []
        paths = checked_images(root, row, row["question"][:60])
        each = max(1, max_tiles // max(1, len(paths)))
        matched = len(row["questions"]) == len(row["claims"])
        for i, question in enumerate(row["questions"] if matched else ()):
            text = f"{pairs.without_image(question)} Please answer yes or no."
            prompt = Prompt(f"judge {row['rid']} {i}", text, paths, max_tiles=each)
            yes, yes_too, no, no_too = word_probs(generator, prompt, ["Yes", "yes", "No", "no"])
            row["yes_no"].append((yes + yes_too, no + no_too))
        row["score"] = -sum(no > yes for yes, no in row["yes_no"]) if row["yes_no"] else None


def candidates(data_set: pairs.SampleSet, folder: Path) -> Iterator[tuple[dict, list[Line]]]:
    """Each sampled response with its rid, and its lines in part files: none before it is scored."""
    scored = grouped(part_files(folder), lambda row, name: pairs.checked_rid(SCORED, row, name))
    for name, row in read_parts(data_set.files):
        pairs.images_of(row, name)
        if not row.get("qid"):
            raise InputError(f"{name}: no 'qid'; make the samples with `pairs.py sample`")
        rid = pairs.digest(row["qid"], row.setdefault("k", 0), row["response"])
        yield row | {"rid": rid}, scored.get(rid, [])


def score_candidates(cfg: DivideConfig, data_set: pairs.SampleSet, folder: Path) -> int:
    """Score this process's candidates, a chunk at a time; the number that others still owe."""
    unscored = (row for row, scored in candidates(data_set, folder) if not scored)
    todo = (row for row in unscored if pairs.is_mine(row["rid"]))
    while chunk := list(islice(todo, 256)):  # that go through the steps together
        generator = pairs.load_generator(cfg)
        with pairs.open_part(folder) as log:
            add_claims(chunk, generator)
            judge_claims(chunk, generator, data_set.root(cfg.root), data_set.info.max_tiles)
            for row in chunk:
                log.append(row)
    return sum(not scored for _, scored in candidates(data_set, folder))


def better_pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(chosen, rejected) of all candidates whose scores and texts differ."""
    scored = permutations([row for row in rows if row["score"] is not None], 2)
    better = [(a, b) for a, b in scored if a["score"] > b["score"]]
    return [(a, b) for a, b in better if a["response"].strip() != b["response"].strip()]


def length_limit(lengths: list[tuple[int, int]]) -> float:
    """The limit on (rejected - chosen) / rejected words that brings the mean lengths closest."""

    def distance(limit: float) -> float:
        gaps = [r - c for c, r in lengths if (r - c) / max(r, 1) <= limit]
        return abs(sum(gaps)) / len(gaps) if gaps else math.inf

    return min((step / 50 for step in range(49, -1, -1)), key=distance)


def plan_candidates(cfg: DivideConfig, data_set: pairs.SampleSet, folder: Path) -> pairs.Plan:
    """Pairs by score, then without those that would teach length."""
    tally, drawn = defaultdict(Counter), []
    counts, cost = tally["counts"], tally["cost"]
    groups = defaultdict(list)  # of these samples alone: others may have been scored there before
    for row, lines in candidates(data_set, folder):
        groups[pairs.digest(row["qid"])] += lines
    for key, lines in sorted(groups.items()):
        rows = pairs.drop_repeats(lines)
        for row in rows:
            pairs.spend(cost, row, *row["split_cost"])
            cost["generated"] += len(row["yes_no"])
            counts["claims and questions do not match"] += row["score"] is None
        counts["responses"] += len(rows)
        drawn += pairs.choose(better_pairs(rows), cfg.pairs_per_query, cfg.seed, key)
    lengths = [tuple(len(row["response"].split()) for row in pair) for pair in drawn]
    limit = length_limit(lengths)
    kept = [pair for pair, (c, r) in zip(drawn, lengths) if (r - c) / max(r, 1) <= limit]
    counts["pairs before the length limit"] = len(drawn)
    files = {KIND: f"annotations/{data_set.name}_pairs_{KIND}.jsonl"}
    return pairs.Plan(data_set, files, kept, write_pair, {"length_limit": limit}, tally=tally)


def write_pair(pair: tuple[dict, dict], _: pairs.Tally) -> dict[str, list[dict]]:
    names = "qid k finish_reason score claims yes_no"
    sides = [(row["response"], pairs.picked(row, names)) for row in pair]
    return {KIND: [pairs.pair_record(pair[0], pair[0]["question"], *sides, {})]}


def divide_and_conquer(cfg: DivideConfig) -> None:
    pairs.pair_with_model(cfg, KIND, "divide/{}", {}, score_candidates, plan_candidates)


if __name__ == "__main__":
    run(lambda: divide_and_conquer(parse_cli(DivideConfig)))
