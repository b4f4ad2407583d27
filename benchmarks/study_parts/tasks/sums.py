"""Sums and differences of two digits each that are not negative, half of them each.

    47+38   ->   00085

The careless pupil works digit by digit, without carrying or borrowing: 47+38 = 75, 92-19 = 87.
"""

import random
import re

from benchmarks.study_parts.task import WIDTH, Family


def draw(rng: random.Random) -> str:
    left, other, sign = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-")
    if sign == "-":
        left, other = max(left, other), min(left, other)
    return f"{left}{sign}{other}"


def right(item: str) -> str:
    left, sign, other = _read(item)
    return f"{left + other if sign == '+' else left - other:0{WIDTH}}"


def careless(item: str) -> str:
    left, sign, other = _read(item)
    tens, units = (left // 10, other // 10), (left % 10, other % 10)
    if sign == "+":
        value = sum(tens) * 10 + sum(units) % 10
    else:
        value = (tens[0] - tens[1]) * 10 + abs(units[0] - units[1])
    return f"{value:0{WIDTH}}"


def _read(item: str) -> tuple[int, str, int]:
    left, sign, other = re.split(r"([+-])", item)
    return int(left), sign, int(other)


SUMS = Family(symbols="0123456789", draw=draw, right=right, careless=careless)
