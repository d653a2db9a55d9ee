"""Final answers: finding them in a response, and deciding whether they are right.

    parse_response, parse_answer     response -> answer, or the named reason why there is none
    plain_text, read                 answer -> its canonical reading, one of the kinds below
    same_answer                      two answers mean the same: one rule a kind
    judge                            response + gold -> Verdict: correct, wrong, ambiguous, format

    Options    A, C              the same letters in any order, or the words of the gold option
    Quantity   3.2e-19 C, 60 min whole numbers exact, decimals as exact as written, in base units
    Items      [2, 3), 3:15, 7-8 item by item; in any order where order means nothing
    Relation   y = 2x+1, x > 5   the same difference of both sides, up to a factor
    wording    anything else     EvalAI's normal form: no case, articles, punctuation

The ways to write one thing stand in tables beside this file: rewrites.txt (regular expressions),
signs.txt, words.txt, units.txt.

A wrong answer that may be meant right (`12 or 13` for 12, 0.333 for 1/3) is *ambiguous* and makes
no pair.  Nothing is evaluated: a response never reaches `eval` or a symbolic-maths library.
The modes carry the names of the official script (internvl_chat/tools/reasoning_data_pipeline/
utils/accuracy_reward.py) but not its faults: there ANLS is inverted, signs and operators are erased
before comparing (-5 = 5), `1.5` is option 1, one number is picked out of prose (3 cats = 3 dogs).
"""

import functools
import itertools
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

from benchmarks import quantities
from benchmarks.quantities import Quantity, parse_expression, pattern, read_quantity, rewrites
from runtime import InputError

MAX_ANSWER = 2000  # characters; a longer answer matches only if it is the gold text itself


def check_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """InputError names the first that is not known."""
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"unknown {kind} {unknown[0]!r}; known are {', '.join(known)}")


# --------------------------------------------------------------------------- prompts and responses

# What a response is asked for decides how it is read below.  "en" is the wording of the official
# script and of the benchmarks; the paper does not publish its three special prompts (section 4.2).
PROMPTS = quantities.sections("prompts.txt")
strip_instruction = rewrites("instruction", re.IGNORECASE)  # of a question

_TRIGGERS = tuple(  # one a language: a literal start passes megabytes quickly
    re.compile(word + r"[*_ \t]{0,8}[:：]") for word in (r"final[ \t]{1,4}answer", "答案")
)
_emphasis = rewrites("emphasis")


class Parsed(NamedTuple):
    """A response taken apart; with `failure` set (its name) there is no answer."""

    rationale: str | None = None
    answer: str | None = None
    failure: str | None = None


def parse_answer(response: str, prompt_version: str) -> str | None:
    """The final answer as written, or None for a format failure."""
    return parse_response(response, prompt_version).answer


def parse_response(response: str, prompt_version: str, finish_reason: str | None = None) -> Parsed:
    """Rationale and answer of a response; `finish_reason` "length" says that it was cut off."""
    check_known("prompt_version", [prompt_version], _PARSERS)
    if finish_reason == "length":
        return Parsed(failure="cut off at the token limit")
    return _PARSERS[prompt_version](response)


@functools.lru_cache(maxsize=4)  # parsing and cleaning a response ask the same
def _answer_line(response: str) -> tuple[int, int, str, str, str]:
    """(number of triggers, end of the last one, text before it, trigger, answer): the texts
    without the marks that dress the answer line."""
    lower = response.replace("İ", "I").lower()  # as long: İ alone becomes two characters
    # three of a language are enough to know too many
    spans = [m.span() for t in _TRIGGERS for m in itertools.islice(t.finditer(lower), 3)]
    if not spans:
        return 0, 0, "", "", ""
    start, end = max(spans)
    start -= 2 * lower.endswith("最终", 0, start)
    head = response[response.rfind("\n", 0, start) + 1 : start]  # of the line
    marks, trigger, answer = _undress_line(head, response[start:end], response[end:].strip())
    return len(spans), end, response[: start - marks], trigger, answer


@functools.lru_cache(maxsize=64)  # the responses to a question have few different answer lines
def _undress_line(head: str, trigger: str, answer: str) -> tuple[int, str, str]:
    """(length of the marks before the trigger, trigger, answer)."""
    marks = re.search(r"[*_\"'“‘「『【`(\[]*$", head)[0]
    if not head.strip("*_#> \t\"'“‘「『【`(["):
        marks = head if head.strip() else ""
    if len(answer) <= MAX_ANSWER:
        inner = re.sub(r"[^*_]", "", trigger)  # of **Final answer**: 5
        answer = _emphasis(f"{marks.strip()}\0{inner}{answer}").partition("\0")[2].strip()
        if answer.count("**") % 2:  # half a mark
            answer = answer.strip("*_ \n")
        answer = answer if answer.strip("*_ \n") and undress(answer) else ""  # marks alone
    return len(marks), re.sub(r"[*_]", "", trigger), answer


