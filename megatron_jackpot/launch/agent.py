"""torchrun for `launch` and the Slurm scripts: python -m megatron_jackpot.launch.agent [torchrun's
arguments].

Unlike stock torchrun it leaves SIGTERM and SIGUSR1 to the ranks, which save and end; it ends when its parent
does, and with the exit code of the first rank that failed.
"""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from megatron_jackpot.run.interrupt import die_with_parent

EXIT_REFUSED = 2
"""Exit code of a rank that has said itself why its input cannot work."""


def main(argv: list[str]) -> int:
    """Run the ranks to their end: 0, or the first failed rank's code (128 + n after signal n)."""
    die_with_parent(signal.SIGKILL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    # Ignored by the ranks too until they listen; SIGTERM is not, so that it can end one that hangs before.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # What torch says of a rank that ends, a block of lines, is said below in one.
    logging.disable(logging.ERROR)
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code != EXIT_REFUSED:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            print(f"[agent] rank {rank} (pid {failure.pid}) ended with {how}", file=sys.stderr, flush=True)
        return 128 - code if code < 0 else code or 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
