"""SGLang servers as child processes: start, wait for health, stop exactly what was started.

On a machine without CUDA the flags and the shims in cpu_server/ run the stock wheel on CPU.
"""

import http.client
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from megatron_jackpot.config import Servers
from megatron_jackpot.servers import api_key, model_files
from megatron_jackpot.servers.address import free_port, port_is_free, url_of
from megatron_jackpot.servers.environment import child_environment, own_environment
from megatron_jackpot.servers.gpus import Device, Placement

DIE_WITH_PARENT = Path(__file__).parent / "die_with_parent.py"
CPU_SHIMS = Path(__file__).parent / "cpu_server"
CPU_FLAGS = (
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--mem-fraction-static", "0.05", "--sleep-on-idle"),
)
"""--sleep-on-idle: without it the idle scheduler keeps a core busy (101% against 1%, same tokens/s)."""
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
SILENT_HEALTH = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
"""/health answers at once, and 503 while a server starts or ends; otherwise it samples a token and sleeps a
second, as /health_generate does."""
HEALTH, HEALTH_GENERATE = "/health", "/health_generate"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks without a proxy: what the environment names is for the way out, not for servers of ours."""


AWAIT_VARIABLE = "JACKPOT_AWAIT_SERVERS"
"""Set for ranks that a launch starts beside its servers, before these answer."""


def answers(url: str, limit_s: float, path: str = HEALTH) -> bool:
    """Whether a server answers `path` within `limit_s`, at most 5 s."""
    try:
        with DIRECT.open(url + path, timeout=min(5.0, max(0.1, limit_s))) as answer:
            return answer.status == 200
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def await_servers(servers: Servers, stopped: Callable[[], object]) -> None:
    """In a rank that a launch started beside its servers: until all of servers.urls answer, or `stopped()`.

    Raises TimeoutError after servers.start_timeout_s; the launch, which has the same limit, says why.
    """
    if os.environ.pop(AWAIT_VARIABLE, None) != "1":
        return
    deadline = time.monotonic() + servers.start_timeout_s
    for url in servers.urls:
        while not answers(url, deadline - time.monotonic()):
            if stopped():
                return
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Waited {servers.start_timeout_s:g} s (servers.start_timeout_s) for server {url}."
                )
            time.sleep(0.25)


class ServerProcess:
    """One server in a process group of its own. Example: ServerProcess(argv, port=30000, log_path=path)."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log_path: Path,
        host: str = "127.0.0.1",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.command = list(command)
        self.host = host
        self.port = port
        self.log_path = Path(log_path)
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """Where to reach it; a server bound to every interface is reached on the loopback one."""
        return url_of(self.host, self.port)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Spawn it. Raises RuntimeError when the port is in use."""
        if not port_is_free(self.host, self.port):
            raise RuntimeError(
                f"Port {self.port} on {self.host} is in use: no server can start there. "
                "Set servers.port to a free port, or to 0 to take one."
            )
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, str(DIE_WITH_PARENT), *self.command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )

    def wait_healthy(self, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Poll /health.

        Raises RuntimeError at once when the process ends, InterruptedError once `stopped()`, TimeoutError
        after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not self.answers(deadline - time.monotonic()):
            if stopped():
                raise InterruptedError(f"Told to stop while server {self.url} started.")
            if not self.running:
                code = self.process.returncode if self.process else None
                raise RuntimeError(
                    f"Server {self.url} ended with exit code {code} while starting.\n{self.log_end()}"
                )
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Server {self.url} did not answer /health within {timeout_s:g} s "
                    f"(servers.start_timeout_s).\n{self.log_end()}"
                )
            time.sleep(0.25)

    def answers(self, limit_s: float, path: str = HEALTH) -> bool:
        """Whether it answers `path` within `limit_s`, at most 5 s."""
        # A stranger may have taken the port since it was checked; then our process has ended or will.
        return answers(self.url, limit_s, path) and self.running

    def note(self, line: str) -> None:
        """Into the server's log, between what the server says; the report counts restarts there."""
        with suppress(OSError), self.log_path.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def log_end(self, num_lines: int = 20) -> str:
        """The last lines of the log, without the noise of optional models."""
        if not self.log_path.exists():
            return f"No log at {self.log_path}."
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 65536))
            lines = log.read().decode(errors="replace").splitlines()
        lines = [line for line in lines if "Ignore import error" not in line]
        return "\n".join([f"Last lines of {self.log_path}:", *lines[-num_lines:]])

    def terminate(self) -> None:
        """Ask it to end; `stop` makes sure of it."""
        if self.process is not None and self.running:
            # The leader alone: it ends its children in order, and takes one that others end for a crash.
            self.process.terminate()
        else:
            self._signal(signal.SIGTERM)

    def stop(self, grace_s: float = 10) -> None:
        """SIGTERM, up to `grace_s` of waiting, SIGKILL to the whole process group: nothing of it runs on."""
        if self.process is None:
            return
        self.terminate()
        if not self._gone_within(grace_s):
            self._signal(signal.SIGKILL)
            self._gone_within(5)
        self.process = None
        if self._log is not None:
            self._log.close()

    def _signal(self, number: int) -> None:
        # The group keeps the leader's id while any member lives: this reaches only what was started here.
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _gone_within(self, limit_s: float) -> bool:
        assert self.process is not None
        deadline, left_alone = time.monotonic() + limit_s, False
        while True:
            if self.process.poll() is not None and not left_alone:
                # The leader has ended without them: nobody else will tell its children.
                left_alone = True
                self._signal(signal.SIGTERM)
            if not _group_runs(self.process.pid):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


