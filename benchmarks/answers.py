"""Final answers: finding them in a response, and deciding whether they are right.

    parse_response, parse_answer     response -> answer, or the named reason why there is none
    judge                            response + gold -> Verdict (label, matching mode, reason)
    is_correct, matching_mode        answer + gold + modes -> right or wrong, and by which mode
    is_ambiguous                     a wrong answer that still holds the gold answer as whole tokens
    parse_expression, same_value     arithmetic with LaTeX, powers, roots and free letters
    read_answer, same_answer         the same for units, percents, relations, lists and intervals

One judge for the preference data (pairs.py) and the benchmarks (eval.py).  A response never reaches
`eval`, a symbolic-maths library or an unbounded regular expression: expressions go through the
small parser below, limited in length, depth and the size of powers, so that every call ends soon.

The modes carry the names of the official script (internvl_chat/tools/reasoning_data_pipeline/
utils/accuracy_reward.py) but not its faults: there ANLS is inverted, signs and operators are erased
before comparing (-5 = 5), `1.5` is option 1, one number is picked out of prose (3 cats = 3 dogs).
"""

import functools
import itertools
import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from runtime import InputError

MAX_ANSWER = 2000  # characters; a longer answer matches only if it is the gold text itself
MAX_EXPRESSION = 200  # characters read as mathematics
MAX_DEPTH = 40  # nested groups, powers and functions
MAX_BITS = 4096  # of an exact power; a larger one is computed as a float, which may overflow

# --------------------------------------------------------------------------- prompts

_STEPS = (
    "Your task is to answer the question below. {how}when you're ready to answer, please use the "
)
_STEPS += 'format "Final answer: .."\n\nQuestion:\n\n{question}'
_THINK = (
    "First think the question through step by step between <think> and </think>. After a line "
    "break give a short, direct answer that does not refer to the thinking.\n"
)
# What a response is asked for decides how it is read below.  "en" is the wording of the official
# script and of the benchmarks; the paper does not publish its three special prompts (section 4.2).
PROMPTS = {
    "none": "{question}",
    "direct": "{question}\nAnswer the question using a single word or phrase.",
    "en": _STEPS.replace("{how}", "Give step by step reasoning before you answer, and "),
    "en_bg": _STEPS.replace(
        "{how}",
        "First state the background knowledge that the question needs, then give step by step "
        "reasoning that uses it, and ",
    ),
    "en_vis": _STEPS.replace(
        "{how}",
        "First describe what the picture shows, then give step by step reasoning on that basis, "
        "and ",
    ),
    "en_ground": _STEPS.replace(
        "{how}",
        "Give step by step reasoning before you answer, tie every object that you name to its "
        "region as <ref>object</ref><box>[[x1, y1, x2, y2]]</box> with coordinates from 0 to "
        "1000, and ",
    ),
    "zh": "你的任务是回答以下问题。请在回答之前逐步推理，准备好回答时，请使用以下格式："
    '"答案: ..."\n\n问题:\n\n{question}',
    "en_v2": "{question}\nAnswer the question above step by step. The last line of your response "
    "must read 'Answer: \\boxed{...}' (without quotes) with your conclusion in the box. If you are "
    "unsure, make a reasoned guess; do not repeat steps endlessly.",
    "zh_v2": "{question}\n请逐步推理并回答上述问题。回答的最后一行应为“答案：\\boxed{...}”，"
    "方框内是你的结论。如果不确定，请做出合理的猜测，不要无休止地重复步骤。",
    "en_r1": _THINK + "{question}\nPut the final answer within \\boxed{}.",
    "zh_r1": _THINK + "{question}\n请详细回答这个问题，并将最终答案放在\\boxed{}中。",
}
_SHORT_ANSWER = re.compile(
    r"\s*(?:answer the question using a single word or phrase\.?"
    r"|answer with the option's letter from the given choices directly\.?"
    r"|please answer yes or no\.?"
    r"|(?:please )?(?:answer the question and )?put (?:the|your) final answer (?:with)?in "
    r"\\boxed\{\}\.?)\s*$",
    re.IGNORECASE,
)


def strip_instruction(question: str) -> str:
    """The question without a closing instruction to answer briefly."""
    return (question[:-200] + _SHORT_ANSWER.sub("", question[-200:])).strip()


# --------------------------------------------------------------------------- parsing responses

# answer after the last trigger; "none": the question says itself how to answer
TRIGGER_VERSIONS = ("none", "en", "zh", "en_bg", "en_vis", "en_ground")
WHOLE_VERSIONS = ("direct",)  # the response is the answer
BOX_VERSIONS = ("en_v2", "zh_v2")  # answer in the last \boxed{}
THINK_VERSIONS = ("en_r1", "zh_r1")  # the same, after </think>

_TRIGGERS = {  # on lower-cased text: a literal start passes megabytes quickly, IGNORECASE does not
    "final": re.compile(r"final[ \t]{1,4}answer[*_ \t]{0,8}[:：]"),
    "答案": re.compile(r"答案[*_ \t]{0,8}[:：]"),
}
_BOX = "\\boxed{"


@dataclass(frozen=True)
class Parsed:
    """A response taken apart; with `failure` set (its name) there is no answer."""

    rationale: str | None = None
    answer: str | None = None
    failure: str | None = None


def parse_answer(response: str, prompt_version: str) -> str | None:
    """The final answer as written, or None for a format failure."""
    return parse_response(response, prompt_version).answer


def parse_response(response: str, prompt_version: str, finish_reason: str | None = None) -> Parsed:
    """Rationale and answer of a response; `finish_reason` "length" says that it was cut off."""
    if finish_reason == "length":
        return Parsed(failure="cut off at the token limit")
    if prompt_version in TRIGGER_VERSIONS:
        return _parse_after_trigger(response)
    if prompt_version in WHOLE_VERSIONS:
        return _parse_whole(response)
    if prompt_version in BOX_VERSIONS:
        return _parse_box(response)
    if prompt_version in THINK_VERSIONS:
        return _parse_thinking(response)
    known = ", ".join((*TRIGGER_VERSIONS, *WHOLE_VERSIONS, *BOX_VERSIONS, *THINK_VERSIONS))
    raise InputError(f"unknown prompt_version {prompt_version!r}; known are {known}")


def _find_triggers(response: str) -> list[tuple[int, int]]:
    """(start, end) of each trigger, in order; three of a language are enough to know too many."""
    lower = response.lower()
    if len(lower) != len(response):  # İ becomes two characters
        lower = response.replace("İ", "I").lower()
    spans = []
    for word, pattern in _TRIGGERS.items():
        for match in itertools.islice(pattern.finditer(lower), 3) if word in lower else ():
            start = match.start()
            spans.append((start - 2 * lower.endswith("最终", 0, start), match.end()))
    return sorted(spans)


