"""What a launcher says of itself, among its children's output."""

from contextlib import suppress


def say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone, and the children must be ended all the same
        print(f"[launch] {text}", flush=True)