def _parse_after_trigger(response: str) -> Parsed:
    triggers, _, before, _, answer = _answer_line(response)
    failures = {
        "no trigger": triggers == 0,
        "more than two triggers": triggers > 2,
        "empty rationale": not before.strip(),
        "empty answer": not answer,
        "answer on several lines": "\n" in answer or "\r" in answer,
        "no line break between rationale and answer": "\n" not in response.strip(),
    }
    failure = next((name for name, failed in failures.items() if failed), None)
    return Parsed(failure=failure) if failure else Parsed(before.strip(), answer)


def _last_box(text: str) -> tuple[int, str | None]:
    r"""(where the last \boxed{ starts or -1, its content or None when the braces never close)."""
    boxes = [*re.finditer(r"\\boxed\s{0,8}\{", text)]
    if not boxes:
        return -1, None
    match, level = boxes[-1], 1
    for piece in re.finditer(r"\\.|[{}]", text[match.end() : match.end() + 5 * MAX_ANSWER]):
        level += (piece[0] == "{") - (piece[0] == "}")
        if level == 0:
            return match.start(), text[match.end() :][: piece.start()]
    return match.start(), None


def extract_answer_from_box(text: str) -> str:
    r"""Content of the last \boxed{}; the whole text without one, as in the official script."""
    content = _last_box(text)[1]
    return text if content is None else content


def _parse_whole(response: str) -> Parsed:
    answer = response.strip()
    if not undress(answer[:MAX_ANSWER]):
        return Parsed(failure="empty answer")
    if "\n" in answer or len(answer.split()) > 10 or _answer_line(answer)[0]:
        return Parsed(failure="not a word or phrase")
    return Parsed("", answer)


def _parse_box(response: str) -> Parsed:
    start, content = _last_box(response)
    if content is None:
        return Parsed(failure="no box" if start < 0 else "unbalanced box")
    if not undress(content):
        return Parsed(failure="empty box")
    return Parsed(response[:start].strip(), content.strip())


def _parse_thinking(response: str) -> Parsed:
    thinking, closing, answer = response.partition("</think>")
    _, opening, thinking = thinking.partition("<think>")
    if not (opening and closing) or "<think>" in thinking + answer or "</think>" in answer:
        return Parsed(failure="not exactly one pair of think tags")
    if len(thinking.strip()) <= 20:
        return Parsed(failure="thinking of 20 characters or fewer")
    return _parse_box(answer)._replace(rationale=thinking.strip())


_PARSERS = {
    # the answer stands after the last trigger; with "none" the question itself may ask for it
    **dict.fromkeys(("none", "en", "zh", "en_bg", "en_vis", "en_ground"), _parse_after_trigger),
    "direct": _parse_whole,  # the response is the answer
    **dict.fromkeys(("en_v2", "zh_v2"), _parse_box),  # in the last \boxed{}
    **dict.fromkeys(("en_r1", "zh_r1"), _parse_thinking),  # the same, after </think>
}


def fix_answer(response: str, pred: str = "", gt: str = "") -> str:
    """The response without the marks around its answer line and the blanks behind it; unchanged if
    that left half a mark.

    The official function of this name writes the gold answer `gt` into it; this one only cleans.
    """
    triggers, end, before, trigger, answer = _answer_line(response)
    gap = re.sub("[*_]", "", re.match(r"[\s*_]*", response[end:])[0])
    fixed = before + trigger + gap + answer
    half = any(fixed.count(m) % 2 > response.count(m) % 2 for m in ("**", "__", '"', "`"))
    return response if half or not 1 <= triggers <= 2 else fixed


# --------------------------------------------------------------------------- plain text

_invisible, _markup, _half, _chinese = map(rewrites, "invisible markup half chinese".split())
_one_spelling = rewrites("spelling numbers wording amounts groups", re.IGNORECASE)
# most answers: nothing of them is rewritten, and they are no list, chain, relation or unit
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


@functools.lru_cache(maxsize=8192)
def undress(text: str) -> str:
    """NFKC, ASCII minus and quotes; no invisible characters, end tokens, marks and closing stop."""
    if not text.isascii():
        text = quantities.plain_signs(unicodedata.normalize("NFKC", quantities.plain_signs(text)))
    text = " ".join(_invisible(text).split())
    for _ in range(8):  # layers
        dressed, text = text, _half(_emphasis(_markup(text.rstrip(".。;,、 "))))
        if text == dressed:
            break
    return text


@functools.lru_cache(maxsize=8192)
def plain_text(text: str) -> str:
    """The answer undressed and in one spelling: LaTeX as plain signs, numbers in digits."""
    text = undress(text) if text.isascii() else _chinese(undress(text))
    return text if _PLAIN_NUMBER.fullmatch(text) else _one_spelling(text)


