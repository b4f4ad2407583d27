"""A reward that differs between any two answers of random models: the policy has something to learn."""

import zlib


def by_text(response_text: str, label: object) -> float:
    """In [0, 1), a function of the text alone.

    Two values only would leave one run in thirty without a group of unequal rewards, so without a gradient.
    """
    return zlib.crc32(response_text.encode()) / 2**32
