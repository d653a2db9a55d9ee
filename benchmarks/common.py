"""What every benchmark is made of: its descriptor, the paper's prompts, readings and averages.

Each file of this folder says for one benchmark how a row of the official file becomes an item, what
is asked, how a reply is read and what is averaged, and ends with its `Benchmark`, which
eval.TABLE lists.  The verbs that work on any of them stand in eval.py.  Prompts and `final_answer`
are those of OpenGVLab/InternVL, internvl_chat/eval @2410d1db.
"""

import math
import re
import statistics
import string
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.answers import PROMPTS
from benchmarks.quantities import pattern, plain_signs, plain_spelling
from runtime import InputError, fits

PROMPTS_VERSION = "internvl-2410d1db/2"  # changes whenever a prompt of any benchmark does
COT = PROMPTS["en"].removesuffix("{question}")  # the wording that pairs were made with
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
PHRASE_SUFFIX = PROMPTS["direct"].removeprefix("{question}")

Item = dict[str, Any]  # a row of the official file, with our "id" (text, unique)


def lettered(choices: list) -> dict[str, Any]:
    """Letter -> choice; more than 26 have no letter."""
    return dict(zip(string.ascii_uppercase, choices))


def option_lines(choices: list) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in lettered(choices).items())


# --------------------------------------------------------------------------- replies

FINAL = re.compile(r"(Final answer:|Answer:)\s*(.*)", re.IGNORECASE)


def final_answer(reply: str) -> str:
    """InternVL's extract_answer: after the FIRST marker to the end of the line, or everything."""
    match = FINAL.search(reply)
    return match[2].strip() if match else reply


@dataclass(frozen=True)
class Reply:
    """What a model answered, and what a judge said about it."""

    text: str
    cot: bool = False
    cut_off: bool = False  # at the token limit
    judgement: Any = None  # text, or the numbers that an official file holds
    judge: str = ""
    judge_date: str = ""

    @property
    def final(self) -> str:
        return final_answer(self.text) if self.cot else self.text


@dataclass(frozen=True)
class Reading:
    """One reply, read and compared."""

    prediction: Any  # what was read: a letter, a number, a list of objects, a judge's rating
    correct: bool = False
    parsed: bool = True  # False: the rule found nothing to read and fell back to its last resort


Replied = list[tuple[Item, Reply]]
Readings = list[tuple[Item, Reading]]

_NUMBER = pattern("REPLIED")


def last_number(text: str) -> str:
    r"""The last number written, as `float` takes it; "" without one.

    Thousands may be grouped by commas, `{,}`, `\,` or narrow blanks; a power of ten may follow.
    """
    numbers = _NUMBER.findall(plain_spelling(plain_signs(text.replace("\\!", ""))))
    return re.sub(r"\s*\*\s*10\^\{?", "e", numbers[-1].replace(",", "")) if numbers else ""


def in_range(item: Item, numbers: Any, low: float, high: float) -> list[float]:
    """Numbers that a judge's file holds, or an error that names the item."""
    numbers = numbers if isinstance(numbers, list) else [numbers]
    if not numbers or not all(fits(x, float) and low <= x <= high for x in numbers):
        raise InputError(f"{item['id']}: judgement {numbers} out of range {low:g} to {high:g}")
    return [float(x) for x in numbers]


# --------------------------------------------------------------------------- averages


def share(readings: Readings) -> dict:  # accuracy
    return proportion(sum(r.correct for _, r in readings), len(readings))


def proportion(count: int, n: int) -> dict:
    """x100, with its standard error sqrt(p (1 - p) / n)."""
    p = count / max(n, 1)
    error = 100 * math.sqrt(p * (1 - p) / max(n, 1))
    return {"score": 100 * count / max(n, 1), "standard_error": error, "n": n, "correct": count}


def mean(values: list[float]) -> dict:
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return {"score": statistics.fmean(values), "standard_error": error, "n": n}


# --------------------------------------------------------------------------- the descriptor


@dataclass(frozen=True)
class Judge:
    """How a judge is asked; what it said is read by `Benchmark.read` in this mode.

    templates/NAME.txt is in our own words: for figures that compare with published ones pass the
    official template with --judge_template.
    """

    messages: Callable[[Item, Reply, str], list[dict]]  # the template is the last argument
    max_tokens: int
    temperature: float = 0.0
    mode: str = "judge"
    settled: Callable[[Item, str], bool] = lambda item, reply: False  # no judgement needed


@dataclass(frozen=True)
class Benchmark:
    """Everything that is particular to one benchmark."""

    name: str
    files: tuple[str, ...]  # official names, looked for in a folder
    fields: dict[str, Any]  # a row's keys and their types; `a|b` is either, `T | None` optional
    new_tokens: int  # Direct
    read: Callable[[Item, Reply, str], Reading]  # the mode is the last argument
    metric: str = "accuracy"
    n_expected: int = 0  # 0: not fixed
    split: str = "test"
    question: Callable[[Item], str] = lambda item: item.get("question", item.get("text"))
    suffix: str = ""  # the sentence about the answer's format: Direct, and in some files
    cot: Callable[[str], str] = lambda question: COT + question.strip()
    cot_tokens: int = 4096  # 0: no chain-of-thought setting
    item: Callable[[Item], Any] = lambda row: None  # completes a row in place
    summary: Callable[[Readings], dict] = share  # of all items and of each group
    mean_of: tuple[str, ...] = ()  # the score is the mean of these categories that are in the data
    pooled_as: str = ""  # the name of the summary over all items of `mean_of`
    groups: tuple[str, ...] = ()  # keys of an item: a score for each of their values
    modes: tuple[str, ...] = ("rule",)  # ways to read a reply; the first is the default
    judge: Judge | None = None
    categories: tuple[str, ...] = ()  # a file with one of these in its name is of that category
    ordered: bool = False  # official files carry no ids: their order is the id
    ids_file: str = ""  # names the items of this split where the file holds more
    image: bool = True
    judgements_suffice: bool = False  # official reviews hold all that is averaged
    notes: Callable[[list[Item], str, bool], list[str]] = lambda items, mode, cot: []

    def ask(self, item: Item, cot: bool) -> str:
        """The text that a model is asked; one of MathVision's stands in the picture alone."""
        question = self.question(item).removesuffix(self.suffix)
        if not question.strip() and "<image1>" not in item.get("question", ""):
            raise InputError(f"{item['id']}: no question")
        return self.cot(question) if cot else question + self.suffix

    def total(self, readings: Readings) -> dict:
        """Score, standard error, n, what else the benchmark reports, and a table per group."""
        groups: dict[str, dict] = {}
        for key in self.groups:
            members = defaultdict(list)
            for item, reading in readings:
                names = item.get(key)
                for name in names if isinstance(names, list) else [names]:
                    if name not in (None, ""):
                        members[str(name)].append((item, reading))
            groups[key] = {name: self.summary(members[name]) for name in sorted(members)}
        chosen = [g for name, g in groups.get("category", {}).items() if name in self.mean_of]
        if not chosen:
            return {**self.summary(readings), "groups": groups}
        inside = [(item, reading) for item, reading in readings if item["category"] in self.mean_of]
        error = math.sqrt(sum(g["standard_error"] ** 2 for g in chosen)) / len(chosen)
        return {"score": statistics.fmean(g["score"] for g in chosen), "standard_error": error,
                "n": sum(g["n"] for g in chosen), self.pooled_as: self.summary(inside)["score"],
                "accuracy_of_single_replies": share(inside)["score"], "groups": groups}  # fmt: skip

    def is_judged(self, mode: str) -> bool:
        return self.judge is not None and mode == self.judge.mode