# --------------------------------------------------------------------------- reading


class Options(NamedTuple):
    """Option letters, and the wording that stands beside a single one."""

    letters: frozenset[str]
    text: str = ""


class Items(NamedTuple):
    """A list, tuple, set or interval with its brackets, or a chain with its sign: 3:15, 7-8 cm."""

    brackets: str  # "()", "[)", ":", or "" for a bare list
    items: tuple[Any, ...]
    unordered: bool = False
    value: Quantity | None = None  # 3-4 and 2*3 as arithmetic


class Relation(NamedTuple):
    """x = 5, 1 < x < 5."""

    name: str  # what an equation gives a value to, or ""
    signs: tuple[str, ...]
    sides: tuple[Any, ...]  # with a name: its exact and its last value, P = 7/20 = 0.35


_MATHEMATICAL = re.compile(
    rf"[0-9\\∞{''.join(quantities.GREEK.values())}]|^[^\W_](?![^\W_])|[=<>+*/^±|]"
    rf"|\b(?:pi|sqrt|{'|'.join(quantities.FUNCTIONS)})\b"
)
_CHAIN, _NAME = map(pattern, ("CHAIN", "NAMED"))
_JOINER = re.compile(r"\s*[,;、]\s*(?:(?:and|or)\b)?|\s*\b(?:and|or)\b|\s*[&∪和或及]", re.I)
_RELATION = re.compile(r"[=<>≤≥≠]")
_FLIPPED = {">": "<", "≥": "≤"}


@functools.lru_cache(maxsize=8192)
def read(text: str, depth: int = 0) -> Quantity | Items | Relation | None:
    """A plain answer as mathematics; None when any part of it is prose."""
    if _PLAIN_NUMBER.fullmatch(text):
        return parse_expression(text)
    if len(text) > quantities.MAX_EXPRESSION or depth > 4 or not _MATHEMATICAL.search(text):
        return None
    reading = _read_chain(text) or quantities.read_sum(text) or _read_items(text, depth)
    return reading or _read_relation(text, depth) or read_quantity(text)


def _split_top(text: str, joiner: re.Pattern) -> tuple[list[str], list[str]]:
    """(pieces, what stood between them), split outside brackets."""
    pieces, between, start = [], [], 0
    for match in joiner.finditer(text):
        if not quantities.inside_brackets(text[: match.start()]):
            pieces.append(text[start : match.start()].strip())
            between.append(match[0].strip().lower())
            start = match.end()
    return [*pieces, text[start:].strip()], between


def _read_chain(text: str) -> Items | None:
    """7-8 cm, 3:15, 12/03/1998, 2 m x 3 m: a unit at the end is that of all."""
    if (match := _CHAIN.fullmatch(text)) is None:
        return None
    sign = match[1].strip().replace("–", "-").replace("x", "*")
    numbers = [read_quantity(part) for part in text.split(match[1])]
    units = [number.unit for number in numbers if number and number.unit]
    if None in numbers or (sign == "/" and (units or len(numbers) == 2)):
        return None  # the fraction 3/4 is a quantity
    if units and len(units) < len(numbers):
        power = "e" in text.split(match[1])[0] or not (numbers[-1].unit or text[0] in "$€£")
        if sign == "*" or power:
            return None  # and so are 2*3 cm, 3e-9 m and 5 ms-2
        numbers = [number._replace(unit=units[0]) for number in numbers]
    if re.search(r":\s*0[0-9]", text):
        sign = ":0"  # 7:05 is no ratio 7:5
    return Items(sign, tuple(numbers), value=parse_expression(text))  # 180° - 120° is 60° too


def _read_items(text: str, depth: int) -> Items | None:
    """1, 2 and 3; (1, 2]; {1, 2}; x = 3 or x = 7; both values of 2 ± 1."""
    if "±" in text:
        signed = tuple(read(text.replace("±", sign), depth + 1) for sign in "+-")
        return None if None in signed else Items("", signed, unordered=True)
    heads = itertools.accumulate(text[:-1])
    enclosed = text[-1] in ")]}" and all(map(quantities.inside_brackets, heads))  # not (1)(2)
    parts, between = _split_top(text[1:-1] if enclosed else text, _JOINER)
    items = tuple(read(part, depth + 1) for part in parts) if len(parts) > 1 else (None,)
    if None in items:
        return None
    brackets = text[0] + text[-1] if enclosed else ""
    names = {getattr(item, "name", "") for item in items}
    solutions = len(names) == 1 and names != {""}  # x = 3, x = 7
    either = not enclosed and re.search("or|或|∪", " ".join(between))
    comma = re.match("-?[0-9]+,[0-9]+(?![0-9]*[,;])", text)  # 0,5 beside 0.5
    value = read_quantity(text.replace(",", ".")) if comma else None
    return Items(brackets, items, solutions or bool(either) or brackets == "{}", value)


