"""Random faults on one run for a while, then a table of what was tried and survived.

    python tests/faults/soak.py --minutes 30 [--seed 0] [--ranks 2]

Survived means: two more steps within the limit (or, where the launcher itself was hit, after it was started
again), and at the end an account in which every prompt came exactly once.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from megatron_jackpot.run.interrupt import EXIT_REQUEUE
from tests.faults.harness import FaultRun, check_account, make_models

Fault = Callable[[FaultRun, random.Random], None]


def kill_server(run: FaultRun, draw: random.Random) -> None:
    run.hit(run.servers()[0], signal.SIGKILL)


def kill_scheduler(run: FaultRun, draw: random.Random) -> None:
    run.hit(draw.choice(run.servers()[0].children(recursive=True)), signal.SIGKILL)


def hang_server(run: FaultRun, draw: random.Random) -> None:
    for process in (run.servers()[0], *run.servers()[0].children(recursive=True)):
        run.hit(process, signal.SIGSTOP)


def pause_server(run: FaultRun, draw: random.Random) -> None:
    """Stopped for less than servers.hang_s."""
    tree = [run.servers()[0], *run.servers()[0].children(recursive=True)]
    for process in tree:
        run.hit(process, signal.SIGSTOP)
    time.sleep(draw.uniform(1, 5))
    for process in tree:
        run.hit(process, signal.SIGCONT)


def kill_rank(run: FaultRun, draw: random.Random) -> None:
    run.hit(draw.choice(run.ranks()), signal.SIGKILL)


def kill_torchrun(run: FaultRun, draw: random.Random) -> None:
    run.hit(run.find("megatron_jackpot.launch.agent")[0], signal.SIGKILL)


def kill_launcher(run: FaultRun, draw: random.Random) -> None:
    run.note_children()
    run.popen.kill()
    run.popen.wait()


def damage_newest(run: FaultRun, draw: random.Random) -> None:
    """A bit of the newest checkpoint, then a rank's death."""
    newest = sorted((run.folder / "checkpoints").glob("step-*"))[-1]
    victim = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    content = bytearray(victim.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    victim.write_bytes(content)
    kill_rank(run, draw)


def ask_to_stop(run: FaultRun, draw: random.Random) -> None:
    code = run.stop(draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    assert code == EXIT_REQUEUE, f"exit code {code}"


FAULTS: dict[str, Fault] = {
    "kill -9 of the server": kill_server,
    "kill -9 of a server's child": kill_scheduler,
    "server hangs": hang_server,
    "server pauses 1-5 s": pause_server,
    "kill -9 of a rank": kill_rank,
    "kill -9 of torchrun": kill_torchrun,
    "kill -9 of the launcher": kill_launcher,
    "bit flip in the newest checkpoint, kill -9 of a rank": damage_newest,
    "SIGTERM or SIGUSR1 to the launcher": ask_to_stop,
}


def soak(folder: Path, minutes: float, seed: int, ranks: int, console: Console) -> bool:
    """True when everything was survived."""
    yaml_file = make_models(folder)
    draw = random.Random(seed)
    counts = {name: [0, 0, 0.0] for name in FAULTS}
    deadline = time.monotonic() + 60 * minutes
    run = FaultRun(yaml_file, ranks=ranks)
    try:
        run.wait_steps(3)
        names: list[str] = []
        while time.monotonic() < deadline:
            names = names or draw.sample(list(FAULTS), len(FAULTS))
            name = names.pop()
            time.sleep(draw.uniform(0, 6))
            counts[name][0] += 1
            started = time.monotonic()
            try:
                FAULTS[name](run, draw)
                if run.popen.poll() is not None:
                    run.__exit__()
                    run = FaultRun(yaml_file, ranks=ranks)
                run.wait_steps(2, limit_s=300)
            except (AssertionError, IndexError, OSError) as error:
                console.print(f"[red]{name} was not survived[/red]: {error}", highlight=False)
                return report(counts, run, console)
            counts[name][1] += 1
            counts[name][2] = max(counts[name][2], time.monotonic() - started)
            console.print(f"step {run.steps()}: {name}: {time.monotonic() - started:.0f} s")
        run.stop()
        return report(counts, run, console)
    finally:
        run.__exit__()


def report(counts: dict[str, list], run: FaultRun, console: Console) -> bool:
    table = Table("fault", "tried", "survived", "longest until two more steps")
    for name, (tried, survived, longest) in counts.items():
        table.add_row(name, str(tried), str(survived), f"{longest:.0f} s")
    console.print(table)
    steps = check_account(run.folder)
    console.print(f"{steps} steps, every prompt of every epoch exactly once")
    return all(tried == survived for tried, survived, _ in counts.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if soak(Path(folder), args.minutes, args.seed, args.ranks, Console(width=110)) else 1


if __name__ == "__main__":
    sys.exit(main())
