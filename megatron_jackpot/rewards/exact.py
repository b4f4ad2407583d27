"""The response equals the label's answer, surrounding white space aside."""

from typing import Any


def score(response_text: str, label: Any) -> float:
    return float(response_text.strip() == gold_answer(label).strip())


def check(label: Any) -> None:
    """Raises ValueError when no response could be scored against the label."""
    if not gold_answer(label).strip():
        raise ValueError("the answer is empty.")


def gold_answer(label: Any) -> str:
    """The reference answer of a label: the label itself, or its key `answer`."""
    gold = label.get("answer") if isinstance(label, dict) else label
    if not isinstance(gold, str):
        raise ValueError(f"the label needs an answer of type str, got {gold!r}.")
    return gold
