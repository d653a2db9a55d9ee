"""CRPE: relations and existence, with the options in all four orders.

Read as in VLMEvalKit (utils/crpe.py), or strictly as in OpenGVLab/all-seeing (eval_crpe.py).
"""

import re
from collections import defaultdict
from typing import Literal

from benchmarks.common import LETTER_SUFFIX, Benchmark, Item, Reading, Readings, Reply, proportion
from runtime import InputError


def item(row: Item) -> None:
    """Four consecutive rows are one question; existence and relation are numbered apart."""
    number, category = row["question_id"], row["category"]
    row["id"] = f"{'exist' if category == 'exist' else 'relation'}/{number}"
    row["_aliases"] = [f"/{number}", f"{category}/{number}"]
    row["group"] = f"{row['_file']} {row['_index'] // 4}"


def read(item: Item, reply: Reply, mode: str) -> Reading:
    text, gold = reply.final, item["correct_option"]
    if mode == "strict":
        return Reading(text, text == gold, len(text) == 1)
    if len(text) == 1 or text[:1] in list("ABCD"):
        return Reading(text[0], text[0] == gold, text[0] in "ABCD")
    option = re.search(rf"^{re.escape(gold)}\.\s*(.+?)\s*$", item["text"], re.MULTILINE)
    right = bool(text) and option is not None and option[1].lower() in text.lower()
    return Reading(text, right, right)


def circular(readings: Readings) -> dict:
    """A question counts as right if it is with its options in all four orders."""
    groups = defaultdict(list)
    for item, reading in readings:
        groups[item["group"]].append(reading.correct)
    if odd := [name for name, rows in groups.items() if len(rows) != 4]:
        raise InputError(f"{len(odd)} questions lack some of their 4 rows, first {odd[0]}")
    return proportion(sum(map(all, groups.values())), len(groups))


BENCHMARK = Benchmark(
    name="crpe", files=("crpe_*[!a].jsonl", "questions*.jsonl"),  # no ..._meta.jsonl
    fields={"question_id": int | str, "text": str, "correct_option": Literal[*"ABCD"],
            "category": Literal["exist", "subject", "predicate", "object"]},
    item=item, suffix=LETTER_SUFFIX, new_tokens=100, read=read, modes=("vlmevalkit", "strict"),
    metric="circular accuracy, mean of the relations", groups=("category",), summary=circular,
    mean_of=("subject", "predicate", "object"), pooled_as="pooled_relation",
)  # fmt: skip
