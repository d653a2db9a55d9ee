"""POPE: is the object in the picture? (AoiDragon/POPE; InternVL's evaluate_pope.py)

The official score is kept as it is.  A reply that its word rule reads otherwise than a reader
would (`**No**`, `NO`, `No!` count as yes) is counted as unparsed, and the plain reading's score
stands beside it.
"""

import functools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Literal

from benchmarks.common import PHRASE_SUFFIX, Benchmark, Item, Reading, Readings, Reply
from benchmarks.files import near, read_rows
from benchmarks.quantities import pattern
from runtime import InputError

CATEGORIES = ("random", "popular", "adversarial")
HEAD = "3,000 random questions (repository HEAD); the paper's evaluation has 2,910"


def item(row: Item) -> None:
    """The three official files number their questions alike: the key is (category, number)."""
    number = row["question_id"]
    if "label" not in row:  # LLaVA's list has no labels: they are in the official files beside it
        labels = official_labels(row["_file"].parent)
        text = row["text"].removesuffix(PHRASE_SUFFIX).strip()
        row["label"] = labels.get((row["category"], row["image"], text))
    row["id"], row["_aliases"] = f"{row['category']}/{number}", [f"/{number}"]


@functools.cache
def official_labels(folder: Path) -> dict[tuple, str]:
    """(category, image, question) -> label, from the coco_pope_*.json of a folder."""
    rows = [r for path in near(folder, "coco_pope_*.json") for r in read_rows(path, CATEGORIES)]
    return {(r.get("category"), r["image"], r["text"].strip()): r["label"] for r in rows}


def official_answer(reply: str) -> str:
    """The official reading: no if a word of the first sentence is exactly No, no or not."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


_YES_OR_NO = pattern("YES_OR_NO", re.IGNORECASE)


def plain_answer(reply: str) -> str | None:
    """The first word that says yes or no, in any case and any marks; None without one."""
    match = _YES_OR_NO.search(reply)
    return match and ("yes" if match["yes"] else "no")


def read(item: Item, reply: Reply, mode: str) -> Reading:
    if item["label"] is None:
        raise InputError(f"{item['id']}: no label; put coco_pope_*.json beside the question file")
    official, plain = official_answer(reply.final), plain_answer(reply.final)
    if mode == "plain":
        answer, parsed = plain or "yes", plain is not None
    else:
        answer, parsed = official, plain == official
    return Reading(answer, answer == item["label"], parsed)


def confusion(readings: Readings) -> dict:
    """F1 x100 of "yes" and what it is made of; an empty denominator counts as 0."""
    kinds = Counter((r.prediction, r.correct) for _, r in readings)
    tp, fp = kinds["yes", True], kinds["yes", False]
    tn, fn = kinds["no", True], kinds["no", False]
    n = len(readings)
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    return {"score": 100 * f1, "standard_error": 100 * math.sqrt(f1 * (1 - f1) / n), "n": n,
            "TP": tp, "FP": fp, "TN": tn, "FN": fn, "precision": precision, "recall": recall,
            "f1": f1, "accuracy": (tp + tn) / n, "yes_ratio": (tp + fp) / n}  # fmt: skip


BENCHMARK = Benchmark(
    name="pope", files=("coco_pope_*.json", "llava_pope_test.jsonl"),
    fields={"question_id": int | str, "image": str, "text": str,
            "label": Literal["yes", "no", None], "category": Literal[CATEGORIES]},
    categories=CATEGORIES, item=item, suffix=PHRASE_SUFFIX,
    new_tokens=100, read=read, modes=("rule", "plain"), metric="mean of the three F1",
    n_expected=8910, split="COCO val2014", groups=("category",), summary=confusion,
    mean_of=CATEGORIES, pooled_as="pooled_f1",
    notes=lambda items, mode, cot: [HEAD] * (sum(i["category"] == "random" for i in items) == 3000),
)  # fmt: skip
