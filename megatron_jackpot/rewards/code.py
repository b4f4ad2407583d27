"""The response's program passes the tests of its row: docs/rewards.md, "code".

A process of its own runs it for each test, sealed by the kernel (sandbox/): no response can reach the tests,
the network, a file or another process. Linux on x86_64 or aarch64.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from megatron_jackpot.rewards.final_answer import without_thinking
from megatron_jackpot.rewards.sandbox import run
from megatron_jackpot.rewards.sandbox.values import LARGEST, to_frame

FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)")
TAGS = ("", "py", "python", "python3")
MOST_TESTS = 100
LONGEST = 2**19
"""Characters of a program."""
WALL = 3
"""Seconds by the clock for a test for each that it may compute: a busy machine, or a program that sleeps."""
SHARE = 0.8
"""Of the time limit of a reward, for all tests of a response; those not begun by then have failed."""

Test = str | dict[str, str]
"""Statements that call the program's functions, or {"stdin": ..., "stdout": ...}."""


class CodeReward:
    """`score` and `check` of responses' programs."""

    def __init__(
        self,
        *,
        credit: Literal["share", "all"],
        cpu_s: int,
        memory_gb: float,
        check_answers: bool,
        trusted: bool,
        timeout_s: float,
    ) -> None:
        """`data.code` of the configuration, and the time limit of a reward. Raises ValueError where programs
        cannot be sealed and are not trusted."""
        self.credit, self.check_answers, self.timeout_s = credit, check_answers, SHARE * timeout_s
        self.limits = {
            "memory_bytes": int(memory_gb * 2**30),
            "cpu_s": cpu_s,
            "wall_s": WALL * cpu_s,
            "sealed": not trusted,
            "all": credit == "all",
        }
        try:
            passed = self.verdicts("", ["assert True"])
        except RuntimeError as error:
            raise ValueError(
                f"data.reward = 'code' cannot seal the programs of responses on this machine ({error}): they "
                "could read files, use the network and end the trainer. Run on Linux, x86_64 or aarch64, "
                "with seccomp; or set data.code.trusted=true where nothing is to be protected."
            ) from error
        if passed != [True]:
            raise ValueError(
                f"data.code: a program that does nothing does not pass within memory_gb = {memory_gb:g} and "
                f"data.reward_timeout_s = {timeout_s:g}. Raise them, or look what keeps this machine busy."
            )

    def score(self, response_text: str, label: object) -> float:
        """The share of the tests that pass, or 1 where all do; 0 without a program."""
        program = program_of(response_text)
        if program is None:
            return 0.0
        tests = tests_of(label)
        passed = sum(self.verdicts(program, tests)) / len(tests)
        return passed if self.credit == "share" else float(passed == 1)

    def check(self, label: object) -> None:
        """Raises ValueError when the tests are none, or the row's own answer does not pass them."""
        tests = tests_of(label)
        if not self.check_answers:
            return
        answer = label["answer"] if isinstance(label, Mapping) else None
        program = program_of(answer) if isinstance(answer, str) else None
        passed = [] if program is None else self.verdicts(program, tests)
        if passed.count(True) < len(tests):
            first = passed.index(False) + 1 if False in passed else len(passed) + 1
            raise ValueError(
                f"test {first} of {len(tests)} fails for the row's own 'answer'. Mend the row, or set "
                "data.code.check_answers=false where 'answer' is no program."
            )

    def verdicts(self, program: str, tests: list[Test]) -> list[bool]:
        """Of each test whether the program passes; none after the time for all of them, nor, where only all
        count, after the first that fails. Raises RuntimeError where the machine cannot run it."""
        asked = {
            "program": program,
            "kinds": ["calls" if isinstance(test, str) else "input" for test in tests],
            **self.limits,
        }
        told = _run(to_frame(asked) + to_frame(tests), self.timeout_s)
        if told.strip(b"01"):
            raise RuntimeError(told.decode(errors="replace").strip("01E"))
        return [one == ord("1") for one in told]


def _run(sent: bytes, timeout_s: float) -> bytes:
    """What sandbox/run.py says within the limit. Raises RuntimeError, or MemoryError where none starts."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "0"}
    if libraries := os.environ.get("LD_LIBRARY_PATH"):
        environment["LD_LIBRARY_PATH"] = libraries
    try:
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-X", "utf8", run.__file__],
            env=environment,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOMEM):
            raise
        raise MemoryError("no process could be started") from error
    try:
        told, _ = process.communicate(sent, timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        told, _ = process.communicate()
    else:
        # Programs end with it; in a session of its own none of another's is hit.
        _end_session(process.pid)
    return told


def _end_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def program_of(response_text: str) -> str | None:
    """The last whole block between ``` of Python or of no language, a text without ``` being all program;
    thoughts are left out. None where there is none, or one longer than LONGEST."""
    visible = without_thinking(response_text)
    if visible is None:
        return None
    blocks = [text for tag, text in _blocks(visible) if tag.lower() in TAGS]
    found = blocks[-1] if blocks else None if "```" in visible else visible
    return found if found is not None and len(found) <= LONGEST else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(tag, lines) of each whole block; each line is looked at once, whatever a response repeats."""
    tag, lines = "", None
    for line in text.splitlines(keepends=True):
        if lines is not None and line.strip() == "```":
            yield tag, "".join(lines)
            lines = None
        elif lines is not None:
            lines.append(line)
        elif opened := FENCE.match(line):
            tag, lines = opened[1], []


def tests_of(label: object) -> list[Test]:
    """The column `tests` of a row, a list or its JSON. Raises ValueError for what is none."""
    tests = label.get("tests") if isinstance(label, Mapping) else None
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError as error:
            raise ValueError(f"its 'tests' is a text that is no JSON: {error}.") from error
    if not isinstance(tests, list) or not 1 <= len(tests) <= MOST_TESTS:
        raise ValueError(f"needs a list 'tests' of 1 to {MOST_TESTS}, got {repr(tests)[:80]}.")
    for number, test in enumerate(tests, 1):
        if isinstance(test, str):
            try:
                compile(test, "<test>", "exec")
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"test {number} is no Python: {error}.") from error
        elif not (
            isinstance(test, dict)
            and test.keys() == {"stdin", "stdout"}
            and all(isinstance(text, str) for text in test.values())
        ):
            raise ValueError(
                f'test {number} must be statements, or {{"stdin": text, "stdout": text}}; '
                f"got {repr(test)[:80]}."
            )
    if len(json.dumps(tests)) > LARGEST:
        raise ValueError(f"its 'tests' are more than {LARGEST} bytes.")
    return tests
