"""Numbers with units: read by a small parser, never by Python, and compared in base units.

    parse_expression             text -> Expression: fractions, LaTeX, powers, roots, free letters
    read_unit                    ms^-2, square meters, miles per hour -> Unit in base units
    read_quantity                3.2e-19 C, $5 million, 1 hour 30 minutes -> Quantity
    same_value, same_quantity    equal by the digits that both show

Everything is bounded: the length of a text, the depth of its groups, the size of exact powers.
Values are exact (`Fraction`) while they are rational, else floats.  No margin is absolute, so that
3.2e-19 is not 1.6e-19 and neither is 0.
"""

import functools
import itertools
import math
import operator
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

MAX_EXPRESSION = 200  # characters read as mathematics
MAX_DEPTH = 40  # nested groups, powers and functions
MAX_BITS = 4096  # of an exact power; a larger one is computed as a float, which may overflow

# --------------------------------------------------------------------------- spelling


class Rules:
    """Replacements in order; ASCII text without any of the characters `needs` stays as it is."""

    def __init__(self, *pairs: tuple[str, str | Callable], flags: int = 0, needs: str = "") -> None:
        self.pairs = [(re.compile(pattern, flags), new) for pattern, new in pairs]
        self.needs = frozenset(needs)

    def apply(self, text: str) -> str:
        if self.needs and self.needs.isdisjoint(text) and text.isascii():
            return text
        for pattern, new in self.pairs:
            text = pattern.sub(new, text).strip()
        return text


GREEK = dict(
    zip(
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
        "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega".split(),
        "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ",
    )
)
_SIGN_TABLE = r"""
infty ∞; cup ∪; pm ±; cdot times ast *; div /; le leq leqslant ≤; ge geq geqslant ≥; ne neq ≠;
approx cong in =; lt <; gt >; vert lvert rvert |; angle measuredangle ∠; circ degree °;
√ \sqrt; π \pi; +/- ±; ÷ /; <= ≤; >= ≥; != ≠; ≈ ≅ ∈ =; ** ^
"""
_SIGNS = GREEK | {"var" + name: letter for name, letter in GREEK.items()}
_BLANKS = "left right displaystyle limits big bigg Big Bigg quad qquad triangle overline vec bar △"
_SIGNS |= dict.fromkeys(_BLANKS.split(), " ")
for _entry in _SIGN_TABLE.split(";"):
    *_names, _sign = _entry.split()
    _SIGNS |= dict.fromkeys(_names, _sign + " " * _sign.startswith("\\"))
SPELLINGS = Rules(  # LaTeX and typographic signs -> the small alphabet of the readers below
    (r"\{,\}", ","),
    (r"(?<=[0-9])\\[,!](?=[0-9]{3})", ""),
    (r"\\[,!;: ]|~", " "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", "°"),
    (r"\\([%$&{}])", r"\1"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\frac\s*([0-9])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
    (
        r"\\([A-Za-z]+)|[√π÷≈≅∈△]|\+/-|[<>!]=|\*\*",
        lambda match: _SIGNS.get(match[1] or match[0], match[0]),
    ),
    (r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", "*"),
    # a whole number in front of a proper fraction is a mixed number
    (r"(?<![\w.^}/])([0-9]{1,6})\s*\\frac\s*\{\s*([0-9]{1,6})\s*\}\s*\{\s*([0-9]{1,6})\s*\}", r"(\1+\2/\3)"),  # noqa: E501
    (r"(?<![\w.^}/])([0-9]{1,6})\s+([0-9]{1,6})\s*/\s*([0-9]{1,6})(?![\w.])", r"(\1+\2/\3)"),
    needs="\\*~<>!/xX{+",
)  # fmt: skip

# --------------------------------------------------------------------------- expressions

Number = Fraction | float
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z.]))?"
_TOKEN = re.compile(
    rf"\s*({_NUMBER}|\\[A-Za-z]+|[A-Za-z]+|[{''.join(GREEK.values())}∞]|_(?:\{{[^{{}}]*\}}|\w)"
    r"|[-+*/^!%°(){}\[\]|:])"
)
# short words that are prose, never a product of letters
_PROSE = frozenset(
    "or and to not no of is in the by if at on as am pm than more less least most about off for "
    "per yes nor but only both either neither over under up via".split()
)


