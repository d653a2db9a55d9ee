"""MM-Vet: open questions rated by a judge (yuweihao/MM-Vet @acde843e)."""

import math
import statistics

from benchmarks.common import Benchmark, Item, Judge, Reading, Readings, Reply, in_range, mean
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
    if "answer" not in item:
        raise InputError(f"{item['id']}: no 'answer'; judging needs MM-Vet's mm-vet.json")
    gold = item["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join([item["question"], gold, reply.text, ""])
    return [{"role": "user", "content": f"{template}\n{row}"}]


TEMPLATE = """Rate how well each prediction agrees with the ground truth, from 0.0 (all wrong) to 1.0 (all right) in steps of 0.1. Parts joined by <AND> are all needed; any one of the parts joined by <OR> is enough. Complete the last cell of the table with the number alone.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which numbers are circled? | 4 <AND> 9 | Only 7 is circled. | 0.0
Which numbers are circled? | 4 <AND> 9 | The 9 is circled. | 0.5
Which numbers are circled? | 4 <AND> 9 | 4 and 9 | 1.0
What is the animal? | cat <OR> kitten | a small kitten | 1.0
"""  # noqa: E501


def summary(readings: Readings) -> dict:
    return mean([100 * r.prediction for _, r in readings])


BENCHMARK = Benchmark(
    name="mmvet", files=("mm-vet*.json", "llava-mm-vet.jsonl"),
    fields={"question|text": str, "capability|question_id": list | str | int, "answer": str | None},
    item=item, question=lambda item: item["question"], suffix=" ",
    cot=lambda question: COT + question, new_tokens=1000, read=read, modes=("judge",),
    judge=Judge(messages, TEMPLATE, max_tokens=3),
    metric="mean judged correctness", n_expected=218, groups=("capability",), summary=summary,
)  # fmt: skip