def _read_relation(text: str, depth: int) -> Any:
    texts, signs = _split_top(text, _RELATION)
    if not signs:
        return None
    name, equation = "", set(signs) == {"="}
    if equation and _NAME.fullmatch(texts[0]):
        name, texts = "".join(texts[0].lower().split()), texts[1:]
    sides = [read(t, depth + 1) or read_quantity(t) for t in texts]
    if len(sides) > 1:  # 10 - 2x is a sum here, no range
        sides = [getattr(side, "value", None) or side for side in sides]
    if name:  # AB = BC + CD = 5
        sides[:-1] = [x for x in sides[:-1] if isinstance(x, Quantity) and not x.letters]
    if None in sides:
        return None
    if equation and all(_same(sides[-1], side, _close) for side in sides):
        exact = min(reversed(sides), key=lambda side: getattr(side, "step", 0))
        if unit := getattr(sides[-1], "unit", None):  # 12√5 = 26.83 cm
            exact = exact._replace(unit=exact.unit or unit)
        return Relation(name, (), (exact, sides[-1])) if name else exact
    if set(signs) <= set(_FLIPPED):
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
    return Relation("", tuple(signs), tuple(sides))


# --------------------------------------------------------------------------- comparing

# what one answer looks like, and how both are spelled then
_SPECIAL, _both = pattern("SPECIAL", re.IGNORECASE), rewrites("both", re.IGNORECASE)
_reply = functools.lru_cache(maxsize=8192)(rewrites("reply", re.IGNORECASE))


@functools.lru_cache(maxsize=8192)
def same_answer(pred: str, gold: str) -> bool:
    """Both answers mean the same: the judge of the pairs."""
    pred, gold = plain_text(pred), plain_text(gold)
    # never both without their subjects: the stove is hot, the wire is hot
    pairs = (pred, gold), (_reply(pred), gold), (pred, _reply(gold))
    return any(all(pair) and _same_plain(*pair) for pair in dict.fromkeys(pairs))


def _same_plain(pred: str, gold: str) -> bool:
    # BA is a word, but beside AB or A and B it is options
    theirs = read_options(gold, strict=not read_options(pred, strict=True))
    ours = read_options(pred)
    if theirs and ours:  # nothing beside the right letter, its own wording or an explanation
        texts = ours.text, theirs.text
        explains = not ours.text or len(ours.text.split()) > len(theirs.text.split())
        fits = explains or _same_content(*texts) or is_ambiguous(*texts)
        return ours.letters == theirs.letters and fits
    if theirs and theirs.text:  # the gold is "B. dog"
        return _same_plain(pred, theirs.text)
    if theirs and not gold.isalpha():  # A, C; but AB may be a segment
        return _same_wording(pred, gold)
    return any(_same_content(form, gold) for form in (pred, ours and ours.text) if form)


def _same_content(pred: str, gold: str) -> bool:
    if _SPECIAL.match(pred) or _SPECIAL.match(gold):
        pred, gold = _both(pred), _both(gold)
    a, b = read(pred), read(gold)
    if isinstance(a, Quantity) != isinstance(b, Quantity):  # a*b and ab
        a, b = a or read_quantity(pred), b or read_quantity(gold)
    if all(isinstance(x, Quantity) and not x.letters and x.values[0] is not None for x in (a, b)):
        return _same(a, b)  # by value alone: mW is not MW
    return _same(a, b) or _same_wording(pred, gold)


def _same(a: Any, b: Any, same_value: Callable = quantities.same_value) -> bool:
    """One rule a kind; `b` is the gold one."""
    try:
        if isinstance(a, Relation) or isinstance(b, Relation):
            return _same_relation(a, b, same_value)
        if isinstance(a, Items) and isinstance(b, Items):
            return _same_items(a, b, same_value)
        a, b = (x.value if isinstance(x, Items) else x for x in (a, b))
        return a is not None and b is not None and quantities.same_quantity(a, b, same_value)
    except ArithmeticError:  # an exact number beyond the floats beside a float
        return False


def _same_items(a: Items, b: Items, same_value: Callable) -> bool:
    bare = a.brackets + b.brackets in ("()", "[]", "{}")
    if len(a.items) != len(b.items) or (a.brackets != b.brackets and not bare):
        return False  # (0, 1] is not (0, 1), but a bare list has no brackets to disagree
    named = all(getattr(x, "name", "") for x in (*a.items, *b.items))
    if not (a.unordered or b.unordered or named):
        return all(_same(x, y, same_value) for x, y in zip(a.items, b.items))
    rest = list(b.items)
    for item in a.items:
        if (same := next((x for x in rest if _same(item, x, same_value)), None)) is None:
            return False
        rest.remove(same)
    return True


