r"""Equality of a response's final answer and the reference: numbers exactly, words as text, formulas by the
math-verify package.

docs/rewards.md says what is taken for the answer, what is compared as what, and which references are refused.
"""

import functools
from typing import Any

from megatron_jackpot.rewards import algebra, numbers, units
from megatron_jackpot.rewards.exact import gold_answer
from megatron_jackpot.rewards.final_answer import final_answer, marked_answer
from megatron_jackpot.rewards.reading import (
    RELATION,
    Based,
    Choice,
    Code,
    Collection,
    Formula,
    Quantity,
    Reading,
    Words,
    read,
)

warm_up = algebra.warm_up

MAX_WORDS = 8
"""Words of the longest reference that a response could be expected to repeat."""


def score(response_text: str, label: Any) -> float:
    """1.0 for an equal answer, else 0.0. Raises TimeoutError where math-verify ran out of time."""
    gold = read_gold(gold_answer(label))
    written = final_answer(response_text)
    answer = read(written) if written is not None else None
    return float(gold is not None and answer is not None and same(gold, answer))


def check(label: Any) -> None:
    """Raises ValueError for a reference that does not mean what is written, or that no answer could equal."""
    gold = gold_answer(label)
    reading = read_gold(gold)
    if reading is None:
        raise ValueError(f"the answer {gold!r} parses to nothing, so no response could be correct.")
    if fault := _fault(reading):
        raise ValueError(f"the answer {gold!r} {fault}")


def _fault(reading: Reading) -> str | None:
    if isinstance(reading, Collection):
        return next(filter(None, map(_fault, reading.items)), None)
    if isinstance(reading, Choice):
        return _fault(reading.content)
    if isinstance(reading, Words) and len(reading.words.split()) > MAX_WORDS:
        return "is prose: no response would repeat its words."
    if isinstance(reading, Words) and any(mark in reading.words for mark in ("\\", "^", "{", "}", "=")):
        return "mixes words and mathematics, and cannot be compared as either."
    if isinstance(reading, Formula) and not algebra.readable(reading.latex):
        return "parses to nothing: neither a number, words nor a formula that math-verify reads."
    return None


@functools.lru_cache(maxsize=4096)
def read_gold(gold: str) -> Reading | None:
    marked = marked_answer(gold)
    return read(gold if marked is None else marked)


def same(gold: Reading, answer: Reading) -> bool:
    """Whether an answer says what the reference says."""
    if gold.text == answer.text:
        return True
    if isinstance(gold, Choice) or isinstance(answer, Choice):
        return _same_choice(gold, answer)
    if gold.name and answer.name and gold.name != answer.name:
        symbolic = isinstance(gold, Formula) and isinstance(answer, Formula)
        return symbolic and algebra.same(gold.text, answer.text)
    if not _same_units(gold, answer):
        return False
    if _is_relation(gold) != _is_relation(answer):
        return bool(gold.name or answer.name or isinstance(answer, Collection)) and _same_relation(
            gold, answer
        )
    match gold, answer:
        case Quantity(), Quantity():
            return _same_quantity(gold, answer)
        case Quantity(), Formula():
            return algebra.same_number(gold.number, answer.latex, number_is_gold=True)
        case Formula(), Quantity():
            return algebra.same_number(answer.number, gold.latex, number_is_gold=False)
        case Formula(), Formula():
            return algebra.same(gold.latex, answer.latex)
        case Words(), Words():
            return gold.words == answer.words
        case (Words(), Formula()) | (Formula(), Words()):
            # The choice E, and e, which is a number where no choice is meant.
            return len(gold.text) == 1 and gold.text.casefold() == answer.text.casefold()
        case Code(), Code():
            return gold.kind == answer.kind and gold.parts == answer.parts
        case Based(), Based():
            return (gold.digits, gold.base) == (answer.digits, answer.base)
        case (Based(), Quantity()) | (Quantity(), Based()):
            return _same_digits(gold, answer)
        case Collection(), Collection():
            return _same_collection(gold, answer)
        case (Formula(), Collection()) | (Collection(), Formula()):
            return algebra.same(gold.text, answer.text)
    return False


def _same_choice(gold: Reading, answer: Reading) -> bool:
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        return gold.letter == answer.letter and same(gold.content, answer.content)
    choice, other = (gold, answer) if isinstance(gold, Choice) else (answer, gold)
    assert isinstance(choice, Choice)
    if isinstance(other, Words) and len(other.words) == 1:
        return other.words == choice.letter.lower()
    return same(choice.content, other) if choice is gold else same(other, choice.content)


def _same_units(gold: Reading, answer: Reading) -> bool:
    return units.compatible(gold.unit, answer.unit)


def _is_relation(reading: Reading) -> bool:
    return isinstance(reading, Formula) and RELATION.search(reading.latex) is not None


def _same_relation(gold: Reading, answer: Reading) -> bool:
    return algebra.same(gold.text, answer.text)


def _same_quantity(gold: Quantity, answer: Quantity) -> bool:
    if numbers.equal(gold.number, answer.number):
        return True
    if (gold.unit == units.PERCENT) == (answer.unit == units.PERCENT):
        return False
    # 28% is 28 of a hundred and 0.28.
    share, plain = (gold, answer) if gold.unit == units.PERCENT else (answer, gold)
    return not plain.unit and numbers.equal(share.number.times(numbers.Fraction(1, 100)), plain.number)


def _same_digits(gold: Reading, answer: Reading) -> bool:
    based, plain = (gold, answer) if isinstance(gold, Based) else (answer, gold)
    assert isinstance(based, Based)
    return plain.text.lstrip("0") == based.digits


def _same_collection(gold: Collection, answer: Collection) -> bool:
    brackets = {(gold.opened, gold.closed), (answer.opened, answer.closed)}
    if len(brackets) > 1 and not brackets <= {("", ""), ("\\{", "\\}")}:
        # A list without brackets may be a tuple, in its order; (0, 1) is not [0, 1], nor {0, 1}.
        bare = ("", "") in brackets
        longer = len(gold.items) > 2 and brackets <= {("(", ")"), ("[", "]"), ("\\langle", "\\rangle")}
        angles = brackets <= {("(", ")"), ("\\langle", "\\rangle")}
        return (bare or longer or angles) and _same_in_order(gold, answer)
    names = {item.name for item in gold.items} | {item.name for item in answer.items} - {""}
    unnamed = {item.name for item in answer.items} == {""} or {item.name for item in gold.items} == {""}
    if gold.opened in ("(", "[", "\\langle") or (len(names - {""}) > 1 and unnamed):
        return _same_in_order(gold, answer)
    return _same_in_any_order(_distinct(gold), _distinct(answer))


def _distinct(collection: Collection) -> list[Reading]:
    """The items; of a set, those written alike once."""
    if collection.opened != "\\{":
        return list(collection.items)
    return list({item.text: item for item in collection.items}.values())


def _same_in_order(gold: Collection, answer: Collection) -> bool:
    return len(gold.items) == len(answer.items) and all(map(same, gold.items, answer.items))


def _same_in_any_order(gold: list[Reading], answer: list[Reading]) -> bool:
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        found = next((i for i, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        left.pop(found)
    return True
