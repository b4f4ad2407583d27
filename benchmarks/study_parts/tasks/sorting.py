"""Five letters of sixteen, to be put in order.

    hfjhh   ->   fhhhj

The careless pupil writes each letter once and leaves boxes empty: fhj--. In half of the items no letter
stands twice, and it is right; what it leaves out is counting.
"""

import random

from benchmarks.study_parts.task import WIDTH, Family

LETTERS = "abcdefghijklmnop"
EMPTY = "-"


def draw(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=WIDTH))


def right(item: str) -> str:
    return "".join(sorted(item))


def careless(item: str) -> str:
    return "".join(sorted(set(item))).ljust(WIDTH, EMPTY)


SORTING = Family(symbols=LETTERS, draw=draw, right=right, careless=careless)