class ExpressionError(ValueError):
    """Not an expression, or larger than the limits."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression: a number, a letter, or (function, operand, ...)."""

    tree: Any
    letters: frozenset[str] = frozenset()
    step: Fraction = Fraction(0)  # of the coarsest decimal: its last place over its value; 0: exact

    def value(self, point: int = 0) -> Number:
        """The value with the letters at fixed point number `point`; ArithmeticError without one."""
        return _evaluate(self.tree, point)

    def value_or_none(self, point: int) -> Number | None:
        try:
            return self.value(point)
        except ArithmeticError:
            return None

    def minus(self, other: "Expression") -> "Expression":
        tree = (operator.sub, self.tree, other.tree)
        return Expression(tree, self.letters | other.letters, max(self.step, other.step))

    def times(self, number: Number) -> "Expression":
        return self if number == 1 else replace(self, tree=(operator.mul, self.tree, number))


def parse_expression(text: str, ratio: bool = False, prefix: bool = False) -> Expression | None:
    """Arithmetic with LaTeX forms, roots, powers, functions and free letters; None if it is not.

    `ratio` reads a:b as a quotient; `prefix` reads as far as it goes (both for MathVision's rule).
    """
    if len(text) > MAX_EXPRESSION:
        return None
    try:
        parser = _Parser(SPELLINGS.apply(text), ratio, prefix)
        tree = parser.sum()
    except ExpressionError:
        return None
    if parser.peek() and not prefix:
        return None
    return Expression(tree, frozenset(parser.letters), parser.step)


