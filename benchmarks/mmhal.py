"""MMHal-Bench: a judge rates informativeness and hallucination (InternVL's eval/mmhal)."""

import re
from pathlib import Path

from benchmarks.common import Benchmark, Item, Judge, Reading, Readings, Reply, in_range, mean
from runtime import InputError

COT = (
    "Please think step by step and output in the following format:\n\nRationale:\n{rationale}\n"
    "Answer: {answer}\n\nwhere rationale is the reasoning process of the given question."
)


def item(row: Item) -> None:
    source = row.get("image_src") or row.get("image_id") or ""
    row["image"] = row.get("image") or row.get("image_path") or Path(source).name


def read(item: Item, reply: Reply, mode: str) -> Reading:
    """The one digit s with "rating: s" in the judgement, else 0 as in the official script."""
    if not isinstance(reply.judgement, str):
        return Reading(in_range(item, reply.judgement, 0, 6)[0])
    text = reply.judgement.lower()
    written = [int(s) for s in re.findall(r"rating: (\d{1,9})", text)]
    in_range(item, written or 0, 0, 6)
    digits = [s for s in range(7) if f"rating: {s}" in text]
    return Reading(float(digits[0])) if len(digits) == 1 else Reading(0.0, parsed=False)


def summary(readings: Readings) -> dict:
    """Mean rating of 0 to 6, and the share of ratings under 3."""
    bad = sum(r.prediction < 3 for _, r in readings)
    return {**mean([r.prediction for _, r in readings]), "hallucination_rate": bad / len(readings)}


def messages(item: Item, reply: Reply, template: str) -> list[dict]:
    """The judge sees a CoT reply from its last "Answer:" on."""
    parts = template.split("{}")
    if len(parts) != 5:
        raise InputError("MMHal's template needs four {}: contents, question, answer, response")
    answer = reply.text.split("Answer:")[-1].strip() if reply.cot else reply.text
    values = (", ".join(item["image_content"]), item["question"], item["gt_answer"], answer, "")
    text = "".join(part + value for part, value in zip(parts, values))
    return [{"role": "user", "content": text}]


BENCHMARK = Benchmark(
    name="mmhal", files=("mmhal*.jsonl", "response_template.json", "records*.jsonl"),
    fields={"question": str, "gt_answer": str, "image_content": list[str],
            "image": str | None, "image_src": str | None, "image_id": str | None},
    ordered=True, item=item,
    cot=lambda question: f"{question}\n\n{COT}".strip(), new_tokens=1024, cot_tokens=1024,
    read=read, modes=("judge",), judge=Judge(messages, max_tokens=1024),
    metric="mean rating, 0 to 6", n_expected=96, groups=("question_type",), summary=summary,
)  # fmt: skip
