"""How long something was going on in another thread."""

import time


class Stopwatch:
    """Seconds within which at least one `with` block was open, in the source's thread."""

    def __init__(self) -> None:
        self._open, self._since, self._seconds = 0, 0.0, 0.0

    def __enter__(self) -> None:
        if not self._open:
            self._since = time.perf_counter()
        self._open += 1

    def __exit__(self, *error: object) -> None:
        self._open -= 1
        if not self._open:
            self._seconds += time.perf_counter() - self._since

    def seconds(self) -> float:
        """So far; asked from another thread it may miss the end of a block by its own time."""
        return self._seconds + (time.perf_counter() - self._since if self._open else 0.0)
