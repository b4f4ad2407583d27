"""1.0 where the task's own scorer gives exactly 1.0: reasoning-gym's partial credit is not a correct answer.

The answer is the last <answer>...</answer> of the response, or the whole response where it has none.
"""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from reasoning_gym import create_dataset
from reasoning_gym.utils import extract_answer


def score(response_text: str, label: Any) -> float:
    tagged = extract_answer(response_text)
    answer = response_text.strip() if tagged is None else tagged
    try:
        return float(_scorer_of(label)(answer, label["entry"]) == 1.0)
    except Exception:
        # Scorers parse what a model wrote, some without a guard; `check` has shown that this one works.
        return 0.0


def check(label: Any) -> None:
    """Raises ValueError when the task's own answer does not score 1.0."""
    if not isinstance(label, dict) or "task" not in label or "entry" not in label:
        raise ValueError("data.reward = 'reasoning_gym' needs labels made by data.source=reasoning_gym.")
    gold = label["answer"]
    credit = _scorer_of(label)(gold, label["entry"])
    if credit != 1.0:
        raise ValueError(
            f"reasoning_gym task '{label['task']}' scores its own answer {gold!r} {credit}, not 1.0. "
            "Remove it from data.tasks."
        )


def _scorer_of(label: dict[str, Any]) -> Callable[[str, dict[str, Any]], float]:
    return _scorer(label["task"], json.dumps(label.get("options", {}), sort_keys=True))


@cache
def _scorer(task: str, options: str) -> Callable[[str, dict[str, Any]], float]:
    # With the options of the data: some scorers read them (decimal places, tolerances, allowed ranges).
    return create_dataset(task, **json.loads(options)).score_answer