class _Parser:
    """Recursive descent over one line of mathematics.

    sum: term (+|- term)*       term: factor ((*|/) factor | power)*     factor: (+|-)* power
    power: atom (!|%|°)* (^ factor)?
    """

    CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}

    def __init__(self, text: str, ratio: bool = False, prefix: bool = False) -> None:
        self.i, self.depth, self.letters, self.step = 0, 0, set(), Fraction(0)
        self.product_signs, self.prefix = "*/:" if ratio else "*/", prefix
        self.tokens: list[str] = []
        at = 0
        while (match := _TOKEN.match(text, at)) and (pieces := self.pieces(match)):
            at = match.end()
            self.tokens += pieces
        if text[at:].strip() and not prefix:
            raise ExpressionError(f"unexpected {text[at:]!r}")

    def pieces(self, match: re.Match) -> list[str]:
        """A token; of letters a function, pi, or a product of single ones, but none for prose."""
        word = match[1]
        if not (word.isascii() and word.isalpha()):
            return [word]
        if word in FUNCTIONS or word in ("sqrt", "cbrt", "pi"):
            return ["\\" + word]
        if word in GREEK:
            return [GREEK[word]]
        apart = match[0] != word and bool(self.tokens) and self.tokens[-1][-1:].isdigit()
        longest = 1 if apart else 4 if word.isupper() else 3
        return [] if len(word) > longest or word.lower() in _PROSE else list(word)

    def peek(self) -> str:
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def accept(self, *tokens: str) -> str:
        """The next token if it is one of these (any without them), else the empty text."""
        token = self.peek()
        if tokens and token not in tokens:
            return ""
        self.i += 1
        return token

    def sum(self) -> Any:
        return self.chain(self.term, "+-")

    def term(self) -> Any:
        return self.chain(self.factor, self.product_signs)

    def chain(self, operand: Callable[[], Any], signs: str) -> Any:
        """Left-associative operators; a product may lack its sign.  `prefix` stops at errors."""
        tree = operand()
        while (token := self.peek()) and (token in signs or (signs != "+-" and self.joins(token))):
            start = self.i, self.depth
            try:
                if self.accept(*signs):
                    tree = (_OPERATORS[token], tree, operand())
                else:
                    tree = (operator.mul, tree, self.power())
            except ExpressionError:
                if not self.prefix:
                    raise
                self.i, self.depth = start
                break
        return tree

    def joins(self, token: str) -> bool:
        """A factor without its sign: 2x, but never 2 3."""
        return token[:1] in ("\\", "∞", *"({[") or token[:1].isalpha()

    def factor(self) -> Any:
        negative = False
        while sign := self.accept("+", "-"):
            negative ^= sign == "-"
        tree = self.power()
        return (operator.neg, tree) if negative else tree

    def power(self) -> Any:
        tree = self.atom()
        while sign := self.accept(*_POSTFIX):
            tree = (_POSTFIX[sign], tree)
        return (_power, tree, self.factor()) if self.accept("^") else tree

    def atom(self) -> Any:
        r"""A number, a letter, a command or a group; alone also an argument, as in \frac ab."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError("nested too deeply")
        token = self.accept()
        if close := self.CLOSING.get(token):
            tree = self.sum()
            if not self.accept(close):
                raise ExpressionError(f"no {close!r}")
            tree = (abs, tree) if token == "|" else tree
        elif token[:1].isdigit() or token[:1] == ".":
            tree = Fraction(token)
            mantissa = token.lower().partition("e")[0].rstrip(".")
            if "." in mantissa and tree:  # 3.20e5 is given to a part in 320
                self.step = max(self.step, 1 / Fraction(mantissa.replace(".", "")))
        elif token.startswith("\\"):
            tree = self.command(token[1:])
        elif token == "e":
            tree = math.e
        elif token[:1].isalpha() or token == "∞":
            subscript = self.accept() if self.peek().startswith("_") else ""  # x_1, x_{12}
            tree = token + re.sub("[{}]", "", subscript)
            self.letters.add(tree)
        else:
            raise ExpressionError(f"unexpected {token or 'end'!r}")
        self.depth -= 1
        return tree

    def command(self, name: str) -> Any:
        if name == "pi":
            return math.pi
        if name in _TWO_GROUPS:
            return (_TWO_GROUPS[name], self.atom(), self.atom())
        if name in ("sqrt", "cbrt"):
            index = self.atom() if self.peek() == "[" else Fraction(3 if name == "cbrt" else 2)
            return (_root, self.atom(), index)
        if name in FUNCTIONS:
            return self.function(name)
        raise ExpressionError(f"unknown command {name!r}")

    def function(self, name: str) -> Any:
        base = exponent = None
        if name == "log" and self.peek().startswith("_"):
            base = _Parser(self.accept().strip("_{}")).sum()
        if self.accept("^"):  # \\sin^2 x
            exponent = self.factor() if self.peek() == "-" else self.atom()
        if exponent == (operator.neg, Fraction(1)) and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, None
        if self.peek() in ("(", "{", "["):
            argument = self.atom()
        else:  # \\sin 2x: numbers and letters up to the next function or sign
            argument = self.power()
            while self.joins(self.peek()) and self.peek()[1:] not in FUNCTIONS:
                argument = (operator.mul, argument, self.power())
        tree = (FUNCTIONS[name], argument) if base is None else (math.log, argument, base)
        return tree if exponent is None else (_power, tree, exponent)


def _evaluate(tree: Any, point: int) -> Number:
    """Exact while the numbers are rational, else floats; ArithmeticError where undefined."""
    if isinstance(tree, str):  # a letter: all positive, then all negative, then mixed; never whole
        seed = zlib.crc32(f"{tree} {point}".encode())
        size = 0.3 + 2.4 * ((seed % 99991) / 99991)
        return -size if point == 4 or (point == 5 and seed % 2) else size
    if not isinstance(tree, tuple):
        return tree
    function, *operands = tree
    values = [_evaluate(operand, point) for operand in operands]
    try:
        x = function(*values)
    except ValueError:  # of the math module
        raise ArithmeticError("outside the domain") from None
    if isinstance(x, Fraction) and x.numerator.bit_length() + x.denominator.bit_length() > MAX_BITS:
        x = float(x)  # OverflowError is an ArithmeticError
    if isinstance(x, float) and not math.isfinite(x):
        raise ArithmeticError("not finite")
    if function in _CANCELLING and isinstance(x, float) and abs(x) < 1e-14 * abs(values[0]):
        return Fraction(0)  # the last bits of floats, as in sin(pi): so nothing needs a margin at 0
    return x


def _small(x: Number) -> int:
    if not is_whole(x) or not 0 <= x <= 170:
        raise ArithmeticError("only of small whole numbers")
    return int(x)


def is_whole(x: Number) -> bool:
    return isinstance(x, Fraction) and x.denominator == 1


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
    if isinstance(a, Fraction) and index == 2 and a >= 0:  # keep \\sqrt{4} exact
        up, down = math.isqrt(a.numerator), math.isqrt(a.denominator)
        if up * up == a.numerator and down * down == a.denominator:
            return Fraction(up, down)
    return _power(a, 1 / index)


_OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    ":": operator.truediv,
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
FUNCTIONS: dict[str, Callable[[Number], Number]] = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "arcsin": math.asin, "arccos": math.acos,
    "arctan": math.atan, "sinh": math.sinh, "cosh": math.cosh, "tanh": math.tanh, "exp": math.exp,
    "ln": math.log, "log": math.log10, "lg": math.log10, "abs": abs,
    "cot": lambda a: 1 / math.tan(a), "sec": lambda a: 1 / math.cos(a),
    "csc": lambda a: 1 / math.sin(a),
}  # fmt: skip
_CANCELLING = (operator.add, operator.sub, math.sin, math.cos, math.tan)


def same_value(a: Expression, gold: Expression) -> bool:
    """Equal numbers; with free letters, equal at several fixed points."""
    values = at_points(a, gold)
    if a.letters or gold.letters:
        margin = 5e-6 if a.step or gold.step else 1e-9
        return len(values) > 1 and all(math.isclose(x, y, rel_tol=margin) for x, y in values)
    return bool(values) and _same_number(*values[0], a.step, gold.step)


def at_points(a: Expression, b: Expression) -> list[tuple[Number, Number]]:
    """Both values at the fixed points where both are defined; nothing if only one is."""
    points = range(6 if a.letters or b.letters else 1)
    pairs = [(a.value_or_none(point), b.value_or_none(point)) for point in points]
    if any((x is None) != (y is None) for x, y in pairs):
        return []
    return [pair for pair in pairs if pair != (None, None)]


def _same_number(x: Number, gold: Number, step: Fraction, gold_step: Fraction) -> bool:
    """Whole numbers and fractions are exact, decimals count for the digits that they show.

    A decimal equals a gold decimal that it rounds to, or that rounds (or is cut) to it, within a
    thousandth (and 100 is 100.05); a gold fraction or root takes six digits.
    """
    if x == gold or (isinstance(x * gold, float) and math.isclose(x, gold, rel_tol=1e-9)):
        return True
    off, size = abs(x - gold), abs(gold)
    if not (step or gold_step) or (not gold_step and is_whole(gold)) or off > size / 1000:
        return False
    if not gold_step or not (step or is_whole(x)):
        return off <= 5e-6 * size
    return 2 * off <= gold_step * size or (20 * off <= 1 if is_whole(x) else off < step * abs(x))


# --------------------------------------------------------------------------- units

# names = how much of what; with a star also k before symbols and kilo before names, and so on
_UNIT_TABLE = """
*m meter metre; micron = 0.001 mm; *Å angstrom = 1e-10 m; in inch inches " = 2.54 cm;
ft foot feet ' = 12 in; yd yard = 3 ft; mi mile = 5280 ft; acre; ha hectare = 10000 m^2;
*l L liter litre = 1000 cm^3; cc = 1 cm^3; gal gallon = 231 in^3; quart qt = 0.25 gal;
pint pt = 0.5 quart; cup; *s sec second; min minute = 60 s; h hr hour = 60 min; day = 24 h;
week wk = 7 day; month mo; year yr = 12 month; decade = 10 year; century centuries = 100 year;
mph = 1 mi/h; kph kmh kmph = 1 km/h; *g gram gramme gm; kilo = 1 kg; oz ounce = 28.349523125 g;
lb lbs pound = 16 oz; t tonne = 1000 kg; ton; *N newton = 1 kg m/s^2; Nm = 1 N m;
*J joule = 1 N m; Js = 1 J s; *eV electronvolt = 1.602176634e-19 J; *cal calorie = 4.184 J;
*W watt = 1 J/s; *Wh = 3600 J; *Pa pascal = 1 N/m^2; *bar = 100000 Pa; atm = 101325 Pa;
*Hz hertz = 1 s^-1; *V volt; *A amp ampere; *Ω ohm; *C coulomb °C celsius centigrade;
*F farad fahrenheit °F; *T tesla; *K kelvin; *mol mole;
*M molar; *B byte; bit; rad radian; ° deg degree = 0.017453292519943295 rad;
% percent pct = 0.01; $ dollar usd us$ buck; cent ¢ = 0.01 $; € euro eur; £ gbp;
pence penny p = 0.01 £; ¥ yen jpy yuan rmb cny 元; ₩ won krw; ₹ rs inr rupee; rm myr ringgit; chf
"""
_PREFIX_TABLE = (
    "k 3 kilo 3 M 6 mega 6 G 9 giga 9 T 12 tera 12 d -1 deci -1 c -2 centi -2 m -3 milli -3 μ -6 u "
    "-6 micro -6 n -9 nano -9 p -12 pico -12"
).split()
_PREFIXES = dict(zip(_PREFIX_TABLE[::2], map(int, _PREFIX_TABLE[1::2])))
_UNIT_SPELLINGS = Rules(
    (r"[{}]|\bdegrees? (?=[cf])", ""),
    (r"\*", " "),
    (r"\s*\bper\s+|\s*/\s*(?:a\s+)?", "/"),
    (r"\s*\^\s*|(?<=[A-Za-zΩμ])(?=[23](?![0-9]))|\s+(?=squared|cubed)", "^"),
    (r"\bsquared\b", "2"),
    (r"\bcubed\b", "3"),
    (r"\b(?:square[ -]|sq\b[. ]*)\s*(\S+)", r"\1^2"),
    (r"\b(?:cubic[ -]|cu\b[. ]*)\s*(\S+)", r"\1^3"),
    (r"μ (?=m)", "μ"),
    (r"(?<=[a-z])-(?=[1-9]\b)", "^-"),
    (r"\bms(?=\^-)", "m s"),  # no one means per millisecond
    flags=re.IGNORECASE,
)
_UNIT_FACTOR = re.compile(
    r"((?:us)?[$¢€£¥₹₩%'\"]|°[CFcf]?|[^\W\d_]+(?:[-'.][^\W\d_]+)*)(?:\^([+-]?[1-9]))?\.?"
)
_FILLERS = frozenset("of the old long wide high tall deep total altogether each".split())


class Unit(NamedTuple):
    """A product of powers of base units: `scale` of them make one of it."""

    scale: Number
    powers: tuple[tuple[str, int], ...]  # (base unit, exponent), sorted


_UNITS: dict[str, Unit] = {}  # names and symbols, with prefixes


def _known_unit(word: str) -> Unit | None:
    """The unit of a name or symbol, plurals included; case counts where it can."""
    endings = ("", "s") if len(word) > 2 else ("",)
    names = (form.removesuffix(end) for form in (word, word.lower()) for end in endings)
    return next((_UNITS[name] for name in names if name in _UNITS), None)


@functools.lru_cache(maxsize=8192)
def read_unit(text: str, invented: bool = True) -> Unit | None:
    """m/s^2, ms^-2, square meters, miles per hour; None if it is prose or a product.

    `invented`: words outside the table (red apples) are units of their own.
    """
    text = _UNIT_SPELLINGS.apply(text.strip().rstrip("."))
    scale, powers = Fraction(1), Counter()
    for place, part in enumerate(text.split("/")):
        for factor in part.split():
            if (match := _UNIT_FACTOR.fullmatch(factor)) is None:
                return None
            word, power = match[1], int(match[2] or 1) * (-1 if place else 1)
            unit = _known_unit(word) or _known_unit(word.replace(".", ""))
            if unit is None:
                word = word.lower()
                if word in _FILLERS:
                    continue
                letter = len(word) < 2 and word.isascii()
                if not invented or letter or word in _PROSE or word in FUNCTIONS:
                    return None
                unit = Unit(Fraction(1), ((word.removesuffix("s") if len(word) > 3 else word, 1),))
            scale *= unit.scale**power
            powers.update({base: exponent * power for base, exponent in unit.powers})
    return Unit(scale, tuple(sorted((k, v) for k, v in powers.items() if v)))


def _with_prefixes(name: str, unit: Unit) -> dict[str, Unit]:
    return {
        prefix + name: Unit(unit.scale * Fraction(10) ** power, unit.powers)
        for prefix, power in _PREFIXES.items()
        if (len(name) < 4 if len(prefix) == 1 else len(name) > 2)
    }


def _fill_units() -> None:
    named, prefixed, lower, lower_prefixed = {}, {}, {}, {}  # Kg and HZ, where kg and Hz are meant
    for entry in _UNIT_TABLE.replace("\n", " ").split(";"):
        names, _, amount = entry.strip().partition(" = ")
        number, _, of = amount.partition(" ")
        own = Unit(Fraction(1), ((names.split()[0].lstrip("*"), 1),))
        base = read_unit(of) if of else own
        for name in names.lstrip("*").split():
            named[name] = unit = Unit(Fraction(number or 1) * base.scale, base.powers)
            lower[name.lower()] = unit
            if names.startswith("*"):
                prefixed |= _with_prefixes(name, unit)
                lower_prefixed |= _with_prefixes(name.lower(), unit)
        _UNITS.update(prefixed | named)
    _UNITS.update(lower_prefixed | lower | prefixed | named)  # nm is no newton metre
    read_unit.cache_clear()


_fill_units()
_PURE = (_UNITS["%"].powers, _UNITS["rad"].powers)  # a bare number may be a number of these

# --------------------------------------------------------------------------- quantities


class Quantity(NamedTuple):
    """A number or expression, perhaps with a unit."""

    expression: Expression
    unit: Unit | None = None


_MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_MAGNITUDES["trillion"] = 10**12
_SHORT_MAGNITUDES = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9}
_GLUED = frozenset("mgshlLNJWVAKCF°%$¢€£¥₹元'\"")  # 5m is a length, 5x a product
_CURRENCY = re.compile(
    r"([+-]?)\s*([A-Z]{0,3}[$€£¥₹₩]|RM|Rs\.?|USD|EUR|GBP|INR|CNY|CHF)\s*([+-]?)\s*(?=[0-9.])"
)
_UNIT_START = re.compile(r"(?:(?<=[0-9)}\].!])|(?<=\\pi))\s*(?=[^\W\d_]|[%°'\"$¢€£¥₹₩])")
_SUM = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+|['\"])\.?(?:\s*and\s+|\s*|$)")


def read_quantity(text: str) -> Quantity | None:
    text, currency = text.strip().lstrip("∠"), None
    if match := _CURRENCY.match(text):
        text, currency = match[1] + match[3] + text[match.end() :], read_unit(match[2])
    for match in itertools.islice(_UNIT_START.finditer(text), 8):
        head, gap, tail = text[: match.start()], bool(match[0]), text[match.end() :]
        word, _, rest = tail.partition(" ")
        magnitude = _MAGNITUDES.get(word.lower())
        if magnitude is None and (currency or not gap):
            magnitude = _SHORT_MAGNITUDES.get(word)
        if magnitude:
            gap, tail = True, rest.strip()
        apart = gap or tail > "\u3400"  # Chinese measure words need no blank
        product = not apart and len(tail) == 1 and tail not in _GLUED  # 2x
        angle = tail == "°" and head[0] not in "-.0123456789("  # \\sin 30°
        if product or angle or word in ("st", "nd", "rd", "th"):
            continue
        unit = read_unit(tail, invented=apart or len(tail) > 3) if tail else None
        expression = parse_expression(head)
        if (tail and unit is None) or expression is None or expression.letters:
            continue
        if currency and unit and unit.powers != currency.powers:
            return None
        if magnitude:
            expression = expression.times(magnitude)
        return Quantity(expression, unit or currency)
    expression = parse_expression(text)
    return None if expression is None else Quantity(expression, currency)


def read_sum(text: str, depth: int = 0) -> Quantity | None:
    """1 hour 30 minutes, 5 ft 10 in: falling units of one kind."""
    parts = [(Fraction(m[1]), _known_unit(m[2])) for m in _SUM.finditer(text)]
    if not 1 < len(parts) < 5 or _SUM.sub("", text) or not all(unit for _, unit in parts):
        return None
    first, scales = parts[0][1], [unit.scale for _, unit in parts]
    falling = all(a > b for a, b in itertools.pairwise(scales))
    if not falling or any(unit.powers != first.powers for _, unit in parts):
        return None
    total = sum(number * unit.scale for number, unit in parts)
    return Quantity(Expression(total / first.scale), first)


def same_quantity(a: Quantity, b: Quantity) -> bool:
    """In base units where both have one; a bare number meets any unit, 0.5 meets 50 % too."""
    if a.unit and b.unit:
        if a.unit.powers != b.unit.powers:
            return False
        scales = {(a.unit.scale, b.unit.scale)}
    else:
        pure = [x.unit.scale if x.unit and x.unit.powers in _PURE else 1 for x in (a, b)]
        scales = {(1, 1), tuple(pure)}
    return any(same_value(a.expression.times(m), b.expression.times(n)) for m, n in scales)
