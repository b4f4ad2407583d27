"""A reward with a number beside its score: docs/rewards.md, "Several numbers of one reward"."""

from typing import Any


def number(response_text: str, label: dict[str, Any]) -> dict[str, float]:
    """1 for the right number, a tenth for another one; whether it is one is measured beside, as `format`."""
    text = response_text.strip()
    form = float(text.removeprefix("-").isdecimal())
    return {"score": 1.0 if text == label["answer"] else 0.1 * form, "format": form}
