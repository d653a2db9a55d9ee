"""Benchmarks of the MPO paper: Direct, chain of thought, and the difference; scored as published.

    python eval.py generate --bench pope --data D --model_dir M [--cot]   raw replies, resumable
    python eval.py judge    --bench mmvet --data D --answers A --out R    requests for any judge
    python eval.py score    --bench pope --data D --answers A --out R     R/score.json; no torch
    python eval.py report   R...                          the paper's Tables 2, 3, 4 beside ours

One table of descriptors (BENCHES) says for each benchmark how its official files are read, what is
asked, how a reply is read and what is averaged; the verbs below it are shared.  Replies of any
model in the official output formats can be scored.  Whose rule each one follows:

    m3cot, mathvista, pope, mmhal    OpenGVLab/InternVL, internvl_chat/eval @2410d1db
    mathvision, mathvision_mini      mathllm/MATH-V, evaluation/{evaluate,utils}.py @a1f5cc3a
    crpe                             OpenGVLab/all-seeing, eval_crpe.py; VLMEvalKit, utils/crpe.py
    mmvet, llava_bench               yuweihao/MM-Vet; haotian-liu/LLaVA, llava/eval
    object_halbench                  LisaAnne/Hallucination, utils/chair.py; RLHF-V/RLAIF-V
    own                              your own questions, read by the judge of the pairs
    text_mc, text_em, gsm8k          a checkpoint against its own baseline, never against Table 5

`generate` keeps the raw reply: reading it is a matter of scoring.  A score names its n, standard
error, split, setting, extraction, judge and prompts; without all judgements it is "incomplete".
"""

import base64
import binascii
import datetime
import functools
import hashlib
import json
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.answers import PROMPTS as COT_PROMPTS
from benchmarks.answers import edit_distance, get_mode, is_correct, parse_answer, parse_expression
from runtime import (
    AppendLog,
    InputError,
    flag,
    parse_command,
    rank_and_world,
    read_jsonl,
    read_whole_lines,
    run,
    write_atomic,
)

PROMPTS = "internvl-2410d1db/1"  # changes whenever a prompt below does
COT = COT_PROMPTS["en"].removesuffix("{question}")  # the wording that pairs were made with
COT_FREE = (  # MM-Vet: nothing is extracted, the judge reads it all
    "Your task is to answer the question below. Give step by step reasoning. \n\nQuestion:\n\n"
)
COT_MMHAL = (
    "Please think step by step and output in the following format:\n\nRationale:\n{rationale}\n"
    "Answer: {answer}\n\nwhere rationale is the reasoning process of the given question."
)
COT_TOKENS = 4096
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
PHRASE_SUFFIX = COT_PROMPTS["direct"].removeprefix("{question}")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Item = dict[str, Any]  # a row of the official file, with our "id" (text, unique)

# --------------------------------------------------------------------------- reading replies

_FINAL = re.compile(r"(Final answer:|Answer:)\s*(.*)", re.IGNORECASE)


def final_answer(reply: str) -> str:
    """InternVL's extract_answer: after the FIRST marker to the end of the line, or everything."""
    match = _FINAL.search(reply)
    return match[2].strip() if match else reply


@dataclass(frozen=True)
class Judgement:
    """What a judge said about one item: text, or numbers that the official files hold read."""

    said: Any
    judge: str = ""
    date: str = ""


@dataclass(frozen=True)
class Reading:
    """One reply, read and compared."""

    prediction: Any  # what was read: a letter, a number, a list of objects, a judge's rating
    correct: bool = False
    parsed: bool = True  # False: the rule found nothing to read and fell back to its last resort


@dataclass(frozen=True)
class How:
    """How replies are read."""

    mode: str
    cot: bool
    synonyms: str = ""  # CHAIR's list, where it is not beside the data


def m3cot_letter(reply: str, choices: list[str]) -> str:
    """InternVL's post_process: case-sensitive, and "A dog ..." is read as A."""
    reply, options = reply.strip(), dict(zip(LETTERS, choices))
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


def m3cot_own_letter(reply: str, choices: list[str]) -> str:
    """M3CoT's judge_answer: last (X), else last option that occurs, else last letter alone."""
    if "[Answer]" in reply:
        reply = reply.split("[Answer]")[-1].split("[Rationale]")[0].split("[Context]")[0]
    if bracketed := re.findall(r"\(([A-Za-z])\)", reply):
        return bracketed[-1].upper()
    options = dict(zip(LETTERS, choices))
    if named := [k for k, choice in options.items() if choice.lower() in reply.lower()]:
        return named[-1]
    words = re.sub(r"[\n.,!?]", " ", reply).split(" ")
    for case in (str.upper, str.lower):
        if alone := [k for k in options if case(k) in words]:
            return alone[-1]
    return "FAILED"