def _split_at_trigger(response: str, start: int, end: int) -> tuple[str, str, str]:
    """(text before, trigger, answer), without the markdown that dresses the answer line."""
    line_start = response.rfind("\n", 0, start) + 1
    marks = response[line_start:start]
    if marks.strip("*_#> \t"):  # the line begins with wording: only what touches the trigger
        marks = marks[len(marks.rstrip("*_")) :]
    elif not marks.strip():  # an indent
        marks = ""
    trigger = re.sub(r"[*_]", "", response[start:end])
    star, underscore = "*" in marks, "_" in marks
    answer = response[end:].strip()
    for _ in range(8):  # layers of emphasis
        bare = answer
        if bare.startswith("*"):
            bare, star = bare.lstrip("*").lstrip(), True
        if re.match(r"#{1,6}\s", bare):
            bare = bare.lstrip("#").lstrip()
        # a single closing star may belong to the answer (A*), if nothing opened an emphasis
        if bare.endswith("**") or (star and bare.endswith("*")):
            bare = bare.rstrip("*").rstrip()
        if bare.startswith("_") and bare.endswith("_"):
            bare = bare.strip("_").strip()
        elif underscore:
            bare = bare.strip("_").strip()
        if bare.endswith("#") and bare.rstrip("#")[-1:].isspace():
            bare = bare.rstrip("#").rstrip()
        if bare == answer:
            break
        answer = bare
    return response[: start - len(marks)], trigger, answer


def _parse_after_trigger(response: str) -> Parsed:
    spans = _find_triggers(response)
    if not spans:
        return Parsed(failure="no trigger")
    if len(spans) > 2:
        return Parsed(failure="more than two triggers")
    before, _, answer = _split_at_trigger(response, *spans[-1])
    rationale = before.strip()
    if not rationale:
        return Parsed(failure="empty rationale")
    if not answer:
        return Parsed(failure="empty answer")
    if "\n" in answer or "\r" in answer:
        return Parsed(failure="answer on several lines")
    if "\n" not in response.strip():
        return Parsed(failure="no line break between rationale and answer")
    return Parsed(rationale, answer)


def _last_box(text: str) -> tuple[int, str | None]:
    r"""(where the last \boxed starts or -1, its content or None when the braces never close)."""
    start = text.rfind(_BOX)
    if start < 0:
        return -1, None
    inside, level, escaped = start + len(_BOX), 1, False
    for i in range(inside, min(len(text), inside + 5 * MAX_ANSWER)):
        if escaped:
            escaped = False
        elif text[i] == "\\":
            escaped = True
        elif text[i] == "{":
            level += 1
        elif text[i] == "}":
            level -= 1
            if level == 0:
                return start, text[inside:i]
    return start, None


def extract_answer_from_box(text: str) -> str:
    r"""Content of the last \boxed{}; the whole text without one, as in the official script."""
    content = _last_box(text)[1]
    return text if content is None else content


def _parse_whole(response: str) -> Parsed:
    answer = response.strip()
    if not answer:
        return Parsed(failure="empty answer")
    if "\n" in answer or len(answer.split()) > 10 or _find_triggers(answer):
        return Parsed(failure="not a word or phrase")
    return Parsed("", answer)


def _parse_box(response: str) -> Parsed:
    start, content = _last_box(response)
    if start < 0:
        return Parsed(failure="no box")
    if content is None:
        return Parsed(failure="unbalanced box")
    if not content.strip():
        return Parsed(failure="empty box")
    return Parsed(response[:start].strip(), content.strip())


def _parse_thinking(response: str) -> Parsed:
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return Parsed(failure="not exactly one pair of think tags")
    thinking, answer = response.split("</think>")
    if "<think>" not in thinking:
        return Parsed(failure="not exactly one pair of think tags")
    thinking = thinking.split("<think>")[1].strip()
    if len(thinking) <= 20:
        return Parsed(failure="thinking of 20 characters or fewer")
    parsed = _parse_box(answer)
    return parsed if parsed.failure else Parsed(thinking, parsed.answer)


def fix_answer(response: str, pred: str = "", gt: str = "") -> str:
    """The response without markdown marks around its answer line.

    Only cleaning: the official function of this name writes the gold answer into the response;
    `pred` and `gt` keep its signature and are not used.
    """
    spans = _find_triggers(response)
    if not 1 <= len(spans) <= 2:
        return response
    start, end = spans[-1]
    before, trigger, answer = _split_at_trigger(response, start, end)
    written = response[end:]
    if (before, trigger, answer) == (response[:start], response[start:end], written.strip()):
        return response
    gap = written[: written.find(answer)] if answer else ""
    blank = "\n" if "\n" in gap else " " if " " in gap else ""
    return before + trigger.rstrip() + blank + answer


# --------------------------------------------------------------------------- plain normal form

_DASHES = dict.fromkeys(map(ord, "‐‑‒–−﹣－"), "-")
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "⁄": "/", "∕": "/"})
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_VULGAR_FRACTION = re.compile("([0-9]?)([¼-¾⅐-⅞])")
_WRAPPER_PAIRS = (
    ('"', '"'), ("'", "'"), ("`", "`"), ("__", "__"), ("_", "_"), ("「", "」"), ("『", "』"),
    ("«", "»"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"),
)  # fmt: skip
_WRAPPER_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed)\s*\{"
)


def normalise(text: str) -> str:
    """NFKC, ASCII minus, no invisible characters, outer quotes, emphasis, $...$ and stop off."""
    return _normalise_cached(text) if len(text) <= 300 else _normalise(text)


def _normalise(text: str) -> str:
    if not text.isascii():
        # before NFKC, which turns 1½ into 11/2 and x² into x2
        text = _VULGAR_FRACTION.sub(lambda m: f"{m[1]} " * bool(m[1]) + m[2], text)
        text = _SUPERSCRIPT.sub(
            lambda m: "^" + (m[0] if len(m[0]) == 1 else "{" + m[0] + "}"), text
        )
        text = unicodedata.normalize("NFKC", text).translate(_DASHES).translate(_QUOTES)
    text = _INVISIBLE.sub("", text).strip()
    for _ in range(20):  # layers of wrapping
        bare = _unwrap(text)
        if bare == text:
            break
        text = bare
    return text


def _unwrap(text: str) -> str:
    """One layer of wrapping off."""
    text = re.sub(r"^#{1,6}\s+", "", text.strip().rstrip(".。").rstrip())
    if text.startswith("*"):
        return text.strip("*").strip()
    if text.endswith("**"):
        return text.rstrip("*").rstrip()
    for left, right in _WRAPPER_PAIRS:
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner.strip():
            if left not in inner and right not in inner:
                return inner.strip()
    if (match := _WRAPPER_COMMAND.match(text)) and text.endswith("}"):
        inner, level = text[match.end() : -1], 0
        for char in inner:
            level += (char == "{") - (char == "}")
            if level < 0:
                return text  # the brace closes earlier: \text{a} + \text{b}
        return inner.strip() if level == 0 else text
    return text


_normalise_cached = functools.lru_cache(maxsize=8192)(_normalise)

# --------------------------------------------------------------------------- expressions

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+)"
_NUMBER += r"(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z.]))?"
_TOKEN = re.compile(rf"\s*({_NUMBER}|\\[A-Za-z]+|[A-Za-z]+|[α-ωΑ-Ω∞]|[-+*/^!%°_(){{}}\[\]|:])")
_PLAIN_NUMBER = re.compile(rf"[+-]?\s*{_NUMBER}")

