"""Questions without the paper's rules: text-only ones, and your own about pictures.

text_mc, text_em and gsm8k compare a checkpoint with its own baseline, never with Table 5; `own`
asks and reads as for preference pairs, and leaves lists of choices to m3cot.
"""

import re

from benchmarks import m3cot
from benchmarks.answers import get_mode, is_correct, parse_answer, strip_instruction
from benchmarks.common import PHRASE_SUFFIX, Benchmark, Item, Reading, Reply, last_number, lettered

UNREAD = "images video videos clip audio audios history system system_prompt choices options"
FIELDS = {"question": str, **dict.fromkeys(UNREAD.split(), type(None))}  # refused by name
OWN_BASELINE = "compare with the same checkpoint's baseline only, not with the paper's Table 5"


def item_golds(row: Item) -> None:
    golds = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    row["golds"] = [str(gold) for gold in golds if gold not in (None, "")]


def item_gsm8k(row: Item) -> None:
    row["gold"] = last_number(str(row["answer"]).split("####")[-1])
    float(row["gold"])


def read_choice(item: Item, reply: Reply, mode: str) -> Reading:
    """The first option letter that stands alone."""
    letters = "".join(lettered(item["choices"]))
    match = re.search(rf"(?<![^\W_])[{letters}](?![^\W_])", reply.final)
    return Reading(match and match[0], bool(match) and match[0] == item["gold"], bool(match))


def plain_words(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks."""
    text = re.sub(r"[^\w\s]|_", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def read_match(item: Item, reply: Reply, mode: str) -> Reading:
    """A gold answer occurs in the first line (or is all of it)."""
    text = plain_words(reply.final.strip().split("\n")[0].lower().split("answer is")[-1])
    golds = [g for gold in item["golds"] if (g := plain_words(gold))]
    right = text in golds if mode == "exact" else any(gold in text for gold in golds)
    return Reading(text, right, text != "")


def read_own(item: Item, reply: Reply, mode: str) -> Reading:
    """The judge of the preference pairs: format failures, then the matching modes."""
    parsed = parse_answer(reply.text, "en" if reply.cot else "direct")
    right = any(is_correct(parsed, gold, get_mode("own")) for gold in item["golds"] if parsed)
    return Reading(parsed, right, parsed is not None)


def read_gsm8k(item: Item, reply: Reply, mode: str) -> Reading:
    number = last_number(reply.final)
    right = bool(number) and abs(float(number) - float(item["gold"])) < 1e-6
    return Reading(number or None, right, bool(number))


TEXT_MC = Benchmark(
    name="text_mc", files=("*.jsonl",), image=False,
    fields={**FIELDS, **m3cot.FIELDS},
    item=m3cot.item, question=m3cot.question, suffix=m3cot.LETTER_SUFFIX, new_tokens=100,
    read=read_choice, groups=("subject",), notes=lambda items, mode, cot: [OWN_BASELINE],
)  # fmt: skip
TEXT_EM = Benchmark(
    name="text_em", files=("*.jsonl",), image=False,
    fields={**FIELDS, "answer": str | int | float | list[str | int | float | None]},
    item=item_golds, suffix=PHRASE_SUFFIX, new_tokens=50, read=read_match,
    modes=("substring", "exact"), notes=TEXT_MC.notes,
)  # fmt: skip
OWN = Benchmark(
    name="own", files=("*.jsonl",), fields={**TEXT_EM.fields, "image": str}, item=item_golds,
    question=lambda item: strip_instruction(item["question"]), suffix=PHRASE_SUFFIX,
    new_tokens=50, read=read_own,
)  # fmt: skip
GSM8K = Benchmark(
    name="gsm8k", files=("test.jsonl", "*.jsonl"), image=False,
    fields={**FIELDS, "answer": str | int | float},
    item=item_gsm8k, new_tokens=512, read=read_gsm8k, notes=TEXT_MC.notes,
)  # fmt: skip
