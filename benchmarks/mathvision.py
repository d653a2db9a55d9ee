"""MathVision (mathllm/MATH-V @a1f5cc3a, evaluation/evaluate.py and utils.py).

The official cleaning of a reply, step by step, and the official equality without a library of
symbolic mathematics and without evaluating what a model wrote.
"""

import contextlib
import re
from dataclasses import replace
from itertools import accumulate

from benchmarks.common import Benchmark, Item, Reading, Reply, lettered, option_lines
from benchmarks.quantities import MAX_EXPRESSION, parse_expression, pattern, rewrites


def question(item: Item) -> str:
    text = re.sub(r"<image\d+>", "", item["question"]).strip()
    drawn = item["options"] == list("ABCDE")  # in the picture
    return text if drawn else text + option_lines(item["options"])


_COMMANDS = pattern("COMMANDS")
_after_phrase, _clean, _spell = map(rewrites, ("mathvision_phrases", "mathvision", "spelling"))


def clean_answer(reply: str) -> str:
    """MATH-V's way from a reply to a cleaned answer, step by step as in its evaluate.py."""
    text = reply.strip()
    for c in "ABCDE":
        starts = (f"{c}\n", f"({c})\n", f"({c}) {c}\n")
        if text.endswith((f" {c}.", f" ({c}).")) or text.startswith(starts):
            text = c
    tail = text.split("is ")[-1].rstrip(".")
    with contextlib.suppress(ValueError):
        float(tail)
        text = tail
    if "oxed{" not in text:
        text = _after_phrase(text)
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = _clean(text.lower())  # find_math_answer: a box without LaTeX noise and units
    if "sqrt" in text:  # fractions too only beside a root
        text = brace_arguments(text)
    text = re.sub(r"\(([a-e])\)", r"\1", text)
    return re.sub(r"\{([a-e])\}", r"\1", text).rstrip(".").lstrip(":").strip()


def brace_arguments(text: str) -> str:
    r"""\sqrt2 -> \sqrt{2}, then \frac12 -> \frac{1}{2} unless a fraction lacks its second one."""
    text = re.sub(r"\\sqrt(?!\\sqrt)([^{])", r"\\sqrt{\1}", text)
    if re.search(r"(?s)\\frac(?!\{).?(?:\\frac|\Z)", text):
        return text
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    return re.sub(r"\\frac([^{])(?=\{)", r"\\frac{\1}", text)


def rounded(text: str) -> float | None:
    """The value to two decimals as latex2sympy2 and `eval` give it officially; None without one.

    Read as far as it goes, a:b as a quotient.  A letter is a free symbol there and a comma makes a
    list, so that neither has a value; a number before a fraction multiplies it; `$` is not seen.
    """
    text = re.split(r"[&_']|\\\\|\\}", text.replace("$", "").replace("\\,", ""))[0]
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    levels = accumulate((char in "({[") - (char in ")}]") for char in text)
    # what follows a bracket that was never opened is not read
    text = text[: next((i for i, level in enumerate(levels) if level < 0), None)]
    if re.search(r"[^\d\s.+\-*/^:!(){}\[\]]", _COMMANDS.sub("", text)):
        return None
    text = re.sub(r"(?<=[\d)}])\s*(?=\\frac)|(?:(?<=[)}])|(?<=\\pi))\s*(?=\d)", "*", text)
    text, ends = text.replace(":", "/"), range(min(len(text), MAX_EXPRESSION), 0, -1)
    prefixes = (parse_expression(_spell(text[:end])) for end in ends)
    try:
        return round(float(next(filter(None, prefixes)).values[0]), 2)
    except (StopIteration, TypeError, OverflowError):  # no expression, no value, no float
        return None


def equal(answer: str, gold: str) -> bool:
    """MATH-V's is_equal: the same text, tuple or value; tiny values are equal to 0 as there."""
    answer, gold = answer.lower(), gold.lower()
    if not answer.replace(" ", "") or not gold.replace(" ", ""):
        return False
    if answer.strip() == gold.strip():
        return True
    a, b = tuple_values(answer), tuple_values(gold)
    if a or b:
        return a is not None and a == b
    x, y = rounded(answer), rounded(gold)
    return x is not None and x == y


def tuple_values(text: str) -> list | None:
    """(a, b, ...) or [a, b, ...] with its bracket and values; None if it is not one."""
    parts = text[1:-1].split(",")
    if (text[0], text[-1]) not in (("(", ")"), ("[", "]")) or len(parts) < 2:
        return None
    values = [p if "infty" in p or p in ("a", "-a") else rounded(p) for p in parts]
    return None if None in values else [text[0], *values]


def read(item: Item, reply: Reply, mode: str) -> Reading:
    answer = clean_answer(reply.final)
    gold = str(item["answer"])
    golds = {gold, str(lettered(item["options"]).get(gold, gold))}  # the letter, or its option
    return Reading(answer, any(equal(answer, gold) for gold in golds), answer != "")


BENCHMARK = Benchmark(
    name="mathvision", files=("test.jsonl",),
    fields={"question": str, "options": list[str | int | float],
            "answer": str | int | float, "level": int | str, "subject": str},
    question=question, new_tokens=4096, read=read, n_expected=3040, split="full",
    groups=("level", "subject"),
)  # fmt: skip
MINI = replace(
    BENCHMARK, name="mathvision_mini", files=("testmini.jsonl", "test.jsonl"), n_expected=304,
    split="testmini", ids_file="testmini_ids.txt",
)  # fmt: skip
