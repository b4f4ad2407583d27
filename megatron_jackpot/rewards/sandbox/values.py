"""Values between the process of a program and that of its tests: plain ones alone, as JSON.

What arrives is of Python's own types whatever the sender is, so that it can equal nothing that it is not.
"""

import json
from collections.abc import Callable
from typing import Any, TypeAlias

Value: TypeAlias = Any
"""Whatever a program computes with, or its form as JSON."""
FRAME = 4
"""Bytes of a message's length before it."""
LARGEST = 2**22
"""Bytes of a message."""
_SEQUENCES = {"l": list, "t": tuple, "s": set, "f": frozenset}


def to_frame(message: object) -> bytes:
    body = json.dumps(message).encode()
    if len(body) > LARGEST:
        raise ValueError(f"a value of more than {LARGEST} bytes.")
    return len(body).to_bytes(FRAME, "big") + body


def encode(value: Value, other: Callable[[Value], int]) -> Value:
    """`value` as JSON; an object of another type by the number that `other` gives it."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["i", hex(value)]  # whose length has no limit
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    if isinstance(value, dict):
        return ["d", [[encode(key, other), encode(one, other)] for key, one in value.items()]]
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, [encode(one, other) for one in value]]
    return ["o", other(value)]


def decode(told: Value, other: Callable[[int], Value]) -> Value:
    """What was encoded. Raises ValueError for what was not."""
    if not isinstance(told, list):
        if isinstance(told, dict) or type(told) is int:
            raise ValueError("no value")
        return told
    try:
        tag, body, *more = told
        if tag == "i":
            return int(body, 16)
        if tag == "c":
            return complex(body, *more)
        if tag == "b":
            return bytes.fromhex(body)
        if tag == "d":
            return {decode(key, other): decode(one, other) for key, one in body}
        if tag == "o":
            return other(body)
        return _SEQUENCES[tag](decode(one, other) for one in body)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError("no value") from error