_LATEX = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\{,\}", ","),
        (r"(?<=[0-9])\\[,!](?=[0-9]{3})", ""),
        (r"\\(?:left|right|displaystyle|limits|big|Big|bigg|Bigg|q?quad)(?![A-Za-z])|\\[,!;: ]|~", " "),  # noqa: E501
        (r"\\(?:text(?:bf|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\(?:circ|degree)(?![A-Za-z])", "°"),
        (r"\\([%${}])", r"\1"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*([0-9])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"√", r"\\sqrt "),
        (r"π", r"\\pi "),
        (r"\\infty(?![A-Za-z])", "∞"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])|[×·∙∗⋅]", "*"),
        (r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", "*"),
        (r"\\div(?![A-Za-z])|÷", "/"),
        (r"\\leq?(?:slant)?(?![A-Za-z])|≤|<=", "≤"),
        (r"\\geq?(?:slant)?(?![A-Za-z])|≥|>=", "≥"),
        (r"\\neq?(?![A-Za-z])|≠|!=", "≠"),
        (r"\\approx(?![A-Za-z])|≈|≅|\\cong(?![A-Za-z])", "="),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\(?:angle|measuredangle|triangle|overline|vec)(?![A-Za-z])|∠|△", " "),
        (r"\*\*", "^"),
        # a whole number in front of a proper fraction is a mixed number
        (r"(?<![\w.^}/])([0-9]{1,6})\s*\\frac\s*\{\s*([0-9]{1,6})\s*\}\s*\{\s*([0-9]{1,6})\s*\}", r"(\1+\2/\3)"),  # noqa: E501
        (r"(?<![\w.^}/])([0-9]{1,6})\s+([0-9]{1,6})\s*/\s*([0-9]{1,6})(?![\w.])", r"(\1+\2/\3)"),
    )
]  # fmt: skip

_REAL_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "arcsin": math.asin, "arccos": math.acos,
    "arctan": math.atan, "sinh": math.sinh, "cosh": math.cosh, "tanh": math.tanh, "exp": math.exp,
    "ln": math.log, "log": math.log10, "lg": math.log10, "abs": abs,
    "cot": lambda x: 1 / math.tan(x), "sec": lambda x: 1 / math.cos(x),
    "csc": lambda x: 1 / math.sin(x),
}  # fmt: skip
# short words that are prose, never a product of letters
_PROSE = frozenset(
    "or and to not no of is in the by if at on as am pm than more less least most about off for "
    "per yes nor but only both either neither over under up via".split()
)


class ExpressionError(ValueError):
    """Not an expression, or larger than the limits."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression: a tree of tuples (operator, operand, ...)."""

    tree: tuple
    letters: frozenset[str]
    decimal: bool  # some number has a decimal point, so digits are limited

    def value(self, point: int = 0) -> Fraction | float:
        """The value with the letters at fixed point number `point`; ArithmeticError without one."""
        return _evaluate(self.tree, point)


def parse_expression(text: str, ratio: bool = False, prefix: bool = False) -> Expression | None:
    """Arithmetic with LaTeX forms, roots, powers, functions and free letters; None if it is not.

    `ratio` reads a:b as a quotient; `prefix` reads as far as it goes (both for MathVision's rule).
    """
    if len(text) > MAX_EXPRESSION:
        return None
    try:
        parser = _Parser(_plain_math(text), ratio, prefix)
        tree = parser.sum()
        if not prefix and parser.peek():
            return None
    except ExpressionError:
        return None
    return Expression(tree, frozenset(parser.letters), parser.decimal)


def _plain_math(text: str) -> str:
    """LaTeX spellings and typographic signs as the parser's own small alphabet."""
    if text.isascii() and not any(c in text for c in "\\*~<>! /xX{"):
        return text
    for pattern, new in _LATEX:
        text = pattern.sub(new, text)
    return text


class _Parser:
    """Recursive descent over one line of mathematics.

    sum: term (+|- term)*       term: factor ((*|/) factor | power)*     factor: (+|-)* power
    power: postfix (^ factor)?  postfix: atom (!|%|°)*
    """

    OPEN = {"(": ")", "{": "}", "[": "]"}

    def __init__(self, text: str, ratio: bool, prefix: bool) -> None:
        self.i, self.depth, self.letters, self.decimal = 0, 0, set(), False
        self.ratio, self.prefix = ratio, prefix
        self.tokens: list[str] = []
        at = 0
        try:
            while match := _TOKEN.match(text, at):
                at, token = match.end(), match[1]
                if token[0].isascii() and token[0].isalpha():
                    self.tokens += self.letters_of(token, after_gap=match[0] != token)
                else:
                    self.tokens.append(token)
            if text[at:].strip():
                raise ExpressionError(f"unexpected {text[at]!r}")
        except ExpressionError:
            if not prefix:
                raise

    def letters_of(self, word: str, after_gap: bool) -> list[str]:
        """A run of letters: a function, pi, or a product of single letters - but never prose."""
        if word in _REAL_FUNCTIONS or word in ("sqrt", "cbrt", "pi"):
            return ["\\" + word]
        after_number = after_gap and bool(self.tokens) and self.tokens[-1][-1:].isdigit()
        longest = 4 if word.isupper() else 3
        if len(word) > longest or word.lower() in _PROSE or (len(word) > 1 and after_number):
            raise ExpressionError(f"{word!r} is a word")
        return list(word)

    def peek(self) -> str:
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.i += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise ExpressionError(f"no {token!r}")

    def deeper(self, parse: Callable[[], tuple]) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError("nested too deeply")
        tree = parse()
        self.depth -= 1
        return tree

    def sum(self) -> tuple:
        return self.chain(self.term, lambda token: token in ("+", "-"))

    def term(self) -> tuple:
        signs = ("*", "/", ":") if self.ratio else ("*", "/")

        def joins(token: str) -> bool:  # 2x, but never 2 3
            return token in signs or (self.starts_atom(token) and token[0] not in ".0123456789")

        return self.chain(self.factor, joins)

    def chain(self, operand: Callable[[], tuple], joins: Callable[[str], bool]) -> tuple:
        """Left-associative operators; a product may lack its sign.  `prefix` stops at errors."""
        tree = operand()
        while joins(token := self.peek()):
            start = self.i, self.depth
            try:
                if token in ("+", "-", "*", "/", ":"):
                    self.take()
                    tree = ("/" if token == ":" else token, tree, operand())
                else:
                    tree = ("*", tree, self.power())
            except ExpressionError:
                if not self.prefix:
                    raise
                self.i, self.depth = start
                break
        return tree

    def starts_atom(self, token: str) -> bool:
        return bool(token) and (token in self.OPEN or token[0] in "\\.∞" or token[0].isalnum())

    def factor(self) -> tuple:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        tree = self.power()
        return ("neg", tree) if negative else tree

    def power(self) -> tuple:
        tree = self.atom()
        while self.peek() in ("!", "%", "°"):
            tree = (self.take(), tree)
        if self.peek() == "^":
            self.take()
            tree = ("^", tree, self.deeper(self.factor))
        return tree

    def group(self) -> tuple:
        r"""(...), {...} or [...]; without a bracket the next atom, as in \frac ab."""
        close = self.OPEN.get(self.peek())
        if close is None:
            return self.deeper(self.atom)
        self.take()
        tree = self.deeper(self.sum)
        self.expect(close)
        return tree

    def atom(self) -> tuple:
        token = self.peek()
        if token in self.OPEN:
            return self.group()
        self.take()
        if token[:1].isdigit() or token[:1] == ".":
            self.decimal |= "." in token or "e" in token.lower()
            return ("number", Fraction(token.replace(",", "")))
        if token == "|":
            tree = self.deeper(self.sum)
            self.expect("|")
            return ("abs", tree)
        if token.startswith("\\"):
            return self.command(token[1:])
        if token[:1].isalpha() or token == "∞":
            return self.letter(token)
        raise ExpressionError(f"unexpected {token or 'end'!r}")

    def letter(self, name: str) -> tuple:
        if name == "e":
            return ("number", math.e)
        if self.peek() == "_":  # x_1, x_{12}: the subscript is part of the name
            self.take()
            if self.peek() == "{":
                self.take()
                while self.peek() not in ("}", ""):
                    name += "_" + self.take()
                self.expect("}")
            else:
                name += "_" + self.take()
        self.letters.add(name)
        return ("letter", name)

    def command(self, name: str) -> tuple:
        if name == "pi":
            return ("number", math.pi)
        if name == "frac":
            return ("/", self.group(), self.group())
        if name == "binom":
            return ("binom", self.group(), self.group())
        if name in ("sqrt", "cbrt"):
            index: tuple = ("number", Fraction(3 if name == "cbrt" else 2))
            if self.peek() == "[":
                index = self.group()
            return ("root", self.group(), index)
        if name in _REAL_FUNCTIONS:
            return self.function(name)
        if len(name) > 1 and name in _GREEK:
            return self.letter(name)
        raise ExpressionError(f"unknown command {name!r}")

    def function(self, name: str) -> tuple:
        base = exponent = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.group()
        if self.peek() == "^":  # \\sin^2 x
            self.take()
            exponent = self.group() if self.peek() != "-" else self.deeper(self.factor)
        if exponent == ("neg", ("number", Fraction(1))) and "arc" + name in _REAL_FUNCTIONS:
            name, exponent = "arc" + name, None
        if self.peek() in self.OPEN:
            argument = self.group()
        else:  # \\sin 2x: numbers and letters up to the next function or sign
            argument = self.deeper(self.power)
            while self.starts_atom(self.peek()) and self.peek()[1:] not in _REAL_FUNCTIONS:
                argument = ("*", argument, self.deeper(self.power))
        tree = ("logb", argument, base) if base else ("real", name, argument)
        return ("^", tree, exponent) if exponent else tree


