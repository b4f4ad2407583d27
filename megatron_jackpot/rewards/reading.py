r"""What an answer says: a number, words, a date, a collection, or a formula for computer algebra.

Example: `x = 3\frac{1}{2} \text{ cm}` reads as Quantity(name="x", unit="cm", number=7/2).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from megatron_jackpot.rewards import numbers, units
from megatron_jackpot.rewards.numbers import Number
from megatron_jackpot.rewards.written import tidy

MAX_FORMULA = 2000
"""Characters of the longest formula that is read."""
MAX_NESTING = 40
"""Brackets in brackets of the deepest one; and names and choices in front of each other."""
MAX_ITEMS = 200


@dataclass(frozen=True, kw_only=True)
class Reading:
    text: str
    """The tidy text of it all."""
    name: str = ""
    """What is said to have this value: x of x = 5."""
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Quantity(Reading):
    """A number with its unit."""

    number: Number


@dataclass(frozen=True, kw_only=True)
class Words(Reading):
    """Words or a letter: compared as text."""

    words: str


@dataclass(frozen=True, kw_only=True)
class Choice(Reading):
    """A lettered choice with what it says: (D) 12."""

    letter: str
    content: Reading


@dataclass(frozen=True, kw_only=True)
class Code(Reading):
    """Numbers that are no arithmetic: a date, a ratio or time of day, a range, a telephone number."""

    kind: str
    parts: tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class Based(Reading):
    """Digits with the base they are written in: 2516_8."""

    digits: str
    base: int


@dataclass(frozen=True, kw_only=True)
class Collection(Reading):
    """A list ("", ""), a set ({, }), a tuple or an interval with its brackets."""

    opened: str
    closed: str
    items: tuple[Reading, ...]


@dataclass(frozen=True, kw_only=True)
class Formula(Reading):
    """LaTeX for computer algebra."""

    latex: str


MONTHS = "january february march april may june july august september october november december".split()
MONTH = (
    r"(?P<month>"
    + "|".join(f"{month[:3]}(?:{month[3:]})?" if month != "may" else month for month in MONTHS)
    + r")\.?"
)
DATES = [
    re.compile(r"(?P<y>\d{4})[-/.](?P<m>\d{1,2})[-/.](?P<d>\d{1,2})"),
    re.compile(rf"{MONTH}\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?(?:\s*,?\s*(?P<y>\d{{4}}))?", re.IGNORECASE),
    re.compile(
        rf"(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{MONTH}(?:\s*,?\s*(?P<y>\d{{4}}))?", re.IGNORECASE
    ),
]
WRITTEN_DATE = re.compile(r"\d{1,2}[/.]\d{1,2}[/.](?:\d{4}|\d{2})")
RATIO = re.compile(
    r"(\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+)\s*(?:\\text\{)?\s*([ap]\.?\s?m\.?)?\s*\}?", re.IGNORECASE
)
HYPHENS = re.compile(r"\(?\d+\)?(?:\s?-\d+)*-\d+")
BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?\s*_\s*\{?\s*(?:\\text\{\s*)?([0-9]+|[a-z]+)\s*\}?\s*\}?")
BASE_WORD = re.compile(r"([0-9A-Za-z]+)\s+(?:\\text\{\s*)?(?:in )?base[ -]*\}?\s*(\d+|[a-z]+)\s*\}?")

NAME = (
    r"(?:\\?[A-Za-z]+(?:\s*_\s*(?:\{[^{}]*\}|\w))?'*|\\(?:angle|triangle|overline|vec|text|hat|bar)\s*\{?[^{}=<>]*\}?"
    r"|[A-Za-z]+\s*\([^()=<>]*\))"
)
NAMED = re.compile(rf"\s*(?P<name>{NAME})\s*(?:=|\\in(?![A-Za-z])|:(?=\s))\s*(?P<rest>.+)", re.DOTALL)
SWAPPED = re.compile(r"(?P<rest>[^=<>A-Za-z]+?)\s*=\s*(?P<name>[A-Za-z])\s*")
EQUALS = re.compile(r"(?<![<>!\\:=])=(?!=)")
RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|in|equiv|subset|mid)(?![A-Za-z])")
CHOICE = re.compile(
    r"(?:\(([A-Z])\)|([A-Z])[).:])\s*(?:\}\s*)?(\S.*)|\\text\{\s*\(?([A-Z])\)?[.:]?\s*\}\s*(\S.*)", re.DOTALL
)
LETTER = re.compile(
    r"(?:(?:option|choice|answer)\s+)?\(?\s*(?:\\text\{\s*\(?)?([A-Za-z])\)?\s*\}?\s*\)?[.)]?", re.IGNORECASE
)
SEPARATOR = re.compile(r"[,;]\s*(?:(?:and|or)(?![A-Za-z]))?|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
BRACKET = re.compile(r"\\(?:langle|rangle)(?![A-Za-z])|\\.|[()\[\]{}]")
STOPS = re.compile(r"(?<![.,;:!?\"`*])[.,;:!?\"`*]++(?=\s|$)|^[\"`*]+")
"""Looked at once each: from amid a run of them every one would be looked at again."""
OPENING, CLOSING = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}


class _TooDeep(Exception):
    """Of the whole answer, at once: what holds the part would be read in another way, and the part again."""


def read(text: str) -> Reading | None:
    """What `text` says; None where it says nothing, or more than is ever read."""
    try:
        return _read(numbers.join_thousands(tidy(text)), 0)
    except _TooDeep:
        return None


# What is no choice may be a name: of either it is the same that is read behind it.
@lru_cache(maxsize=256)
def _read(text: str, depth: int) -> Reading | None:
    """`depth` of names, choices and collections it stands in. Raises _TooDeep."""
    # First of all: each pair of brackets that is taken off costs a look at all that they hold.
    if depth > MAX_NESTING or _nesting(text) > MAX_NESTING:
        raise _TooDeep
    text = _unparenthesised(text)
    if not text:
        return None
    if code := _code(text):
        return code
    if (number := numbers.read_number(text)) is not None:
        return Quantity(text=text, number=number)
    if len(text) <= MAX_FORMULA and "\\begin" not in text:
        # Before the commas: (A) 1, 2 is one choice.
        if choice := CHOICE.fullmatch(text):
            said = numbers.join_thousands(tidy(choice[3] or choice[5]))
            if content := _read(said, depth + 1):
                return Choice(text=text, letter=choice[1] or choice[2] or choice[4], content=content)
        if several := _collection(text, depth):
            return several
        if "=" in text or "\\in" in text or ":" in text:
            return _related(text, depth)
    return _single(text)


def _single(text: str) -> Reading | None:
    measured = units.split_unit(text)
    factor = Fraction(measured.scale[0]) * 10 ** measured.scale[1]
    number = numbers.read_number(_unparenthesised(measured.rest))
    if number is not None:
        scaled = number.times(factor) if factor != 1 else number
        return Quantity(text=text, unit=measured.unit, number=scaled)
    if factor == 1 and measured.unit and _is_formula(measured.rest):
        return Formula(text=text, unit=measured.unit, latex=measured.rest)
    if _is_formula(text):
        return Formula(text=text, latex=text)
    words = words_of(text)
    return Words(text=text, words=words) if words else None


def words_of(text: str) -> str:
    """Letter case, fonts, stops, articles and spaces aside."""
    if letter := LETTER.fullmatch(text):
        return letter[1].lower()
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace("-", " ").casefold()
    text = STOPS.sub(" ", text)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _is_formula(text: str) -> bool:
    """Whether computer algebra may read it: no words, and no letters that it would multiply."""
    if len(text) > MAX_FORMULA or not text:
        return False
    if re.fullmatch(r"[A-Za-z]|\\text\s*\{.*", text) and text not in ("e", "i"):
        return False
    if re.search(r"\\(?:text|angle|triangle|checkmark)(?![A-Za-z])|['\"?;]|[^\x00-\x7f]", text):
        return False
    bare = re.sub(
        r"\\[A-Za-z]+", "#", re.sub(r"\\begin\{\w+\}(?:\{\w+\})?|\\end\{\w+\}|\\mathbb\{\w\}", " ", text)
    )
    runs = [run for run in re.findall(r"[A-Za-z]+", bare) if run not in units.FUNCTIONS]
    if any(len(run) > 3 or (len(run) > 1 and run.isupper()) for run in runs):
        return False
    # A lone word and digits with a word: words; letters among operators: variables.
    if re.fullmatch(r"[A-Za-z][A-Za-z ]+", text.strip()):
        return False
    return not re.search(r"[A-Za-z]{2,} +[A-Za-z]{2,}", bare) and not re.search(
        r"(?<!_)\d\s+\d|\d\.\d+\.\d", bare
    )


def _code(text: str) -> Reading | None:
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
    for form in DATES:
        if found := form.fullmatch(plain):
            parts = found.groupdict()
            month = parts.get("m") or 1 + [m[:3] for m in MONTHS].index(parts["month"][:3].lower())
            year = int(parts["y"]) if parts["y"] else None
            return Code(text=text, kind="date", parts=(year, int(month), int(parts["d"])))
    if WRITTEN_DATE.fullmatch(plain):
        return Code(text=text, kind="written date", parts=tuple(int(n) for n in re.findall(r"\d+", plain)))
    if found := RATIO.fullmatch(text):
        parts = tuple(Fraction(part.strip()) for part in found[1].split(":"))
        return Code(
            text=text, kind="ratio", parts=parts, unit=units.canonical((found[2] or "").replace(" ", ""))
        )
    if HYPHENS.fullmatch(text):
        return Code(text=text, kind="hyphens", parts=tuple(re.findall(r"\d+", text)))
    if found := BASED.fullmatch(text) or BASE_WORD.fullmatch(text):
        base = int(found[2]) if found[2].isdigit() else numbers.WORDS.get(found[2], 0)
        digits = found[1].upper()
        # Letters alone are a name with an index, except where they cannot be one: FF_{16}.
        numeral = re.search(r"\d", digits) or (base > 10 and len(digits) > 1 and found[1] == digits)
        if 2 <= base <= 36 and numeral and all(int(digit, 36) < base for digit in digits):
            return Based(text=text, digits=digits.lstrip("0") or "0", base=base)
    return None


def _related(text: str, depth: int) -> Reading | None:
    """`x = 5` as 5 with a name, a chain of equations as its last side, another relation as a formula."""
    found = NAMED.fullmatch(text) or SWAPPED.fullmatch(text)
    if found:
        rest = found["rest"]
        if EQUALS.search(rest):
            rest = EQUALS.split(rest)[-1]
        if not re.search(r"[<>]|\\(?:le|ge|ne|equiv)(?![A-Za-z])", rest):
            value = _read(tidy(rest), depth + 1)
            descriptive = re.search(r"\\text|[A-Za-z]{3,}(?!\s*\()", found["name"].replace("\\", " ", 1))
            greek = found["name"].startswith("\\")
            name = "" if descriptive and not greek else re.sub(r"[\s{}]", "", found["name"]).lower()
            return replace(value, name=name, text=text) if value else None
    sides = EQUALS.split(text)
    if len(sides) > 1 and not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", "".join(sides[:-1]))):
        # 48 + 24 = 72 comes to 72.
        return _read(tidy(sides[-1]), depth + 1)
    return _single(text)


def _collection(text: str, depth: int) -> Reading | None:
    if pair := _plus_minus(text, depth):
        return Collection(text=text, opened="", closed="", items=pair)
    if (several := _several_units(text)) or (several := _items(text, depth)):
        return Collection(text=text, opened="", closed="", items=several)
    ends = _outer_brackets(text)
    if ends is None:
        return None
    opened, inside, closed = ends
    items = _items(inside, depth)
    if items:
        return Collection(text=text, opened=opened, closed=closed, items=items)
    return _read(tidy(inside), depth + 1) if opened in (r"\{", "[") and closed in (r"\}", "]") else None


def _items(text: str, depth: int) -> tuple[Reading, ...] | None:
    """Readings of what separators outside of all brackets part; None where there are none."""
    parts = list(_split(text))
    if not 1 < len(parts) <= MAX_ITEMS:
        return None
    items = [_read(tidy(part), depth + 1) for part in parts if part.strip()]
    return tuple(item for item in items if item) if all(items) and len(items) > 1 else None


def _split(text: str) -> Iterator[str]:
    depth, start, at = 0, 0, 0
    for mark in re.finditer(rf"{BRACKET.pattern}|{SEPARATOR.pattern}", text):
        if mark.start() < at:
            continue
        if mark.group() in OPENING or mark.group() == r"\langle":
            depth += 1
        elif mark.group() in CLOSING or mark.group() == r"\rangle":
            depth -= 1
        elif depth == 0 and not mark.group().startswith("\\"):
            yield text[start : mark.start()]
            start = at = mark.end()
    yield text[start:]


def _several_units(text: str) -> tuple[Reading, ...] | None:
    """3 hours 20 minutes."""
    pattern = r"(\d+(?:\.\d+)?)\s*((?:\\text\{)?\s*[A-Za-z]+\s*\}?)(?:\s*,?\s*(?:and\s+)?)"
    found = re.findall(pattern, text)
    if len(found) < 2 or not re.fullmatch(rf"(?:{pattern}){{2,}}", text):
        return None
    items = [_single(f"{number} {unit.strip()}") for number, unit in found]
    return tuple(item for item in items if item) if all(item and item.unit for item in items) else None


def _plus_minus(text: str, depth: int) -> tuple[Reading, ...] | None:
    r"""a \pm b as a + b and a - b."""
    if len(re.findall(r"\\pm(?![A-Za-z])|\+/-", text)) != 1:
        return None
    sides = [re.sub(r"\\pm(?![A-Za-z])\s*|\+/-\s*", sign, text) for sign in "+-"]
    items = [_read(tidy(re.sub(r"(^|[=(])\s*\+", r"\1", side)), depth + 1) for side in sides]
    return tuple(item for item in items if item) if all(items) else None


def _outer_brackets(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, what is inside, closing bracket, of a text that one pair of them holds whole."""
    opening = re.match(r"\(|\[|\\\{|\\langle(?![A-Za-z])", text)
    closing = re.search(r"(?:\)|\]|\\\}|\\rangle)$", text)
    if opening is None or closing is None or opening.end() > closing.start():
        return None
    depth = 0
    for mark in BRACKET.finditer(text):
        depth += (mark.group() in OPENING or mark.group() == r"\langle") - (
            mark.group() in CLOSING or mark.group() == r"\rangle"
        )
        if depth == 0:
            if mark.end() != len(text):
                return None
            return opening.group(), text[opening.end() : closing.start()].strip(), closing.group()
    return None


def _unparenthesised(text: str) -> str:
    """(C) as C, (5) as 5; (1, 2) stays."""
    while (ends := _outer_brackets(text)) and ends[0] == "(" and ends[2] == ")":
        if len(list(_split(ends[1]))) > 1:
            break
        text = ends[1]
    return text


def _nesting(text: str) -> int:
    depth = deepest = 0
    for mark in BRACKET.finditer(text):
        depth += (mark.group() in OPENING) - (mark.group() in CLOSING)
        deepest = max(deepest, depth)
    return deepest
