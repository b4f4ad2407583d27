"""The right number is worth 1, a near one a half; what was cut off before its end is worth nothing."""

from typing import Any


def near(response_text: str, label: dict[str, Any], *, finish_reason: str) -> float:
    """`label` has the row's answer and its other columns, here `within`."""
    try:
        distance = abs(int(response_text) - int(label["answer"]))
    except ValueError:
        return 0.0
    if finish_reason != "stop" or distance > label["within"]:
        return 0.0
    return 1.0 if distance == 0 else 0.5
