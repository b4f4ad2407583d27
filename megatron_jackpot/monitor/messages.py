"""What a process says in words: the logger of the package, as plain lines.

Modules take `logging.getLogger(__name__)` and never set it up; the command does, once per process.
"""

import logging
import os
import sys


class Lines(logging.Handler):
    """Information on standard output as it is, warnings and errors on standard error with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        loud = record.levelno >= logging.WARNING
        text = f"{record.levelname}: {record.getMessage()}" if loud else record.getMessage()
        try:
            # Looked up now: a progress bar on the terminal puts its own streams in their place while it runs.
            print(text, file=sys.stderr if loud else sys.stdout, flush=True)
        except OSError:
            self.handleError(record)


def configure() -> None:
    """Once per process. Of torchrun's ranks only the main one says more than warnings."""
    logger = logging.getLogger("megatron_jackpot")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    # What a library does to the root logger would print every line twice.
    logger.propagate = False
    logger.handlers = [Lines()]


def let_go_of_output() -> None:
    """At a command's end: where `| head` has closed the output, what is left to say is dropped, and Python's
    own end does not complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
