"""LLaVA-Bench in the wild: a judge compares with GPT-4 (haotian-liu/LLaVA, llava/eval)."""

import statistics

from benchmarks.common import Benchmark, Item, Judge, Reading, Readings, Reply, in_range, mean
from benchmarks.files import raw_id, read_rows
from runtime import InputError, parse_json


def read(item: Item, reply: Reply, mode: str) -> Reading:
    """(reference, ours): exactly two numbers in the first line, else (-1, -1), averaged in."""
    pair = reply.judgement
    if isinstance(pair, str):
        try:
            pair = [float(x) for x in pair.split("\n")[0].replace(",", " ").split(" ")]
        except ValueError:
            pair = []
        pair = pair if len(pair) == 2 else [-1, -1]
    if pair == [-1, -1]:
        return Reading((-1.0, -1.0), parsed=False)
    pair = in_range(item, pair, 0, 10)
    if len(pair) != 2:
        raise InputError(f"{item['id']}: judgement {pair} is not a pair (reference, model)")
    return Reading(tuple(pair))


def ratio(readings: Readings) -> dict:
    """100 mean(ours) / mean(reference), rounded as in summarize_gpt_review.py."""
    pairs = [r.prediction for _, r in readings]
    reference, ours = (round(statistics.fmean(column), 3) for column in zip(*pairs))
    if reference <= 0:
        raise InputError(f"{readings[0][0]['category']}: most judgements lack two scores: ask anew")
    off = [100 * (b - ours / reference * a) / reference for a, b in pairs]
    tens = {"reference_x10": round(reference * 10, 1), "model_x10": round(ours * 10, 1)}
    return {**mean(off), "score": round(ours / reference * 100, 1), **tens}


def messages(item: Item, reply: Reply, template: str) -> list[dict]:
    folder, category = item["_file"].parent, item["category"].removeprefix("llava_bench_")
    contexts = {row.get("image"): row.get("caption") for row in read_rows(folder / "context.jsonl")}
    answers = read_rows(folder / "answers_gpt4.jsonl")
    references = {str(raw_id(BENCHMARK, row)): row.get("text") for row in answers}
    context, reference = contexts.get(item["image"]), references.get(item["id"])
    if context is None or reference is None:
        raise InputError(f"{item['id']}: not in context.jsonl and answers_gpt4.jsonl of {folder}")
    context = "\n".join(context) if isinstance(context, list) else context
    if template.lstrip().startswith("{"):  # LLaVA's rule.json
        rules = parse_json(template, "--judge_template")
        if not isinstance(rule := rules.get(f"llava_bench_{category}"), dict):
            raise InputError(f"--judge_template: no rule llava_bench_{category}")
        template = rule["prompt"]
    text = f"[Context]\n{context}\n\n[Question]\n{item['text']}\n\n"
    for role, answer in (("Assistant 1", reference), ("Assistant 2", reply.text)):
        text += f"[{role}]\n{answer}\n\n[End of {role}]\n\n"
    system = "You are a helpful and precise assistant for checking the quality of the answer."
    return [{"role": "system", "content": system},
            {"role": "user", "content": f"{text}[System]\n{template}\n\n"}]  # fmt: skip


BENCHMARK = Benchmark(
    name="llava_bench", files=("questions.jsonl",),
    fields={"question_id": int | str, "image": str, "text": str, "category": str},
    suffix=" Please give a detailed answer.", new_tokens=1000, cot_tokens=0, read=read,
    modes=("judge",), judge=Judge(messages, max_tokens=1024, temperature=0.2),
    judgements_suffice=True, metric="relative score", n_expected=60, split="in the wild",
    groups=("category",), summary=ratio,
)  # fmt: skip
