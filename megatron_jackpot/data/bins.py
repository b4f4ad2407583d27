"""Which sequences share a micro-batch. The standard library alone: `plan` counts bins as the packer does."""

import math
from collections.abc import Sequence
from itertools import islice


def padded(tokens: int, tp: int) -> int:
    """What a micro-batch of `tokens` really has: a multiple of 16 and of the tensor-parallel ranks."""
    multiple = math.lcm(16, tp)
    return math.ceil(tokens / multiple) * multiple


def fill(lengths: Sequence[int], capacity: int, window: int | None) -> list[list[int]]:
    """Indices per bin: of all sequences, or of the first `window` that are left."""
    return fill_bins(lengths, capacity) if window is None else fill_from_window(lengths, capacity, window)


def fill_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices per bin. Capacity 0 gives every sequence its own bin."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = next((b for b, left in enumerate(room) if lengths[index] <= left), None)
        if slot is None:
            bins.append([index])
            room.append(capacity - lengths[index])
        else:
            bins[slot].append(index)
            room[slot] -= lengths[index]
    return bins


def fill_from_window(lengths: Sequence[int], capacity: int, window: int) -> list[list[int]]:
    """Dense Prompt Packing (arXiv 2603.04135): indices per bin, each filled from the `window` first sequences
    that are left, by the longest that fits. Capacity 0 gives every sequence its own bin."""
    bins: list[list[int]] = []
    waiting, rest = list(range(min(window, len(lengths)))), iter(range(window, len(lengths)))
    while waiting:
        content, room = [], capacity
        # One that is too long for any bin has its own, and is refused where its row is made.
        while fitting := [i for i in waiting if lengths[i] <= room or not content]:
            index = max(fitting, key=lambda i: (lengths[i], -i))
            content.append(index)
            room -= lengths[index]
            waiting.remove(index)
            waiting.extend(islice(rest, 1))
        bins.append(content)
    return bins