_GREEK = frozenset(
    "alpha beta gamma delta epsilon theta lambda mu nu xi rho sigma tau phi varphi psi omega "
    "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega".split()
)


def _letter_value(name: str, point: int) -> float:
    """Fixed points: all letters positive, then all negative, then mixed; never 0 or whole."""
    seed = zlib.crc32(f"{name} {point}".encode())
    size = 0.3 + 2.4 * ((seed % 99991) / 99991)
    return -size if point == 4 or (point == 5 and seed % 2) else size


def _evaluate(tree: tuple, point: int) -> Fraction | float:
    """Exact while the numbers are rational, else floats; ArithmeticError where undefined."""
    op = tree[0]
    if op == "number":
        return tree[1]
    if op == "letter":
        return _letter_value(tree[1], point)
    if op == "real":
        try:
            return _finite(_REAL_FUNCTIONS[tree[1]](float(_evaluate(tree[2], point))))
        except ValueError:
            raise ArithmeticError("outside the domain") from None
    a = _evaluate(tree[1], point)
    if len(tree) == 2:
        match op:
            case "neg":
                return -a
            case "abs":
                return abs(a)
            case "%":
                return a / 100
            case "°":
                return float(a) * math.pi / 180
            case "!":
                if not isinstance(a, Fraction) or a.denominator != 1 or not 0 <= a <= 170:
                    raise ArithmeticError("factorial")
                return Fraction(math.factorial(int(a)))
    b = _evaluate(tree[2], point)
    match op:
        case "+":
            return _finite(a + b)
        case "-":
            return _finite(a - b)
        case "*":
            return _finite(a * b)
        case "/":
            return _finite(a / b)
        case "^":
            return _power(a, b)
        case "root":
            return _root(a, b)
        case "logb":
            if a <= 0 or b <= 0 or b == 1:
                raise ArithmeticError("logarithm")
            return math.log(a) / math.log(b)
        case "binom":
            if any(
                not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= 1000
                for x in (a, b)
            ):
                raise ArithmeticError("binomial")
            return Fraction(math.comb(int(a), int(b)))
    raise AssertionError(tree)


def _finite(x: Fraction | float) -> Fraction | float:
    if isinstance(x, float) and not math.isfinite(x):
        raise ArithmeticError("not finite")
    if isinstance(x, Fraction) and x.numerator.bit_length() + x.denominator.bit_length() > MAX_BITS:
        return _finite(float(x))  # OverflowError is an ArithmeticError
    return x


def _power(a: Fraction | float, b: Fraction | float) -> Fraction | float:
    if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
        bits = a.numerator.bit_length() + a.denominator.bit_length()
        if bits * abs(b.numerator) <= MAX_BITS:
            return a ** int(b)
    if a < 0 and b != int(b):
        raise ArithmeticError("root of a negative number")
    return _finite(float(a) ** float(b))


def _root(a: Fraction | float, index: Fraction | float) -> Fraction | float:
    if index == 0:
        raise ArithmeticError("zeroth root")
    if a < 0 and isinstance(index, Fraction) and index.denominator == 1 and index % 2 == 1:
        return -_root(-a, index)
    if isinstance(a, Fraction) and index == 2 and a >= 0:  # keep \sqrt{4} exact
        up, down = math.isqrt(a.numerator), math.isqrt(a.denominator)
        if up * up == a.numerator and down * down == a.denominator:
            return Fraction(up, down)
    return _power(a, 1 / index)


def same_value(
    a: Expression, b: Expression, relative: float | None = None, absolute: float = 1e-9
) -> bool:
    """Equal numbers; with free letters, equal at several fixed points.

    `relative` None: six significant digits where a decimal was written, else (nearly) exact.
    """
    if relative is None:
        relative = 5e-6 if a.decimal or b.decimal else 1e-9
    compared = 0
    for point in range(6 if a.letters or b.letters else 1):
        values = []
        for expression in (a, b):
            try:
                values.append(expression.value(point))
            except ArithmeticError:
                values.append(None)
        x, y = values
        if x is None and y is None:
            continue
        if x is None or y is None:
            return False
        compared += 1
        if not _close(x, y, relative, absolute):
            return False
    return compared >= (2 if a.letters or b.letters else 1)


def _close(x: Fraction | float, y: Fraction | float, relative: float, absolute: float) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        if relative < 1e-8:  # nothing was rounded on the way
            return x == y
        limit = max(Fraction(relative) * max(abs(x), abs(y)), Fraction(absolute))
        return abs(x - y) <= limit
    try:
        return math.isclose(x, y, rel_tol=relative, abs_tol=absolute)
    except OverflowError:  # an exact number beyond the floats
        return False


# --------------------------------------------------------------------------- readings

