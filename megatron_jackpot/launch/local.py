"""A whole run on one machine: SGLang servers and torchrun as children, watched, and ended whatever happens.

Order: check -> record the run -> servers -> torchrun (on a CPU beside servers that still start) -> watch
both, start again what failed -> end torchrun, then the servers.
"""

import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_jackpot.config import Config, ConfigError
from megatron_jackpot.launch import children
from megatron_jackpot.launch.folder import TRAIN_LOG, finished, own_folder, refusals, take_back
from megatron_jackpot.launch.preflight import Subject, preflight
from megatron_jackpot.launch.said import say
from megatron_jackpot.run.interrupt import (
    EXIT_REQUEUE,
    ONE_REQUEST_S,
    SIGNALS,
    STARTED_VARIABLE,
    STOP_FILE,
    StopRequest,
    was_stopped,
    write_stop,
)
from megatron_jackpot.run.provenance import CONFIG_FILE, checkpoints, record
from megatron_jackpot.servers import api_key
from megatron_jackpot.servers.environment import child_environment
from megatron_jackpot.servers.gpus import place_servers, visible_gpus
from megatron_jackpot.servers.process import AWAIT_VARIABLE, ServerProcess, start_servers, stop_servers
from megatron_jackpot.servers.served_folder import served_folder
from megatron_jackpot.servers.supervisor import Supervisor

TRAINER_GRACE_S = 40.0
"""torchrun itself gives its workers 30 s after SIGTERM before it kills them."""
SERVER_GRACE_S = 15.0
STRAY_GRACE_S = 5.0
EXIT_REFUSED = 2
"""Exit code of a rank whose input cannot work: trying again cannot help."""


ALONE = ("--standalone", "--local-addr", "127.0.0.1")
"""torchrun's rendezvous on one machine; --local-addr keeps it off a host name that may not resolve."""

Begin = Callable[[Sequence[str]], None]
"""Told the servers' addresses as soon as they are known, before servers answer."""
StartServers = Callable[[Config, Callable[[], bool], Begin], Sequence[ServerProcess]]
"""Called with what says that no server is wanted any more; raises InterruptedError then."""
TrainerCommand = Callable[[Path, int, Sequence[str]], list[str]]


class Stopped(KeyboardInterrupt):
    """A signal that ends the run at once arrived."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def check(config: Config, nproc: int | None = None) -> None:
    """Everything that can be refused before anything is started. Raises ValueError, a line each."""
    mistakes = preflight(Subject(config, "launch", nproc))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def num_processes(config: Config, nproc: int | None) -> int:
    return nproc or config.parallel.tp * config.parallel.pp * config.parallel.cp


def launch(
    config: Config,
    nproc: int | None = None,
    *,
    start: StartServers | None = None,
    trainer_command: TrainerCommand | None = None,
    began: float | None = None,
) -> int:
    """`run_job` in a folder of its own. What it was asked since `forget_stop` counts.

    Nothing is started where all steps are done.

    EXIT_REFUSED where another launch has it, servers.host is not here, or a rank refuses; a folder that was
    made for it is then gone again.
    """
    folder = config.run.folder
    again = ["megatron-jackpot", "launch", str(folder / CONFIG_FILE), "run.resume=auto"]
    go_on = shlex.join([*again, *(["--nproc", str(nproc)] if nproc else [])])
    try:
        with own_folder(folder) as made:
            if config.run.resume and (done := finished(config)):
                say(done)
                return 0
            code = run_job(
                config, nproc, start=start, trainer_command=trainer_command, began=began, go_on=go_on
            )
            if code == EXIT_REFUSED:
                why = refusals(folder / TRAIN_LOG)
                if take_back(made):
                    say("\n".join([f"refused; {folder} was made for this start and is gone again:", *why]))
    except ConfigError as error:
        say(str(error))
        code = EXIT_REFUSED
    return code


def run_job(
    config: Config,
    nproc: int | None = None,
    *,
    start: StartServers | None = None,
    trainer_command: TrainerCommand | None = None,
    log: str = TRAIN_LOG,
    first: bool = True,
    began: float | None = None,
    go_on: str = "run.resume=auto",
) -> int:
    """Run the job to its end and return the exit code: 0 done, EXIT_REQUEUE if it saved and ended as asked.

    SIGTERM, SIGUSR1, RUN/stop and a time limit ask it to; after a second signal, SIGINT or SIGHUP it ends at
    once with 128 + n. Training that fails is started again from the last checkpoint, at most run.max_restarts
    times, then its code is returned; where it was asked to stop meanwhile, the restart is left to whoever
    queues it again. A server that ends or hangs is started again, at most servers.max_restarts times, then 1.
    Must run in the main thread of its process. Every process started here has ended when this returns.

    `first`: of a job's nodes, the one that has the folder; another may still see what an earlier run was
    asked. `began`, on the monotonic clock: from when run.time_limit_s counts, None for now. `go_on`:
    the command, or the setting, that goes on with the run. Raises ConfigError where servers.host is not here.
    """
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    config_file = record(config, folder)
    children.become_subreaper()
    with _Job(config, folder / log, first, began, go_on) as job:
        urls: Sequence[str] = config.servers.urls

        def command(urls: Sequence[str]) -> list[str]:
            return (trainer_command or torchrun)(config_file, num_processes(config, nproc), urls)

        if not urls:
            api_key.provide(config.servers.host)
            say(f"starting {config.servers.num} SGLang server(s), logs in {folder}")
            try:
                begin = partial(job.begin, command)
                job.look_after((start or start_model_servers)(config, job.needs_no_server, begin))
            except InterruptedError:
                job.code = job.ended_before_servers()
                return job.code
            except (RuntimeError, TimeoutError) as error:
                say(f"the servers did not start. {error}")
                return 1
            urls = [server.url for server in job.servers]
        say(f"servers: {', '.join(urls)}")
        job.train(command(urls), urls)
    return job.code


def start_model_servers(
    config: Config, stopped: Callable[[], bool] = lambda: False, begun: Begin = lambda urls: None
) -> list[ServerProcess]:
    """Servers of the served model's initial weights. Raises InterruptedError once `stopped()`."""
    placement = place_servers(config.servers, see_all=config.sync.method == "ipc")
    model, folder, dtype = served_folder(config), config.run.folder, config.server_dtype
    return start_servers(config.servers, model, placement, folder, dtype=dtype, stopped=stopped, begun=begun)


