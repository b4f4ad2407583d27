"""Mathematical equality of the response's final answer and the reference, by the math-verify package.

Its own time limits use SIGALRM, so it works only in the main thread of a process, as in the pool.
"""

import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from megatron_jackpot.rewards.exact import gold_answer

PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")


def score(response_text: str, label: Any) -> float:
    gold = parse_gold(gold_answer(label))
    return float(bool(gold) and verify(list(gold), parse(response_text)))


def check(label: Any) -> None:
    """Raises ValueError when the reference cannot be read as mathematics: every response would be wrong."""
    gold = gold_answer(label)
    if not parse_gold(gold):
        raise ValueError(f"the answer {gold!r} parses to nothing, so no response could be correct.")
    if PROSE.search(gold) and "\\" not in gold and not parse(gold):
        raise ValueError(f"the answer {gold!r} is prose; math_verify would read its letters as variables.")


@lru_cache(maxsize=4096)
def parse_gold(gold: str) -> tuple[Any, ...]:
    """The parsed reference. It is boxed first: a bare '3x+1' parses to 3, a bare 'x^2-1' to nothing."""
    marked = "$" in gold or "\\boxed" in gold or "####" in gold
    return tuple(parse(gold if marked or not gold.strip() else f"\\boxed{{{gold}}}"))
