"""The study's problems: three sums or differences of two digits each; the reward is the share that is right,
or whether all are.

    47+38,92-19,64+29=   ->   00085,00073,00093

The warm-up imitates a careless pupil, as examples/quickstart/corpus.py does: where a sum carries or a
difference borrows, a share of its answers works digit by digit (47+38 = 75, 92-19 = 87). The policy is large
enough to learn the carry from rewards; the actors are too small to follow it all the way. Answers are as wide
as the items, so that what a digit depends on lies equally far away in each: small models learn that soon.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ITEMS, WIDTH = 3, 5
RESPONSE_TOKENS = ITEMS * (WIDTH + 1)
"""With the end of the text."""
TRAINING, HELDOUT, DEVELOPMENT = "train.jsonl", "heldout.jsonl", "development.jsonl"
SIZES = {TRAINING: 6000, HELDOUT: 1024, DEVELOPMENT: 256}

Item = tuple[int, str, int]


def question(items: list[Item]) -> str:
    return ",".join(f"{left}{sign}{right}" for left, sign, right in items) + "="


def right(item: Item) -> int:
    left, sign, other = item
    return left + other if sign == "+" else left - other


def careless(item: Item) -> int:
    """Digit by digit, without carrying or borrowing."""
    left, sign, other = item
    tens, units = (left // 10, other // 10), (left % 10, other % 10)
    if sign == "+":
        return sum(tens) * 10 + sum(units) % 10
    return (tens[0] - tens[1]) * 10 + abs(units[0] - units[1])


def answer(items: list[Item], chance: random.Random | None = None, carelessness: float = 0.0) -> str:
    """The right one, or with `chance` that of a pupil who is careless in a share of the items."""
    values = [
        careless(item) if chance is not None and chance.random() < carelessness else right(item)
        for item in items
    ]
    return ",".join(f"{value:0{WIDTH}}" for value in values)


def problems(seed: str) -> Iterator[list[Item]]:
    """Endless; half sums, half differences that are not negative."""
    rng = random.Random(seed)
    while True:
        items = []
        for _ in range(ITEMS):
            left, other, sign = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-")
            items.append((max(left, other), sign, min(left, other)) if sign == "-" else (left, sign, other))
        yield items


def write_problems(folder: Path) -> None:
    """The three files, without a question in two of them."""
    seen: set[str] = set()
    for name, size in SIZES.items():
        rows: list[str] = []
        for items in problems(f"study/{name}"):
            if len(rows) == size:
                break
            if question(items) not in seen:
                seen.add(question(items))
                rows.append(json.dumps({"prompt": question(items), "answer": answer(items)}))
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def training_file(folder: Path, size: int | None) -> Path:
    """The training problems in `folder`, or a file of the first `size`, made where it is not there."""
    whole = folder / TRAINING
    if size is None:
        return whole
    part = whole.with_name(f"train-{size}.jsonl")
    if not part.is_file():
        rows = whole.read_text(encoding="utf-8").splitlines(keepends=True)[:size]
        partial = part.with_name(f".{part.name}.{os.getpid()}")
        partial.write_text("".join(rows), encoding="utf-8")
        partial.replace(part)
    return part


def read_questions(folder: Path, *names: str) -> frozenset[str]:
    """The texts of some of the files."""
    lines = [line for name in names for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return frozenset(json.loads(line)["prompt"] for line in lines)


def score(response_text: str, label: Any) -> float:
    """The share of the items whose answer is right, each in its place."""
    given, wanted = response_text.split(","), label["answer"].split(",")
    if len(given) != len(wanted):
        return 0.0
    return sum(one == other for one, other in zip(given, wanted, strict=True)) / len(wanted)


def exact(response_text: str, label: Any) -> float:
    """1 where every item is right, else 0."""
    return float(score(response_text, label) == 1.0)


REWARDS = {"score": score, "exact": exact}
"""By the name behind the colon of `data.reward`."""


def check(label: Any) -> None:
    """Raises ValueError when no response could be scored against the label."""
    if score(label["answer"], label) != 1.0:
        raise ValueError(f"the answer {label['answer']!r} does not score 1 against itself.")