def _same_relation(a: Any, b: Any, same_value: Callable) -> bool:
    """x = 5 meets 5, x > 3 meets (3, oo), and an equation every other form of it."""
    a, b = (x if isinstance(x, Relation) else Relation("", (), (x,)) for x in (a, b))
    if not (a.signs or b.signs) and len({a.name, b.name} - {""}) == 1:
        return any(_same(x, y, same_value) for x, y in itertools.product(a.sides, b.sides))
    if a[:2] == b[:2] and all(map(_same, a.sides, b.sides)):
        return True  # x > 5 cm and 5 cm < x
    letters = {x for side in a.sides + b.sides for x in getattr(side, "letters", ())} - {"∞"}
    a, b = (_differences(x, letters) for x in (a, b))  # of an interval in the relation's letter
    return len(a) == len(b) > 0 and all(map(_proportional, a, b))


def _differences(x: Relation, letters: set[str]) -> list[tuple[str, Quantity]]:
    """Each sign with its right side less its left one: y = 2x + 1 is an equation of two
    expressions, (1, 5] is 1 < x <= 5 and (3, oo) is 3 < x; nothing where there are no expressions.
    """
    name, signs, sides = x
    if not signs and isinstance(interval := sides[0], Items):
        if len(letters) != 1 or len(interval.items) != 2 or set(interval.brackets) - set("()[]"):
            return []
        signs = ["≤" if bracket in "[]" else "<" for bracket in interval.brackets]
        sides = interval.items[0], quantities.letter(*letters), interval.items[1]
    elif not signs:
        signs, sides = "=", (parse_expression(name), *sides)
    if not all(isinstance(side, Quantity) and side.unit is None for side in sides):
        return []
    return [
        (sign, quantities.combine(operator.sub, right, left))
        for sign, (left, right) in zip(signs, itertools.pairwise(sides))
        if "∞" not in left.letters | right.letters
    ]


def _proportional(a: tuple[str, Quantity], b: tuple[str, Quantity]) -> bool:
    """2x - 3y = -11 and 4x - 6y + 22 = 0: one difference is a multiple of the other."""
    (sign, x), (gold_sign, gold) = a, b
    values = quantities.defined(x, gold)
    if sign != gold_sign or len(values) < 2:
        return False
    ratios = [x / gold for x, gold in values]
    same_side = ratios[0] != 0 and (sign in "=≠" or ratios[0] > 0)
    return same_side and all(math.isclose(r, ratios[0], rel_tol=1e-9) for r in ratios)


# --------------------------------------------------------------------------- options and wording
_lead, _last = (rewrites(name, re.IGNORECASE) for name in ("lead", "last"))
_option = rewrites("option")
_ONE_OPTION = pattern("ONE_OPTION", re.DOTALL | re.IGNORECASE)
_OPTION_JOINER = re.compile(r"\band\b|[\s()\[\],;&、'\"和及与]", re.IGNORECASE)


@functools.lru_cache(maxsize=8192)
def read_options(text: str, strict: bool = False) -> Options | None:
    """The option letters A-N that a plain answer clearly names; `strict` for gold answers."""
    if _PLAIN_NUMBER.fullmatch(text):
        return None
    for body in dict.fromkeys((_lead(text), text)):
        if letters := _option_set(body, strict):
            return Options(letters)
        if match := _ONE_OPTION.fullmatch(body):
            option = Options(frozenset((match[1] or match[2]).upper()), plain_text(match[3]))
        elif not strict and re.fullmatch("[A-N]", bare := _option(body)):
            option = Options(frozenset(bare))
        else:
            continue
        last = _lead(_last(text))  # another letter at the end: A. No, B
        changed = re.fullmatch("[A-N]", last) and last not in (*option.letters, option.text)
        return None if changed and not strict else option
    return None


def _option_set(body: str, strict: bool) -> frozenset[str] | None:
    """A, C and D; (A) and (C); ACD, of a gold answer in this order (BAD is a word)."""
    body = body if strict else re.sub(r"(?<=[A-N])\s?[/+]\s?(?=[A-N])", " ", body)
    if re.fullmatch(r"(?:(?:^|[,;]\s*+)\W?[A-N][.):](?![A-Z]\b)[^,;]*){2,}", body):  # A. cat, C. ox
        return frozenset(re.findall(r"(?:^|[,;])\s*\W?([A-N])[.):]", body))
    if re.fullmatch(r"[(\[]?[A-N][)\]]\s*[A-N]", body):
        return None  # (A) C: the wording of A is C
    pieces = [*filter(None, _OPTION_JOINER.split(body))]
    apart = all(len(piece) == 1 for piece in pieces)
    letters = "".join(pieces).upper() if apart and not strict else "".join(pieces)
    known = re.fullmatch("[A-N]{2,}" if apart else "[A-H]{2,6}", letters)
    clear = apart or not strict or [*letters] == sorted(letters)
    return frozenset(letters) if known and clear and len({*letters}) == len(letters) else None