_UNIT_NAMES = """
    mm millimeter millimetre; cm centimeter centimetre; dm decimeter decimetre; m meter metre;
    km kilometer kilometre; inch in inches "; foot ft feet '; yard yd yds; mile mi;
    mg milligram; g gram gm; kg kilogram kgs kilo; lb lbs pound; oz ounce; ton tonne;
    ms millisecond; s sec second secs; min minute mins; h hr hour hrs; day; week wk wks; month mo;
    year yr yrs; ml milliliter millilitre; l liter litre; mph; km/h kmh kph; n newton; j joule;
    kj kilojoule; w watt; kw kilowatt; v volt; a amp ampere; pa pascal; hz hertz; mol mole;
    °c c celsius centigrade; °f f fahrenheit; degree ° deg; % percent pct; $ dollar usd; € euro eur;
    £ gbp; ¥ yen yuan rmb; ₹ rupee; cent ¢; am a.m; pm p.m
"""
_UNITS = {}  # alias, plurals included -> canonical name
for _names in _UNIT_NAMES.split(";"):
    for _alias in _names.split():
        _UNITS[_alias] = _names.split()[0]
        if len(_alias) > 2 and _alias.isalpha():
            _UNITS.setdefault(_alias + "s", _names.split()[0])
_MAGNITUDES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_UNIT_TAIL = re.compile(
    r"(.*?[0-9)}\].!])(\s*)([A-Za-zµ%°'\"$€£¥₹¢²³][A-Za-zµ°/.^{}23 ·-]*)", re.DOTALL
)
_CURRENCY = re.compile(r"([+-]?)\s*([$€£¥₹])\s*(?=[0-9.])")
_CHAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:\s*[-:/x*]\s*[0-9]+(?:\.[0-9]+)?)+")
_RELATION = re.compile(r"[=<>≤≥≠]")
_NAME = re.compile(r"[A-Za-z]{1,20}(?:_\w|_\{\w+\}|'|\([A-Za-z]\))?")
_FLIPPED = {">": "<", "≥": "≤"}


class Value(NamedTuple):
    """A number or expression, perhaps with a unit."""

    expression: Expression
    unit: str
    scale: int = 1  # 10**6 for "million"


class Chain(NamedTuple):
    """Whole numbers joined by one sign: 3:15, 12/03/1998, 2015-2018, 2 x 3."""

    sign: str
    numbers: tuple[Fraction, ...]
    value: Value | None  # as arithmetic, where that is a possible reading


class Relation(NamedTuple):
    """x = 5, 1 < x < 5."""

    name: str  # the name that an equation gives a value to, or ""
    signs: tuple[str, ...]
    sides: tuple[Value, ...]


class Items(NamedTuple):
    """A list, tuple, set or interval with its brackets ("" for a bare list)."""

    left: str
    right: str
    items: tuple[Any, ...]


@functools.lru_cache(maxsize=8192)
def read_answer(text: str, depth: int = 0) -> Value | Chain | Relation | Items | None:
    """A whole answer as mathematics; None when any part of it is prose."""
    if depth == 0:
        if len(text) > MAX_EXPRESSION:
            return None
        text = _plain_math(text)
    text = text.strip()
    if (
        not text
        or depth > 4
        or not re.search(r"[0-9α-ωΑ-Ω\\∞]|^[^\W_](?![^\W_])|[=<>+*/^]|\bpi\b", text)
    ):
        return None
    if _CHAIN.fullmatch(text) and (chain := _read_chain(text)):
        return chain
    parts = _split_top(text, thousands=True)
    if len(parts) > 1:
        return _read_items("", "", parts, depth)
    if _RELATION.search(text) and len(sides := _split_top(text, relation=True)) > 1:
        return _read_relation(sides)
    if text[0] in "([{" and text[-1] in ")]}" and _closes_at_end(text):
        inner = _split_top(text[1:-1])
        if len(inner) > 1:
            return _read_items(text[0], text[-1], inner, depth)
    return _read_value(text)


def _split_top(text: str, relation: bool = False, thousands: bool = False) -> list[str]:
    """Split at commas and semicolons (or at relation signs, which are kept) outside brackets."""
    parts, level, start = [], 0, 0
    for i, char in enumerate(text):
        level += (char in "([{") - (char in ")]}")
        if level > 0:
            continue
        if relation and char in "=<>≤≥≠":
            parts += [text[start:i], char]
            start = i + 1
        elif not relation and char in ",;∪、":
            if thousands and char == "," and _is_thousands(text, i):
                continue
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _is_thousands(text: str, i: int) -> bool:
    """A comma inside a proper grouping of digits: 1,234 but not 1,23 or 1, 234 or 12345,678."""
    before = re.search(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})*$", text[:i])
    return bool(before and re.match(r",[0-9]{3}(?![0-9])", text[i:]))


def _closes_at_end(text: str) -> bool:
    level = 0
    for i, char in enumerate(text):
        level += (char in "([{") - (char in ")]}")
        if level == 0:
            return i == len(text) - 1
    return False


def _read_items(left: str, right: str, parts: list[str], depth: int) -> Items | None:
    items = tuple(read_answer(part, depth + 1) for part in parts)
    return None if None in items else Items(left, right, items)


def _read_chain(text: str) -> Chain | None:
    signs = set(re.findall(r"[-:/x*]", text))
    if len(signs) != 1:
        return None
    sign = signs.pop()
    numbers = tuple(Fraction(n) for n in re.findall(r"[0-9]+(?:\.[0-9]+)?", text))
    if sign == "/" and len(numbers) == 2:
        return None  # a fraction
    arithmetic = sign == "*" or (sign == "-" and len(numbers) == 2)
    return Chain(sign, numbers, _read_value(text) if arithmetic else None)


def _read_relation(parts: list[str]) -> Relation | None:
    texts, signs = [t.strip() for t in parts[::2]], tuple(parts[1::2])
    name = ""
    if signs[0] == "=" and set(signs) == {"="}:
        if not texts[0]:  # "= 5"
            texts, signs = texts[1:], signs[1:]
        elif _NAME.fullmatch(texts[0]):
            name, texts, signs = texts[0].lower(), texts[-1:], ()
    sides = tuple(_read_value(t) for t in texts)
    return None if None in sides else Relation(name, signs, sides)


def _read_value(text: str) -> Value | None:
    text, unit, scale = text.strip(), "", 1
    if match := _CURRENCY.match(text):
        text, unit = match[1] + text[match.end() :], match[2]
    if match := _UNIT_TAIL.fullmatch(text):
        found = _unit(match[3], gap=bool(match[2]))
        head = parse_expression(match[1]) if found else None
        if head is not None and not head.letters and not _has_function(head.tree):
            if unit and found[0] not in ("", unit):
                return None
            return Value(head, found[0] or unit, found[1])
    expression = parse_expression(text)
    return None if expression is None else Value(expression, unit, scale)


def _has_function(tree: tuple) -> bool:
    return tree[0] == "real" or any(isinstance(t, tuple) and _has_function(t) for t in tree)


def _unit(text: str, gap: bool) -> tuple[str, int] | None:
    """(canonical unit, magnitude) of what follows a number; None when it is not a unit."""
    text = re.sub(r"\^\{([23])\}", r"^\1", text.strip().lower().replace("²", "^2"))
    text = text.replace("³", "^3").replace("·", " ")
    scale = 1
    first, _, rest = text.partition(" ")
    if first in _MAGNITUDES:
        text, scale = rest.strip(), _MAGNITUDES[first]
        if not text:
            return "", scale
    if len(text) == 1 and text.isalpha() and not gap and text not in "mg":
        return None  # 2h is a product, 2 h are hours
    name = _known_unit(text.rstrip("."))
    if (
        name is None
        and re.fullmatch(r"[a-z.-]+(?: [a-z.-]+){0,3}", text)
        and (gap or len(text) > 3)
    ):
        words = [w.strip(".") for w in text.split()]
        if not _PROSE.intersection(words) - {"of", "per", "in"} and all(len(w) > 1 for w in words):
            name = " ".join(w[:-1] if w.endswith("s") and len(w) > 3 else w for w in words)
    return None if name is None else (name, scale)


