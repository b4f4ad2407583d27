"""Answers in words, for RUN/samples.jsonl: one row for each that the report shows."""

from collections.abc import Callable, Iterable, Sequence

from megatron_jackpot.monitor.metrics import Row
from megatron_jackpot.records import Prompt, Rollout

Text = Callable[[Sequence[int]], str]
Wrong = tuple[Rollout, Rollout | None]
"""A wrong rollout, and a right one of the same prompt where there is one."""

MOST_WRONG = 4
"""Wrong rollouts that are kept of a step."""


def task_of(prompt: Prompt) -> str | None:
    """The label's `task`: reasoning-gym's, or a column of the data set."""
    task = prompt.label.get("task") if isinstance(prompt.label, dict) else None
    return task if isinstance(task, str) else None


def answer_row(prompt: Prompt, tokens: Sequence[int], correct: bool, text: Text) -> Row:
    """A model's answer to a held-out problem."""
    return {"kind": "evaluation", **_problem(prompt, text), "text": text(tokens), "correct": correct}


def wrong_rollouts(groups: Iterable[Sequence[Rollout]], most: int = MOST_WRONG) -> list[Wrong]:
    """The first wrong rollout of each group, those first whose group has a right one, too."""
    found: list[Wrong] = []
    for group in groups:
        wrong = next((rollout for rollout in group if not rollout.correct), None)
        if wrong is not None:
            found.append((wrong, next((rollout for rollout in group if rollout.correct), None)))
    return sorted(found, key=lambda pair: pair[1] is None)[:most]


def wrong_row(pair: Wrong, text: Text) -> Row:
    """A wrong rollout beside the right answer."""
    wrong, right = pair
    return {
        "kind": "rollout",
        **_problem(wrong.prompt, text),
        "text": text(wrong.tokens.tolist()),
        "finish": wrong.finish,
        "reward": wrong.reward,
        "right": None if right is None else text(right.tokens.tolist()),
    }


def _problem(prompt: Prompt, text: Text) -> Row:
    label = prompt.label.get("answer") if isinstance(prompt.label, dict) else prompt.label
    return {"prompt": text(prompt.tokens), "answer": str(label), "task": task_of(prompt)}
