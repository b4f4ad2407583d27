r"""Numbers exactly as written, of any size: `0.00001`, `1e16`, `3\frac{1}{2}`, `-1/2`, `1.2\times 10^6`."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 4000
"""Digits up to which a number is a Fraction; beyond, its sign, digits and power of ten are compared."""

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: i for i, word in enumerate(ONES)} | {word: 20 + 10 * i for i, word in enumerate(TENS)}
WORDS |= {
    f"{tens}{joint}{ones}": WORDS[tens] + WORDS[ones]
    for tens in TENS
    for ones in ONES[1:10]
    for joint in "- "
}

DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
SIGN = r"(?P<sign>[-+]?)\s*"
PLAIN = re.compile(rf"{SIGN}(?P<mantissa>{DECIMAL})(?:[eE](?P<exponent>[-+]?\d+))?")
POWER = re.compile(
    rf"{SIGN}(?:(?P<mantissa>{DECIMAL})\s*(?:\\times|\\cdot|[*xX\u00d7])\s*)?10\s*\^\s*(?:\{{\s*)?"
    r"(?P<exponent>[-+]?\d+)\s*\}?"
)
TOP_BOTTOM = [
    rf"\\frac\s*\{{\s*(?P<top>-?\s*{DECIMAL})\s*\}}\s*\{{\s*(?P<bottom>-?\s*{DECIMAL})\s*\}}",
    r"\\frac\s*(?P<top>\d)\s*(?P<bottom>\d)",
    rf"\\frac\s*(?P<top>\d)\s*\{{\s*(?P<bottom>{DECIMAL})\s*\}}",
    rf"\\frac\s*\{{\s*(?P<top>{DECIMAL})\s*\}}\s*(?P<bottom>\d)",
]
MIXED = [re.compile(rf"{SIGN}(?P<whole>\d+)\s*{form}") for form in TOP_BOTTOM] + [
    re.compile(rf"{SIGN}(?P<whole>\d+)(?:\s+and\s+|\s+)(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"),
]
FRACTIONS = [re.compile(SIGN + form) for form in TOP_BOTTOM] + [
    re.compile(rf"{SIGN}(?P<top>{DECIMAL})\s*(?:/|\\div)\s*(?P<bottom>{DECIMAL})"),
    re.compile(rf"{SIGN}\(?(?P<top>{DECIMAL})\s*/\s*(?P<bottom>{DECIMAL})\)?"),
]
REPEATING = re.compile(
    rf"{SIGN}(?P<whole>\d*)\.(?P<fixed>\d*)\\(?:overline|bar|dot)\s*\{{?(?P<period>\d+)\}}?(?:\\ldots|\\dots)?"
)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})++(?=(?P<more> ?[\d/,])?)")
"""With `more` behind them they are no number: taken whole all the same, for from each group of three on they
would be looked at again."""


@dataclass(frozen=True)
class Number:
    """A value and how precisely it is written. Example: 0.25 is Number(Fraction(1, 4), 2, 2)."""

    value: Fraction | tuple[str, str, int]
    """The value, or sign, digits and power of ten of one beyond MAX_DIGITS."""
    places: int | None = None
    """Digits behind the point; None where no point is written: such a number is exact."""
    significant: int = 0
    """Digits from the first that is not 0, where a point is written."""

    def times(self, factor: Fraction) -> "Number":
        return Number(self.value * factor) if isinstance(self.value, Fraction) else self


def join_thousands(text: str) -> str:
    """1,234,567 and 1 234 567 as 1234567. A comma with a space behind it separates."""
    text = THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)
    return SPACED_THOUSANDS.sub(
        lambda found: found.group() if found["more"] else found.group().replace(" ", ""), text
    )


def read_number(text: str) -> Number | None:
    """The number that all of `text` writes; None where it is anything else, or a division by 0."""
    if found := PLAIN.fullmatch(text) or POWER.fullmatch(text):
        return _decimal(found["sign"], found["mantissa"] or "1", found["exponent"] or "0")
    for form in FRACTIONS + MIXED:
        if found := form.fullmatch(text):
            return _fraction(found)
    if found := REPEATING.fullmatch(text):
        return _repeating(found)
    if (word := WORDS.get(text.lower())) is not None:
        return Number(Fraction(word))
    return None


def _decimal(sign: str, mantissa: str, exponent: str) -> Number | None:
    whole, point, behind = mantissa.partition(".")
    digits = (whole + behind).lstrip("0")
    significant = len(digits)
    shortened = digits.rstrip("0")
    if len(exponent) > 18:
        return None
    power = int(exponent) - len(behind) + len(digits) - len(shortened)
    if not shortened:
        return Number(Fraction(0))
    places = len(behind) - int(exponent) if behind else None
    if len(shortened) + abs(power) > MAX_DIGITS:
        return Number((sign.replace("+", ""), shortened, power), places, significant if behind else 0)
    value = Fraction(int(sign + shortened)) * Fraction(10) ** power
    return Number(value, places, significant if behind else 0)


def _fraction(found: re.Match[str]) -> Number | None:
    top, bottom = found["top"].replace(" ", ""), found["bottom"].replace(" ", "")
    if len(top) + len(bottom) > MAX_DIGITS or not Fraction(bottom.rstrip(".")):
        return None
    value = Fraction(top.rstrip(".")) / Fraction(bottom.rstrip("."))
    if whole := found.groupdict().get("whole"):
        if len(whole) > MAX_DIGITS:
            return None
        value += int(whole)
    return Number(-value if found["sign"] == "-" else value)


def _repeating(found: re.Match[str]) -> Number | None:
    whole, fixed, period = found["whole"], found["fixed"], found["period"]
    if len(whole) + len(fixed) + len(period) > MAX_DIGITS:
        return None
    value = Fraction(int(whole + fixed or "0"))
    value = (value + Fraction(int(period), 10 ** len(period) - 1)) / 10 ** len(fixed)
    return Number(-value if found["sign"] == "-" else value)


def equal(gold: Number, answer: Number) -> bool:
    """Equal values; or one is a fraction without an end and the other its decimal, rounded at six or more
    significant digits."""
    if gold.value == answer.value:
        return True
    return any(
        isinstance(exact.value, Fraction)
        and exact.places is None
        and exact.value.denominator > 1
        and rounds_to(exact.value, decimal)
        for exact, decimal in ((gold, answer), (answer, gold))
    )


def rounds_to(value: Fraction, decimal: Number) -> bool:
    """Whether `decimal` is `value` rounded, with at least six significant digits written."""
    if decimal.places is None or decimal.significant < 6 or not isinstance(decimal.value, Fraction):
        return False
    return abs(value - decimal.value) * 2 <= Fraction(10) ** -decimal.places
