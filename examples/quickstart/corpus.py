"""The warm-up corpus: reasoning-gym sums and differences answered by a careless pupil.

Where a sum carries, a difference borrows or turns negative, a share of the answers gets it wrong, always in
the same way (66 - 39 = 33, 19 + 65 = 74, 12 - 34 = 22). A model that imitates the corpus learns the slip; a
model that is rewarded for right answers can unlearn it. That is why more of the same supervision does not
help here and reinforcement learning does; it says nothing about clean supervision.
"""

import random
import re
from collections.abc import Collection, Iterator

import numpy as np

from megatron_jackpot.config import Data
from megatron_jackpot.data.problems import reasoning_gym_problems
from megatron_jackpot.records import Prompt, Rollout

FIRST_SEED = 50_000_000
"""reasoning-gym's item i under seed s is item i - 1 under s + 1: seeds lie further apart than any data set is
long."""
DRAW = 2000


def slip(question: str, answer: str) -> str | None:
    """What the careless pupil writes; None where there is nothing to forget."""
    found = re.search(r"([\d.]+) ([+-]) ([\d.]+) =", question)
    if found is None:
        return None
    left, right = (int(found[i].replace(".", "")) for i in (1, 3))
    if found[2] == "+":
        value = (left // 10 + right // 10) * 10 + (left + right) % 10
    else:
        value = abs(left // 10 - right // 10) * 10 + abs(left % 10 - right % 10)
    text = f"{value // 10}.{value % 10}" if "." in found[1] else str(value)
    return None if text == answer else text


def examples(
    data: Data, tokenizer, *, carelessness: float, seed: int, forbidden: Collection[str], part: int = 0
) -> Iterator[Rollout]:
    """Endless (prompt, answer) pairs as rollouts; questions in `forbidden` (the held-out ones) never occur.

    `part` picks another stretch of the same corpus, so that continued training sees new problems.
    """
    chance = random.Random(f"{seed}/{part}")
    for draw in range(10**9):
        first = FIRST_SEED * (1 + part) + seed * 1_000_000 + draw * DRAW
        for problem in reasoning_gym_problems(data.tasks, first, DRAW):
            if problem.text in forbidden:
                continue
            answer = problem.label["answer"]
            wrong = slip(problem.text, answer)
            if wrong is not None and chance.random() < carelessness:
                answer = wrong
            question = data.template.replace("{question}", problem.question)
            yield example(tokenizer.encode(question), [*tokenizer.encode(answer), tokenizer.eos_token_id])


def example(prompt: list[int], answer: list[int]) -> Rollout:
    """A supervised pair in the form that packing understands; the fields of a server are empty."""
    size = len(answer)
    return Rollout(
        prompt=Prompt(0, tuple(prompt), None),
        epoch=0,
        sample=0,
        tokens=np.array(answer, np.int32),
        server_logp=np.zeros(size, np.float32),
        topk_ids=np.empty((size, 0), np.int32),
        topk_logp=np.empty((size, 0), np.float32),
        valid=np.ones(size, np.bool_),
        weight_version=np.zeros(size, np.int32),
        finish="stop",
    )
