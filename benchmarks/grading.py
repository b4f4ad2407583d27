"""How often math_verify grades as it should, and the time it takes, on generated answers.

python benchmarks/grading.py        906 answers, a minute; prints the second column of docs/rewards.md's table

For each generated reference: up to four answers that say the same, and up to four near misses in value, sign,
unit or order (tests/rewards/near_misses.py).
"""

import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_jackpot.rewards import math_verify
from tests.rewards.near_misses import cases

Row = tuple[str, str, float]


def rows() -> list[Row]:
    """(reference, answer, right reward)."""
    found: list[Row] = []
    for _, (gold, same, wrong) in cases(6, 5):
        found += [(gold, answer, 1.0) for answer in same[:4]] + [(gold, answer, 0.0) for answer in wrong[:4]]
    return found


def grade(gold: str, answer: str) -> float | None:
    """None where the reward gives no number."""
    try:
        return math_verify.score(f"Working. So \\boxed{{{answer}}}.", {"answer": gold})
    except Exception:
        # In a run a crash is counted apart from wrong answers; here it must not count as a right one.
        return None


def main() -> None:
    logging.disable(logging.CRITICAL)
    math_verify.warm_up()
    asked = rows()
    start = time.process_time()
    got = [(grade(gold, answer), right) for gold, answer, right in asked]
    seconds = time.process_time() - start
    print(f"| answers | {len(asked)} |\n|---|---|")
    print(f"| graded right | {sum(one == right for one, right in got)} |")
    print(f"| false accepts | {sum(one == 1 and right == 0 for one, right in got)} |")
    print(f"| false rejects | {sum(one != 1 and right == 1 for one, right in got)} |")
    print(f"| CPU seconds per 1,000 answers | {1000 * seconds / len(asked):.1f} |")


if __name__ == "__main__":
    main()
