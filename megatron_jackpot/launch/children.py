"""Child processes of the launcher: in sessions of their own, their output kept, all of them ended in time.

Only what this process started is ever signalled: its descendants, found through the kernel's parent links. As
a child subreaper the launcher also inherits grandchildren whose parent was killed, so none is lost.
"""

import codecs
import ctypes
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

import psutil

from megatron_jackpot.launch.said import say

_PR_SET_CHILD_SUBREAPER = 36
_ANSI = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]")


def become_subreaper() -> None:
    """Orphaned descendants become children of this process instead of init's. Linux; elsewhere a no-op."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(spare: Sequence[psutil.Process] = ()) -> list[psutil.Process]:
    """Everything below this process, leaves included, without `spare`."""
    return [child for child in psutil.Process().children(recursive=True) if child not in spare]


def end(
    children: Sequence[psutil.Process],
    *,
    grace_s: float,
    hurry: Callable[[], bool] = lambda: False,
    signum: int = signal.SIGTERM,
) -> None:
    """`signum`, then SIGKILL to whatever is left after `grace_s` seconds or once `hurry()`; then reap
    them."""
    alive = _signal(children, signum)
    deadline = time.monotonic() + grace_s
    while alive and time.monotonic() < deadline and not hurry():
        _, alive = psutil.wait_procs(alive, timeout=0.2)
    psutil.wait_procs(_signal(alive, signal.SIGKILL), timeout=5)


def tree(pid: int) -> list[psutil.Process]:
    """A process and everything below it; nothing where it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _signal(children: Sequence[psutil.Process], signum: int) -> list[psutil.Process]:
    reached = []
    for child in children:
        try:
            child.send_signal(signum)
            reached.append(child)
        except psutil.NoSuchProcess:
            pass
    return reached


class Streamed:
    """A child whose output goes to this terminal and, without colours and redrawn lines, to a file.

    On a terminal it is given a pseudo-terminal, so that its progress bars still move.
    """

    def __init__(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str]):
        self.log = log
        if sys.stdout.isatty():
            read_fd, write_fd = pty.openpty()
            size = shutil.get_terminal_size()
            termios.tcsetwinsize(write_fd, (size.lines, size.columns))
        else:
            read_fd, write_fd = os.pipe()
        try:
            self.popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=write_fd,
                stderr=write_fd,
                env=env,
                start_new_session=True,
            )
        finally:
            os.close(write_fd)
        self._pump = threading.Thread(target=self._copy, args=(read_fd,), daemon=True)
        self._pump.start()

    def code(self) -> int | None:
        """Exit code as a shell gives it, 128 + n after signal n; None while it runs."""
        code = self.popen.poll()
        return code if code is None or code >= 0 else 128 - code

    def drain(self, limit_s: float) -> None:
        """Wait until the last output is written; a stray grandchild may hold the pipe open."""
        self._pump.join(timeout=limit_s)

    def _copy(self, read_fd: int) -> None:
        held = b""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with open(read_fd, "rb", buffering=0) as source, _Log(self.log) as log:
            while chunk := _read(source.fileno()):
                with suppress(OSError):  # The terminal may be gone; the log goes on.
                    sys.stdout.write(decoder.decode(chunk))
                    sys.stdout.flush()
                *lines, held = (held + chunk).split(b"\n")
                log.write(b"".join(_plain(line) + b"\n" for line in lines))
            log.write(_plain(held))


class _Log:
    """A file that lacks what could not be written to it, as on a full disk; the terminal is told so once.

    Whoever pumps output must go on: a pipe that nobody reads ends the child that writes into it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._told = False

    def __enter__(self) -> Self:
        self._file: BinaryIO | None = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # Some network file systems tell only now.
                self._file.close()

    def write(self, text: bytes) -> None:
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            while text:
                text = text[self._file.write(text) :]
        except OSError as error:
            if not self._told:
                say(f"{self.path} lacks lines from here on, which are shown here alone: {error}")
            self._told = True


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:
        # A pseudo-terminal whose other side is closed reports EIO instead of an end of file.
        return b""


def _plain(line: bytes) -> bytes:
    """What is left on the screen of one line: after the last carriage return, without escape sequences."""
    return _ANSI.sub(b"", line.rstrip(b"\r")).split(b"\r")[-1]