def _known_unit(text: str) -> str | None:
    if text in _UNITS:
        return _UNITS[text]
    if (bare := text.replace(".", "")) in _UNITS:
        return _UNITS[bare]
    for pattern, form in (
        (r"(?:square|sq\.?) ?(.+)|(.+) ?(?:squared|\^2)", "{}^2"),
        (r"(?:cubic|cu\.?) ?(.+)|(.+) ?(?:cubed|\^3)", "{}^3"),
        (r"degrees? (.+)", "{}"),
    ):
        if match := re.fullmatch(pattern, text):
            base = _known_unit(next(g for g in match.groups() if g).strip())
            return form.format(base) if base else None
    if match := re.fullmatch(r"([^/]+?)(?: ?/ ?| per )([^/]+)", text):
        up, down = _known_unit(match[1].strip()), _known_unit(match[2].strip())
        if up and down:
            return {"mile/h": "mph"}.get(f"{up}/{down}", f"{up}/{down}")
    return None


def same_answer(pred: str, gold: str) -> bool:
    """Both answers are wholly mathematics and mean the same."""
    a, b = read_answer(normalise(pred)), read_answer(normalise(gold))
    return a is not None and b is not None and _same(a, b)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Relation) and isinstance(b, Relation):
        return _same_relation(a, b)
    for one, other in ((a, b), (b, a)):  # x = 5 meets 5
        if isinstance(one, Relation):
            return not one.signs and _same(one.sides[0], other)
    if isinstance(a, Items) and isinstance(b, Items):
        return _same_items(a, b)
    if isinstance(a, Chain) and isinstance(b, Chain):
        return (a.sign, a.numbers) == (b.sign, b.numbers)
    a, b = (x.value if isinstance(x, Chain) else x for x in (a, b))
    if not isinstance(a, Value) or not isinstance(b, Value):
        return False
    if a.unit and b.unit and a.unit != b.unit:
        return False
    scales = {(a.scale, b.scale)}
    if (a.unit == "%") != (b.unit == "%"):  # 50 % meets 50 and 0.5
        scales.add(
            (a.scale * (100 if b.unit == "%" else 1), b.scale * (100 if a.unit == "%" else 1))
        )
    return any(same_value(_scaled(a, m), _scaled(b, n)) for m, n in scales)


def _scaled(value: Value, scale: int) -> Expression:
    tree, letters, decimal = (
        value.expression.tree,
        value.expression.letters,
        value.expression.decimal,
    )
    return Expression(("*", tree, ("number", Fraction(scale))), letters, decimal)


def _same_items(a: Items, b: Items) -> bool:
    if len(a.items) != len(b.items):
        return False
    if (a.left, a.right) == (b.left, b.right) == ("{", "}"):  # sets: in any order
        rest = list(b.items)
        for item in a.items:
            found = next((i for i, other in enumerate(rest) if _same(item, other)), None)
            if found is None:
                return False
            del rest[found]
        return True
    brackets = {(a.left, a.right), (b.left, b.right)}
    if len(brackets) > 1 and ("", "") not in brackets:
        return False  # a bare list has no brackets to disagree, but (0, 1] is not (0, 1)
    return all(_same(x, y) for x, y in zip(a.items, b.items, strict=True))


def _same_relation(a: Relation, b: Relation) -> bool:
    if not a.signs and not b.signs and (a.name == b.name or not a.name or not b.name):
        return _same(a.sides[0], b.sides[0])
    forms = []
    for r in (a, b):
        if not r.signs:  # y = 2x + 1 against an equation of two expressions
            name = parse_expression(r.name)
            if name is None:
                return False
            r = Relation("", ("=",), (Value(name, ""), r.sides[0]))
        if all(s in (*_FLIPPED, "=") for s in r.signs) and set(r.signs) != {"="}:
            signs = tuple(_FLIPPED.get(s, s) for s in reversed(r.signs))
            r = Relation("", signs, tuple(reversed(r.sides)))
        forms.append(r)
    a, b = forms
    if a.signs != b.signs:
        return False
    if all(_same(x, y) for x, y in zip(a.sides, b.sides, strict=True)):
        return True
    if a.signs != ("=",):
        return False
    (p, q), (r, s) = (tuple(v.expression for v in x.sides) for x in (a, b))
    if not (p.letters | q.letters) or (p.letters | q.letters) != (r.letters | s.letters):
        return False
    left, right, turned = (
        Expression(("-", x.tree, y.tree), x.letters | y.letters, x.decimal or y.decimal)
        for x, y in ((p, q), (r, s), (s, r))
    )
    return same_value(left, right) or same_value(left, turned)


# --------------------------------------------------------------------------- matching modes

_NUMBER_WORDS = {w: str(i) for i, w in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}  # fmt: skip
_CONTRACTIONS = frozenset(
    "aint arent cant couldve couldnt didnt doesnt dont hadnt hasnt havent hed hes howd howll hows "
    "id im ive isnt itd itll maam mightnt mightve mustnt mustve neednt notve oclock oughtnt shant "
    "shes shouldve shouldnt somebodys someones thats thered therere theres theyd theyll theyre "
    "theyve twas wasnt weve werent whatll whatre whats whatve whens whered wheres whereve whod "
    "wholl whos whove whyll whyre whys wont wouldve wouldnt yall youd youll youre youve".split()
)
# operators, signs beside digits, brackets around digits: compared as mathematics, not as wording
_NOT_WORDING = re.compile(
    r"[+*/<>=^\\≤≥≠≈±×÷√|]|(?<![^\W\d_])-|-(?![^\W\d_])|[(\[{]\s*[-+.0-9]|[.0-9]\s*[)\]}]"
)
# between words, not operators: New York - USA, red/blue
_JOINED_WORDS = re.compile(r"(?<=[^\W\d_]{2})(?:\s+-\s+|\s*/\s*)(?=[^\W\d_]{2})")
_PUNCTUATION = re.compile(r"[;\[\]\"{}()_\-@`,?!、。，；「」《》]")
_BETWEEN_DIGITS = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9,])")

_OPTION_LEAD = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*"
    r"(?:(?:option|choice)\s+)?|(?:正确)?(?:答案|选项?)[是为:：]?\s*)(?=[(\[]?[A-Na-n](?![A-Za-z]))",
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"(?:[(\[]\s*([A-Na-n])\s*[)\]]\s*[.:、]?|([A-Na-n])\s*(?:[.:)、]|$))\s*(.*)", re.DOTALL
)


def _vqa_wording(text: str) -> str:
    """EvalAI's normal form of plain wording."""
    text = _JOINED_WORDS.sub(" ", text.lower())
    text = _BETWEEN_DIGITS.sub(lambda m: m[1].replace(",", ""), text)
    text = re.sub(r"\.(?![0-9])", "", _PUNCTUATION.sub(" ", text))
    words = []
    for word in text.split():
        if word.replace("'", "") in _CONTRACTIONS:
            words.append(word.replace("'", ""))
        else:
            words += word.replace("'s", " 's").split()
    words = [_NUMBER_WORDS.get(word, word) for word in words]
    if any(len(word) > 1 for word in words):  # "A B" names two options: no articles there
        words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(words)