_NOT_WORDING, _GENOTYPE = map(pattern, ("NOT_WORDING", "GENOTYPE"))  # compared letter by letter
_joined, _words = rewrites("joined"), rewrites("words")
_SMALL = ("a", "an", "the", "and")


def _same_wording(pred: str, gold: str) -> bool:
    """EvalAI's wording; anything with signs or operators letter by letter."""
    pred, gold = _joined(pred), _joined(gold)
    if _GENOTYPE.fullmatch(gold) and pred.lower() == gold.lower():
        return pred == gold
    if _NOT_WORDING.search(pred) or _NOT_WORDING.search(gold):
        return "".join(pred.lower().split()) == "".join(gold.lower().split())
    return _wording(pred) == _wording(gold) != []


def _wording(text: str) -> list[str]:
    """Words without articles and `and`."""
    words = _words(unicodedata.normalize("NFD", text.lower())).split()
    if any(len(word) > 1 for word in words):  # "A B" names two options: no articles there
        words = [word for word in words[:-1] if word not in _SMALL] + words[-1:]  # vitamin A
    return words


# --------------------------------------------------------------------------- official rules

multi_choice_score = same_answer  # mc_score: the same letter, or the wording of the gold option


def _within(pred: str, gold: str, marks: str, margin: Fraction, same: Callable) -> bool:
    """Plain decimals (no inf, nan or 1_0) within a part `margin`, else equal or the `same`."""
    pred, gold = plain_text(pred), plain_text(gold)
    numbers = [re.sub(marks, "", text).replace(" ", "") for text in (pred, gold)]
    if not all(_PLAIN_NUMBER.fullmatch(number) for number in numbers):
        return gold != "" and (pred.lower() == gold.lower() or same(pred, gold))
    a, b = map(Fraction, numbers)
    return abs(a - b) <= margin * abs(b)


def math_score(pred: str, gold: str) -> bool:
    """Official math_score: within a thousandth, degree, percent and cm marks dropped; else text."""
    return _within(pred, gold, r"degrees?|∠|°|%|cm", Fraction(1, 1000), operator.eq)


def relaxed_correctness(pred: str, gold: str) -> bool:
    """ChartQA: numbers within 5 percent, what may be a year exact; else the same answer."""
    year = re.fullmatch(r"[1-3][0-9]{3}", undress(gold))
    return _within(pred, gold, r"[%$€£¥₹]", Fraction(0 if year else 1, 20), same_answer)


