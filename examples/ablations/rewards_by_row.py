"""A reward with a number beside its score: docs/rewards.md, "Several numbers of one reward"."""

from typing import Any


def number(response_text: str, label: dict[str, Any]) -> dict[str, float]:
    """1 for the right number, else a tenth of the share of digits, which is measured beside as `format`."""
    text = response_text.strip()
    form = sum(character.isdigit() for character in text) / max(1, len(text))
    return {"score": 1.0 if text == label["answer"] else 0.1 * form, "format": form}
