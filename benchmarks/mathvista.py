"""MathVista testmini (lupantech/MathVista @53d52587; InternVL's eval/mathvista).

Three ways to read a reply: `rule` is InternVL's --quick_extract, `judge` a judge's extraction as
in the official script, `offline` our own reading without a judge.
"""

import functools
import re
from typing import Any, Literal

from benchmarks import common
from benchmarks.answers import MAX_ANSWER, edit_distance, plain_text, read_options
from benchmarks.common import Benchmark, Item, Judge, Reading, Reply
from benchmarks.quantities import plain_signs
from runtime import InputError, read_json

read_once = functools.cache(read_json)
RULES_GIVE_LESS = "the paper's Direct figure is extracted by GPT: rules give less"


def item(row: Item) -> None:
    row["answer"], row["choices"] = str(row["answer"]), list(row["choices"] or [])
    if row["question_type"] == "multi_choice" and not row["choices"]:
        raise ValueError("a multi_choice question without choices")
    beside = row["_file"].parent / "query.json"
    if "query" not in row and beside.exists():
        row["query"] = read_once(beside).get(row["id"])
    if row["answer_type"] == "float":
        row["precision"] = int(row["precision"])
    if row["answer"] not in ("", *row["choices"]) and not normalise(row, row["answer"]).correct:
        raise ValueError(f"no reply can be read as the answer {row['answer']!r}")
    row["task"] = (row.get("metadata") or {}).get("task", "")


def question(item: Item) -> str:
    if not isinstance(item.get("query"), str):
        raise InputError(f"{item['id']}: no 'query'; put MathVista's query.json beside the data")
    return item["query"]


def read_exactly(item: Item, reply: str) -> str | None:
    """The first steps of MathVista's extraction, which need no judge; None if they don't apply."""
    if reply == "" or (item["question_type"] == "multi_choice" and reply in item["choices"]):
        return reply
    convert = {"integer": int, "float": float}.get(item["answer_type"])
    try:
        return str(convert(reply)) if convert else None
    except ValueError:
        return None


def read_offline(item: Item, reply: str) -> str:
    """Better than the rule, without a judge: the last number, letter or option named."""
    text = plain_signs(common.final_answer(reply))
    if item["question_type"] == "multi_choice":
        if bracketed := re.findall(r"\(([A-Za-z])\)", text):
            return f"({bracketed[-1]})"
        named = read_options(plain_text(text[-MAX_ANSWER:]))
        letters = sorted(named.letters) if named else []
        if len(letters) == 1 and letters[0] in common.lettered(item["choices"]):
            return f"({letters[0]})"
        last = max((text.rfind(plain_signs(c)), len(c), c) for c in item["choices"])
        return last[2] if last[0] >= 0 else text
    if item["answer_type"] == "list":
        return (re.findall(r"\[[^\[\]]*\]", text) or [text])[-1]
    return common.last_number(text) or text


def normalise(item: Item, extraction: Any) -> Reading:
    """MathVista's normalize_extracted_answer; right if the same text as the gold answer."""
    prediction, parsed = str(extraction), True
    if item["question_type"] == "multi_choice":
        text = prediction.strip()
        if letters := re.findall(r"\(([a-zA-Z])\)", text):
            text = letters[0].upper()
        if text in (options := common.lettered(item["choices"])):
            prediction = options[text]
        else:  # a choice is ALWAYS picked, also for an empty reply: the nearest, first on ties
            prediction = min(item["choices"], key=lambda choice: edit_distance(text, choice))
            parsed = prediction == text
    elif item["answer_type"] in ("integer", "float"):
        try:
            number, integer = float(extraction), item["answer_type"] == "integer"
            prediction = str(int(number) if integer else round(number, item["precision"]))
        except (ValueError, TypeError, OverflowError):
            prediction, parsed = None, False
    return Reading(prediction, prediction == item["answer"], parsed)


def read(item: Item, reply: Reply, mode: str) -> Reading:
    if mode == "judge" and reply.judgement is not None:
        return normalise(item, reply.judgement)
    extraction = read_exactly(item, reply.text)
    if extraction is None and mode == "offline":
        extraction = read_offline(item, reply.text)
    return normalise(item, common.final_answer(reply.text) if extraction is None else extraction)


def messages(item: Item, reply: Reply, template: str) -> list[dict]:
    text = f"{template.strip()}\n\n{question(item)}\n\n{reply.text}\n\nExtracted answer: "
    return [{"role": "user", "content": text}]


BENCHMARK = Benchmark(
    name="mathvista", files=("testmini.json", "testmini.jsonl"),
    fields={"question": str, "question_type": Literal["multi_choice", "free_form"],
            "answer_type": Literal["integer", "float", "list", "text"],
            "choices": list[str] | None, "answer": str | int | float, "query": str | None},
    item=item, question=question, new_tokens=4096, read=read, modes=("rule", "offline", "judge"),
    judge=Judge(
        messages, max_tokens=256, settled=lambda item, reply: read_exactly(item, reply) is not None
    ),
    n_expected=1000, split="testmini", groups=("task", "answer_type"),
    notes=lambda items, mode, cot: [RULES_GIVE_LESS] if mode != "judge" and not cot else [],
)  # fmt: skip
