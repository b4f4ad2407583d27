"""Stages of the tests, each a pytest in a process of its own, forked from one that has imported what most of
them need and what takes seconds. tests/run.sh calls it:

    python -m tests.stages LOGS JOBS END "STAGE ..." "STAGE ..." [--full]

Each stage that is run leaves STAGE.log and STAGE.end, "STATUS SECONDS", in LOGS. From END on (seconds since
1970) none begins, and those that run are interrupted, with status 124. The first job takes stages of the
first list and then of the second; the others begin with the second.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import pytest

FRESH = ("kernels", "types")
"""Those with interpreters of their own: Triton's must be chosen before Triton is imported, and the type
checker needs none of the imports, which are made while these run."""
KILL_AFTER_S = 60
"""From the interrupt on, for pytest to end what its tests started."""


@dataclass
class Running:
    stage: str
    pid: int
    begun: float
    screen: subprocess.Popen[bytes] | None
    interrupted: bool = False


class Stages:
    """What waits, by job, and what runs."""

    def __init__(self, logs: Path, end: float, orders: list[list[str]], options: list[str]):
        self.logs, self.end, self.orders, self.options = logs, end, orders, options
        self.jobs: list[Running | None] = [None] * len(orders)
        self.begun: set[str] = set()
        self.forks: bool | None = None

    def run(self) -> None:
        """All for which there is time."""
        while self._begin() or any(self.jobs):
            time.sleep(0.1)
            for job, running in enumerate(self.jobs):
                if running is not None and self._ended(running):
                    self.jobs[job] = None

    def _begin(self) -> bool:
        """Whether any began. The first job comes last: the imports are made for it."""
        any_began = False
        for job in reversed(range(len(self.jobs))):
            waiting = [stage for stage in self.orders[job] if stage not in self.begun]
            if self.jobs[job] is None and waiting and time.time() < self.end:
                self.begun.add(waiting[0])
                self.jobs[job] = self._start(waiting[0])
                any_began = True
        return any_began

    def _start(self, stage: str) -> Running:
        log, screen = self.logs / f"{stage}.log", None
        if len(self.jobs) == 1:
            print(f"== tests/{stage}", flush=True)
            screen = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE)
            assert screen.stdin is not None
            out = screen.stdin.fileno()
        else:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        begun = time.time()
        fresh = stage in FRESH or not self._can_fork()
        pid = os.fork()
        if pid == 0:
            _become(stage, self.options, out, fresh=fresh)
        if screen is None:
            os.close(out)
        else:
            screen.stdin.close()
        return Running(stage, pid, begun, screen)

    def _can_fork(self) -> bool:
        """After the imports. A lock that another thread holds stays locked in a forked process, and CUDA does
        not outlive a fork."""
        if self.forks is None:
            self.forks = len(self.orders[0]) > 1 and shutil.which("nvidia-smi") is None
            if self.forks:
                _import_all()
                self.forks = len(os.listdir("/proc/self/task")) == 1
        return self.forks

    def _ended(self, running: Running) -> bool:
        pid, status = os.waitpid(running.pid, os.WNOHANG)
        if pid == 0:
            if time.time() > self.end and not running.interrupted:
                running.interrupted = True
                os.kill(running.pid, signal.SIGINT)
            elif time.time() > self.end + KILL_AFTER_S:
                os.kill(running.pid, signal.SIGKILL)
            return False
        code = 124 if running.interrupted else os.waitstatus_to_exitcode(status)
        if running.screen is None:
            print(f"== tests/{running.stage}", flush=True)
            subprocess.run(["cat", str(self.logs / f"{running.stage}.log")], check=True)
        else:
            running.screen.wait()
        (self.logs / f"{running.stage}.end").write_text(f"{code} {time.time() - running.begun:.0f}\n")
        return True


def _import_all() -> None:
    from tests.parallel.spawn import OF_A_RUN, PRELOADED

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in [*PRELOADED, *OF_A_RUN]:
            # Those of the tests are left to pytest.
            if not module.startswith("tests."):
                importlib.import_module(module)


def _become(stage: str, options: list[str], out: int, *, fresh: bool) -> NoReturn:
    """This process is the stage's from here on, with its output into `out`."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, place in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(fd, place)
    arguments = [f"tests/{stage}", *options]
    if fresh:
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
    import pytest

    sys.argv[:] = ["pytest", *arguments]
    ranks = any("tests.parallel.spawn" in path.read_text() for path in Path("tests", stage).glob("*.py"))
    sys.exit(pytest.main(arguments, plugins=[_RanksFromHere()] if ranks else []))


class _RanksFromHere:
    """Makes the server of ranks before a test has done anything in this process."""

    def pytest_sessionstart(self, session: "pytest.Session") -> None:
        from tests.parallel.spawn import fork_server

        capture = session.config.pluginmanager.getplugin("capturemanager")
        # What ranks print belongs to their test.
        capture.resume_global_capture()
        fork_server()
        capture.suspend_global_capture()


if __name__ == "__main__":
    logs, jobs, end, several, single, *options = sys.argv[1:]
    ordered = sorted(single.split(), key=lambda stage: stage not in FRESH)
    orders = [[*several.split(), *ordered], *[[*ordered, *several.split()]] * (int(jobs) - 1)]
    Stages(Path(logs), float(end), orders, options).run()
