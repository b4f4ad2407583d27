"""The process of the tests: it has them and what they expect, and a program's process only by its pipes."""

import builtins
import json
import os
import select
import signal
import time
from collections.abc import Callable

from megatron_jackpot.rewards.sandbox.values import FRAME, LARGEST, Value, decode, encode, to_frame

BEGIN = b"\n"
"""Tells a program's process that its turn has come."""


class Ended(BaseException):
    """A program that is gone, came too late or sent what is no reply; a test cannot catch it by Exception."""


def _is_frame(found: bytes) -> bool:
    """Whether a message is whole. Raises Ended for one that is too large."""
    if len(found) < FRAME:
        return False
    size = int.from_bytes(found[:FRAME], "big")
    if size > LARGEST:
        raise Ended
    return len(found) - FRAME >= size


class Program:
    """A program's process: `to` and `back` are this side's ends of its pipes, which do not block."""

    def __init__(self, pid: int, to: int, back: int) -> None:
        self.pid, self.to, self.back = pid, to, back
        self.collected = False
        self.deadline = 0.0
        """Of time.monotonic(), for all that is asked of it."""

    def run(self, text: str) -> bytes:
        """What it writes, given `text` and no more, until it closes its output. Raises Ended."""
        return self._exchange(BEGIN + text.encode(), lambda found: False, last=True)

    def ask(self, request: dict[str, Value] | None) -> Value:
        """The reply to a request, or without one what the program has. Raises Ended."""
        found = self._exchange(BEGIN if request is None else to_frame(request), _is_frame)
        try:
            return json.loads(found[FRAME:])
        except (ValueError, RecursionError) as error:
            raise Ended from error

    def _exchange(self, sent: bytes, whole: Callable[[bytes], bool], *, last: bool = False) -> bytes:
        """Write `sent` while reading, until what came is whole or nothing more will come."""
        found, waits = b"", select.poll()
        waits.register(self.back, select.POLLIN)
        waits.register(self.to, select.POLLOUT)
        while not whole(found):
            left = self.deadline - time.monotonic()
            if left <= 0 or len(found) > LARGEST + FRAME:
                raise Ended
            for fd, _ in waits.poll(left * 1000):
                if fd == self.to:
                    sent = self._write(sent)
                    if not sent:
                        waits.unregister(self.to)
                        if last:
                            os.close(self.to)
                elif piece := os.read(self.back, 65536):
                    found += piece
                else:
                    return found
        return found

    def _write(self, sent: bytes) -> bytes:
        """What is left of it; nothing where nobody reads any more."""
        try:
            return sent[os.write(self.to, sent) :]
        except BrokenPipeError:
            return b""

    def status(self) -> int:
        """How the process ended, in time. Raises Ended."""
        while time.monotonic() < self.deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.collected = True
                return status
            time.sleep(0.001)
        raise Ended

    def end(self) -> None:
        """Nothing of it is left: its memory, its threads and its number are the machine's again."""
        if not self.collected:
            # Its number is its own until it is waited for.
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.collected = True


class Remote:
    """A function, class or object of the program: calls and attributes go there."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int) -> None:
        self._program, self._number = program, number

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        sent = {"args": encode(list(args), _number_of), "kwargs": encode(kwargs, _number_of)}
        return self._answer(sent)

    def __getattr__(self, name: str) -> Value:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._answer({"name": name})

    def _answer(self, request: dict[str, Value]) -> Value:
        told = self._program.ask({"of": self._number, **request})
        if not isinstance(told, dict):
            raise Ended
        if "raised" in told:
            kind = getattr(builtins, str(told["raised"]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise Ended
            if issubclass(kind, StopIteration):
                raise RuntimeError("StopIteration")  # It would end the test's own loop as if all were there.
            raise _made(kind, str(told.get("text")))
        return received(self._program, told.get("value"))


def _made(kind: type[Exception], text: str) -> Exception:
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and its kin want more than a text.
        return ValueError(text)


def _number_of(thing: Value) -> int:
    if isinstance(thing, Remote):
        return object.__getattribute__(thing, "_number")
    raise TypeError(
        f"a {type(thing).__name__} cannot be given to a program. Use numbers, texts, lists, dicts."
    )


def received(program: Program, told: Value) -> Value:
    """A value that a program sent. Raises Ended for what is none."""
    try:
        return decode(told, lambda number: Remote(program, int(number)))
    except (ValueError, RecursionError) as error:
        raise Ended from error


def passes(test: str | dict[str, str], program: Program, seconds: float) -> bool:
    """Whether a program passes: statements that end without an exception, or the output for an input."""
    program.deadline = time.monotonic() + seconds
    try:
        if isinstance(test, str):
            told = program.ask(None)
            if not isinstance(told, dict):
                return False
            names = {name: received(program, one) for name, one in told.items() if _is_own(name)}
            exec(compile(test, "<test>", "exec"), {**names, "__name__": "tests", "__builtins__": builtins})
            return True
        output = program.run(test["stdin"])
        return program.status() == 0 and _lines(output.decode(errors="replace")) == _lines(test["stdout"])
    except BaseException:  # A test may do anything, also end its process.
        return False


def _is_own(name: str) -> bool:
    """What a test takes from the language stays the language's: a program with an `abs` or a `set` of its own
    would be the judge of itself."""
    return name[:2] != "__" and not hasattr(builtins, name)


def _lines(text: str) -> list[str]:
    """Without white space at the ends of lines, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
