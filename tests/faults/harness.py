"""A real launch of tiny models in a process of its own, faults for it, and the account it must keep."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from megatron_jackpot.monitor.metrics import read_metrics
from tests.parallel import spawn
from tests.tiny import write_models, write_tokenizer

spawn.PRELOADED += spawn.OF_A_RUN

STEP_LIMIT_S = 180
SIZE, PER_STEP = 40, 4
PHASES = (
    *("rollout of step", "score of step", "correct of step", "update_actor of step", "update_policy of step"),
    *("sync of step", "save of step", "write step-", "publish step-"),
)
"""Of a step and of its checkpoint, as RUN/doing names them."""


def make_models(folder: Path, *, ahead: int = 0) -> Path:
    """Tiny policy and actor, and the YAML of a run that saves every step."""
    write_models(folder)
    for name in ("policy", "actor"):
        write_tokenizer(folder / name)
    tree = dict(
        run=dict(folder=str(folder / "run"), steps=1000, save_every=1, resume="auto", phase_timeout_s=120),
        policy=dict(hf=str(folder / "policy"), optimizer=dict(lr=1e-4)),
        actor=dict(hf=str(folder / "actor"), optimizer=dict(lr=1e-4)),
        data=dict(
            tasks=dict(chain_sum=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)),
            size=SIZE,
            max_prompt_tokens=100,
            reward_workers=1,
        ),
        rollout=dict(
            prompts_per_step=PER_STEP,
            samples_per_prompt=3,
            max_new_tokens=48,
            temperature=1.0,
            request_timeout_s=30,
            retries=2,
            ahead=ahead,
            max_staleness=max(1, ahead),
        ),
        packing=dict(tokens=256),
        precision=dict(dtype="float32"),
        servers=dict(max_total_tokens=8192, hang_s=8, max_restarts=20, start_timeout_s=600),
        sync=dict(probe_every=1000, timeout_s=20),
        evaluation=dict(size=0),
        parallel=dict(timeout_s=60),
        logging=dict(progress=False, tensorboard=False),
    )
    tree["run"]["max_restarts"] = 20
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


class FaultRun:
    """One launch; `with` ends it and whatever it left."""

    def __init__(self, yaml_file: Path, *overrides: str, ranks: int = 1) -> None:
        self.yaml_file, self.ranks_wanted = yaml_file, ranks
        self.folder = Path(yaml.safe_load(yaml_file.read_text())["run"]["folder"])
        self.seen: list[psutil.Process] = []
        self.start(*overrides)

    def start(self, *overrides: str, env: dict[str, str] | None = None) -> None:
        """Launch, also again after the end of the one before; `env` besides this process's own."""
        self.out = self.yaml_file.parent / f"launch-{time.monotonic_ns()}.txt"
        with self.out.open("wb") as out:
            self.popen = subprocess.Popen(
                self.command(*overrides),
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )

    def command(self, *overrides: str) -> list[str]:
        command = [sys.executable, "-m", "megatron_jackpot.cli", "launch", str(self.yaml_file), *overrides]
        return [*command, "--nproc", str(self.ranks_wanted)]

    def __enter__(self) -> "FaultRun":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill the launch and everything that was seen of it."""
        self.note_children()
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        for child in self.seen:
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def steps(self) -> int:
        """Steps in the metrics so far."""
        try:
            return max((row["step"] for row in read_metrics(self.folder)), default=0)
        except (OSError, ValueError):
            return 0

    def wait_steps(self, more: int, limit_s: float = STEP_LIMIT_S) -> None:
        """Until `more` further steps are done. Raises AssertionError with the output otherwise."""
        goal, deadline = self.steps() + more, time.monotonic() + limit_s
        while self.steps() < goal:
            self.note_children()
            assert self.popen.poll() is None, f"ended with {self.popen.poll()}\n{self.text()[-4000:]}"
            assert time.monotonic() < deadline, f"no step {goal} in {limit_s} s\n{self.text()[-4000:]}"
            time.sleep(0.1)

    def wait_for(self, there: Callable[[], bool], limit_s: float = STEP_LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not there():
            assert time.monotonic() < deadline, f"not within {limit_s} s\n{self.text()[-4000:]}"
            time.sleep(0.2)

    def note_children(self) -> None:
        if self.popen.poll() is None:
            known = {child.pid for child in self.seen}
            children = psutil.Process(self.popen.pid).children(recursive=True)
            self.seen += [child for child in children if child.pid not in known]

    def find(self, words: str) -> list[psutil.Process]:
        """Running descendants whose command line holds `words`."""
        found = []
        if self.popen.poll() is not None:
            return found
        for child in psutil.Process(self.popen.pid).children(recursive=True):
            try:
                if words in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
            except psutil.NoSuchProcess:
                pass
        return found

    def servers(self) -> list[psutil.Process]:
        return [p for p in self.find("sglang.launch_server") if "launch_server" in " ".join(p.cmdline()[:4])]

    def ranks(self) -> list[psutil.Process]:
        return [p for p in self.find("megatron_jackpot.cli train") if "agent" not in " ".join(p.cmdline())]

    def one(self, find: Callable[[], list[psutil.Process]]) -> psutil.Process:
        """The first that `find` finds, now or, while it is being replaced, soon."""
        deadline = time.monotonic() + STEP_LIMIT_S
        while not (found := find()):
            assert time.monotonic() < deadline, f"none in {STEP_LIMIT_S} s\n{self.text()[-4000:]}"
            time.sleep(0.2)
        return found[0]

    def hit(self, victim: psutil.Process, signum: int) -> bool:
        """Whether it was still there, and not another one under its number."""
        self.note_children()
        try:
            victim.send_signal(signum)
        except psutil.NoSuchProcess:
            return False
        return True

    def kill_server_in_an_update(self, limit_s: float) -> str:
        """kill -9 of the first server when it has been paused for new weights and not yet been told to go
        on."""
        log, doing = self.folder / "server-0.log", self.folder / "doing" / "rank-0"
        paused, deadline = "POST /pause_generation", time.monotonic() + limit_s
        while time.monotonic() < deadline:
            before, line = log.read_text(errors="replace").count(paused), doing.read_text()
            rank = int(line.split()[1].rsplit(":", 1)[1])
            while time.monotonic() < deadline and log.read_text(errors="replace").count(paused) == before:
                pass
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGSTOP)
                text, line = log.read_text(errors="replace"), doing.read_text()
                there = text.rfind(paused) > text.rfind("POST /continue_generation") and "sync of" in line
                if there:
                    self.hit(self.servers()[0], signal.SIGKILL)
                os.kill(rank, signal.SIGCONT)
                if there:
                    return f"{line.strip()} (server)"
        raise AssertionError(f"no update of the server in {limit_s} s")

    def stop(self, signum: int = signal.SIGTERM, limit_s: float = 120) -> int:
        self.note_children()
        self.popen.send_signal(signum)
        return self.popen.wait(timeout=limit_s)


def kill_in_phase(
    doing: Path, phase: str, limit_s: float, victim: Callable[[int], int] = lambda pid: pid
) -> str:
    """kill -9 of the process that `doing` (RUN/doing/rank-N) is about, or of its `victim`, while it is in a
    phase.

    It is stopped first, so that what it says is what it does. Returns its line. Raises AssertionError after
    `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        line = doing.read_text() if doing.exists() else ""
        if phase not in line:
            # Some last a millisecond; without a pause the ranks would have a core less.
            time.sleep(0.0002)
            continue
        pid = int(line.split()[1].rsplit(":", 1)[1])
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(pid, signal.SIGSTOP)
            while psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                pass
            there = psutil.Process(pid).status() == psutil.STATUS_STOPPED and phase in doing.read_text()
            hit = victim(pid) if there else None
            if hit is not None:
                os.kill(hit, signal.SIGKILL)
            if hit != pid:
                os.kill(pid, signal.SIGCONT)
            if there:
                return line.strip()
    raise AssertionError(f"'{phase}' was not seen in {doing} in {limit_s} s")


def check_account(folder: Path) -> int:
    """Every step once, in order, and every prompt of an epoch at most once; the number of steps.

    `lost` prompts (requests that failed for good) are allowed, but named.
    """
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    epochs: dict[int, list[int]] = {}
    for row in rows:
        assert len(row["trained"]) + len(row["lost"]) == PER_STEP, row
        epochs.setdefault(row["epoch"], []).extend([*row["trained"], *row["lost"]])
    for number, (epoch, asked) in enumerate(sorted(epochs.items())):
        assert epoch == number and len(asked) == len(set(asked)), f"epoch {epoch}: a prompt came twice"
        if number < len(epochs) - 1:
            assert len(asked) == SIZE // PER_STEP * PER_STEP, f"epoch {epoch}: a prompt was left out"
    metrics = [row["step"] for row in read_metrics(folder)]
    assert metrics == list(range(len(rows) + 1))
    return len(rows)