def start_servers(
    servers: Servers,
    model: Path,
    placement: Placement,
    folder: Path,
    *,
    dtype: str,
    stopped: Callable[[], bool] = lambda: False,
    begun: Callable[[Sequence[str]], None] = lambda urls: None,
) -> list[ServerProcess]:
    """Start servers.num healthy servers of `model` side by side, logs in folder/server-{i}.log.

    On any failure all are stopped. Server i takes servers.port + i, or a free one where that is 0; of the
    placement's GPUs, those from i * tp to (i + 1) * tp. With servers.release_memory they lend theirs
    (sync/memory_saver.py). Raises ValueError for too few GPUs, RuntimeError when one ends while it starts,
    InterruptedError once `stopped()`, TimeoutError after servers.start_timeout_s.
    """
    gpus, tp, needed = placement.gpus, servers.tp, servers.num * servers.tp
    if gpus is not None and len(gpus) < needed:
        raise ValueError(
            f"{servers.num} servers of tp {tp} need {needed} GPUs, got {list(gpus)}. Lower servers.num or tp."
        )
    # A folder in Megatron's format has nothing that SGLang could load: the first push brings the weights.
    weights = () if any(model.glob("*.safetensors")) else ("--load-format", "dummy")
    lends = servers.release_memory
    saver = ("--enable-memory-saver",) if lends and placement.device == "cuda" else ()
    started: list[ServerProcess] = []
    deadline = time.monotonic() + servers.start_timeout_s
    try:
        for i in range(servers.num):
            port = servers.port + i if servers.port else free_port(servers.host)
            url = url_of(servers.host, port)
            place, seen = _placed(gpus and gpus[i * tp : (i + 1) * tp], placement.all_gpus)
            flags = (*place, *saver, *weights)
            command = server_command(
                servers, model, port=port, dtype=dtype, device=placement.device, flags=flags
            )
            environment = server_environment(placement.device, folder, url, tp=tp, gpus=seen)
            if placement.device == "cpu" and not (servers.extra_args or servers.python):
                # Both may bring another architecture, or another SGLang.
                environment.setdefault(model_files.VARIABLE, model_files.other_models(model))
            log_path = folder / f"server-{i}.log"
            server = ServerProcess(
                command, host=servers.host, port=port, log_path=log_path, environment=environment
            )
            started.append(server)
            server.start()
        begun([server.url for server in started])
        for server in started:
            server.wait_healthy(max(0.1, deadline - time.monotonic()), stopped)
    except BaseException as error:
        stop_servers(started, grace_s=1 if isinstance(error, InterruptedError) else 10)
        raise
    return started


def _placed(
    own: Sequence[int] | None, every: Sequence[int] | None
) -> tuple[tuple[str, ...], Sequence[int] | None]:
    """(flags that put a server on its `own` GPUs, those that it sees)."""
    if not own or not every:
        return (), own
    return ("--base-gpu-id", str(list(every).index(own[0]))), every


def stop_servers(servers: Sequence[ServerProcess], grace_s: float = 10) -> None:
    """Stop all of them, waiting once for the slowest."""
    deadline = time.monotonic() + grace_s
    for server in servers:
        server.terminate()
    for server in servers:
        server.stop(max(0.5, deadline - time.monotonic()))


def server_command(
    servers: Servers, model: Path, *, port: int, dtype: str, device: Device, flags: Sequence[str] = ()
) -> list[str]:
    """argv of one server. Its first weights are version 0; no sampling default comes from the model; it is
    asked in ids and answers in ids, so that no text is made of them (a third of the front's time)."""
    command = [str(servers.python or sys.executable), "-m", "sglang.launch_server"]
    command += ["--model-path", str(model), "--host", servers.host, "--port", str(port)]
    command += ["--tp-size", str(servers.tp), "--device", device, "--dtype", dtype]
    command += ["--weight-version", "0", "--sampling-defaults", "openai", "--skip-server-warmup"]
    command += ["--skip-tokenizer-init", "--log-level", "warning"]
    if device == "cpu":
        command += CPU_FLAGS
    if servers.max_total_tokens is not None:
        command += ["--max-total-tokens", str(servers.max_total_tokens)]
    if not servers.prefix_cache:
        command.append("--disable-radix-cache")
    return [*command, *api_key.arguments(), *flags, *servers.extra_args]


def server_environment(
    device: Device, folder: Path, url: str, *, tp: int = 1, gpus: Sequence[int] | None = None
) -> dict[str, str]:
    """This process's environment without torchrun's variables, and what the device needs."""
    environment = child_environment(own_environment(), folder, [url])
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | SILENT_HEALTH
    if device == "cpu":
        cores = os.cpu_count() or 1
        paths = [str(CPU_SHIMS), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= CPU_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        if tp > 1:
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % cores) for rank in range(tp))
    elif gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return environment


def _group_runs(group: int) -> bool:
    """Whether any process of the group is alive; one that ended but was not collected yet does not count."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, member_of = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                return True
    return not Path("/proc/self/stat").exists()
