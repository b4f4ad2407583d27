"""Random faults on one run for a while, then a table of what was tried and survived.

    python tests/faults/soak.py --minutes 30 [--seed 0] [--ranks 2] [--ahead 2] [--only TEXT ...] [--once]

--only takes the faults whose name holds one of the texts, --once ends when each has been tried.

Survived means: two more steps within the limit (or, where the launcher itself was hit, after it was started
again), and at the end an account in which every prompt came exactly once.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from rich.console import Console
from rich.table import Table

from megatron_jackpot.run.interrupt import EXIT_REQUEUE, STOP_FILE
from tests.faults.harness import STEP_LIMIT_S, FaultRun, check_account, make_models

START_LIMIT_S = 600
"""A launch's start is no fault, and slow on a machine with other work or with caches that are still empty."""

Fault = Callable[[FaultRun, random.Random], None]


def family(process: psutil.Process) -> list[psutil.Process]:
    """It and everything below it; itself alone where it ends meanwhile."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return [process]


def surely(run: FaultRun, find: Callable[[], list[psutil.Process]], signum: int) -> None:
    """Signal the first that `find` finds; one that is replaced between finding and signalling is looked for
    again."""
    while not run.hit(run.one(find), signum):
        pass


def kill_server(run: FaultRun, draw: random.Random) -> None:
    surely(run, run.servers, signal.SIGKILL)


def kill_scheduler(run: FaultRun, draw: random.Random) -> None:
    def children() -> list[psutil.Process]:
        found = family(run.one(run.servers))[1:]
        return draw.sample(found, len(found))

    surely(run, children, signal.SIGKILL)


def hang_server(run: FaultRun, draw: random.Random) -> None:
    for process in family(run.one(run.servers)):
        run.hit(process, signal.SIGSTOP)


def pause_server(run: FaultRun, draw: random.Random) -> None:
    """Stopped for less than servers.hang_s; on a slow machine the launcher may still have replaced it."""
    tree = family(run.one(run.servers))
    for process in tree:
        run.hit(process, signal.SIGSTOP)
    time.sleep(draw.uniform(1, 5))
    for process in tree:
        run.hit(process, signal.SIGCONT)


def any_rank(run: FaultRun, draw: random.Random) -> Callable[[], list[psutil.Process]]:
    def ranks() -> list[psutil.Process]:
        found = run.ranks()
        return draw.sample(found, len(found))

    return ranks


def kill_rank(run: FaultRun, draw: random.Random) -> None:
    surely(run, any_rank(run, draw), signal.SIGKILL)


def kill_torchrun(run: FaultRun, draw: random.Random) -> None:
    surely(run, lambda: run.find("megatron_jackpot.launch.agent"), signal.SIGKILL)


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


def ends_as_asked(run: FaultRun, limit_s: float = STEP_LIMIT_S) -> None:
    code = run.popen.wait(timeout=limit_s)
    assert code == EXIT_REQUEUE, f"exit code {code}\n{run.text()[-2000:]}"
    assert run.text().count("told to stop") + run.text().count("saved and ended") == 1, run.text()[-2000:]


def signal_launcher(run: FaultRun, draw: random.Random) -> None:
    run.note_children()
    run.popen.send_signal(draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    ends_as_asked(run)


def signal_rank(run: FaultRun, draw: random.Random) -> None:
    surely(run, any_rank(run, draw), draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    ends_as_asked(run)


def stop_file(run: FaultRun, draw: random.Random) -> None:
    (run.folder / STOP_FILE).write_text("please stop\n")
    ends_as_asked(run)


def time_limit(run: FaultRun, draw: random.Random) -> None:
    """Of the run, or of the Slurm job that it believes to be in."""
    signal_launcher(run, draw)
    limit_s = draw.uniform(60, 120)
    if draw.random() < 0.5:
        run.start(f"run.time_limit_s={limit_s}", "run.stop_margin_s=20")
    else:
        run.start("run.stop_margin_s=20", env={"SLURM_JOB_END_TIME": str(time.time() + limit_s)})
    ends_as_asked(run, limit_s + STEP_LIMIT_S)


def behind_a_proxy(run: FaultRun, draw: random.Random) -> None:
    signal_launcher(run, draw)
    names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    run.start(env=dict.fromkeys(names, "http://127.0.0.1:9"))


def without_home(run: FaultRun, draw: random.Random) -> None:
    signal_launcher(run, draw)
    run.start(env={"HOME": "/proc/nohome"})


def second_launch(run: FaultRun, draw: random.Random) -> None:
    second = subprocess.run(run.command(), capture_output=True, text=True, timeout=STEP_LIMIT_S)
    assert second.returncode == 2, f"exit code {second.returncode}: {second.stdout}{second.stderr}"
    assert f"in use by pid {run.popen.pid}" in second.stdout + second.stderr, second.stderr


FAULTS: dict[str, Fault] = {
    "kill -9 of the server": kill_server,
    "kill -9 of a server's child": kill_scheduler,
    "server hangs": hang_server,
    "server pauses 1-5 s": pause_server,
    "kill -9 of a rank": kill_rank,
    "kill -9 of torchrun": kill_torchrun,
    "kill -9 of the launcher": kill_launcher,
    "bit flip in the newest checkpoint, kill -9 of a rank": damage_newest,
    "SIGTERM or SIGUSR1 to the launcher": signal_launcher,
    "SIGTERM or SIGUSR1 to a rank": signal_rank,
    "RUN/stop": stop_file,
    "time limit, its own or Slurm's": time_limit,
    "proxy in the environment": behind_a_proxy,
    "HOME that cannot be written": without_home,
    "second launch in the folder": second_launch,
}


def soak(folder: Path, args: argparse.Namespace, console: Console) -> bool:
    """True when everything was survived."""
    yaml_file = make_models(folder, ahead=args.ahead)
    draw = random.Random(args.seed)
    chosen = [name for name in FAULTS if any(text in name for text in args.only)]
    counts = {name: [0, 0, 0.0] for name in chosen}
    deadline = time.monotonic() + 60 * args.minutes
    run = FaultRun(yaml_file, ranks=args.ranks)
    try:
        run.wait_steps(3, limit_s=START_LIMIT_S)
        names: list[str] = []
        while time.monotonic() < deadline:
            if args.once and all(tried for tried, _, _ in counts.values()):
                break
            names = names or draw.sample(chosen, len(chosen))
            name = names.pop()
            time.sleep(draw.uniform(0, 6))
            counts[name][0] += 1
            started, launched = time.monotonic(), run.popen
            try:
                FAULTS[name](run, draw)
                if run.popen.poll() is not None:
                    run.end()
                    run.start()
                run.wait_steps(2, limit_s=300 if run.popen is launched else START_LIMIT_S)
            except (AssertionError, IndexError, OSError, psutil.Error, subprocess.TimeoutExpired) as error:
                # What it quotes may look like rich's markup.
                console.print(f"{name} was not survived: {error}", style="red", markup=False, highlight=False)
                return report(counts, run, console)
            counts[name][1] += 1
            counts[name][2] = max(counts[name][2], time.monotonic() - started)
            console.print(f"step {run.steps()}: {name}: {time.monotonic() - started:.0f} s")
        run.stop()
        return report(counts, run, console)
    finally:
        run.end()


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
    parser.add_argument("--ahead", type=int, default=0, help="steps whose rollouts are asked for early")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT")
    parser.add_argument("--once", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if soak(Path(folder), args, Console(width=110)) else 1


if __name__ == "__main__":
    sys.exit(main())