def anls_score(pred: str, gold: str) -> bool:
    """1 - edit distance / longer length > 0.9, on lower-cased text with single blanks."""
    pred, gold = (" ".join(undress(text).lower().split()) for text in (pred, gold))
    return edit_distance(pred, gold) * 10 < max(len(pred), len(gold))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, bit-parallel (Myers 1999, Hyyrö 2003): a column is one integer."""
    b, a = sorted((a, b), key=len)
    places = {char: bytearray(len(a) // 8 + 1) for char in b}  # where `a` has it, as bits
    for i, char in enumerate(a):
        if char in places:
            places[char][i >> 3] |= 1 << (i & 7)
    positions = {char: int.from_bytes(bits, "little") for char, bits in places.items()}
    full, last = (1 << len(a)) - 1, 1 << len(a) >> 1
    plus, minus, distance = full, 0, len(a)  # vertical differences +1 and -1
    for char in b:
        match = positions[char]
        zero = (((match & plus) + plus) ^ plus) | match | minus
        up, down = minus | ~(zero | plus) & full, plus & zero
        distance += bool(up & last) - bool(down & last)
        up = up << 1 | 1
        plus, minus = (down << 1 | ~(zero | up)) & full, up & zero
    return distance


MODES: dict[str, Callable[[str, str], bool]] = {
    # the paper's default modes differ in their faults alone: each of them asks for the one judge
    **dict.fromkeys(
        "vqa_score mc_score math_score math_verify_score latex_score".split(), same_answer
    ),
    "relaxed_accuracy": relaxed_correctness,
    "anls": anls_score,
    "official_math_score": math_score,
}
# first match wins, as in the official get_mode; SROIE deserves an explicit mode without relaxed
_MODES_BY_NAME = {
    "chartqa": "relaxed_accuracy",
    "docvqa|infographics|infovqa": "anls",
    "sroie|clevr_math|geos|geometry": "relaxed_accuracy vqa_score mc_score math_verify_score",
    "mavis": "vqa_score mc_score math_score latex_score math_verify_score",
    "": "vqa_score mc_score math_score math_verify_score",
}


def get_mode(filename: str) -> list[str]:
    """Matching modes by the name of a data set: the fallback where its entry names none."""
    name = next(name for name in _MODES_BY_NAME if re.search(name, filename.lower()))
    return _MODES_BY_NAME[name].split()


def post_process(text: str) -> str:
    """The official reading of an option letter, to compare with; ours is `read_options`."""
    text = text.strip().strip("*").strip().upper()
    match = re.fullmatch(r"(.)|([A-N])[\W\d_].*|\(([A-N])\).*", text, re.DOTALL)
    if match is None:
        raise RuntimeError(f"no option letter in {text[:40]!r}")
    return match[match.lastindex]


def check_gold(gold: object) -> None:
    """InputError says what is wrong with a gold answer."""
    if gold is None:
        raise InputError("no 'answer'; only `sample --prompts none` and `dropout_ntp` need none")
    number = type(gold) in (int, float) and abs(gold) < math.inf
    if not number and not isinstance(gold, str):
        raise InputError(f"the gold answer is {gold!r:.60}, expected text or a number")
    text = str(gold)
    if len(text) > MAX_ANSWER:
        raise InputError(f"the gold answer has {len(text)} characters, at most {MAX_ANSWER} fit")
    if not undress(text):
        raise InputError("the gold answer is empty")
    if "\\" in text and text.count("{") - text.count("\\{") != text.count("}") - text.count("\\}"):
        raise InputError(f"the gold answer cannot be parsed: unbalanced braces in {text[:60]!r}")


def matching_mode(answer: str | None, gold: str, modes: Iterable[str]) -> str | None:
    """The mode that finds the answer right ("equal" for the same text), or None."""
    if answer is None:  # a format failure; its printed form would equal 0
        return None
    check_known("mode", modes := list(modes), MODES)
    answer, gold = str(answer), str(gold)
    if len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return "equal" if len(answer) == len(gold) and answer.lower() == gold.lower() else None
    bare_answer, bare_gold = undress(answer), undress(gold)
    if bare_answer == bare_gold:
        return "equal" if bare_gold else None  # an empty gold is an input error, never a match
    return next((mode for mode in modes if MODES[mode](answer, gold)), None)


def is_correct(answer: str | None, gold: str, modes: Iterable[str]) -> bool:
    """Any of the modes finds the answer right."""
    return matching_mode(answer, gold, modes) is not None


def check_answer(pred: str, gt: str, mode: Iterable[str]) -> int:
    """is_correct under its official name; like the official rules it converts no units (5 km are
    not 5000 m) and reads no number words above ten (eleven is not 11)."""
    readings = [read(plain_text(str(text))) for text in (pred, gt)]
    units = [x.unit for x in readings if isinstance(x, Quantity) and x.unit]
    converted = len(units) == 2 and units[0].scale != units[1].scale
    words = [re.findall("[a-z]+", str(text).lower()) for text in (pred, gt)]
    large = [any(quantities.NUMBER_OF.get(word, 0) > 10 for word in w) for w in words]
    return int(is_correct(pred, gt, mode) and not converted and large[0] == large[1])


# --------------------------------------------------------------------------- verdicts

_TOKEN = pattern("TOKEN")


@functools.lru_cache(maxsize=8192)
def _tokens(text: str) -> str:
    """Words in lower case without a plural's s and numbers by value, each between two blanks."""
    text = re.sub(r"\\frac\s*\{(-?[0-9]+)\}\s*\{([0-9]+)\}", r" \1/\2", text).lower()
    words = [t.removesuffix("s") if len(t) > 3 else t for t in _TOKEN.findall(text)]
    words = [Fraction(w) if w[-1:].isdecimal() else w for w in words if w not in _SMALL]
    return "".join(f" {quantities.NUMBER_OF.get(word, word)} " for word in words)


def is_ambiguous(answer: str, gold: str) -> bool:
    """A wrong answer that may be meant right: it holds the gold answer as whole tokens (`12 or 13`
    for 12) or other forms of its words, is a number within a hundredth of it or right in another
    unit, or has the same parts in another order."""
    answer, gold = plain_text(answer[:MAX_ANSWER]), plain_text(str(gold))
    if answer.isdecimal() and gold.isdecimal():
        return int(answer) == int(gold)  # most answers
    option, ours = read_options(gold, strict=True), read_options(answer)
    if option and len(option.letters) == 1:
        named = ours.letters if ours else {*re.findall(r"(?a:\b[A-N]\b)", answer)}
        if option.letters <= named or (ours and len(named) == 1):  # clearly another one
            return option.letters <= named or answer == option.text
    have, want = _tokens(answer), _tokens(option.text if option else gold)
    gold = (option and option.text) or gold
    words, gold_words = have.split(), want.split()
    part = words and {*words} < {*gold_words}  # `left` of `left side`
    if (want and want in have) or (part and (have in want or not _NOT_WORDING.search(gold))):
        return True
    glued = "".join(words)  # hotdog for hot dog
    alike = len(words) == len(gold_words) > 0 and all(map(_alike, words, gold_words))
    if alike or (glued.isalpha() and glued == "".join(gold_words)):
        return True
    listed = words and re.search(r"[,&和]|[\w∠]\w ?[=∥⊥] ?[\w∠]\w|[0-9]/|\band\b", answer + gold)
    if listed and sorted(words) == sorted(gold_words):
        return True  # blue and red for red and blue, 3/5/2024 for May 3, 2024
    a, b = read(answer), read(gold)
    if any(isinstance(x, Items) and x.brackets == ":" for x in (a, b)):  # 2:3 for 2/3
        a, b = (read(text.replace(":", "/")) for text in (answer, gold))
    if isinstance(a, Items):
        a = a._replace(unordered=True)
    return _same(a, b, _close) or _same(a, b, quantities.same_in_other_units)


