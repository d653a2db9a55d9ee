"""Numbers with units: read by a small parser, never by Python, and compared in base units.

    parse_expression             text -> Quantity: fractions, LaTeX, powers, roots, free letters
    read_unit                    ms^-2, square meters, miles per hour -> Unit in base units
    read_quantity                3.2e-19 C, $5 million, 1 hour 30 minutes -> Quantity
    same_value, same_quantity    equal by the digits that both show

Everything is bounded: the length of a text, with it the depth of its groups (200 characters nest
at most 400 calls), and the size of exact powers.
Values are exact (`Fraction`) while they are rational and no roots, else floats.  No margin is
absolute, so that 3.2e-19 is not 1.6e-19 and neither is 0.
"""

import functools
import itertools
import math
import operator
import random
import re
import string
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

MAX_EXPRESSION = 200  # characters read as mathematics
MAX_BITS = 4096  # of an exact number; a larger one is a float, or nothing

# --------------------------------------------------------------------------- spelling


def table(name: str) -> list[list[str]]:
    """The lines of a table beside this file as words, without comments."""
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if line and line[0] != "#"]


def sections(name: str) -> dict[str, str]:
    """[section] -> its text, of a file beside this one."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    _, *parts = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)
    return {name: part.strip("\n") for name, part in zip(parts[::2], parts[1::2])}


_SIGNS = {name: sign for sign, *names in table("signs.txt") for name in names}
GREEK = {name: sign for name, sign in _SIGNS.items() if "Α" <= sign <= "ω" and name[:3] != "var"}
NUMBER_OF = {word: int(number) for number, *words in table("words.txt") for word in words}
_REWRITES = sections("rewrites.txt")
_PATTERNS = [line.split(" = ", 1) for line in _REWRITES["patterns"].splitlines() if line[0] != "#"]


def pattern(text: str, flags: int = 0) -> re.Pattern:
    """A regular expression that may name those of [patterns] in rewrites.txt."""
    for name, part in _PATTERNS:
        text = text.replace(name, part)
    return re.compile(text, flags)


def rewrites(names: str, flags: int = re.DOTALL) -> Callable[[str], str]:
    """Sections of rewrites.txt as a function."""
    rules = []
    for line in "\n".join(_REWRITES[name] for name in names.split()).splitlines():
        old, arrow, new = f"{line} ".partition(" => ")
        if arrow:
            compiled, new = pattern(old, flags), new.rstrip(" ").replace("␣", " ")
            find = compiled.match if old.startswith("^") else compiled.search
            new = _COMPUTED.get(new) or (partial(_ordinals, new) if "@" in new else new)
            rules.append((find, compiled.sub, new))

    def rewrite(text: str) -> str:
        text = text.strip()
        for find, replace, new in rules:
            if find(text):  # few do, and asking is faster than replacing nothing
                text = replace(new, text).strip()
        return text

    return rewrite


def inside_brackets(head: str) -> bool:
    """A bracket of the text before is still open."""
    return sum(map(head.count, "([{")) > sum(map(head.count, ")]}"))


def _sign(match: re.Match) -> str:
    sign = _SIGNS.get(match[1] or match[0], match[0])
    return " " if sign == "_" else sign + " " * sign.startswith("\\")


def _ordinals(new: str, match: re.Match) -> str:
    return re.sub("@([0-9])", lambda m: str(NUMBER_OF[match[int(m[1])].lower()]), match.expand(new))


def _digits(match: re.Match) -> str:
    """twenty-five -> 25, two hundred thousand -> 200000, 三百零五 -> 305."""
    terms: list[int] = []
    for word in re.findall(r"[^\W\d_一-鿿]+|[一-鿿]", match[0].lower()):
        value, times = NUMBER_OF.get(word, 0), 0  # nothing for `a` and `and`
        while terms and terms[-1] < value:  # two hundred thousand
            times += terms.pop()
        terms.append(value * max(times, 1))
    return str(sum(terms))


def _ungrouped(match: re.Match) -> str:
    """1,234 -> 1234; inside brackets a comma separates: (1,234) is a point."""
    separates = "," in match[0] and inside_brackets(match.string[: match.start()])
    return match[0] if separates else re.sub("[ ,'._]", "", match[0])


def _clock(match: re.Match) -> str:
    """quarter to 5 -> 4:45, half past 10 -> 10:30, 20 minutes past 6 -> 6:20"""
    minutes = int(match["minute"] or 60 // NUMBER_OF[match["part"].lower()])
    time = 60 * int(match["hour"]) + (-minutes if match["to"] else minutes)
    return f"{time // 60 or 12}:{time % 60:02}"


_COMPUTED = {
    "@": _sign, "@digits": _digits, "@place": lambda match: _digits(match) + "th",
    "@ungrouped": _ungrouped, "@clock": _clock,
    "@evening": lambda match: f"{int(match[1]) + 12}{match[2] or ':00'}",
}  # fmt: skip
plain_signs, plain_spelling = rewrites("signs"), rewrites("spelling")

# --------------------------------------------------------------------------- expressions

Number = Fraction | float
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z.]))?"
_TOKEN = re.compile(
    rf"({_NUMBER}|\\[A-Za-z]+|[A-Za-z]+|[{''.join(GREEK.values())}∞]|_(?:\{{[^{{}}]*\}}|\w)"
    r"|[-+*/^!%°(){}\[\]|])|\S"
)
_PROSE = pattern("PROSE", re.IGNORECASE)
_LETTERS = {*string.ascii_letters, *GREEK.values(), "∞"}


class Unit(NamedTuple):
    """A product of powers of base units: `scale` times their product."""

    scale: Number = Fraction(1)
    kind: Fraction = Fraction(1)  # each base unit is a large number of its own; 1: a pure number

    def times(self, other: "Unit", power: int = 1) -> "Unit":
        return Unit(self.scale * other.scale**power, self.kind * other.kind**power)


class Quantity(NamedTuple):
    """The value of an expression at each fixed point of its letters; without letters one value."""

    values: tuple[Number | None, ...]  # None where it has none: 1/0, too large
    letters: frozenset[str] = frozenset()
    step: Fraction = Fraction(0)  # of the coarsest decimal: its last place over its value; 0: exact
    unit: Unit | None = None

    def times(self, number: Number) -> "Quantity":
        return combine(operator.mul, self, constant(number))


def constant(number: Number, step: Fraction = Fraction(0)) -> Quantity:
    return Quantity((number,), step=step)


@functools.lru_cache(maxsize=256)
def letter(name: str) -> Quantity:
    """A free letter at six points, never whole: four times positive, once negative, once either."""
    draw = random.Random(name)
    signs = (1, 1, 1, 1, -1, draw.choice((1, -1)))
    values = (sign * Fraction(draw.randrange(301, 2701, 2), 1000) for sign in signs)
    return Quantity(tuple(values), frozenset([name]))


def paired(*expressions: Quantity) -> list[tuple[Number | None, ...]]:
    """Their values at the same points."""
    points = max(len(x.values) for x in expressions)
    return [*zip(*(x.values * (points // len(x.values)) for x in expressions))]


def combine(function: Callable[..., Number], *operands: Quantity) -> Quantity:
    """A function of expressions, point by point."""
    return Quantity(
        tuple(_compute(function, values) for values in paired(*operands)),
        frozenset().union(*(x.letters for x in operands)),
        max(x.step for x in operands),
    )


def _compute(function: Callable[..., Number], values: tuple) -> Number | None:
    """Exact while the numbers are rational, else floats; None where undefined."""
    if None in values:
        return None
    try:
        x = function(*values)
        if isinstance(x, Fraction):
            large = x.numerator.bit_length() + x.denominator.bit_length() > MAX_BITS
            return (float(x) or None) if large else x
    except (ArithmeticError, ValueError):  # outside the domain, beyond the floats
        return None
    if not math.isfinite(x) or (function is _power and x == 0 != values[0]):  # beyond the floats
        return None
    if function in _CANCELLING and abs(x) < 1e-14 * abs(values[0]):
        return Fraction(0)  # the last bits of floats, as in sin(pi): so nothing needs a margin at 0
    return x


def parse_expression(text: str) -> Quantity | None:
    """Plainly spelled arithmetic: roots, powers, functions, free letters; None if it is not."""
    if len(text) > MAX_EXPRESSION:
        return None
    try:
        parser = _Parser(text)
        expression = parser.expression()
    except ValueError:
        return None
    return None if parser.peek() else expression


class _Parser:
    """Precedence climbing over one line of mathematics: + -, then * / and products without a sign,
    then signs, then powers, then ! % °."""

    def __init__(self, text: str) -> None:
        self.tokens = [piece for word in _TOKEN.findall(text) for piece in self.pieces(word)]
        self.i = 0

    def pieces(self, word: str) -> list[str]:
        """A token; of letters a known name or a product of single ones; no rule reads ?."""
        if word in GREEK:
            return [GREEK[word]]
        product = word.isalpha() and len(word) <= (4 if word.isupper() else 3)
        if product and word not in _NAMES and not _PROSE.fullmatch(word):
            return list(word)
        return [word if len(word) == 2 else word.removeprefix("\\") or "?"]  # \x is not x

    def peek(self) -> str:
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def accept(self, *tokens: str) -> str:
        """The next token if it is one of these (any without them), else the empty text."""
        token = self.peek()
        if tokens and token not in tokens:
            return ""
        self.i += 1
        return token

    def joins(self, token: str) -> bool:
        """A factor without its sign: 2x, but never 2 3."""
        return token[:1] in ("∞", *"({[") or token[:1].isalpha()

    def expression(self, above: int = 0) -> Quantity:
        """As far as operators of a rank above `above` go."""
        if sign := self.accept("+", "-"):
            value = self.expression(_SIGN)
            value = combine(operator.neg, value) if sign == "-" else value
        else:
            value = self.atom()
        while token := self.peek():
            rank, function = _INFIX.get(token, (_TIMES * self.joins(token), operator.mul))
            if token in _POSTFIX:
                value = combine(_POSTFIX[self.accept()], value)
            elif token == "^":
                self.accept()
                value = combine(_power, value, self.expression(_SIGN))
            elif rank <= above:
                break
            else:
                self.i += token in _INFIX
                value = combine(function, value, self.expression(rank))
        return value

    def atom(self) -> Quantity:
        r"""A number, a letter, a command or a group; alone also an argument, as in \frac ab."""
        token = self.accept()
        if close := _CLOSING.get(token):
            value = self.expression()
            if not self.accept(close):
                raise ValueError(f"no {close!r}")
            return combine(abs, value) if token == "|" else value
        if token[:1].isdigit() or token[:1] == ".":
            number = _compute(operator.pos, (Fraction(token),))
            mantissa = token.lower().partition("e")[0].rstrip(".")
            decimal = "." in mantissa and number  # 3.20e5 is given to a part in 320
            return constant(number, 1 / Fraction(mantissa.replace(".", "")) if decimal else 0)
        if token in _CONSTANTS:
            return constant(_CONSTANTS[token])
        if token in _TWO_GROUPS:
            return combine(_TWO_GROUPS[token], self.atom(), self.atom())
        if token in ROOTS:
            index = self.atom() if self.peek() == "[" else constant(ROOTS[token])
            return combine(_root, self.atom(), index)
        if token in FUNCTIONS:
            return self.function(token)
        if token in _LETTERS:
            subscript = self.accept() if self.peek().startswith("_") else ""  # x_1, x_{12}
            return letter(token + re.sub("[{}]", "", subscript))
        raise ValueError(f"unexpected {token or 'end'!r}")

    def function(self, name: str) -> Quantity:
        r"""\log_2 8, \sin^2 x, \sin^{-1} x, \sin 2x: letters up to the next function or sign."""
        base = exponent = None
        if name == "log" and self.peek().startswith("_"):
            base = _Parser(self.accept().strip("_{}")).expression()
        if self.accept("^"):
            exponent = self.expression(_SIGN)
        if self.peek() in ("(", "{", "["):
            argument = self.atom()
        else:
            argument = self.expression(_SIGN)
            while self.joins(self.peek()) and self.peek() not in FUNCTIONS:
                argument = combine(operator.mul, argument, self.expression(_TIMES))
        value = combine(math.log, argument, base) if base else combine(FUNCTIONS[name], argument)
        return combine(_power, value, exponent) if exponent else value


def is_whole(x: Number | None) -> bool:
    return isinstance(x, Fraction) and x.denominator == 1


def _small(x: Number) -> int:
    if not is_whole(x) or not 0 <= x <= 170:
        raise ArithmeticError("only of small whole numbers")
    return int(x)


def _power(a: Number, b: Number) -> Number:
    if isinstance(a, Fraction) and is_whole(b):
        bits = a.numerator.bit_length() + a.denominator.bit_length()
        if bits * abs(b.numerator) <= MAX_BITS:
            return a ** int(b)
    if a < 0 and b != int(b):
        raise ArithmeticError("root of a negative number")
    return float(a) ** float(b)


def _root(a: Number, index: Number) -> Number:
    if a < 0 and is_whole(index) and index % 2 == 1:
        return -_root(-a, index)
    return _power(a, 1 / index)


_CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}
_PLUS, _TIMES, _SIGN = 1, 2, 3  # ranks: what binds tighter stands higher
_INFIX = {
    "+": (_PLUS, operator.add), "-": (_PLUS, operator.sub),
    "*": (_TIMES, operator.mul), "/": (_TIMES, operator.truediv),
}  # fmt: skip
_POSTFIX = {
    "!": lambda a: Fraction(math.factorial(_small(a))),
    "%": lambda a: a / 100,
    "°": lambda a: a * math.pi / 180,
}
_TWO_GROUPS = {
    "frac": operator.truediv,
    "binom": lambda a, b: Fraction(math.comb(_small(a), _small(b))),
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
ROOTS = {"sqrt": Fraction(2), "cbrt": Fraction(3)}
FUNCTIONS: dict[str, Callable[[Number], Number]] = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "arcsin": math.asin, "arccos": math.acos,
    "arctan": math.atan, "sinh": math.sinh, "cosh": math.cosh, "tanh": math.tanh, "exp": math.exp,
    "ln": math.log, "log": math.log10, "lg": math.log10, "abs": abs,
    "cot": lambda a: 1 / math.tan(a), "sec": lambda a: 1 / math.cos(a),
    "csc": lambda a: 1 / math.sin(a),
}  # fmt: skip
_NAMES = {*FUNCTIONS, *ROOTS, *_CONSTANTS}
_CANCELLING = (operator.add, operator.sub, math.sin, math.cos, math.tan)


def same_value(a: Quantity, gold: Quantity) -> bool:
    """Equal numbers; with free letters, equal at the fixed points."""
    values = defined(a, gold)
    if a.letters or gold.letters:
        return len(values) > 1 and all(_same_number(x, y, 0, 0) for x, y in values)
    return bool(values) and _same_number(*values[0], a.step, gold.step)


def defined(a: Quantity, b: Quantity) -> list[tuple[Number, Number]]:
    """Both values where both have one; nothing if one of them alone has one somewhere."""
    values = paired(a, b)
    alike = all((x is None) == (y is None) for x, y in values)
    return [(x, y) for x, y in values if alike and x is not None]


def _same_number(x: Number, gold: Number, step: Number, gold_step: Number) -> bool:
    """Whole numbers and fractions are exact, decimals count for the digits that they show.

    A decimal equals a gold decimal that it rounds to, or that rounds (or is cut) to it, within a
    thousandth (and 100 is 100.05); a gold fraction or root takes six digits.
    """
    exact = isinstance(x, Fraction) and isinstance(gold, Fraction)
    if x == gold or (not exact and math.isclose(x, gold, rel_tol=1e-9)):
        return True
    off, size = abs(x - gold), abs(gold)
    if not (step or gold_step) or (not gold_step and is_whole(gold)) or off > size / 1000:
        return False
    if not gold_step or not (step or is_whole(x)):
        return off <= 5e-6 * size
    return 2 * off <= gold_step * size or (20 * off <= 1 if is_whole(x) else off < step * abs(x))


# --------------------------------------------------------------------------- units

_unit_spelling = rewrites("units", re.IGNORECASE)
_UNIT_FACTOR = pattern("FACTOR")
_FILLERS = frozenset("of the old long wide high tall deep total altogether each more".split())


def _base(name: str) -> Unit:
    return Unit(kind=Fraction(zlib.crc32(name.encode()) | 1))


_UNITS: dict[str, Unit] = {}  # names and symbols, with prefixes: see units.txt


def _known_unit(word: str) -> Unit | None:
    """The unit of a name or symbol, plurals and points included; case counts where it can."""
    forms = [bare for form in (word, word.replace(".", "")) for bare in (form, form.lower())]
    names = (form.removesuffix(end) for form in forms for end in ("", "s" * (len(form) > 2)))
    return next((_UNITS[name] for name in names if name in _UNITS), None)


@functools.lru_cache(maxsize=8192)
def read_unit(text: str, invented: bool = True) -> Unit | None:
    """m/s^2, ms^-2, square meters, miles per hour; None if it is prose or a product.

    `invented`: words outside the table (red apples) are units of their own.
    """
    text, product = _unit_spelling(text.strip().rstrip(".")), Unit()
    for place, part in enumerate(text.split("/")):
        for factor in part.split():
            if (match := _UNIT_FACTOR.fullmatch(factor)) is None:
                return None
            if (unit := _known_unit(match[1])) is None:
                word = match[1].lower()
                if word in _FILLERS:
                    continue
                letter = len(word) < 2 and word.isascii()
                if letter or not invented or word in _NAMES or _PROSE.fullmatch(word):
                    return None
                unit = _base(word.removesuffix("s") if len(word) > 3 else word)
            product = product.times(unit, int(match[2] or 1) * (-1 if place else 1))
    return product


def _fill_units() -> None:
    prefixes: dict[str, Fraction] = {}
    exact, lower = {}, {}  # lower: HZ, where Hz is meant
    for line in table("units.txt"):
        names, _, amount = " ".join(line).partition(" = ")
        number, _, of = amount.partition(" ")
        if names.endswith("-"):
            prefixes |= dict.fromkeys(names.replace("-", "").split(), Fraction(number))
            continue
        base = read_unit(of) if of else Unit() if amount else _base(line[0].lstrip("*"))
        unit = base._replace(scale=Fraction(number or 1) * base.scale)
        scales = {"": Fraction(1)} | (prefixes if names[0] == "*" else {})
        for name, prefix in itertools.product(names.lstrip("*").split(), scales):
            if prefix == "" or (len(name) < 4 if len(prefix) == 1 else len(name) > 2):
                large = unit._replace(scale=unit.scale * scales[prefix])
                for known, key in ((exact, prefix + name), (lower, prefix + name.lower())):
                    known[key] = known.get(key, large) if prefix else large  # Nm is a name itself
        _UNITS.update(lower | exact)
    read_unit.cache_clear()


_fill_units()
_COUNTRIES = {x for u in _UNITS.values() if is_whole(x := u.kind / _UNITS["$"].kind)}

# --------------------------------------------------------------------------- quantities

_amount = rewrites("amount")
_UNIT_START = pattern("UNIT_START")
_SUM = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+|['\"])\.?(?:\s*and\s+|\s*|$)")


def read_quantity(text: str) -> Quantity | None:
    text = _amount(text.strip())
    for match in itertools.islice(_UNIT_START.finditer(text), 8):
        head, tail = text[: match.start()], text[match.end() :]
        if tail in head or (tail == "°" and head[0] not in "-.0123456789("):  # 3° + 5°, \\sin 3°
            continue
        unit = read_unit(tail, invented=bool(match[0]) or tail > "\u3400")  # 5 red apples, 5个
        expression = parse_expression(head)
        if unit and expression and not expression.letters:
            return expression._replace(unit=unit)
    return parse_expression(text)


def read_sum(text: str) -> Quantity | None:
    """1 hour 30 minutes, 5 ft 10 in: falling units of one kind."""
    parts = [(Fraction(m[1]), _known_unit(m[2])) for m in _SUM.finditer(text)]
    if not 1 < len(parts) < 5 or _SUM.sub("", text) or not all(unit for _, unit in parts):
        return None
    units = [unit for _, unit in parts]
    if not all(a.kind == b.kind and a.scale > b.scale for a, b in itertools.pairwise(units)):
        return None
    total = sum(number * unit.scale for number, unit in parts)
    return constant(total / units[0].scale)._replace(unit=units[0])


def same_quantity(a: Quantity, b: Quantity, same: Callable = same_value) -> bool:
    """In base units where both have one; a bare number meets any unit, 0.5 meets 50 % too."""
    if a.unit == b.unit:
        return same(a, b)
    (scale, kind), (gold_scale, gold_kind) = a.unit or Unit(), b.unit or Unit()
    country = max(kind, gold_kind) / min(kind, gold_kind)  # US of US$5/kg and $5/kg
    converted = country in _COUNTRIES and same(a.times(scale), b.times(gold_scale))
    return converted or (None in (a.unit, b.unit) and same(a, b))


def same_in_other_units(a: Quantity, b: Quantity) -> bool:
    """80 cents beside 0.8, 5 cm beside 50: a number without a unit may count another one."""
    if (a.unit is None) == (b.unit is None):
        return False
    given, bare = (a, b) if a.unit else (b, a)
    ratio = combine(operator.truediv, given, bare).values[0] or 0
    wanted, scales = float(ratio) * float(given.unit.scale), _scales(given.unit.kind).items()
    near = [scale for x, scale in scales if math.isclose(x, wanted, rel_tol=0.01)]
    return any(same_value(given.times(given.unit.scale / scale), bare) for scale in near)


@functools.lru_cache(maxsize=256)
def _scales(kind: Fraction) -> dict[float, Fraction]:
    """Of the known units of a kind; as a float, too, which is found faster."""
    return {float(unit.scale): unit.scale for unit in _UNITS.values() if unit.kind == kind}
