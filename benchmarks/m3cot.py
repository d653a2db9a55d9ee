"""M3CoT: multi-step multiple choice (LightChen233/M3CoT; InternVL's evaluate_m3cot.py)."""

import re

from benchmarks.common import LETTER_SUFFIX, Benchmark, Item, Reading, Reply, lettered, option_lines


def item(row: Item) -> None:
    """InternVL's or the Hugging Face layout: the gold answer, an index or a letter, as a letter."""
    row["choices"] = [str(choice) for choice in row["choices"]]
    answer, letters = row["answer"], [*lettered(row["choices"])]
    row["gold"] = dict(enumerate(letters)).get(answer, str(answer).strip().upper())
    if row["gold"] not in letters:
        raise ValueError(f"answer {answer!r} is none of the {len(letters)} choices")
    row["_aliases"] = [row["image"]] if row.get("image") else []


def question(item: Item) -> str:
    hint = item.get("hint") or item.get("context") or ""
    return f"{hint}\n{item['question']}".lstrip() + option_lines(item["choices"])


def internvl_letter(reply: str, choices: list[str]) -> str:
    """InternVL's post_process: case-sensitive, and "A dog ..." is read as A."""
    reply, options = reply.strip(), lettered(choices)
    if len(reply) > 1:
        if reply[0] in options:
            return reply[0]
        for letter, choice in options.items():
            if choice in reply:
                return letter
        if reply[1] == ".":
            return reply[0]
        if reply[0] == "(" and reply[2:3] == ")":
            return reply[1]
    return reply


def m3cot_letter(reply: str, choices: list[str]) -> str:
    """M3CoT's judge_answer: last (X), else last option that occurs, else last letter alone."""
    if "[Answer]" in reply:
        reply = reply.split("[Answer]")[-1].split("[Rationale]")[0].split("[Context]")[0]
    if bracketed := re.findall(r"\(([A-Za-z])\)", reply):
        return bracketed[-1].upper()
    options = lettered(choices)
    if named := [k for k, choice in options.items() if choice.lower() in reply.lower()]:
        return named[-1]
    words = re.sub(r"[\n.,!?]", " ", reply).split(" ")
    for case in (str.upper, str.lower):
        if alone := [k for k in options if case(k) in words]:
            return alone[-1]
    return "FAILED"


def read(item: Item, reply: Reply, mode: str) -> Reading:
    if mode == "m3cot":
        letter = m3cot_letter(reply.text, item["choices"])
    else:
        letter = internvl_letter(reply.final, item["choices"])
    return Reading(letter, letter == item["gold"], letter in lettered(item["choices"]))


FIELDS = {"question": str, "hint": str | None, "context": str | None,
          "choices": list[str | int | float], "answer": str | int}  # fmt: skip
BENCHMARK = Benchmark(
    name="m3cot", files=("test.jsonl", "test*.jsonl"),
    fields={**FIELDS, "image": str},
    item=item, question=question, suffix=LETTER_SUFFIX, new_tokens=100, read=read,
    modes=("internvl", "m3cot"), n_expected=2318, groups=("domain",),
)  # fmt: skip
