"""All tests of one response: `python run.py` without site packages, PYTHONPATH being this package's alone.

Standard input has two messages (values.py): the program and how many processes it needs, and only when those
are there the tests, so that no process of the program ever held them. Then all are sealed, and the tests run
one after another. Standard output gets a 1 or a 0 for each, or what is wrong with this machine after an E.
"""

import ctypes
import json
import os
import resource
import signal
import sys

from megatron_jackpot.rewards.sandbox.program import no_more_imports, preload, run_with_input, serve_calls
from megatron_jackpot.rewards.sandbox.seal import CannotSeal, seal
from megatron_jackpot.rewards.sandbox.tests import Program, passes
from megatron_jackpot.rewards.sandbox.values import FRAME, Value

LARGEST_FILE = 2**20
"""Bytes, where files can be written at all."""
OPEN_FILES = 1024
ANSWERS = 3
"""Descriptor on which a program's process answers."""


def main() -> None:
    """Raises nothing of its own but what no machine should do."""
    asked = _message()
    _end_with_parent()
    # What tests print is no verdict.
    verdicts, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    seconds, kinds = asked["cpu_s"], asked["kinds"]
    _limit(asked["memory_bytes"], seconds * (len(kinds) + 1))
    preload(asked["program"])
    programs = [_start(kind, asked) for kind in kinds]
    tests = _message()
    for test in tests:
        preload(test if isinstance(test, str) else "")
    if asked["sealed"]:
        try:
            seal(may_kill=[program.pid for program in programs])
        except CannotSeal as error:
            os.write(verdicts, b"E" + str(error).encode())
            return
        no_more_imports()
    for test, program in zip(tests, programs, strict=True):
        passed = passes(test, program, asked["wall_s"])
        program.end()
        os.write(verdicts, b"1" if passed else b"0")
        if asked["all"] and not passed:
            return


def _message() -> Value:
    def exactly(size: int) -> bytes:
        found = b""
        while len(found) < size:
            found += os.read(0, size - len(found)) or sys.exit("nobody asks")
        return found

    return json.loads(exactly(int.from_bytes(exactly(FRAME), "big")))


def _start(kind: str, asked: dict[str, Value]) -> Program:
    """A process that waits for its turn to run the program."""
    theirs_in, to = os.pipe()
    back, theirs_out = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(to, False)
        os.set_blocking(back, False)
        return Program(pid, to, back)
    _end_with_parent()
    output = os.dup(theirs_out)
    os.dup2(theirs_in, 0)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.dup2(output if kind == "input" else nothing, 1)
    if kind == "calls" and output != ANSWERS:
        os.dup2(output, ANSWERS)
    # Among them the tests' own input, and the ends of other programs' pipes.
    os.closerange(ANSWERS + (kind == "calls"), OPEN_FILES)
    _limit(asked["memory_bytes"], asked["cpu_s"])
    if asked["sealed"]:
        try:
            seal()
        except CannotSeal:
            sys.exit(1)  # The tests' process says why.
        no_more_imports()
    if kind == "input":
        run_with_input(asked["program"])
    else:
        serve_calls(asked["program"], ANSWERS)
    sys.exit(0)


def _limit(memory_bytes: int, cpu_s: int) -> None:
    """Of this process and those it starts, each; none above what the machine allows."""
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: cpu_s, resource.RLIMIT_CORE: 0}
    for what, wanted in {**limits, resource.RLIMIT_FSIZE: LARGEST_FILE}.items():
        hard = resource.getrlimit(what)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(what, (value, value))


def _end_with_parent() -> None:
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    main()
