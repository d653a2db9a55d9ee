"""MM-Vet: open questions rated by a judge (yuweihao/MM-Vet @acde843e)."""

import math
import statistics

from benchmarks.common import Benchmark, Item, Judge, Reading, Reply, in_range, mean
from runtime import InputError

# nothing is extracted from a CoT reply: the judge reads it all
COT = "Your task is to answer the question below. Give step by step reasoning. \n\nQuestion:\n\n"


def item(row: Item) -> None:
    row["id"] = row["id"] if row["id"].startswith("v1_") else f"v1_{row['id']}"
    row["_aliases"] = [row["id"].removeprefix("v1_")]
    row["question"] = row.get("question", row.get("text"))
    row["image"] = row.get("imagename", row.get("image"))


def read(item: Item, reply: Reply, mode: str) -> Reading:
    """The first blank-separated word as a number in [0, 1]; the official last resort is 0.0."""
    if not isinstance(reply.judgement, str):  # an official grade file: scores of several runs
        return Reading(statistics.fmean(in_range(item, reply.judgement, 0, 1)))
    try:
        score = float(reply.judgement.split(" ")[0].strip())
    except ValueError:
        score = math.nan
    return Reading(score) if 0 <= score <= 1 else Reading(0.0, parsed=False)


def messages(item: Item, reply: Reply, template: str) -> list[dict]:
    if item.get("answer") is None:
        raise InputError(f"{item['id']}: no 'answer'; judging needs MM-Vet's mm-vet.json")
    gold = item["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join([item["question"], gold, reply.text, ""])
    return [{"role": "user", "content": f"{template}\n{row}"}]


BENCHMARK = Benchmark(
    name="mmvet", files=("mm-vet*.json", "llava-mm-vet.jsonl"),
    fields={"question|text": str, "capability|question_id": list | str | int, "answer": str | None},
    item=item, question=lambda item: item["question"] + " ",
    cot=lambda question: COT + question.removesuffix(" "), new_tokens=1000, read=read,
    modes=("judge",), judge=Judge(messages, max_tokens=3),
    metric="mean judged correctness", n_expected=218, groups=("capability",),
    summary=lambda readings: mean([100 * r.prediction for _, r in readings]),
)  # fmt: skip