def read_m3cot(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    if how.mode == "m3cot":
        letter = m3cot_own_letter(reply, item["choices"])
    else:
        letter = m3cot_letter(final_answer(reply) if how.cot else reply, item["choices"])
    return Reading(letter, letter == item["gold"], letter in list(LETTERS[: len(item["choices"])]))


def mathvista_plain(item: Item, reply: str) -> str | None:
    """The first steps of MathVista's extraction, which need no judge; None if they don't apply."""
    if reply == "" or (item["question_type"] == "multi_choice" and reply in item["choices"]):
        return reply
    convert = {"integer": int, "float": float}.get(item["answer_type"])
    try:
        return str(convert(reply)) if convert else None
    except ValueError:
        return None


def mathvista_offline(item: Item, reply: str) -> str:
    """Better than the regex alone, without a judge: the last number, letter or option named."""
    text = final_answer(reply)
    if item["question_type"] == "multi_choice":
        if letters := re.findall(r"\(([A-Za-z])\)", text):
            return f"({letters[-1]})"
        last = max((text.rfind(choice), len(choice), choice) for choice in item["choices"])
        return last[2] if last[0] >= 0 else text
    if item["answer_type"] == "list":
        return (re.findall(r"\[[^\[\]]*\]", text) or [text])[-1]
    return last_number(text) or text


def last_number(text: str) -> str:
    """The last number written, thousands commas removed; "" without one."""
    numbers = re.findall(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+", text)
    return numbers[-1].replace(",", "") if numbers else ""


def mathvista_normalise(item: Item, extraction: Any) -> Reading:
    """MathVista's normalize_extracted_answer; right if the same text as the gold answer."""
    prediction, parsed = str(extraction), True
    if item["question_type"] == "multi_choice":
        text = prediction.strip()
        if letters := re.findall(r"\(([a-zA-Z])\)", text):
            text = letters[0].upper()
        if text in (options := list(LETTERS[: len(item["choices"])])):
            prediction = item["choices"][options.index(text)]
        else:  # a choice is ALWAYS picked, also for an empty reply: the nearest, first on ties
            prediction = min(item["choices"], key=lambda choice: edit_distance(text, choice))
            parsed = prediction == text
    elif item["answer_type"] in ("integer", "float"):
        try:
            number = float(extraction)
            whole = item["answer_type"] == "integer"
            prediction = str(int(number) if whole else round(number, int(item["precision"])))
        except (ValueError, TypeError, OverflowError):
            prediction, parsed = None, False
    return Reading(prediction, prediction == item["answer"], parsed)


def read_mathvista(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    extraction: Any = mathvista_plain(item, reply)
    if how.mode == "judge" and said is not None:
        extraction = "" if said.said is None else said.said
    elif extraction is None:
        extraction = (mathvista_offline if how.mode == "offline" else _rule)(item, reply)
    return mathvista_normalise(item, extraction)


def _rule(item: Item, reply: str) -> str:
    return final_answer(reply)


_ANSWER_PHRASES = tuple(
    the + rest
    for rest in (" final answer is", " answer is", " correct answer is", " answer should be")
    for the in ("the", "The")
)
_NOISE = (  # in this order, as in MATH-V's find_math_answer and _strip_string
    (" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""),
    ("\\text", ""), ("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""),
    ("^{\\circ}", ""), ("^\\circ", ""), ("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""),
    ("{km}", ""), ("km", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
    ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", ""),
    ("\\%", ""), ("{.", "{0."),
)  # fmt: skip


def mathvision_answer(reply: str) -> str:
    """MATH-V's way from a reply to a cleaned answer, step by step as in its evaluate.py."""
    text = reply.strip()
    for c in "ABCDE":
        starts = (f"{c}\n", f"({c})\n", f"({c}) {c}\n")
        if text.endswith((f" {c}.", f" ({c}).")) or text.startswith(starts):
            text = c
    tail = text.split("is ")[-1].rstrip(".")
    try:
        float(tail)
        text = tail
    except ValueError:
        pass
    if "oxed{" not in text:
        for phrase in _ANSWER_PHRASES:
            if phrase in text:
                text = text.split(phrase)[-1].strip().split("\n")[0].split(". ")[0]
            text = text.strip()
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = _mathvision_clean(text)
    for left, right in ("()", "{}"):
        for c in "abcde":
            text = text.replace(left + c + right, c)
    return text.rstrip(".").lstrip(":").strip()


def _brace_arguments(text: str) -> str:
    r"""\sqrt2 -> \sqrt{2}, then \frac12 -> \frac{1}{2}."""
    head, *parts = text.split("\\sqrt")
    roots = [f"{{{p[0]}}}{p[1:]}" if p[:1] not in ("", "{") else p for p in parts]
    text = "\\sqrt".join([head, *roots])
    head, *parts = text.split("\\frac")
    for i, p in enumerate(parts):
        if p[:1] != "{":
            if len(p) < 2:
                return text
            parts[i] = f"{{{p[0]}}}" + (p[1:] if p[1] == "{" else f"{{{p[1]}}}{p[2:]}")
    return "\\frac".join([head, *parts])


def _mathvision_clean(text: str) -> str:
    """MATH-V's find_math_answer: the content of the last box, without LaTeX noise and units."""
    text = text.lower().replace("{}", "")
    if boxes := re.findall(r"oxed{(.*)}", text, flags=re.DOTALL):  # greedy, to the last brace
        text = boxes[-1]
    close, opened = text.find("}"), text.find("{")
    if close != -1 and (opened == -1 or close < opened):
        text = text[:close]
    text = text.split("=")[-1].split("\\approx")[-1]
    for old, new in _NOISE:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    if "sqrt" in text:  # fractions too are only repaired beside a root
        text = _brace_arguments(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    return re.sub(r"^(-?(?:[1-9]\d*|0))/(-?(?:[1-9]\d*|0))$", r"\\frac{\1}{\2}", text)


_KNOWN = (
    r"\\(?:frac|sqrt|pi|cdot|times|div|(?:arc)?(?:sin|cos|tan)|log|ln|left|right|displaystyle)"
    r"(?![a-z])|(?<=\d)\\%"
)


def _rounded(text: str) -> float | None:
    """The value to two decimals as latex2sympy2 and `eval` give it officially; None without one.

    Read as far as it goes, a:b as a quotient.  A letter is a free symbol there and a comma makes a
    list, so that neither has a value; a number before a fraction multiplies it; `$` is not seen.
    """
    text = re.split(r"[&_']|\\\\|\\}", text.replace("$", "").replace("\\,", ""))[0]
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    level = 0
    for i, char in enumerate(text):
        level += (char in "({[") - (char in ")}]")
        if level < 0:  # what follows a bracket that was never opened is not read
            text = text[:i]
            break
    if re.search(r"[^\d\s.+\-*/^:!(){}\[\]]", re.sub(_KNOWN, "", text)):
        return None
    text = re.sub(r"(?<=[\d)}])\s*(?=\\frac)|(?:(?<=[)}])|(?<=\\pi))\s*(?=\d)", "*", text)
    expression = parse_expression(text, ratio=True, prefix=True)
    try:
        return None if expression is None else round(float(expression.value()), 2)
    except (ArithmeticError, ValueError):
        return None


def mathvision_equal(answer: str, gold: str) -> bool:
    """MATH-V's is_equal: the same text, tuple or value; tiny values are equal to 0 as there."""
    answer, gold = answer.lower(), gold.lower()
    if not answer.replace(" ", "") or not gold.replace(" ", ""):
        return False
    if answer.strip() == gold.strip():
        return True
    a, b = _tuple(answer), _tuple(gold)
    if a or b:
        return a is not None and a == b
    x, y = _rounded(answer), _rounded(gold)
    return x is not None and x == y


def _tuple(text: str) -> list | None:
    """(a, b, ...) or [a, b, ...] with its bracket and values; None if it is not one."""
    parts = text[1:-1].split(",")
    if (text[0], text[-1]) not in (("(", ")"), ("[", "]")) or len(parts) < 2:
        return None
    symbols = ("a", "-a")
    values = [p if "infty" in p or p in symbols else _rounded(p) for p in parts]
    return None if None in values else [text[0], *values]


def read_mathvision(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    answer = mathvision_answer(final_answer(reply) if how.cot else reply)
    golds = [str(item["answer"])]
    place = LETTERS.find(golds[0]) if len(golds[0]) == 1 else -1
    if 0 <= place < len(item["options"]):
        golds.append(str(item["options"][place]))
    return Reading(answer, any(mathvision_equal(answer, g) for g in golds), answer != "")


def pope_answer(reply: str) -> str:
    """The official reading: no if a word of the first sentence is exactly No, no or not."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_pope(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    if item["label"] is None:
        raise InputError(f"{item['id']}: no label; put coco_pope_*.json beside the question file")
    text = final_answer(reply) if how.cot else reply
    clear = re.search(r"\b(yes|no|not)\b", text, re.IGNORECASE) is not None
    return Reading(pope_answer(text), pope_answer(text) == item["label"], clear)


def read_crpe(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    text, gold = final_answer(reply) if how.cot else reply, item["correct_option"]
    if how.mode == "strict":
        return Reading(text, text == gold, len(text) == 1)
    if len(text) == 1 or text[:1] in list("ABCD"):
        return Reading(text[0], text[0] == gold, text[0] in "ABCD")
    option = re.search(rf"^{gold}\.\s*(.+?)\s*$", item["text"], re.MULTILINE)
    found = bool(text) and option is not None and option[1].lower() in text.lower()
    return Reading(text, found, found)


def read_choice(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    """Text-only multiple choice: the first option letter that stands alone."""
    text = final_answer(reply) if how.cot else reply
    letters = LETTERS[: len(item["choices"])]
    match = re.search(rf"(?<![^\W_])[{letters}](?![^\W_])", text)
    return Reading(match and match[0], bool(match) and match[0] == item["gold"], bool(match))


def plain_words(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks."""
    text = re.sub(r"[^\w\s]|_", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def read_match(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    """Text-only short answers: a gold answer occurs in the first line (or is all of it)."""
    text = final_answer(reply) if how.cot else reply
    text = plain_words((text.strip().split("\n")[0]).split("answer is")[-1])
    golds = [g for gold in item["golds"] if (g := plain_words(gold))]
    right = text in golds if how.mode == "exact" else any(gold in text for gold in golds)
    return Reading(text, right, text != "")


def read_own(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    """The judge of the preference pairs: format failures, then the matching modes."""
    parsed = parse_answer(reply, "en" if how.cot else "direct")
    right = any(is_correct(parsed, gold, get_mode("own")) for gold in item["golds"] if parsed)
    return Reading(parsed, right, parsed is not None)


def read_gsm8k(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    number = last_number(final_answer(reply) if how.cot else reply)
    right = bool(number) and abs(float(number) - float(item["gold"])) < 1e-6
    return Reading(number or None, right, bool(number))


# ------------------------------------------------------------------- judged and object benchmarks


def in_range(item: Item, numbers: Any, low: float, high: float) -> list[float]:
    """Numbers that a judge's file holds, or an error that names the item."""
    numbers = numbers if isinstance(numbers, list) else [numbers]
    if not numbers or not all(isinstance(x, int | float) and low <= x <= high for x in numbers):
        raise InputError(f"{item['id']}: judgement {numbers} out of range {low:g} to {high:g}")
    return [float(x) for x in numbers]


def read_mmvet(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    """The first blank-separated word as a number in [0, 1]; the official last resort is 0.0."""
    if not isinstance(said.said, str):  # an official grade file: the scores of several runs
        return Reading(statistics.fmean(in_range(item, said.said, 0, 1)))
    try:
        score = float(said.said.split(" ")[0].strip())
    except ValueError:
        score = math.nan
    return Reading(score) if 0 <= score <= 1 else Reading(0.0, parsed=False)


def read_llava(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    """(reference, ours): exactly two numbers in the first line, else (-1, -1), averaged in."""
    pair = said.said
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


def read_mmhal(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    """The one digit s with "rating: s" in the reply, else 0 as in the official script."""
    if not isinstance(said.said, str):
        return Reading(in_range(item, said.said, 0, 6)[0])
    text = said.said.lower()
    in_range(item, [int(s) for s in re.findall(r"rating: (\d{1,9})", text)] or 0, 0, 6)
    digits = [s for s in range(7) if f"rating: {s}" in text]
    return Reading(float(digits[0])) if len(digits) == 1 else Reading(0.0, parsed=False)


@functools.cache
def read_synonyms(path: Path) -> tuple[dict[str, str], frozenset[str]]:
    """(word or double word -> COCO class, all single words) of CHAIR's synonyms.txt."""
    if not path.is_file():
        raise InputError(f"no synonym list {path}: pass --synonyms (CHAIR's data/synonyms.txt)")
    classes: dict[str, str] = {}
    for line in path.read_text().splitlines():
        words = [word.strip() for word in line.split(",") if word.strip()]
        classes |= dict.fromkeys(words, words[0])
    if len(set(classes.values())) < 2:
        raise InputError(f"{path}: expected one COCO class a line, `class, synonym, synonym`")
    # Qualifiers that would fire for a person or a seat, as hard-coded in chair.py ("": no object).
    animals = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub"
    renamed = {f"{age} {a}": a for a in animals.split() for age in ("baby", "adult")}
    renamed |= {f"passenger {v}": v for v in ("jet", "train")}
    renamed |= {"bow tie": "tie", "toilet seat": "toilet", "home plate": ""}
    classes |= {double: classes.get(word, "") for double, word in renamed.items()}
    return classes, frozenset(word for name in classes for word in name.split())


_PLURALS = {"men": "man", "women": "woman", "children": "child", "people": "person",
            "mice": "mouse", "geese": "goose", "oxen": "ox"}  # fmt: skip


def singular(word: str, known: frozenset[str]) -> str:
    """A hand-made singulariser: the first way to take a plural off that gives a listed word."""
    forms = [word, _PLURALS.get(word, "")]
    forms += [word[: -len(p)] + s for p, s in _PLURALS.items() if word.endswith(p)]
    if word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            forms.append(word[:-2])
        if word.endswith("ies"):
            forms.append(word[:-3] + "y")
        if word.endswith("ves"):
            forms += [word[:-3] + "f", word[:-3] + "fe"]
    return next((form for form in forms if form in known), word)


def chair_objects(caption: str, synonyms: Path) -> list[str]:
    """The COCO classes that a caption mentions, every mention, in order (classic CHAIR)."""
    classes, known = read_synonyms(synonyms)
    words = re.findall(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]", caption.lower())
    words = [singular(word, known) for word in words]
    mentions, i = [], 0
    while i < len(words):
        size = next(n for n in (3, 2, 1) if n == 1 or " ".join(words[i : i + n]) in classes)
        mentions.append(" ".join(words[i : i + size]))
        i += size
    if any(classes.get(m) == "toilet" for m in mentions):  # the seat of a toilet is no chair
        mentions = [m for m in mentions if m != "seat"]
    return [classes[m] for m in mentions if classes.get(m)]


def read_object_halbench(item: Item, reply: str, said: Judgement | None, how: How) -> Reading:
    """Classes mentioned, and which of them are not in the image (or its reference captions)."""
    synonyms = Path(how.synonyms or item["_file"].parent / "synonyms.txt")
    parsed = True
    if how.mode == "chair-llm":
        names = said.said if isinstance(said.said, list) else json_list(said.said)
        parsed = names is not None
        found = [c for name in names or [] for c in chair_objects(str(name), synonyms)]
        found = list(dict.fromkeys(found))  # the paper's way: each class of a reply counts once
    else:
        found = chair_objects(reply, synonyms)
    classes = read_synonyms(synonyms)[0]
    if unknown := [name for name in item["gt_objects"] if name not in classes]:
        raise InputError(f"{item['id']}: gt_objects {unknown[:3]} are not in {synonyms}")
    truth = {classes[name] for name in item["gt_objects"]}
    truth |= {c for text in item.get("gt_captions", ()) for c in chair_objects(text, synonyms)}
    invented = [name for name in found if name not in truth]
    return Reading({"objects": found, "hallucinated": invented}, not invented, parsed)


def json_list(text: str) -> list | None:
    """The first JSON list in a judge's reply; None if there is none."""
    for match in re.finditer(r"\[[^\[\]]*\]", text):
        try:
            return json.loads(match[0])
        except ValueError:
            continue
    return None


# --------------------------------------------------------------------------- averages

Pairs = list[tuple[Item, Reading]]


def share(pairs: Pairs) -> dict:
    """Accuracy x100 with its standard error sqrt(p (1 - p) / n)."""
    return proportion(sum(r.correct for _, r in pairs), len(pairs))


def proportion(count: int, n: int) -> dict:
    p = count / max(n, 1)
    error = 100 * math.sqrt(p * (1 - p) / max(n, 1))
    return {"score": 100 * count / max(n, 1), "standard_error": error, "n": n, "correct": count}


def average(pairs: Pairs, scale: float = 100) -> dict:
    values = [scale * r.prediction for _, r in pairs]
    return {"score": statistics.fmean(values), "standard_error": spread(values), "n": len(values)}


def spread(values: list[float]) -> float:
    """Standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def rating(pairs: Pairs) -> dict:
    """MMHal: mean rating of 0 to 6, and the share of ratings under 3."""
    bad = sum(r.prediction < 3 for _, r in pairs)
    return {**average(pairs, 1), "hallucination_rate": bad / len(pairs)}


def ratio(pairs: Pairs) -> dict:
    """LLaVA-Bench: 100 mean(ours) / mean(reference), rounded as in summarize_gpt_review.py."""
    said = [r.prediction for _, r in pairs]
    reference, ours = (round(statistics.fmean(column), 3) for column in zip(*said))
    if reference <= 0:
        raise InputError("the judge's mean score of the reference answers is not positive")
    off = [100 * (b - ours / reference * a) / reference for a, b in said]
    return {"score": round(ours / reference * 100, 1), "standard_error": spread(off),
            "n": len(pairs), "reference_x10": round(reference * 10, 1),
            "model_x10": round(ours * 10, 1)}  # fmt: skip


def confusion(pairs: Pairs) -> dict:
    """POPE: F1 x100 of "yes" and what it is made of; an empty denominator counts as 0."""
    kinds = Counter((r.prediction, r.correct) for _, r in pairs)
    tp, fp = kinds["yes", True], kinds["yes", False]
    tn, fn = kinds["no", True], kinds["no", False]
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
    return {"score": 100 * f1, "standard_error": 100 * math.sqrt(f1 * (1 - f1) / len(pairs)),
            "n": len(pairs), "TP": tp, "FP": fp, "TN": tn, "FN": fn, "precision": precision,
            "recall": recall, "f1": f1, "accuracy": (tp + tn) / len(pairs),
            "yes_ratio": (tp + fp) / len(pairs)}  # fmt: skip


def circular(pairs: Pairs) -> dict:
    """CRPE: a question counts as right if it is with its options in all four orders."""
    groups = defaultdict(list)
    for item, reading in pairs:
        groups[item["group"]].append(reading.correct)
    if odd := [name for name, rows in groups.items() if len(rows) != 4]:
        raise InputError(f"{len(odd)} questions lack some of their 4 rows, first {odd[0]}")
    return proportion(sum(map(all, groups.values())), len(groups))


def chair(pairs: Pairs) -> dict:
    """CHAIR x100, lower is better; the response level divides by replies that name an object."""
    found = [(len(r.prediction["objects"]), len(r.prediction["hallucinated"])) for _, r in pairs]
    mentions, invented = (sum(column) for column in zip(*found))
    bad, naming = sum(b > 0 for _, b in found), sum(a > 0 for a, _ in found)
    response = proportion(bad, naming)
    return {"score": response["score"], "standard_error": response["standard_error"],
            "n": len(pairs), "response_level": response["score"],
            "mention_level": 100 * invented / max(mentions, 1), "CHAIRs": bad / len(pairs),
            "replies_with_objects": naming, "hallucinated_replies": bad,
            "mentions": mentions, "hallucinated_mentions": invented}  # fmt: skip


def mean_of_groups(kind: str, names: tuple[str, ...], pooled_as: str) -> Callable:
    """Headline = plain mean of some groups' scores, as far as they are in the data."""

    def total(pairs: Pairs, groups: dict, summary: Callable) -> dict:
        chosen = [groups[kind][name] for name in names if name in groups[kind]]
        if not chosen:  # CRPE's existence file alone
            return summary(pairs)
        inside = [(i, r) for i, r in pairs if i["category"] in names]
        error = math.sqrt(sum(g["standard_error"] ** 2 for g in chosen)) / len(chosen)
        return {"score": statistics.fmean(g["score"] for g in chosen), "standard_error": error,
                "n": sum(g["n"] for g in chosen), pooled_as: summary(inside)["score"],
                "accuracy_of_single_replies": share(inside)["score"]}  # fmt: skip

    return total


# --------------------------------------------------------------------------- official files


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """(where, row) of a .json or .jsonl file; an object of objects gives rows with "id"."""
    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        # POPE's question files are one object a line despite their name, so both are tried
        whole = json.loads(path.read_bytes()) if path.suffix == ".json" else None
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "imgToEval" in whole:  # CHAIR's caption files
        whole = list(whole["imgToEval"].values())
    if isinstance(whole, dict) and all(isinstance(v, dict | str) for v in whole.values()):
        rows = {k: v if isinstance(v, dict) else {"text": v} for k, v in whole.items()}
        return [(f"{path} key {k!r}", {"id": k, **row}) for k, row in rows.items()]
    if isinstance(whole, list):  # MMHal's judge files are lists of texts
        rows = [r if isinstance(r, dict) else {"index": i, "text": r} for i, r in enumerate(whole)]
        return [(f"{path} entry {i}", row) for i, row in enumerate(rows)]
    return [(f"{path} line {number}", row) for number, row in read_jsonl(path)]


def raw_id(row: dict) -> Any:
    """The id of a row under whichever of the official names it has; None without one."""
    keys = ("id", "pid", "question_id", "image_id", "index", "image_path")
    return next((row[k] for k in keys if row.get(k) is not None), None)


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Names for an error message: the first few, and how many there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def find_data(bench: "Bench", given: tuple[Path, ...]) -> list[Path]:
    """The question files: as given, or found in a given folder by their official names."""
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            found = next((f for glob in bench.files if (f := sorted(path.glob(glob)))), None)
            if not found:
                raise InputError(f"no {' or '.join(bench.files)} in {path}: name the file of it")
            files += found
        else:
            files.append(path)
    return files


def lacking(bench: "Bench", row: dict) -> list[str]:
    """The fields of a benchmark that a row lacks; `a|b` is either name."""
    return [f for f in bench.fields if not any(name in row for name in f.split("|"))]


def load_items(bench: "Bench", given: tuple[Path, ...], ids: str = "") -> list[Item]:
    """The items in file order, ids unique; those that --ids leaves out are marked "_out"."""
    items: list[Item] = []
    for path in find_data(bench, given):
        for index, (where, row) in enumerate(read_rows(path)):
            if absent := lacking(bench, row):
                like = [b for b in BENCHES.values() if not lacking(b, row)]
                most = max(like, key=lambda b: len(b.fields), default=None)
                hint = f"; it looks like {most.name}" if most else ""
                raise InputError(f"{where}: no {absent[0]!r}: not a file of {bench.name}{hint}")
            row |= {"_file": path, "_index": index}
            row["id"] = str(index if raw_id(row) is None or bench.ordered else raw_id(row))
            try:
                bench.item(row)
            except InputError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise InputError(f"{where}: not a row of {bench.name}: {error!r}") from None
            items.append(row)
    if not items:
        raise InputError(f"no items in {listed(given)}")
    if repeated := [k for k, n in Counter(item["id"] for item in items).items() if n > 1]:
        raise InputError(f"{listed(given)}: duplicate ids: {listed(repeated)}")
    if not ids and bench.ids_file and len(items) > bench.n_expected:
        ids = items[0]["_file"].parent / bench.ids_file
    if ids:
        if not (ids_file := Path(ids)).is_file():
            raise InputError(f"no file {ids_file}: pass --ids a file with the ids of {bench.name}")
        wanted = set(ids_file.read_text().split())
        if unknown := wanted - {item["id"] for item in items}:
            raise InputError(f"{ids_file}: ids that the data lacks: {listed(sorted(unknown))}")
        for item in items:
            item["_out"] = item["id"] not in wanted
    return items


class Ids:
    """Finds the item that a row of answers or judgements is about."""

    def __init__(self, bench: "Bench", items: list[Item]) -> None:
        self.ordered, self.known = bench.ordered, defaultdict(set)
        for item in items:
            for name in (item["id"], *item.get("aliases", ())):
                self.known[str(name)].add(item["id"])

    def find(self, where: str, row: dict, order: int) -> str:
        key = raw_id(row)
        if self.ordered:  # a chat API's raw answer has an id of its own
            key = order if "choices" in row else row.get("id", row.get("index", order))
        if key is None:
            raise InputError(f"{where}: no id (id, pid, question_id, image_id or index)")
        names = [f"{row['category']}/{key}"] if row.get("category") else []
        found = next((f for n in (*names, str(key)) if (f := self.known.get(n))), set())
        if len(found) > 1 and not names:
            some = listed(sorted(found))
            raise InputError(f"{where}: id {key!r} may be {some}: the row needs its 'category'")
        if len(found) != 1:
            raise InputError(f"{where}: id {key!r} is not in the data: another benchmark's file?")
        return next(iter(found))


# the raw reply first: official files may also hold the read answer, the question or the gold
REPLY_KEYS = tuple(
    "response answer_orig model_answer caption messages prediction text answer".split()
)
JUDGEMENT_KEYS = tuple("tuple score judgement content review text".split())


def load_replies(bench: "Bench", items: list[Item], given: tuple[Path, ...]) -> dict[str, dict]:
    """id -> row with "reply", from our answers.jsonl or the official output formats."""
    ids, rows = Ids(bench, items), {}
    for path in given:
        if path.is_dir():
            path = path / "answers.jsonl"
            if not path.exists():
                raise InputError(f"no {path}: `generate` writes it when every item is answered")
        category = next((c for c in POPE if c in path.name and bench.name == "pope"), None)
        for order, (where, row) in enumerate(read_rows(path)):
            if category and "id" not in row:
                row.setdefault("category", category)
            name = ids.find(where, row, order)
            if name in rows:
                raise InputError(f"{where}: duplicate id {name!r} in the answers")
            key = next((k for k in REPLY_KEYS if k in row), None)
            if key is None:
                raise InputError(f"{where}: no reply; expected one of {', '.join(REPLY_KEYS)}")
            reply = row[key]
            if isinstance(reply, list) and reply:  # the turns of M3CoT's own outputs
                reply = reply[-1].get("content") if isinstance(reply[-1], dict) else reply[-1]
            rows[name] = {**row, "reply": "" if reply is None else str(reply)}
    missing = [item["id"] for item in items if not item.get("_out") and item["id"] not in rows]
    if given and missing:
        raise InputError(f"no reply for {len(missing)} of {len(items)} items: {listed(missing)}")
    return rows


def load_judgements(
    bench: "Bench", items: list[Item], given: Iterable[Path], judge: str
) -> dict[str, Judgement]:
    """id -> judgement, from judgements.jsonl or the files of the official judges."""
    ids, found = Ids(bench, items), {}
    for path in given:
        rows = read_rows(path)
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
        for order, (where, row) in enumerate(rows):
            name = ids.find(where, row, order)
            if name in found:
                raise InputError(f"{where}: duplicate id {name!r} in the judgements")
            said = next((row[k] for k in JUDGEMENT_KEYS if k in row), None)
            if said is None and isinstance(row.get("choices"), list):  # a chat API's raw answer
                said = row["choices"][0]["message"]["content"]
            if said is None:
                raise InputError(f"{where}: no judgement; expected 'judgement' with a text")
            who = str(row.get("judge") or row.get("reviewer_id") or judge or "not named")
            found[name] = Judgement(said, who, str(row.get("date") or f"{written:%Y-%m-%d}"))
    return found


# --------------------------------------------------------------------------- items and prompts

POPE = ("random", "popular", "adversarial")
RELATIONS = ("subject", "predicate", "object")


def item_choices(row: Item) -> None:
    """M3CoT in InternVL's or the Hugging Face layout, and text_mc: the gold becomes a letter."""
    row["choices"] = [str(choice) for choice in row["choices"]]
    answer, letters = row["answer"], LETTERS[: len(row["choices"])]
    row["gold"] = answer.strip().upper() if isinstance(answer, str) else LETTERS[answer]
    if len(row["gold"]) != 1 or row["gold"] not in letters:
        raise ValueError(f"answer {answer!r} is none of the {len(letters)} choices")
    row["aliases"] = [row["image"]] if row.get("image") else []


def item_mathvista(row: Item) -> None:
    row["answer"], row["choices"] = str(row["answer"]), list(row["choices"] or [])
    beside = row["_file"].parent / "query.json"
    if "query" not in row and beside.exists():
        row["query"] = _json(beside).get(row["id"])
    row["task"] = (row.get("metadata") or {}).get("task", "")


@functools.cache
def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def item_pope(row: Item) -> None:
    """The three official files number their questions alike: the key is (category, number)."""
    named = re.search("|".join(POPE), row["_file"].name)
    row["category"] = row.get("category") or (named and named[0])
    if row["category"] not in POPE:
        raise ValueError(f"no category, and the file's name holds none of {', '.join(POPE)}")
    number = row["question_id"]
    if "label" not in row:  # LLaVA's list has no labels: they are in the official files beside it
        labels = _pope_labels(row["_file"].parent)
        text = row["text"].removesuffix(PHRASE_SUFFIX).strip()
        row["label"] = labels.get((row["category"], row["image"], text))
    row["id"], row["aliases"] = f"{row['category']}/{number}", [number]


def near(folder: Path, name: str) -> list[Path]:
    """The files of that name in a folder and one level below it."""
    return [*sorted(folder.glob(name)), *sorted(folder.glob(f"*/{name}"))]


@functools.cache
def _pope_labels(folder: Path) -> dict[tuple, str]:
    files = [(c, f) for c in POPE for f in near(folder, f"coco_pope_{c}.json")]
    rows = [(category, row) for category, path in files for _, row in read_rows(path)]
    return {(category, r["image"], r["text"].strip()): r["label"] for category, r in rows}


def item_crpe(row: Item) -> None:
    """Four consecutive rows are one question; existence and relation are numbered apart."""
    if len(row["correct_option"]) != 1:
        raise ValueError(f"correct_option {row['correct_option']!r} is not a letter")
    number, category = row["question_id"], row["category"]
    row["id"] = f"{'exist' if category == 'exist' else 'relation'}/{number}"
    row["aliases"] = [number, f"{category}/{number}"]
    row["group"] = f"{row['_file']} {row['_index'] // 4}"


def item_mmvet(row: Item) -> None:
    row["id"] = row["id"] if row["id"].startswith("v1_") else f"v1_{row['id']}"
    row["aliases"] = [row["id"].removeprefix("v1_")]
    row["question"] = row.get("question", row.get("text"))
    row["image"] = row.get("imagename", row.get("image"))


def item_mmhal(row: Item) -> None:
    source = row.get("image_src") or row.get("image_id", "")
    row["image"] = row.get("image") or row.get("image_path") or Path(source).name


def item_object_halbench(row: Item) -> None:
    """Objects that are there: `gt_objects`, else COCO 2014's annotation files in the folder."""
    if "gt_objects" not in row:
        objects, captions = _coco_truth(row["_file"].parent)
        row["gt_objects"] = sorted(objects[int(row["image_id"])])
        row["gt_captions"] = captions[int(row["image_id"])]
    row["question"] = row.get("question") or "Please describe this image in detail."


@functools.cache
def _coco_truth(folder: Path) -> tuple[dict[int, set], dict[int, list]]:
    """image id -> classes of instances_*2014.json, and texts of captions_*2014.json."""
    objects, captions = defaultdict(set), defaultdict(list)
    instances = near(folder, "instances_*2014.json")
    if not instances:
        raise InputError(f"no 'gt_objects' in the rows and no instances_*2014.json in {folder}")
    for path in instances:
        whole = json.loads(path.read_bytes())
        names = {c["id"]: c["name"] for c in whole["categories"]}
        for a in whole["annotations"]:
            objects[a["image_id"]].add(names[a["category_id"]])
    for path in near(folder, "captions_*2014.json"):
        for a in json.loads(path.read_bytes())["annotations"]:
            captions[a["image_id"]].append(a["caption"])
    return objects, captions


def item_text(row: Item) -> None:
    gold = row["answer"]
    row["golds"] = [str(g) for g in (gold if isinstance(gold, list) else [gold])]


def item_gsm8k(row: Item) -> None:
    row["gold"] = str(row["answer"]).split("####")[-1].strip().replace(",", "")
    float(row["gold"])


def wrapped(question: str, cot: bool, suffix: str = "") -> str:
    """Direct: the question and its answer-format sentence; CoT: the question in the CoT text."""
    return COT + question.strip() if cot else question + suffix


def ask_choices(item: Item, cot: bool) -> str:
    hint = item.get("hint") or item.get("context")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item["choices"])]
    question = "\n".join([*([str(hint)] if hint else []), item["question"], *lines])
    return wrapped(question, cot, LETTER_SUFFIX).strip()


def ask_mathvista(item: Item, cot: bool) -> str:
    if not item.get("query"):
        raise InputError(f"{item['id']}: no 'query'; put MathVista's query.json beside the data")
    return wrapped(item["query"], cot)


def ask_mathvision(item: Item, cot: bool) -> str:
    text = re.sub(r"<image\d+>", "", item["question"]).strip()
    if item["options"] and item["options"] != list("ABCDE"):  # A..E: drawn in the picture
        text += "".join(f"\n{k}. {option}" for k, option in zip(LETTERS, item["options"]))
    return wrapped(text, cot)


def ask_pope(item: Item, cot: bool) -> str:
    return wrapped(item["text"].removesuffix(PHRASE_SUFFIX), cot, PHRASE_SUFFIX)


def ask_crpe(item: Item, cot: bool) -> str:
    return wrapped(item["text"].removesuffix(LETTER_SUFFIX), cot, LETTER_SUFFIX)


def ask_mmvet(item: Item, cot: bool) -> str:
    return COT_FREE + item["question"] if cot else item["question"] + " "  # InternVL adds a blank


def ask_llava(item: Item, cot: bool) -> str:
    return item["text"] + " Please give a detailed answer."


def ask_mmhal(item: Item, cot: bool) -> str:
    return f"{item['question']}\n\n{COT_MMHAL}".strip() if cot else item["question"]


def ask_plain(item: Item, cot: bool) -> str:
    return wrapped(item["question"], cot)


def ask_phrase(item: Item, cot: bool) -> str:
    return wrapped(item["question"], cot, PHRASE_SUFFIX)


# --------------------------------------------------------------------------- requests to a judge
# Default texts are our own words: for figures that compare with published ones pass the official
# template with --judge_template.


def judge_mmvet(item: Item, reply: str, template: str) -> list[dict]:
    if "answer" not in item:
        raise InputError(f"{item['id']}: no 'answer'; judging needs MM-Vet's mm-vet.json")
    gold = item["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join([item["question"], gold, reply, ""])
    return [{"role": "user", "content": f"{template}\n{row}"}]


MMVET_TEMPLATE = """Rate how well each prediction agrees with the ground truth, from 0.0 (all wrong) to 1.0 (all right) in steps of 0.1. Parts joined by <AND> are all needed; any one of the parts joined by <OR> is enough. Complete the last cell of the table with the number alone.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which numbers are circled? | 4 <AND> 9 | Only 7 is circled. | 0.0
Which numbers are circled? | 4 <AND> 9 | The 9 is circled. | 0.5
Which numbers are circled? | 4 <AND> 9 | 4 and 9 | 1.0
What is the animal? | cat <OR> kitten | a small kitten | 1.0
"""  # noqa: E501


def judge_llava(item: Item, reply: str, template: str) -> list[dict]:
    folder, category = item["_file"].parent, item["category"].removeprefix("llava_bench_")
    contexts = {row["image"]: row["caption"] for _, row in read_rows(folder / "context.jsonl")}
    references = {str(raw_id(r)): r["text"] for _, r in read_rows(folder / "answers_gpt4.jsonl")}
    if item["image"] not in contexts or item["id"] not in references:
        raise InputError(f"{item['id']}: not in context.jsonl and answers_gpt4.jsonl of {folder}")
    context = contexts[item["image"]]
    context = "\n".join(context) if isinstance(context, list) else context
    role = "Assistant"
    if template.lstrip().startswith("{"):  # LLaVA's rule.json
        rule = json.loads(template)[f"llava_bench_{category}"]
        template, role = rule["prompt"], rule["role"]
    text = f"[Context]\n{context}\n\n[Question]\n{item['text']}\n\n"
    for number, answer in ((1, references[item["id"]]), (2, reply)):
        text += f"[{role} {number}]\n{answer}\n\n[End of {role} {number}]\n\n"
    system = "You are a helpful and precise assistant for checking the quality of the answer."
    return [{"role": "system", "content": system},
            {"role": "user", "content": f"{text}[System]\n{template}\n\n"}]  # fmt: skip


LLAVA_TEMPLATE = """Two assistants answered the question about an image that you know from the context. Judge helpfulness, relevance, accuracy and level of detail, and do not let their order matter. First write one line with nothing but two numbers from 1 to 10 separated by a blank: the score of Assistant 1 and that of Assistant 2. Then explain your scores."""  # noqa: E501


def judge_mmhal(item: Item, reply: str, template: str) -> list[dict]:
    parts = template.split("{}")
    if len(parts) != 5:
        raise InputError("MMHal's template needs four {}: contents, question, answer, response")
    values = (", ".join(item["image_content"]), item["question"], item["gt_answer"], reply)
    text = parts[0] + "".join(value + part for value, part in zip(values, parts[1:]))
    return [{"role": "user", "content": text}]


MMHAL_TEMPLATE = """Judge a model's answer about an image. What counts is whether it informs and whether it states anything that the image contents and the human answer do not support (a hallucination). The human answer may be short: more detail is welcome if nothing in it is false. Explain briefly, then end with one line from this list:
- Rating: 6, very informative with good analysis or reasoning, no hallucination
- Rating: 5, very informative, no hallucination
- Rating: 4, somewhat informative, no hallucination
- Rating: 3, not informative, no hallucination
- Rating: 2, very informative, with hallucination
- Rating: 1, somewhat informative, with hallucination
- Rating: 0, not informative, with hallucination

### Image contents
{}

### Question
{}

### Human answer
{}

### Answer to judge
{}
"""  # noqa: E501


def judge_mathvista(item: Item, reply: str, template: str) -> list[dict]:
    text = f"{template.strip()}\n\n{ask_mathvista(item, False)}\n\n{reply}\n\nExtracted answer: "
    return [{"role": "user", "content": text}]


MATHVISTA_TEMPLATE = """Read the response and write the answer that it gives, alone, in the form that the hint asks for.

Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.
Question: How many sides has the shape?

The shape closes after its sixth side.

Extracted answer: 6

Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.
Question: Which bar is tallest?
Choices:
(A) red
(B) blue

The blue bar ends above the red one.

Extracted answer: B
"""  # noqa: E501


def judge_object_halbench(item: Item, reply: str, template: str) -> list[dict]:
    text = template.replace("{question}", item["question"]).replace("{answer}", reply)
    return [{"role": "system", "content": text}]


OBJECT_TEMPLATE = """List every object that the answer says is visible in the picture: names only, without attributes, as one JSON list such as ["dog", "red bus"] with [] for none.

Question: {question}

Answer: {answer}
"""  # noqa: E501


@dataclass(frozen=True)
class JudgeRule:
    """How a judge is asked; how its reply is read stands with the benchmark."""

    ask: Callable[[Item, str, str], list[dict]]
    template: str
    max_tokens: int
    temperature: float = 0.0
    settled: Callable[[Item, str], bool] = lambda item, reply: False  # no judgement needed


# --------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Bench:
    """Everything that is particular to one benchmark."""

    name: str
    files: tuple[str, ...]  # official names, looked for in a folder
    fields: tuple[str, ...]  # a row without them belongs to another benchmark
    item: Callable[[Item], Any]  # completes a row in place
    ask: Callable[[Item, bool], str]
    new_tokens: int  # Direct
    read: Callable[[Item, str, Judgement | None, How], Reading]
    metric: str
    n_expected: int = 0  # 0: not fixed
    split: str = "test"
    summary: Callable[[Pairs], dict] = share  # of all items and of each group
    headline: Callable | None = None  # where the score is not the summary of all items
    groups: dict[str, Callable[[Item], Iterable[str]]] = field(default_factory=dict)
    modes: tuple[str, ...] = ("rule",)  # ways to read a reply; the first is the default
    judged: tuple[str, ...] = ()  # the modes that need a judgement of every item
    judge: JudgeRule | None = None
    cot: bool = True
    ordered: bool = False  # official files carry no ids: their order is the id
    ids_file: str = ""  # names the items of this split where the file holds more
    image: bool = True
    note: str = ""


def by(key: str) -> Callable[[Item], list[str]]:
    return lambda item: [str(item[key])] if item.get(key) not in (None, "") else []


_MATHVISION = {
    "fields": ("question", "options", "answer", "level", "subject"),
    "item": lambda row: None,
    "ask": ask_mathvision,
    "new_tokens": 4096,
    "read": read_mathvision,
    "metric": "accuracy",
    "groups": {"level": by("level"), "subject": by("subject")},
}
_OWN_BASELINE = "compare with the same checkpoint's baseline only, not with the paper's Table 5"

BENCHES = {
    b.name: b
    for b in (
        Bench(
            "m3cot", ("test.jsonl", "test*.jsonl"), ("question", "choices", "answer", "image"),
            item_choices, ask_choices, 100, read_m3cot, "accuracy", 2318,
            groups={"domain": by("domain")}, modes=("internvl", "m3cot"),
        ),
        Bench(
            "mathvista", ("testmini.json", "testmini.jsonl"),
            ("question", "question_type", "answer_type", "choices", "answer"),
            item_mathvista, ask_mathvista, 4096, read_mathvista, "accuracy", 1000, "testmini",
            groups={"task": by("task"), "answer_type": by("answer_type")},
            modes=("rule", "offline", "judge"), judged=("judge",),
            judge=JudgeRule(
                judge_mathvista, MATHVISTA_TEMPLATE, 256,
                settled=lambda item, reply: mathvista_plain(item, reply) is not None,
            ),
        ),
        Bench("mathvision", ("test.jsonl",), n_expected=3040, split="full", **_MATHVISION),
        Bench(
            "mathvision_mini", ("testmini.jsonl", "test.jsonl"), n_expected=304, split="testmini",
            ids_file="testmini_ids.txt", **_MATHVISION,
        ),
        Bench(
            "pope", ("coco_pope_*.json", "llava_pope_test.jsonl"), ("question_id", "image", "text"),
            item_pope, ask_pope, 100, read_pope, "mean of the three F1", 8910, "COCO val2014",
            summary=confusion, groups={"category": by("category")},
            headline=mean_of_groups("category", POPE, "pooled_f1"),
        ),
        Bench(
            "crpe", ("crpe_*.jsonl", "questions*.jsonl"),
            ("question_id", "text", "category", "correct_option"),
            item_crpe, ask_crpe, 100, read_crpe, "circular accuracy, mean of the relations",
            summary=circular, groups={"category": by("category")},
            modes=("vlmevalkit", "strict"),
            headline=mean_of_groups("category", RELATIONS, "pooled_relation"),
        ),
        Bench(
            "mmvet", ("mm-vet*.json", "llava-mm-vet.jsonl"),
            ("question|text", "capability|question_id"),
            item_mmvet, ask_mmvet, 1000, read_mmvet, "mean judged correctness", 218,
            summary=average, groups={"capability": lambda item: item.get("capability", [])},
            modes=("judge",), judged=("judge",), judge=JudgeRule(judge_mmvet, MMVET_TEMPLATE, 3),
        ),
        Bench(
            "llava_bench", ("questions.jsonl",), ("question_id", "image", "text", "category"),
            lambda row: None, ask_llava, 1000, read_llava, "relative score", 60, "in the wild",
            summary=ratio, groups={"category": by("category")}, modes=("judge",),
            judged=("judge",), judge=JudgeRule(judge_llava, LLAVA_TEMPLATE, 1024, 0.2), cot=False,
        ),
        Bench(
            "mmhal", ("mmhal*.jsonl", "response_template.json", "records*.jsonl"),
            ("question", "gt_answer", "image_content"),
            item_mmhal, ask_mmhal, 1024, read_mmhal, "mean rating, 0 to 6", 96,
            summary=rating, groups={"question_type": by("question_type")}, modes=("judge",),
            judged=("judge",), judge=JudgeRule(judge_mmhal, MMHAL_TEMPLATE, 1024), ordered=True,
        ),
        Bench(
            "object_halbench", ("*halbench*.jsonl", "captions*.jsonl"), ("image_id",),
            item_object_halbench, ask_plain, 1024, read_object_halbench,
            "replies with an object that is not there (lower is better)", 300, "COCO 2014",
            summary=chair, modes=("chair-rule", "chair-llm"), judged=("chair-llm",),
            judge=JudgeRule(judge_object_halbench, OBJECT_TEMPLATE, 512), cot=False,
            note="chair-rule matches words and is not the paper's number",
        ),
        Bench(
            "text_mc", ("*.jsonl",), ("question", "choices", "answer"), item_choices, ask_choices,
            100, read_choice, "accuracy", groups={"subject": by("subject")}, image=False,
            note=_OWN_BASELINE,
        ),
        Bench(
            "text_em", ("*.jsonl",), ("question", "answer"), item_text, ask_phrase, 50, read_match,
            "accuracy", modes=("substring", "exact"), image=False, note=_OWN_BASELINE,
        ),
        Bench(
            "own", ("*.jsonl",), ("question", "answer", "image"), item_text, ask_phrase, 50,
            read_own, "accuracy", note="your own questions, in the format of pairs.py sample",
        ),
        Bench(
            "gsm8k", ("test.jsonl", "*.jsonl"), ("question", "answer"), item_gsm8k, ask_plain, 512,
            read_gsm8k, "accuracy", image=False, note=_OWN_BASELINE,
        ),
    )
}  # fmt: skip
BenchName = Literal[
    "m3cot", "mathvista", "mathvision", "mathvision_mini", "pope", "crpe", "mmvet", "llava_bench",
    "mmhal", "object_halbench", "text_mc", "text_em", "own", "gsm8k",
]  # fmt: skip

# --------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class Ask:
    """Shared flags of the verbs that read a benchmark."""

    bench: BenchName = flag("", "which benchmark")
    data: tuple[Path, ...] = flag((), "its official question file, or the folder with it")
    ids: str = flag("", "file with the ids of a subset (off: all)")
    cot: bool = flag(False, "chain of thought (Direct otherwise)")

    def __post_init__(self) -> None:
        if self.bench not in BENCHES:
            raise ValueError(f"--bench is needed: one of {', '.join(BENCHES)}")
        if self.cot and not BENCHES[self.bench].cot:
            raise ValueError(f"{self.bench} has no chain-of-thought setting")


@dataclass(frozen=True)
class Generate(Ask):
    """Answer a benchmark's questions greedily; run it again to go on where it stopped."""

    model_dir: Path = flag(Path(), "folder with config.json and weights")
    images: str = flag("", "folder that image paths start from (off: the data's)")
    out: str = flag("", "folder for replies (off: results/MODEL/BENCH-SETTING)")
    max_tiles: int = flag(6, "tiles per image without the thumbnail")
    max_new_tokens: int = flag(0, "longest reply (0: the benchmark's own)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data or self.model_dir == Path():
            raise ValueError("--data and --model_dir are needed")


def image_paths(bench: Bench, items: list[Item], root: str, out: Path) -> list[Path | None]:
    """One path an item; every missing or forbidden one is named in a single error."""
    paths, bad = [], []
    for item in items:
        name = item.get("image") if bench.image else None
        folder = Path(root or item["_file"].parent)
        if not bench.image:
            paths.append(None)
        elif not isinstance(name, str) or not name:
            bad.append(f"{item['id']}: no image named")
        elif len(name) > 1000:  # MMHal's and RLAIF-V's files hold the picture itself, as base64
            paths.append(_unpacked(item["id"], name, out))
        elif not (path := folder / name).resolve().is_relative_to(folder.resolve()):
            bad.append(f"{item['id']}: image {name!r} leaves {folder}")
        elif not path.is_file():
            bad.append(f"{item['id']}: no {path}")
        else:
            paths.append(path)
    if bad:
        raise InputError(
            f"{len(bad)} of {len(items)} images cannot be used; --images names their folder\n  "
            + "\n  ".join(bad)
        )
    return paths


def _unpacked(name: str, text: str, out: Path) -> Path:
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise InputError(f"{name}: the image is neither a path nor base64 ({error})") from None
    path = out / "images" / f"{hashlib.sha256(content).hexdigest()[:24]}.jpg"
    if not path.exists():
        write_atomic(path, content)
    return path


def weights_mark(model_dir: Path) -> str:
    """Changes with the model: its small files' content, its weight files' names and sizes."""
    if not (model_dir / "config.json").is_file():
        raise InputError(f"no config.json in {model_dir}: --model_dir names a model's folder")
    digest = hashlib.sha256()
    for path in sorted(model_dir.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes() if path.suffix == ".json" else b"")
    return digest.hexdigest()[:16]


def answered(out: Path) -> dict[str, dict]:
    """id -> reply from the part files of every process of every earlier start."""
    rows: dict[str, dict] = {}
    for path in sorted(out.glob("answers.*-of-*.jsonl")):
        for row in read_whole_lines(path)[0]:
            if rows.setdefault(row["id"], row)["response"] != row["response"]:
                raise InputError(f"{path}: a second, different reply to {row['id']!r}")
    return rows


def generate(cfg: Generate) -> Path:
    """The verb: replies to `out`/answers.jsonl, the same file from any number of processes."""
    bench, (rank, world) = BENCHES[cfg.bench], rank_and_world()
    items = [i for i in load_items(bench, cfg.data, cfg.ids) if not i.get("_out")]
    setting = "CoT" if cfg.cot else "Direct"
    model = cfg.model_dir.resolve().name
    out = Path(cfg.out or f"results/{model}/{bench.name}-{setting.lower()}")
    images = image_paths(bench, items, cfg.images, out)
    questions = [bench.ask(item, cfg.cot) for item in items]
    tokens = cfg.max_new_tokens or (COT_TOKENS if cfg.cot else bench.new_tokens)
    asked = json.dumps([[i["id"], q, p and p.name] for i, q, p in zip(items, questions, images)])
    record = {
        "benchmark": bench.name,
        "setting": setting,
        "prompts": PROMPTS,
        "model": model,
        "weights": weights_mark(cfg.model_dir),
        "questions": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "max_tiles": cfg.max_tiles,
        "max_new_tokens": tokens,
        "temperature": 0.0,
    }
    same_run(out / "run.json", record)

    done = answered(out)
    log = AppendLog(out / f"answers.{rank}-of-{world}.jsonl")
    mine = [k for k in range(rank, len(items), world) if items[k]["id"] not in done]
    if mine:
        from tqdm import tqdm  # noqa: PLC0415  (scoring needs none of these)

        from generate import Generator, Prompt  # noqa: PLC0415

        prompts = (
            Prompt(items[k]["id"], questions[k], images=(images[k],) if images[k] else (),
                   max_tiles=cfg.max_tiles, max_new_tokens=tokens)
            for k in mine
        )  # fmt: skip
        generator = Generator.load(cfg.model_dir, temperature=0.0, max_new_tokens=tokens)
        samples = tqdm(generator.run(prompts), total=len(mine), disable=rank > 0, desc=bench.name)
        for sample in samples:
            log.append(
                {
                    "id": sample.prompt_id,
                    "response": sample.text.strip(),
                    "finish_reason": sample.finish_reason,
                    "num_tokens": sample.num_tokens,
                }
            )
    log.close()

    done = answered(out)
    left = [item["id"] for item in items if item["id"] not in done]
    if left:  # another process has these; the one that completes the set writes the file
        print(f"{out}: {len(items) - len(left)} of {len(items)} answered", file=sys.stderr)
        return out
    lines = [json.dumps(done[item["id"]], ensure_ascii=False) + "\n" for item in items]
    write_atomic(out / "answers.jsonl", "".join(lines))
    print(f"{out / 'answers.jsonl'}: {len(items)} replies, {setting}", file=sys.stderr)
    return out


def same_run(path: Path, record: dict) -> None:
    """A folder holds one run: other settings are refused, not mixed in."""
    if path.exists():
        old = json.loads(path.read_text())
        for key, value in record.items():
            if old.get(key) != value:
                raise InputError(
                    f"{path.parent} holds a run with {key} {old.get(key)!r}, not {value!r}: "
                    "use another --out"
                )
    else:
        write_atomic(path, json.dumps(record, indent=1) + "\n")


# --------------------------------------------------------------------------- score and judge


@dataclass(frozen=True)
class Score(Ask):
    """Score replies to a benchmark: JSON on stdout, and score.json and items.jsonl in --out."""

    answers: tuple[Path, ...] = flag((), "replies: a folder of `generate`, or any official format")
    judgements: tuple[Path, ...] = flag((), "judgements.jsonl, or an official judge's file")
    extraction: str = flag("", "how replies are read (off: judge if given, else the default rule)")
    synonyms: str = flag("", "CHAIR's synonym list (off: synonyms.txt beside the data)")
    judge_name: str = flag("", "who judged, where the file does not say")
    name: str = flag("", "the model's name in the report (off: from run.json or the file's name)")
    out: str = flag("", "folder for score.json (off: the folder of our own answers)")

    def __post_init__(self) -> None:
        super().__post_init__()
        bench = BENCHES[self.bench]
        if self.extraction and self.extraction not in bench.modes:
            known = ", ".join(bench.modes)
            raise ValueError(f"{self.bench} has no extraction {self.extraction!r}; known: {known}")
        if not self.answers and not (self.judgements and bench.modes == ("judge",)):
            raise ValueError("--answers is needed")
        if self.judgements and not bench.judged:
            raise ValueError(f"{self.bench} is scored without a judge")
        if not self.data and bench.name != "llava_bench":
            raise ValueError("--data is needed")


def own_run(answers: tuple[Path, ...]) -> tuple[dict, Path | None]:
    """(run.json, folder) where the answers are ours; ({}, None) for anyone else's."""
    folders = {path if path.is_dir() else path.parent for path in answers}
    path = next(iter(folders)) / "run.json" if len(folders) == 1 else Path("")
    return (json.loads(path.read_text()), path.parent) if path.is_file() else ({}, None)


def setting_of(cfg: Ask, record: dict) -> bool:
    """Whether the replies are chain of thought: what run.json says, else the flag."""
    if record and record["benchmark"] != cfg.bench:
        raise InputError(f"these answers are to {record['benchmark']}, not to {cfg.bench}")
    if record and cfg.cot and record["setting"] != "CoT":
        raise InputError("--cot, but run.json beside the answers says Direct")
    return record["setting"] == "CoT" if record else cfg.cot


def read_all(
    bench: Bench, items: list[Item], replies: dict, judged: dict[str, Judgement], how: How
) -> tuple[Pairs, list[str]]:
    """(items with their readings, ids that lack a judgement)."""
    pairs, missing = [], []
    for item in items:
        reply, said = replies.get(item["id"], {}).get("reply", ""), judged.get(item["id"])
        if how.mode in bench.judged and said is None and not bench.judge.settled(item, reply):
            missing.append(item["id"])
        else:
            pairs.append((item, bench.read(item, reply, said, how)))
    return pairs, missing


def totals(bench: Bench, pairs: Pairs) -> dict:
    """Score, standard error, n, what else the benchmark reports, and a table per group."""
    tables: dict[str, dict] = {}
    for kind, names in bench.groups.items():
        members = defaultdict(list)
        for item, reading in pairs:
            for name in names(item):
                members[name].append((item, reading))
        tables[kind] = {name: bench.summary(members[name]) for name in sorted(members)}
    if bench.headline:
        return {**bench.headline(pairs, tables, bench.summary), "groups": tables}
    return {**bench.summary(pairs), "groups": tables}


def load_scored(cfg: Score) -> tuple[list[Item], dict[str, dict], dict[str, Judgement]]:
    """(items, replies, judgements) by id; MathVista's outputs may hold a judge's extraction."""
    bench = BENCHES[cfg.bench]
    # LLaVA's review files alone say everything that is averaged
    items = load_items(bench, cfg.data, cfg.ids) if cfg.data else [
        {"id": str(raw_id(row)), "category": row.get("category")}
        for path in cfg.judgements
        for _, row in read_rows(path)
    ]  # fmt: skip
    replies = load_replies(bench, items, cfg.answers)
    judged = load_judgements(bench, items, cfg.judgements, cfg.judge_name)
    if "extraction" in next(iter(replies.values()), {}) and not judged and bench.judged:
        where = "extraction column of the answers"
        judged = {
            name: Judgement(row["extraction"], cfg.judge_name or where)
            for name, row in replies.items()
            if "extraction" in row
        }
    return [item for item in items if not item.get("_out")], replies, judged


def score(cfg: Score) -> dict:
    """The verb: what score.json holds."""
    bench, (record, folder) = BENCHES[cfg.bench], own_run(cfg.answers)
    cot = setting_of(cfg, record)
    items, replies, judged = load_scored(cfg)
    mode = cfg.extraction or (bench.judged[0] if judged and bench.judged else bench.modes[0])
    how = How(mode, cot, cfg.synonyms)
    pairs, missing = read_all(bench, items, replies, judged, how)
    total = totals(bench, pairs) if pairs else {"score": None, "standard_error": None, "n": 0}
    seen = [replies[item["id"]] for item in items if item["id"] in replies]
    texts = [row["reply"] for row in seen]
    of_judge = [judged[i["id"]] for i, _ in pairs if i["id"] in judged and mode in bench.judged]
    notes = [bench.note] * bool(bench.note)
    if mode in ("rule", "offline") and bench.name == "mathvista" and not cot:
        notes.append("the paper's Direct figure is extracted by GPT: rules give less")
    if bench.name == "pope" and Counter(i["category"] for i in items)["random"] == 3000:
        notes.append("3,000 random questions (repository HEAD); the paper's evaluation has 2,910")
    part = f" ({len(items)} of {bench.n_expected} items)"
    others = {
        other: totals(bench, read_all(bench, items, replies, {}, How(other, cot))[0])["score"]
        for other in bench.modes
        if other != mode and other not in bench.judged and texts and bench.name != "object_halbench"
    }
    result = {
        "benchmark": bench.name,
        "model": cfg.name or record.get("model") or (cfg.answers or cfg.judgements)[0].stem,
        "setting": "CoT" if cot else "Direct",
        "status": "incomplete" if missing else "complete",
        **({**total, "score": None, "standard_error": None} if missing else total),
        "metric": bench.metric,
        "n_expected": bench.n_expected or None,
        "split": bench.split + part * (bench.n_expected not in (0, len(items))),
        "extraction": mode,
        "other_extractions": others,
        "judge": ", ".join(sorted({j.judge for j in of_judge})) or None,
        "judge_date": max((j.date for j in of_judge), default=None) or None,
        "prompts": record.get("prompts", "not ours"),
        "unparsed": sum(not reading.parsed for _, reading in pairs),
        "empty_replies": sum(not text.strip() for text in texts),
        "without_final_answer": sum(not _FINAL.search(text) for text in texts) if cot else None,
        "cut_off": sum(row.get("finish_reason") == "length" for row in seen),
        "missing_judgements": missing,
        "notes": notes,
    }
    if missing:
        result["partial"] = {"score": total["score"], "n": total["n"]}
    if out := Path(cfg.out) if cfg.out else folder:
        lines = [
            {"id": item["id"], "prediction": r.prediction, "correct": r.correct, "parsed": r.parsed}
            for item, r in pairs
        ]
        write_atomic(out / "items.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_atomic(out / "score.json", json.dumps(result, indent=1) + "\n")
    return result


@dataclass(frozen=True)
class Judge(Ask):
    """Write requests.jsonl for any judge; with judgements there, check and count them."""

    answers: tuple[Path, ...] = flag((), "replies: a folder of `generate`, or any official format")
    judgements: tuple[Path, ...] = flag((), "what came back (off: judgements.jsonl in --out)")
    judge_template: str = flag("", "the official template (off: ours, in other words)")
    judge_name: str = flag("", "who judged, where the file does not say")
    out: str = flag("", "folder for requests.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        if BENCHES[self.bench].judge is None:
            raise ValueError(f"{self.bench} needs no judge")
        if not self.data or not self.answers or not self.out:
            raise ValueError("--data, --answers and --out are needed")


def judge(cfg: Judge) -> list[str]:
    """The verb: ids still without a judgement."""
    bench = BENCHES[cfg.bench]
    cot = setting_of(cfg, own_run(cfg.answers)[0])
    items = load_items(bench, cfg.data, cfg.ids)
    replies = load_replies(bench, items, cfg.answers)
    items = [item for item in items if not item.get("_out")]
    out, given = Path(cfg.out), Path(cfg.judge_template) if cfg.judge_template else None
    template = given.read_text() if given else bench.judge.template
    lines, wanted = [], []
    for item in items:
        reply = replies[item["id"]]["reply"]
        if bench.name == "mmhal" and cot:  # its own CoT format
            reply = reply.split("Answer:")[-1].strip()
        if bench.judge.settled(item, reply):
            continue
        wanted.append(item["id"])
        request = {
            "id": item["id"],
            "benchmark": bench.name,
            "messages": bench.judge.ask(item, reply, template),
            "max_tokens": bench.judge.max_tokens,
            "temperature": bench.judge.temperature,
            "template": given.name if given else "ours",
        }
        lines.append(json.dumps(request, ensure_ascii=False) + "\n")
    write_atomic(out / "requests.jsonl", "".join(lines))
    found = cfg.judgements or tuple(out.glob("judgements.jsonl"))
    judged = load_judgements(bench, items, found, cfg.judge_name)
    how, there = How(bench.judged[0], cot), [item for item in items if item["id"] in judged]
    read_all(bench, there, replies, judged, how)  # a judgement out of range ends here
    left = [name for name in wanted if name not in judged]
    print(f"{out / 'requests.jsonl'}: {len(lines)} requests, {len(left)} not judged yet"
          + (f": {listed(left)}" if judged and left else ""), file=sys.stderr)  # fmt: skip
    return left


# --------------------------------------------------------------------------- report

TABLE2 = {
    "m3cot": "M3CoT", "mathvista": "MathVista", "mathvision_mini": "MathVision", "mmvet": "MM-Vet",
    "llava_bench": "LLaVA-B", "pope": "POPE", "crpe": "CRPE", "mmhal": "MMHal",
}  # fmt: skip
PAPER_TABLE2 = {
    "InternVL2-8B": (59.3, 58.3, 20.4, 54.2, 73.2, 86.9, 75.0, 3.3),
    "InternVL2-8B-MPO": (79.2, 67.0, 25.7, 56.2, 76.7, 88.1, 75.4, 3.5),
    "DPO+ (Table 8)": (80.4, 66.4, 23.4, 58.3, 74.1, 87.6, 75.5, 3.4),
    "BCO+ (Table 8)": (79.6, 66.1, 18.8, 55.5, 78.6, 88.5, 75.5, 3.5),
}
TABLE3 = ("m3cot", "mathvista", "mmvet", "pope")
PAPER_TABLE3 = {  # (Direct, CoT)
    "InternVL2-8B": ((59.3, 57.0), (58.3, 56.8), (54.2, 54.7), (86.9, 82.9)),
    "SFT": ((63.9, 67.8), (62.7, 64.2), (54.7, 53.8), (86.5, 84.0)),
    "MPO": ((77.2, 79.2), (64.5, 67.0), (55.1, 56.2), (87.0, 88.1)),
}
TABLE4 = ("ObjHal resp.", "ObjHal ment.", "MMHal score", "MMHal hall.")
PAPER_TABLE4 = {
    "InternVL2-8B": (18.4, 8.7, 3.3, 40.6),
    "RLAIF-V": (7.3, 3.9, 3.5, 32.3),
    "DropoutNTP": (7.6, 4.1, 3.6, 31.3),
}


@dataclass(frozen=True)
class Report:
    """Tables 2, 3 and 4 of the paper beside our scores: `report DIR... [--out DIR]`."""

    dir: tuple[Path, ...] = flag((), "folder with a score.json")
    out: Path = flag(Path("report"), "folder for report.txt, report.json and report.png")

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("name the folders with score.json: report DIR...")


Scores = dict[str, dict[str, dict[str, dict]]]  # model -> benchmark -> setting -> score.json


def load_scores(folders: Iterable[Path]) -> Scores:
    """Every score has one place; a second one for it is an error, never a choice."""
    scores: Scores = defaultdict(lambda: defaultdict(dict))
    places: dict[tuple, Path] = {}
    for folder in folders:
        if not (folder / "score.json").is_file():
            raise InputError(f"no score.json in {folder}: run `eval.py score --out {folder}` first")
        s = json.loads((folder / "score.json").read_text())
        place = (s["model"], s["benchmark"], s["setting"])
        if place in places:
            raise InputError(f"{folder} and {places[place]} both hold {' '.join(place)}")
        places[place] = folder
        scores[s["model"]][s["benchmark"]][s["setting"]] = s
    return scores


def value(settings: dict[str, dict], setting: str, key: str = "score") -> float | None:
    return settings[setting].get(key) if setting in settings else None


def difference(settings: dict[str, dict]) -> float | None:
    direct, cot = value(settings, "Direct"), value(settings, "CoT")
    return None if direct is None or cot is None else cot - direct


def cell(x: float | None, settings: dict[str, dict] | None = None, setting: str = "") -> str:
    if x is None:
        half = settings and settings.get(setting, {}).get("status") == "incomplete"
        return "incomplete" if half else "-"
    return f"{x + 1e-9:.1f}"  # 31.25 is printed as 31.3, as in the paper


def ruled(title: str, header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in [header, *rows]
    ]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def report_text(scores: Scores) -> str:
    """The tables, and what each of our figures stands on."""
    rows = [[f"paper {name}", *map(cell, values)] for name, values in PAPER_TABLE2.items()]
    for model, benches in scores.items():
        for setting in ("Direct", "CoT"):
            ours = [cell(value(benches[b], setting), benches[b], setting) for b in TABLE2]
            rows.append([f"{model} {setting}", *ours])
        rows.append([f"{model} CoT - Direct", *(signed(difference(benches[b])) for b in TABLE2)])
    text = [ruled("Table 2 (the paper's MPO row is CoT and its InternVL2-8B row Direct wherever "
                  "Table 3 has both)", ["", *TABLE2.values()], rows)]  # fmt: skip

    header = ["", *(f"{TABLE2[b]} {kind}" for b in TABLE3 for kind in ("Direct", "CoT", "diff"))]
    rows = [
        [f"paper {name}", *(c for d, t in pairs for c in (cell(d), cell(t), signed(t - d)))]
        for name, pairs in PAPER_TABLE3.items()
    ]
    for model, benches in scores.items():
        row = [model]
        for b in TABLE3:
            row += [cell(value(benches[b], s), benches[b], s) for s in ("Direct", "CoT")]
            row.append(signed(difference(benches[b])))
        rows.append(row)
    text.append(ruled("Table 3", header, rows))

    rows = [[f"paper {name}", *map(cell, values)] for name, values in PAPER_TABLE4.items()]
    for model, benches in scores.items():
        for setting in ("Direct", "CoT"):
            if any(setting in benches[b] for b in ("object_halbench", "mmhal")):
                rows.append([f"{model} {setting}", *map(cell, table4(benches, setting))])
    text.append(ruled("Table 4 (hallucination; lower is better but for the MMHal score)",
                      ["", *TABLE4], rows))  # fmt: skip

    other = [b for b in BENCHES if b not in TABLE2 and b != "object_halbench"]
    rows = [
        [f"{model} {b}", *(cell(value(benches[b], s), benches[b], s) for s in ("Direct", "CoT")),
         signed(difference(benches[b]))]
        for model, benches in scores.items() for b in other if b in benches
    ]  # fmt: skip
    if rows:
        text.append(ruled("Not in the paper's tables (text-only: own baseline only, not Table 5)",
                          ["", "Direct", "CoT", "diff"], rows))  # fmt: skip
    return "\n".join([*text, "What our figures stand on", *map(footnote, every(scores))]) + "\n"


def every(scores: Scores) -> list[dict]:
    return [s for benches in scores.values() for b in benches.values() for s in b.values()]


def signed(x: float | None) -> str:
    return "-" if x is None else f"{x:+.1f}"


def table4(benches: dict, setting: str) -> list[float | None]:
    rate = value(benches["mmhal"], setting, "hallucination_rate")
    whole = value(benches["mmhal"], setting) is not None
    return [
        value(benches["object_halbench"], setting, "response_level"),
        value(benches["object_halbench"], setting, "mention_level"),
        value(benches["mmhal"], setting),
        100 * rate if rate is not None and whole else None,
    ]


def footnote(s: dict) -> str:
    """One line a score: everything that has to be known to compare it."""
    if s["score"] is None:
        figure = f"incomplete ({s['n']} judged, {len(s['missing_judgements'])} missing)"
    else:
        figure = f"{s['score']:.2f} +- {s['standard_error']:.2f}"
    words = [
        f"{s['model']} {s['benchmark']} {s['setting']}: {figure}", s["metric"], f"n {s['n']}",
        s["split"], f"extraction {s['extraction']}", f"unparsed {s['unparsed']}",
        f"prompts {s['prompts']}", *s["notes"],
    ]  # fmt: skip
    if s["judge"]:
        words.append(f"judge {s['judge']} {s['judge_date'] or ''}".rstrip())
    return "; ".join(words)


def report_figure(scores: Scores, path: Path) -> None:
    """Direct and CoT bars of every model beside the paper's two rows."""
    import matplotlib  # noqa: PLC0415  (only for the picture)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    shown = [b for b in TABLE2 if b != "mmhal" and any(b in benches for benches in scores.values())]
    series = []
    for name in ("InternVL2-8B", "InternVL2-8B-MPO"):
        paper = dict(zip(TABLE2, PAPER_TABLE2[name]))
        series.append((f"paper {name}", [paper[b] for b in shown], [0] * len(shown), ""))
    for model, benches in scores.items():
        for setting, hatch in (("Direct", ""), ("CoT", "//")):
            ours = [value(benches[b], setting) or 0 for b in shown]
            error = [value(benches[b], setting, "standard_error") or 0 for b in shown]
            series.append((f"{model} {setting}", ours, error, hatch))
    figure, axes = pyplot.subplots(figsize=(max(6, 1.6 * len(shown) + 3), 4), layout="constrained")
    width = 0.8 / len(series)
    for i, (name, ours, error, hatch) in enumerate(series):
        places = [x + (i - (len(series) - 1) / 2) * width for x in range(len(shown))]
        axes.bar(places, ours, width, yerr=error, label=name, hatch=hatch, capsize=2)
    axes.set_xticks(range(len(shown)), [TABLE2[b] for b in shown])
    axes.set_ylabel("score (bars: standard error)")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(cfg: Report) -> str:
    """The verb: report.txt, report.json and report.png in `out`; returns the text."""
    scores = load_scores(cfg.dir)
    text = report_text(scores)
    ours = {
        model: {
            b: {"Direct": value(s, "Direct"), "CoT": value(s, "CoT"), "difference": difference(s)}
            for b, s in benches.items() if s
        }
        for model, benches in scores.items()
    }  # fmt: skip
    paper = {
        "table2": {name: dict(zip(TABLE2, row)) for name, row in PAPER_TABLE2.items()},
        "table3": {name: dict(zip(TABLE3, row)) for name, row in PAPER_TABLE3.items()},
        "table4": {name: dict(zip(TABLE4, row)) for name, row in PAPER_TABLE4.items()},
    }
    whole = {"ours": ours, "paper": paper, "scores": every(scores)}
    write_atomic(cfg.out / "report.txt", text)
    write_atomic(cfg.out / "report.json", json.dumps(whole, indent=1) + "\n")
    report_figure(scores, cfg.out / "report.png")
    return text


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["report"]:  # report DIR... is report --dir DIR ...
        n = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
        argv[1:n] = [word for folder in argv[1:n] for word in ("--dir", folder)]
    verbs = {"generate": Generate, "score": Score, "judge": Judge, "report": Report}
    verb, cfg = parse_command(verbs, argv)
    if verb == "generate":
        generate(cfg)
    elif verb == "judge":
        judge(cfg)
    elif verb == "score":
        result = score(cfg)
        print(json.dumps(result, indent=1))
        print(footnote(result), file=sys.stderr)
    else:
        print(report(cfg), end="")


if __name__ == "__main__":
    run(main)
