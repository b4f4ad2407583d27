"""The study's problems, whatever their family: three items each, answered in five characters each; the reward
is the share that is right, or whether all are.

    47+38,92-19,64+29=   ->   00085,00073,00093        (tasks/sums.py)

The warm-up imitates a careless pupil, as examples/quickstart/corpus.py does: a share of its answers takes a
short cut that is right for half of the items and wrong, always in the same way, for the others. What it
leaves out the policy is large enough to learn from rewards; the actors are too small to follow all the way.
Answers are as wide in every item, so that what a character depends on lies equally far away in each: small
models learn that soon.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ITEMS, WIDTH = 3, 5
RESPONSE_TOKENS = ITEMS * (WIDTH + 1)
"""With the end of the text."""
TRAINING, HELDOUT, DEVELOPMENT = "train.jsonl", "heldout.jsonl", "development.jsonl"
SIZES = {TRAINING: 6000, HELDOUT: 1024, DEVELOPMENT: 256}
FIRST = "sums"
"""The family whose data and models lie in the study's folder itself; another's lie below its name."""


@dataclass(frozen=True)
class Family:
    """What is asked. An item is the text that stands in the question."""

    symbols: str
    """A guess is one of these."""
    draw: Callable[[random.Random], str]
    right: Callable[[str], str]
    """The item's answer, WIDTH characters without a comma."""
    careless: Callable[[str], str]
    """The pupil's, which is the right one for about half of the items."""

    def problems(self, seed: str) -> Iterator[list[str]]:
        """Endless, ITEMS items each."""
        rng = random.Random(seed)
        while True:
            yield [self.draw(rng) for _ in range(ITEMS)]

    def answer(self, items: list[str], chance: random.Random | None = None, carelessness: float = 0.0) -> str:
        """The right one, or with `chance` that of a pupil who is careless in a share of the items."""
        return ",".join(
            self.careless(item) if chance is not None and chance.random() < carelessness else self.right(item)
            for item in items
        )

    def write_problems(self, folder: Path) -> None:
        """The three files, without a question in two of them."""
        seen: set[str] = set()
        for name, size in SIZES.items():
            rows: list[str] = []
            for items in self.problems(f"study/{name}"):
                if len(rows) == size:
                    break
                if question(items) not in seen:
                    seen.add(question(items))
                    rows.append(json.dumps({"prompt": question(items), "answer": self.answer(items)}))
            (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def question(items: list[str]) -> str:
    return ",".join(items) + "="


def home(folder: Path, family: str) -> Path:
    """Where in the study's folder a family's data/ and models/ lie."""
    return folder if family == FIRST else folder / family


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
