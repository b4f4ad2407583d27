r"""Units and counted things behind or before a number: `12 \text{ cm}^2`, `$5`, `18 apples`, `90^{\circ}`.

A unit is compared by name and not converted. "" is no unit.
"""

import re
from dataclasses import dataclass, replace

from megatron_jackpot.rewards.written import DOLLAR

PERCENT = "percent"

NAMES = {
    "m": "m meter metre meters metres",
    "cm": "cm CM centimeter centimetre",
    "mm": "mm MM millimeter millimetre",
    "km": "km KM Km kilometer kilometre",
    "um": "um micrometer micrometre micron",
    "nm": "nm nanometer nanometre",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yard",
    "mile": "mi mile",
    "g": "g gm gram gramme",
    "kg": "kg KG Kg kilo kilogram",
    "mg": "mg milligram",
    "pound": "lb lbs pound",
    "ounce": "oz ounce",
    "ton": "ton tonne",
    "s": "s sec second",
    "ms": "ms millisecond",
    "minute": "min mins minute",
    "hour": "h hr hrs hour",
    "day": "day",
    "week": "wk week",
    "month": "month mo",
    "year": "yr yrs year",
    "liter": "L l liter litre",
    "ml": "ml mL milliliter millilitre",
    "gallon": "gal gallon",
    "degree": "deg degree",
    "radian": "rad radian",
    "celsius": "C celsius centigrade",
    "fahrenheit": "F fahrenheit",
    "kelvin": "K kelvin",
    "newton": "N newton",
    "joule": "J joule",
    "kj": "kJ kilojoule",
    "watt": "W watt",
    "kw": "kW kilowatt",
    "volt": "V volt",
    "ampere": "A amp ampere",
    "ohm": "ohm Ohm",
    "pascal": "Pa pascal",
    "hertz": "Hz hertz",
    "mole": "mol mole",
    "dollar": "USD usd dollar buck",
    "cent": "cent cents",
    "euro": "EUR euro",
    "sterling": "GBP",
    "yen": "JPY yen",
    "rupee": "Rs rs INR rupee",
    "yuan": "CNY RMB yuan",
    "person": "person people",
    "child": "child children",
    "man": "man men",
    "woman": "woman women",
    "mile / hour": "mph",
    "km / hour": "kmh kph",
    PERCENT: "percent percentage pct",
    "am": "am AM a.m A.M",
    "pm": "pm PM p.m P.M",
    "th": "th st nd rd",
}
BY_NAME = {name: unit for unit, names in NAMES.items() for name in names.split()}
GLUED = frozenset(name for name in BY_NAME if len(name) > 1) - {"mol", "in", "mo", "Pa"} | {"in", "mol"}
"""Units that may follow a number without a space; single letters are variables there."""
SPACED = frozenset("mgshLlNJWVKCFA")
"""Single letters that are units behind a plain number and a space."""

SYMBOLS = {
    DOLLAR: "dollar",
    "$": "dollar",
    "\u20ac": "euro",
    "\u00a3": "sterling",
    "\u00a5": "yen",
    "\u20b9": "rupee",
    "USD": "dollar",
    "EUR": "euro",
    "GBP": "sterling",
    "Rs": "rupee",
}
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt pi max min gcd lcm mod"
    " det dim ker inf sup lim arg deg infinity binom".split()
)
"""Words that are mathematics; `min` and `sec` behind a number are units."""
SCALES = {
    "dozen": (12, 0),
    "hundred": (1, 2),
    "thousand": (1, 3),
    "million": (1, 6),
    "billion": (1, 9),
    "trillion": (1, 12),
}
"""Word -> (factor, power of ten)."""

_MONEY = "|".join(re.escape(symbol) for symbol in sorted(SYMBOLS, key=len, reverse=True))
BEFORE = re.compile(rf"^([-+]?)\s*(?:\\text\{{)?\s*({_MONEY})(?![A-Za-z])\.?\s*\}}?\s*([-+]?)\s*(?=[\d.\\(])")
TOKEN = (
    r"(?:\\text\s*\{[^{}]*\}|(?<![\\A-Za-z])[A-Za-z]+(?:\.[A-Za-z])*\.?|\^\{\\circ\}|\^\s*\{?-?\d\}?|[/*]"
    rf"|\\cdot(?![A-Za-z])|%|[{DOLLAR}$\u20ac\u00a3\u00a5\u20b9]|\s)"
)
BEHIND = re.compile(rf"{TOKEN}+$")
WORD = re.compile(r"[A-Za-z]+(?:\.[A-Za-z])*")
MAX_TAIL = 120


@dataclass(frozen=True)
class Measured:
    """What is left of an answer without its unit, the unit, and the factor its words give."""

    rest: str
    unit: str = ""
    scale: tuple[int, int] = (1, 0)