def torchrun(
    config_file: Path, nproc: int, urls: Sequence[str], rendezvous: Sequence[str] = ALONE
) -> list[str]:
    """The training command of one node."""
    run = [sys.executable, "-m", "megatron_jackpot.launch.agent", *rendezvous]
    train = [
        "-m",
        "megatron_jackpot.cli",
        "train",
        str(config_file),
        f"servers.urls={json.dumps(list(urls))}",
    ]
    return [*run, "--nproc-per-node", str(nproc), *train]


def trainer_env(folder: Path, urls: Sequence[str]) -> dict[str, str]:
    """This environment, with the package importable and, on a CPU, one thread in whatever a rank starts; its
    own are parallel.threads."""
    package_root = str(Path(__file__).resolve().parents[2])
    env = {**child_environment(os.environ, folder, urls), "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")]))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not visible_gpus():
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("MKL_NUM_THREADS", "1")
        # Threads that wait for each other actively lose a time slice per operation where anything else wants
        # their core, a server for one: the first step took three times as long.
        env.setdefault("OMP_WAIT_POLICY", "passive")
    return env


class _Job:
    """The children of one launch and the one way they end: leaving the block, for whatever reason."""

    def __init__(self, config: Config, log: Path, first: bool, began: float | None, go_on: str):
        self.go_on = go_on
        self.config, self.folder, self.log, self.first = config, config.run.folder, log, first
        self.look_after(())
        self.trainer: children.Streamed | None = None
        self.code = 1
        self._spare = children.descendants()
        self._signals = 0
        self._ending = False
        self._asked: int | None = None
        self._asked_at = -math.inf
        self._stop = StopRequest(config.run, started=time.monotonic() if began is None else began)
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Job":
        for signum in (signal.SIGINT, signal.SIGHUP, *SIGNALS):
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # started by nohup
            self._handlers[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self._ending = True
        try:
            if isinstance(error, Stopped):
                self.code = 128 + error.signum
                say(f"{signal.Signals(error.signum).name}: ending the run (once more to end it at once)")
            self._end()
            if isinstance(error, Stopped):
                say(f"ended at once ({signal.Signals(error.signum).name}): {self._left()}")
        finally:
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
        return isinstance(error, Stopped)

    def look_after(self, servers: Sequence[ServerProcess]) -> None:
        self.servers, self.supervisor = servers, Supervisor(servers, self.config.servers, say)

    def begin(self, command: Callable[[Sequence[str]], list[str]], urls: Sequence[str]) -> None:
        """Start training while servers start: ranks load their libraries and wait for servers to answer.

        Not on a GPU, where servers measure the memory that is free.
        """
        if not visible_gpus():
            self._start_trainer(command(urls), urls, {AWAIT_VARIABLE: "1"})

    def train(self, argv: Sequence[str], urls: Sequence[str]) -> None:
        """Training to its end, started again from the last checkpoint after a failure; sets `code`."""
        for attempt in range(self.config.run.max_restarts + 1):
            # Another node may still see what an earlier run was asked, before the first has cleared it.
            if (self.first or attempt) and self.stopping():
                self.code = self._left_to_the_queue() if attempt else self.nothing_to_save()
                return
            if attempt or self.trainer is None:
                self._start_trainer([*argv, *(["run.resume=auto"] if attempt else [])], urls, {})
            self.code = self._watch()
            if self._is_last(self.code):
                return
            saved = checkpoints(self.folder)
            if attempt < self.config.run.max_restarts:
                if self.stopping():
                    self.code = self._left_to_the_queue()
                    return
                say(
                    f"starting again after {saved[-1].name}: restart {attempt + 1} of "
                    f"{self.config.run.max_restarts}"
                )
                children.end(self._below_trainer(), grace_s=STRAY_GRACE_S, hurry=self._hurry)
                if self.config.servers.release_memory:
                    # Only what ended knew which had lent it: a push would write to memory that is not there.
                    self.supervisor.renew("training that is over may have its memory")

    def _start_trainer(self, argv: Sequence[str], urls: Sequence[str], more: Mapping[str, str]) -> None:
        env = trainer_env(self.folder, urls) | {STARTED_VARIABLE: str(self._stop.started), **more}
        self.trainer = children.Streamed(argv, log=self.log, env=env)

    def stopping(self) -> bool:
        """Whether the run was asked, in whatever way, to save and end."""
        return self._why_stop() is not None

    def needs_no_server(self) -> bool:
        """Told to stop, or training that began beside servers has ended, and is not started again."""
        code = self.trainer.code() if self.trainer else None
        return self.stopping() or (code is not None and self._is_last(code))

    def _is_last(self, code: int) -> bool:
        restarts = self.config.run.max_restarts
        return code in (0, EXIT_REFUSED, EXIT_REQUEUE) or not restarts or not checkpoints(self.folder)

    def ended_before_servers(self) -> int:
        if self.trainer is None or (code := self.trainer.code()) is None:
            return self.nothing_to_save()
        code = self._ended(code)
        return code if self._is_last(code) else self._left_to_the_queue()

    def nothing_to_save(self) -> int:
        say(f"told to stop ({self._why_stop()}) before training began: {self._left()}")
        return EXIT_REQUEUE

    def _left_to_the_queue(self) -> int:
        say(f"told to stop ({self._why_stop()}): not started again; {self._left()}")
        return EXIT_REQUEUE

    def _left(self) -> str:
        """What there is to go on from, and how."""
        saved = checkpoints(self.folder)
        state = f"saved is {saved[-1]}" if saved else "nothing is saved, a run begins anew"
        return f"{state}; go on with: {self.go_on}"

    def _why_stop(self) -> str | None:
        return signal.Signals(self._asked).name if self._asked is not None else self._stop.reason()

    def _watch(self) -> int:
        """Until training ends or a server is lost for good."""
        assert self.trainer is not None
        while (code := self.trainer.code()) is None:
            if (
                self._asked is not None
                and not (self.folder / STOP_FILE).exists()
                and was_stopped(self.folder) is None
            ):
                write_stop(self.folder, signal.Signals(self._asked).name)
            # Who is to end needs no server: one that is lost now must not cost the save.
            if not self.stopping() and not self.supervisor.look():
                return 1
            time.sleep(0.2)
        return self._ended(code)

    def _ended(self, code: int) -> int:
        """What is said of training that has ended, and the launch's code for it."""
        assert self.trainer is not None
        self.trainer.drain(limit_s=1)
        if reason := was_stopped(self.folder):
            how = "saved and ended" if checkpoints(self.folder) else "ended"
            say(f"{how} ({reason}): {self._left()}")
            return EXIT_REQUEUE
        if code == EXIT_REFUSED:
            say("training was refused, for what is said above")
        elif code:
            say(f"training ended with exit code {code}; its output is in {self.trainer.log}")
        else:
            say(f"done: {self.folder}")
        return code

    def _end(self) -> None:
        if self.trainer and self.trainer.code() is None:
            below = [p for p in children.descendants(self._spare) if p.pid == self.trainer.popen.pid]
            # torchrun passes SIGHUP on to its ranks, which it ends; SIGTERM would ask them to save first.
            children.end(below, grace_s=TRAINER_GRACE_S, hurry=self._hurry, signum=signal.SIGHUP)
        if self.servers and not self._hurry():
            stop_servers(self.servers, SERVER_GRACE_S)
        children.end(children.descendants(self._spare), grace_s=STRAY_GRACE_S, hurry=self._hurry)
        if self.trainer:
            self.trainer.drain(limit_s=5)

    def _below_trainer(self) -> list[psutil.Process]:
        servers = [server.process.pid for server in self.servers if server.process is not None]
        kept = [p for pid in servers for p in children.tree(pid)]
        return children.descendants([*self._spare, *kept])

    def _hurry(self) -> bool:
        return self._signals > 1

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum in SIGNALS and time.monotonic() - self._asked_at < ONE_REQUEST_S:
            return
        self._signals += 1
        if signum in SIGNALS and self._asked is None and not self._ending:
            self._asked, self._asked_at = signum, time.monotonic()
            return
        if not self._ending:
            self._ending = True
            raise Stopped(signum)