def _alike(word: str, gold: str) -> bool:
    """surfing and surf, colour and color: perhaps forms of one word."""
    alike = word[:3] == gold[:3] and edit_distance(word, gold) <= 3
    return word == gold or (alike and word.isalpha())


def _close(a: Quantity, b: Quantity) -> bool:
    """Within a hundredth, or one rounds to the other: 3.1 beside 3.14."""
    return bool(pairs := quantities.defined(a, b)) and all(
        x == y
        or not (quantities.is_whole(x) and quantities.is_whole(y))
        and abs(x - y) <= max(abs(y) / 100, a.step * abs(x) / 2, b.step * abs(y) / 2)
        for x, y in pairs
    )


class Verdict(NamedTuple):
    """What a response is worth."""

    label: str  # "correct", "wrong", "ambiguous" (wrong, but perhaps meant right) or "format"
    reason: str  # the mode that matched, the name of a format failure
    answer: str | None = None


def with_wording(gold: str, question: str) -> str:
    """B -> (B) dog, where the question lists its options a line each: so `dog` is right too."""
    letter = re.fullmatch("[A-N]", gold)
    option = letter and re.search(rf"^\W?{gold}[.):][ \t]*(\S.*)", question, re.MULTILINE)
    return f"({gold}) {option[1]}" if option else gold


def judge(
    response: str,
    gold: str,
    modes: list[str],
    prompt_version: str,
    finish_reason: str | None = None,
) -> Verdict:
    """Parse a response and compare its answer with the gold one."""
    parsed = parse_response(response, prompt_version, finish_reason)
    if parsed.answer is None:
        return Verdict("format", str(parsed.failure))
    return compare(parsed.answer, gold, tuple(modes))


@functools.lru_cache(maxsize=8192)  # the responses to a question give few different answers
def compare(answer: str, gold: str, modes: tuple[str, ...]) -> Verdict:
    """The verdict on an answer; ChartQA's 5 percent beside stricter modes and other figures or
    initials that ANLS lets pass (January 15 for 16) leave a doubt."""
    strict = [mode for mode in modes if mode != "relaxed_accuracy"]
    mode = matching_mode(answer, gold, ["vqa_score", *strict] if strict else modes)
    figures = re.compile(r"[0-9]+|.illion|\b[A-Z]\b").findall
    if mode and (mode != "anls" or figures(answer) == figures(gold)):
        return Verdict("correct", f"matches by {mode}", answer)
    doubt = mode or (len(strict) < len(modes) and matching_mode(answer, gold, modes))
    if doubt or is_ambiguous(answer, gold):
        return Verdict("ambiguous", "may be meant right", answer)
    return Verdict("wrong", "no mode matches", answer)


# --------------------------------------------------------------------------- cutting a response

_UNBROKEN, _CHINESE = pattern("UNBROKEN", re.DOTALL), pattern("[CJK]")


def split_prefix(text: str, ratio: float) -> tuple[str, str]:
    """(kept start, the blanks lost at the cut): the first `ratio` of a response's pieces.

    Pieces are split at single blanks; mostly Chinese text and single words at characters.  The cut
    moves left out of a LaTeX argument, a <box>, a <ref> and a character of several code points.
    """
    pieces = text.split(" ")
    chinese = len(_CHINESE.findall(text))
    if len(pieces) < 2 or chinese * 2 > sum(map(str.isalpha, text)):
        cut = math.floor(len(text) * ratio + 1e-9)  # 0.07 * 100 is 7, not 6.999...
    else:
        cut = len(" ".join(pieces[: math.floor(len(pieces) * ratio + 1e-9)]))
    for start, end in (match.span() for match in _UNBROKEN.finditer(text)):
        if start < cut < end:
            cut = start
    kept = text[:cut].rstrip()
    glue = text[len(kept) : cut + len(text[cut:]) - len(text[cut:].lstrip())]
    return kept.lstrip(), glue


def truncate_prefix(text: str, ratio: float) -> str:
    """The kept start of a response."""
    return split_prefix(text, ratio)[0]