def vqa_score(pred: str, gold: str) -> bool:
    """EvalAI wording; anything with signs or operators is compared as mathematics instead."""
    pred, gold = normalise(pred), normalise(gold)
    if any(_NOT_WORDING.search(_JOINED_WORDS.sub(" ", text)) for text in (pred, gold)):
        squeezed = ["".join(text.lower().split()) for text in (pred, gold)]
        return squeezed[0] == squeezed[1] or same_answer(pred, gold)
    wording = _vqa_wording(pred)
    return wording != "" and wording == _vqa_wording(gold)


def option_letter(text: str) -> tuple[str, str] | None:
    """(letter A-N, text of the option or "") of an answer that clearly names one option."""
    text = normalise(text)
    if lead := _OPTION_LEAD.match(text):
        text = normalise(text[lead.end() :])
    match = _OPTION.fullmatch(text)
    if match is None:
        return None
    letter, rest = match[1] or match[2], match[3]
    marked = text[match.start(3) - 1 : match.start(3)]  # "" at the end, " " after a blank
    if rest and not match[1] and marked in (".", ":") and re.match(r"[^\W\d_](?![^\W\d_])", rest):
        return None  # initials and ratios: A.M, a:b
    if re.match(r"(?:and\b|or\b|[&,/和或]|[(\[][A-N][)\]])", rest):
        return None  # several options: (A) and (B)
    return letter.upper(), rest.strip()


def multi_choice_score(pred: str, gold: str) -> bool:
    """The same option letter, or the wording of the gold option."""
    ours, theirs = option_letter(pred), option_letter(gold)
    if theirs is None:
        return normalise(pred).lower() == normalise(gold).lower() != ""
    if ours is not None:
        return ours[0] == theirs[0]
    return theirs[1] != "" and (vqa_score(pred, theirs[1]) or same_answer(pred, theirs[1]))


def read_number(text: str) -> Fraction | None:
    """A plain decimal number, proper thousands commas allowed; never inf, nan or 1_0."""
    text = text.strip()
    if len(text) > 400 or not _PLAIN_NUMBER.fullmatch(text):
        return None
    return Fraction(re.sub(r"[,\s]", "", text))


def _near(pred: Fraction, gold: Fraction, relative: Fraction) -> bool:
    return abs(pred - gold) <= (relative * abs(gold) if gold else Fraction(1, 10**9))


def math_score(pred: str, gold: str) -> bool:
    """Numbers within a relative 1e-3, degree, percent and cm marks dropped; else the same text."""
    pred, gold = normalise(pred), normalise(gold)
    marks = r"degrees?|\\angle|°|\\?%|cm"
    numbers = [read_number(re.sub(marks, "", text)) for text in (pred, gold)]
    if None not in numbers:
        return _near(*numbers, Fraction(1, 1000))
    return pred.lower() == gold.lower() != ""


def relaxed_correctness(pred: str, gold: str) -> bool:
    """Numbers within 5 percent, but years exact; else the same text."""
    pred, gold = normalise(pred), normalise(gold)
    numbers = [
        read_number(re.sub(r"^([+-]?)\s*[$€£¥₹]|\\?[%$€£¥₹]$", r"\1", t)) for t in (pred, gold)
    ]
    if None in numbers:
        return pred.lower() == gold.lower() != ""
    year = re.fullmatch(r"(?:19|20)[0-9]{2}", gold)
    return numbers[0] == numbers[1] if year else _near(*numbers, Fraction(1, 20))


