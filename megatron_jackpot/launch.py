"""A whole run on one machine: SGLang servers and torchrun as children, watched, and ended whatever happens.

Order: check -> record the run -> servers -> torchrun -> watch -> end torchrun, then the servers.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_jackpot import children
from megatron_jackpot.config import Config
from megatron_jackpot.provenance import CONFIG_FILE, PROVENANCE_FILE, checkpoints, record
from megatron_jackpot.rollout.server import ServerProcess, port_is_free, start_servers, stop_servers

TRAINER_GRACE_S = 40.0
"""torchrun itself gives its workers 30 s after SIGTERM before it kills them."""
SERVER_GRACE_S = 15.0
STRAY_GRACE_S = 5.0
TRAIN_LOG = "train.log"
OWN_FILES = (CONFIG_FILE, PROVENANCE_FILE, TRAIN_LOG, "server-*.log")
"""What a launch writes before training starts: a folder with nothing else may be used again."""


StartServers = Callable[[Config, int], Sequence[ServerProcess]]
TrainerCommand = Callable[[Path, int, Sequence[str]], list[str]]


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def check(config: Config, nproc: int | None = None) -> None:
    """Everything that can be refused before anything is started. Raises ValueError with the remedy."""
    p = config.parallel
    model = p.tp * p.pp * p.cp
    if num_processes(config, nproc) % model:
        raise ValueError(f"--nproc {nproc} is not a multiple of tp * pp * cp = {model}. Use --nproc {model}.")
    for name, folder in (("policy.hf", config.policy.hf), ("actor.hf", config.actor.hf)):
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{name} = {folder} holds no config.json. Set it to a Hugging Face model folder."
            )
    if not config.servers.urls and config.servers.port:
        for port in range(config.servers.port, config.servers.port + config.servers.num):
            if not port_is_free(config.servers.host, port):
                raise ValueError(
                    f"Port {port} on {config.servers.host} is in use: no server can start there. "
                    "Set servers.port to a free one, or to 0 to have one chosen."
                )
    if not config.run.resume:
        _check_folder(config.run.folder)
    elif not checkpoints(config.run.folder):
        raise ValueError(
            f"run.resume = true, but run.folder = {config.run.folder} holds no checkpoint. Set run.resume=false."
        )


def num_processes(config: Config, nproc: int | None) -> int:
    if nproc is not None and nproc < 1:
        raise ValueError(f"--nproc {nproc} must be at least 1.")
    return nproc or config.parallel.tp * config.parallel.pp * config.parallel.cp


def launch(
    config: Config,
    nproc: int | None = None,
    *,
    start: StartServers | None = None,
    trainer_command: TrainerCommand | None = None,
) -> int:
    """Run the job to its end: torchrun's exit code, 128 + n after signal n, 1 if a server failed.

    Must run in the main thread of its process. Every process started here has ended when this returns.
    """
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    config_file = record(config, folder)
    nproc = num_processes(config, nproc)
    children.become_subreaper()
    with _Job(folder) as job:
        urls: Sequence[str] = config.servers.urls
        if not urls:
            say(f"starting {config.servers.num} SGLang server(s), logs in {folder}")
            try:
                job.servers = (start or start_actor_servers)(config, nproc)
            except (RuntimeError, TimeoutError) as error:
                say(f"the servers did not start. {error}")
                return 1
            urls = [server.url for server in job.servers]
        say(f"servers: {', '.join(urls)}")
        argv = (trainer_command or torchrun)(config_file, nproc, urls)
        job.trainer = children.Streamed(argv, log=folder / TRAIN_LOG, env=trainer_env())
        job.code = job.watch()
    return job.code


def start_actor_servers(config: Config, nproc: int) -> list[ServerProcess]:
    """Servers of the actor's initial weights, on the last GPUs: ranks take theirs from the front."""
    servers, gpus = config.servers, visible_gpus()
    # A folder in Megatron's format has nothing that SGLang could load: the first push brings the weights.
    dummy = () if any(config.actor.hf.glob("*.safetensors")) else ("--load-format", "dummy")
    needed, numbered = servers.num * servers.tp, all(gpu.isdigit() for gpu in gpus)
    return start_servers(
        config.actor.hf,
        dtype=servers.dtype or config.precision.dtype,
        folder=config.run.folder,
        num=servers.num,
        tp=servers.tp,
        host=servers.host,
        port=servers.port,
        python=servers.python,
        start_timeout_s=servers.start_timeout_s,
        max_total_tokens=servers.max_total_tokens,
        extra_args=(*dummy, *servers.extra_args),
        device="cuda" if gpus else "cpu",
        gpus=[int(gpu) for gpu in gpus[-needed:]] if numbered and len(gpus) >= needed else None,
    )


def torchrun(config_file: Path, nproc: int, urls: Sequence[str]) -> list[str]:
    """The training command; --local-addr keeps it off a host name that may not resolve."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    train = [
        "-m",
        "megatron_jackpot.cli",
        "train",
        str(config_file),
        f"servers.urls={json.dumps(list(urls))}",
    ]
    return [*run, "--nproc-per-node", str(nproc), *train]


def trainer_env() -> dict[str, str]:
    """This environment, with the package importable and, on a CPU, one thread for each rank."""
    package_root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH")]))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not visible_gpus():
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("MKL_NUM_THREADS", "1")
    return env


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES spells them, without importing torch."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not found:
        return found
    return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]


def say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone, and the children must be ended all the same
        print(f"[launch] {text}", flush=True)


class _Job:
    """The children of one launch and the one way they end: leaving the block, for whatever reason."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.servers: Sequence[ServerProcess] = ()
        self.trainer: children.Streamed | None = None
        self.code = 1
        self._spare = children.descendants()
        self._signals = 0
        self._ending = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Job":
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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
        finally:
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
        return isinstance(error, Stopped)

    def watch(self) -> int:
        """Until training ends or a server does."""
        assert self.trainer is not None
        while (code := self.trainer.code()) is None:
            if self._report_dead_servers():
                return 1
            time.sleep(0.2)
        self.trainer.drain(limit_s=1)
        if code:
            self._report_dead_servers()
            say(f"training ended with exit code {code}; its output is in {self.trainer.log}")
        else:
            say(f"done: {self.folder}")
        return code

    def _report_dead_servers(self) -> bool:
        dead = [server for server in self.servers if not server.running]
        for server in dead:
            code = server.process.returncode if server.process else None
            say(f"server {server.url} ended with exit code {code}. {server.log_end()}")
        return bool(dead)

    def _end(self) -> None:
        if self.trainer and self.trainer.code() is None:
            below = [p for p in children.descendants(self._spare) if p.pid == self.trainer.popen.pid]
            children.end(below, grace_s=TRAINER_GRACE_S, hurry=self._hurry)
        if self.servers and not self._hurry():
            stop_servers(self.servers, SERVER_GRACE_S)
        children.end(children.descendants(self._spare), grace_s=STRAY_GRACE_S, hurry=self._hurry)
        if self.trainer:
            self.trainer.drain(limit_s=5)

    def _hurry(self) -> bool:
        return self._signals > 1

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signals += 1
        if not self._ending:
            self._ending = True
            raise Stopped(signum)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.folder = {folder} is a file. Set run.folder to a new folder.")
    found = sorted(folder.iterdir()) if folder.exists() else []
    foreign = [path.name for path in found if not any(path.match(pattern) for pattern in OWN_FILES)]
    if foreign:
        raise ValueError(
            f"run.folder = {folder} already holds a run ({', '.join(foreign[:4])}). "
            "Set run.folder to a new folder, delete this one, or continue it with run.resume=true."
        )
