"""torchrun for `launch` and the Slurm scripts: python -m megatron_jackpot.launch.agent [torchrun's
arguments].

Unlike stock torchrun it leaves SIGTERM and SIGUSR1 to the ranks, which save and end; it ends when its parent
does, and with the exit code of the first rank that failed.
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from megatron_jackpot.run.interrupt import die_with_parent


def main(argv: list[str]) -> int:
    """Run the ranks to their end: 0, or the first failed rank's code (128 + n after signal n)."""
    die_with_parent(signal.SIGKILL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    # Ignored by the ranks too until they listen; SIGTERM is not, so that it can end one that hangs before.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        print(f"[agent] {error}", file=sys.stderr, flush=True)
        code = failure.exitcode
        return 128 - code if code < 0 else code or 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