def anls_score(pred: str, gold: str) -> bool:
    """1 - edit distance / longer length > 0.9, on lower-cased text with single blanks."""
    pred, gold = (" ".join(normalise(text).lower().split()) for text in (pred, gold))
    longer = max(len(pred), len(gold))
    if abs(len(pred) - len(gold)) * 10 >= longer:
        return False
    return edit_distance(pred, gold) * 10 < longer


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, bit-parallel (Myers 1999, Hyyrö 2003): a column is one integer."""
    if not a or not b:
        return len(a) + len(b)
    positions: dict[str, int] = {}
    for i, char in enumerate(a):
        positions[char] = positions.get(char, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    plus, minus, distance = full, 0, len(a)  # vertical differences +1 and -1
    for char in b:
        match = positions.get(char, 0)
        zero = (((match & plus) + plus) ^ plus) | match | minus
        up, down = minus | ~(zero | plus) & full, plus & zero
        distance += bool(up & last) - bool(down & last)
        up = up << 1 | 1
        plus, minus = (down << 1 | ~(zero | up)) & full, up & zero
    return distance


def math_verify_score(pred: str, gold: str) -> bool:
    """The whole answer is a number, a number with a unit, an expression or a list of these."""
    return same_answer(pred, gold)


def latex_score(pred: str, gold: str) -> bool:
    r"""Symbolic equality, where either side has a backslash or is a fraction a/b."""
    if not any("\\" in t or re.fullmatch(r"\s*[0-9]+\s*/\s*[0-9]+\s*", t) for t in (pred, gold)):
        return False
    return same_answer(pred, gold)


MODES: dict[str, Callable[[str, str], bool]] = {
    "vqa_score": vqa_score,
    "mc_score": multi_choice_score,
    "math_score": math_score,
    "math_verify_score": math_verify_score,
    "relaxed_accuracy": relaxed_correctness,
    "anls": anls_score,
    "latex_score": latex_score,
}
_DEFAULT_MODES = ("vqa_score", "mc_score", "math_score", "math_verify_score")
# first match wins, as in the official get_mode; SROIE deserves an explicit mode without relaxed
_MODES_BY_NAME = (
    (("chartqa",), ("relaxed_accuracy",)),
    (("docvqa", "infographics", "infovqa"), ("anls",)),
    (
        ("sroie", "clevr_math", "geos", "geometry"),
        ("relaxed_accuracy", "vqa_score", "mc_score", "math_verify_score"),
    ),
    (
        ("mavis",),
        ("vqa_score", "mc_score", "math_score", "latex_score", "math_verify_score"),
    ),
)


def get_mode(filename: str) -> list[str]:
    """Matching modes by the name of a data set: the fallback where its entry names none."""
    for names, modes in _MODES_BY_NAME:
        if any(name in filename.lower() for name in names):
            return list(modes)
    return list(_DEFAULT_MODES)


def post_process(text: str) -> str:
    """The official reading of an option letter, to compare with; ours is `option_letter`."""
    text = text.strip().strip("*").strip().upper()
    if len(text) == 1:
        return text
    if re.match(r"[A-N][\W\d_]", text):
        return text[0]
    if re.match(r"\([A-N]\)", text):
        return text[1]
    raise RuntimeError(f"no option letter in {text[:40]!r}")


def check_gold(gold: object) -> str | None:
    """What is wrong with a gold answer, or None."""
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        return f"is {type(gold).__name__}, expected text or a number"
    if isinstance(gold, float) and not math.isfinite(gold):
        return f"is {gold}"
    text = normalise(str(gold))
    if not text:
        return "is empty"
    if len(text) > MAX_ANSWER:
        return f"has {len(text)} characters, at most {MAX_ANSWER} are compared"
    if "\\" in text and text.count("{") - text.count("\\{") != text.count("}") - text.count("\\}"):
        return f"cannot be parsed: unbalanced braces in {text[:60]!r}"
    return None


def matching_mode(answer: str | None, gold: str, modes: Iterable[str]) -> str | None:
    """The mode that finds the answer right ("equal" for the same text), or None."""
    modes = list(modes)
    if answer is None:  # a format failure; its printed form would equal 0
        return None
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise InputError(f"unknown mode {unknown[0]!r}; known are {', '.join(MODES)}")
    answer, gold = str(answer), str(gold)
    if len(answer) > MAX_ANSWER or len(gold) > MAX_ANSWER:
        return "equal" if len(answer) == len(gold) and answer.lower() == gold.lower() else None
    plain_answer, plain_gold = normalise(answer), normalise(gold)
    if not plain_gold or not plain_answer:  # an empty gold is an input error, never a match
        return None
    if plain_answer.lower() == plain_gold.lower():
        return "equal"
    return next((mode for mode in modes if MODES[mode](answer, gold)), None)


def is_correct(answer: str | None, gold: str, modes: Iterable[str]) -> bool:
    """Any of the modes finds the answer right."""
    return matching_mode(answer, gold, modes) is not None


def check_answer(pred: str, gt: str, mode: Iterable[str]) -> int:
    """is_correct under its official name and signature."""
    return int(is_correct(pred, gt, mode))


# --------------------------------------------------------------------------- verdicts

_CJK = "\u3400-\u9fff\uf900-\ufaff"
_GUARD_TOKEN = re.compile(
    r"(?P<minus>(?<![\w)])-\s?)?(?:\\[dt]?frac\s*\{(?P<up>-?[0-9]{1,50})\}\s*\{(?P<down>[0-9]{1,50})\}"
    r"|(?P<number>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/(?P<over>[0-9]{1,50})(?![0-9./]))?)"
    rf"|(?P<cjk>[{_CJK}])|(?P<word>[^\W\d_{_CJK}]+(?:'[^\W\d_{_CJK}]+)*)"
)


def _guard_tokens(text: str) -> list[tuple[str, Any]]:
    """Signed numbers by value, words, single Chinese characters."""
    tokens: list[tuple[str, Any]] = []
    for m in _GUARD_TOKEN.finditer(text):
        if word := m["word"] or m["cjk"]:
            tokens.append(("word", word.lower()))
            continue
        up, down = m["up"] or m["number"].replace(",", ""), m["down"] or m["over"] or "1"
        if len(up) > 100 or not int(down):
            tokens.append(("text", m[0]))
        else:
            value = Fraction(up) / int(down)
            tokens.append(("number", -value if m["minus"] else value))
    return tokens


def is_ambiguous(answer: str, gold: str) -> bool:
    """A wrong answer that holds the gold answer as whole tokens: `12 or 13` for 12."""
    if len(answer) > MAX_ANSWER:
        answer = answer[:MAX_ANSWER]
    answer, gold = normalise(answer), normalise(str(gold))
    option = option_letter(gold)
    wanted = [gold]
    if option is not None:
        letter = re.search(rf"(?<![^\W_]){option[0]}(?![^\W_])", answer)
        if letter and option_letter(answer) is None:
            return True
        wanted = [option[1]]
    have = _guard_tokens(answer)
    for text in wanted:
        want = _guard_tokens(text)
        n = len(want)
        if n and any(have[i : i + n] == want for i in range(len(have) - n + 1)):
            return True
    return False


@dataclass(frozen=True)
class Verdict:
    """What a response is worth."""

    label: str  # "correct", "wrong" or "format"
    reason: str
    mode: str | None = None  # the mode that matched
    answer: str | None = None
    ambiguous: bool = False  # wrong, but holds the gold answer: not used as a negative


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
    mode = matching_mode(parsed.answer, gold, modes)
    if mode is not None:
        return Verdict("correct", f"matches by {mode}", mode, parsed.answer)
    if is_ambiguous(parsed.answer, gold):
        return Verdict("wrong", "holds the gold answer", None, parsed.answer, ambiguous=True)
    return Verdict("wrong", "no mode matches", None, parsed.answer)


# --------------------------------------------------------------------------- cutting a response

_LATEX_COMMAND_TAIL = re.compile(r"\\[A-Za-z]*(?:\[[^\[\]]{0,20}\])?$")
_TAGS = ("box", "ref", "quad", "think")


def split_prefix(text: str, ratio: float) -> tuple[str, str]:
    """(kept start, the blanks lost at the cut): the first `ratio` of a response's pieces.

    Pieces are split at single blanks; mostly Chinese text and single words at characters.  The cut
    moves left out of a LaTeX argument, a <box> and a <ref>.
    """
    pieces = text.split(" ")
    letters = [c for c in text if c.isalpha()]
    chinese = sum("\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" for c in letters)
    if len(pieces) < 2 or chinese * 2 > len(letters):
        cut = math.floor(len(text) * ratio + 1e-9)  # 0.07 * 100 is 7, not 6.999...
    else:
        cut = len(" ".join(pieces[: math.floor(len(pieces) * ratio + 1e-9)]))
    cut = _safe_cut(text, cut)
    kept = text[:cut].rstrip()
    glue = text[len(kept) : cut + len(text[cut:]) - len(text[cut:].lstrip())]
    return kept.lstrip(), glue


def truncate_prefix(text: str, ratio: float) -> str:
    """The kept start of a response."""
    return split_prefix(text, ratio)[0]


def _safe_cut(text: str, cut: int) -> int:
    """The last place at or before `cut` that is not inside a LaTeX argument or a tag pair."""
    while 0 < cut < len(text):
        safe = cut
        for tag in _TAGS:
            start = text.rfind(f"<{tag}>", 0, cut)
            if start >= 0 and f"</{tag}>" not in text[start:cut]:
                safe = min(safe, start)
        partial = text.rfind("<", max(0, cut - 8), cut)  # inside a tag itself
        if partial >= 0 and re.match(rf"</?(?:{'|'.join(_TAGS)})>", text[partial:]):
            if ">" not in text[partial:cut]:
                safe = min(safe, partial)
        opened = []
        for match in re.finditer(r"\\[{}\\]|[{}]", text[:cut]):
            if match[0] == "{":
                opened.append(match.start())
            elif match[0] == "}" and opened:
                opened.pop()
        if opened and "}" in text[cut:]:
            safe = min(safe, opened[0])
        safe = _before_command(text, safe)
        if unicodedata.combining(text[safe]) or "\udc00" <= text[safe] <= "\udfff":
            safe -= 1
        if safe == cut:
            return cut
        cut = safe
    return cut


def _before_command(text: str, cut: int) -> int:
    r"""Left of a LaTeX command that the cut would split: \fr|ac, \frac{1}|{2}."""
    head = text[:cut]
    if (match := _LATEX_COMMAND_TAIL.search(head)) and re.match(r"[A-Za-z{\[]", text[cut:]):
        return match.start()
    while text[cut : cut + 1] == "{" and head.endswith("}"):
        level, i = 0, len(head)
        while i > 0:
            i -= 1
            level += (head[i] == "}") - (head[i] == "{")
            if level == 0:
                break
        head = head[:i]
        if match := _LATEX_COMMAND_TAIL.search(head):
            return match.start()
    return cut