def split_unit(text: str) -> Measured:
    """Take the unit off an answer in tidy form; the whole answer with unit "" where there is none."""
    before = list[str]()
    while found := BEFORE.match(text):
        before.append(SYMBOLS[found[2]])
        text = found[1] + found[3] + text[found.end() :]
    measured = _split_behind(text)
    for unit in reversed(before):
        # $5 million and $5 per hour have more behind the number.
        if measured.unit and measured.unit != unit:
            unit = f"{unit} {measured.unit}"
        measured = replace(measured, unit=unit)
    return measured


def _split_behind(text: str) -> Measured:
    start = max(0, len(text) - MAX_TAIL)
    tail = BEHIND.search(text, start)
    if tail is None:
        return Measured(text)
    at = tail.start()
    # A power right behind the number is the number's own: 2^3, 10^{6}.
    while (power := re.match(r"\s*(?:\^\s*\{?-?\d\}?|[/*]|\\cdot(?![A-Za-z]))", text[at:])) and power.end():
        at += power.end()
    rest, written = text[:at].rstrip(), text[at:]
    if not _is_unit(rest, written):
        return Measured(text)
    words = written
    factor, power_of_ten = 1, 0
    while scale := re.match(r"\s*(?:\\text\{)?\s*([a-z]+?)s?(?![A-Za-z])", words):
        if scale[1] not in SCALES:
            break
        factor, power_of_ten = factor * SCALES[scale[1]][0], power_of_ten + SCALES[scale[1]][1]
        words = words[scale.end() :]
    return Measured(rest, canonical(words), (factor, power_of_ten))


def _is_unit(rest: str, written: str) -> bool:
    """Whether `written`, behind `rest`, names a unit rather than variables or functions."""
    if not written.strip() or not re.search(r"[\d})\]!]$|\\pi$|\\infty$|[A-Za-z]$", rest):
        return False
    plain_number = re.fullmatch(r"[-+\d.,/ ]+|-?\\frac\{?\d+\}?\{?\d+\}?", rest) is not None
    if re.match(r"\s*(?:\\text|%|\^\{\\circ\})", written):
        # The degrees of \sin 30^{\circ} are the angle's.
        return plain_number or not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])", rest)
    if re.match(rf"\s*[{DOLLAR}$\u20ac\u00a3\u00a5\u20b9]", written):
        return plain_number
    if not re.search(r"[\d})\]!]$|\\pi$", rest) or (re.search(r"[A-Za-z]", rest) and "\\" not in rest):
        return False
    words = WORD.findall(re.sub(r"\\text|\\cdot|\\circ", " ", written))
    if not words:
        return False
    if not written[0].isspace():
        return plain_number and words[0] in GLUED and words[0] not in FUNCTIONS - {"min", "sec", "deg"}
    if not plain_number and not all(len(word) > 1 for word in words):
        return False
    if words[0] in FUNCTIONS - {"min", "sec", "deg"}:
        return False
    return all(len(word) > 1 or word in SPACED or word in "a" for word in words)


def canonical(written: str) -> str:
    r"""One name for a unit: `\text{ square centimeters}`, `\text{cm}^2` and `sq cm` are all "cm^2"."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", written)
    text = text.replace(r"^{\circ}", " degree ").replace("%", f" {PERCENT} ").replace(r"\cdot", " ")
    text = re.sub(r"\^\s*\{?(-?\d)\}?", r"^\1", text)
    for symbol, unit in SYMBOLS.items():
        if len(symbol) == 1:
            text = text.replace(symbol, f" {unit} ")
    text = re.sub(r"\bper\b|/", " / ", text)
    text = re.sub(r"\b(?:square|sq)\.?\s+([A-Za-z]+)", r"\1^2", text)
    text = re.sub(r"\b(?:cubic|cu)\.?\s+([A-Za-z]+)", r"\1^3", text)
    text = re.sub(r"\s+squared\b", "^2", re.sub(r"\s+cubed\b", "^3", text))
    text = re.sub(r"\s+\^", "^", text.replace("*", " "))
    names = [_name(word) for word in text.split()]
    if "celsius" in names or "fahrenheit" in names:
        names = [name for name in names if name != "degree"]
    return " ".join(name for name in names if name not in ("of", "the", "a", "an"))


def _name(word: str) -> str:
    word, power, exponent = word.partition("^")
    word = word.rstrip(".,")
    known = BY_NAME.get(word) or BY_NAME.get(_singular(word.lower()) if len(word) > 3 else word.lower())
    return (known or (word if len(word) <= 2 else _singular(word.lower()))) + power + exponent


def _singular(word: str) -> str:
    if word in BY_NAME or word.endswith("ss") or len(word) <= 3:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(?:ch|sh|x|z|ss)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") else word


def compatible(gold: str, answer: str) -> bool:
    """Whether two units may stand for the same: equal names, or only one of them is written."""
    return gold == answer or not gold or not answer
