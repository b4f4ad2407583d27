"""One node's part of a Slurm job: `serve` runs its servers, `join` its training processes.

jobs/common.sh starts each of them once per node. They meet in the run's folder, under the job's id and how
often it was requeued, so that nothing of an earlier attempt is believed:

    RUN/slurm/17-0/servers/0.json  {"node": "n1", "urls": ["http://10.0.0.1:30000"]}
    RUN/slurm/17-0/master.json     {"node": "n1", "host": "10.0.0.1", "port": 41235}
"""

import json
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_jackpot.config import Config
from megatron_jackpot.config.placement import trainer_procs, training_processes
from megatron_jackpot.launch import children
from megatron_jackpot.launch.folder import finished, own_folder
from megatron_jackpot.launch.local import run_job, start_model_servers, torchrun
from megatron_jackpot.launch.lock import HELD_LIMIT_S, StillHeld
from megatron_jackpot.launch.said import say
from megatron_jackpot.run.interrupt import EXIT_REQUEUE, SIGNALS, StopRequest, forget_stop
from megatron_jackpot.servers.address import free_port
from megatron_jackpot.servers.process import stop_servers
from megatron_jackpot.servers.supervisor import Supervisor

SERVER_GRACE_S = 15.0
EXIT_NO_START = 2
MEETING_S = 60.0
"""How much later than the servers' own limit a node may start; steps of one job do not start together."""
ENDED_FILE = "ended.json"
"""In the attempt's folder: the first training node has left before training began."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job step."""

    attempt: str
    rank: int
    num_nodes: int
    node: str
    address: str
    interface: str | None

    def folder(self, config: Config) -> Path:
        return config.run.folder / "slurm" / self.attempt


def serve(config: Config) -> int:
    """This node's servers, watched as `launch` does: until SIGUSR2 or SIGTERM (0), or one is lost for good
    (1).

    EXIT_NO_START when they did not start: jobs/common.sh then does not queue a job's first attempt again.

    Raises ValueError for a bad layout.
    """
    config, place = enter(config, os.environ, "serve")
    if config.cluster.nodes > 1:
        servers = config.servers.model_copy(update={"host": place.address})
        config = config.model_copy(update={"servers": servers})
    logs = config.run.folder / "servers" / place.node
    children.become_subreaper()
    ended = threading.Event()
    for signum in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: ended.set())
    # The trainer saves on it and needs its servers until then.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if done := finished(config):
        # `join` says so, and the script ends this step then; an end before that would count as lost servers.
        say(f"{place.node}: {done}; no server is started")
        limit_s = config.servers.start_timeout_s + MEETING_S
        if ended.wait(limit_s):
            return 0
        say(f"{place.node}: waited {limit_s:g} s for the trainers' step to end this one")
        return EXIT_NO_START
    try:
        servers = start_model_servers(
            config.model_copy(update={"run": config.run.model_copy(update={"folder": logs})}), ended.is_set
        )
    except InterruptedError:
        return 0
    except (RuntimeError, TimeoutError) as error:
        say(f"{place.node}: the servers did not start. {error}")
        return EXIT_NO_START
    try:
        urls = [server.url for server in servers]
        publish(place.folder(config) / "servers" / f"{place.rank}.json", {"node": place.node, "urls": urls})
        say(f"{place.node}: servers {', '.join(urls)}, logs in {logs}")
        supervisor = Supervisor(servers, config.servers, say)
        while not ended.wait(0.5):
            if not supervisor.look():
                return 1
    finally:
        stop_servers(servers, SERVER_GRACE_S)
        children.end(children.descendants(), grace_s=5)
    return 0


def join(config: Config, began: float | None = None) -> int:
    """This node's training processes to their end: torchrun's code, EXIT_REQUEUE when saved before the end.

    Raises ValueError for a bad layout, ConfigError where another launch has the folder, StillHeld where what
    is left of an ended one does. Waits for servers and for the first node, within servers.start_timeout_s;
    every way of asking a run to stop ends that as well. `began`, on the monotonic clock: from when
    run.time_limit_s counts, None for now.
    """
    config, place = enter(config, os.environ, "join")
    if done := finished(config):
        say(f"{place.node}: {done}")
        return 0
    began = time.monotonic() if began is None else began
    first = place.rank == 0
    try:
        with own_folder(config.run.folder) if first else nullcontext():
            if first:
                forget_stop(config.run.folder)
            return _meet_and_train(config, place, began)
    except StillHeld:
        publish(place.folder(config) / ENDED_FILE, {"node": place.node})
        raise


def _meet_and_train(config: Config, place: Place, began: float) -> int:
    first = place.rank == 0
    asked: list[int] = []
    for signum in SIGNALS:
        signal.signal(signum, lambda number, _frame: asked.append(number))
    request = StopRequest(config.run, started=began)
    ended = place.folder(config) / ENDED_FILE

    def stopped() -> bool:
        # The file may still be an earlier run's where the first node has not come to clear it.
        return bool(asked) or (request.reason() is not None if first else ended.exists())

    try:
        urls = config.servers.urls or wait_for_servers(config, place, stopped)
        master = meet(config, place, stopped)
    except InterruptedError:
        if first:
            publish(ended, {"node": place.node})
        say(f"{place.node}: told to stop before training began")
        return EXIT_REQUEUE
    except TimeoutError as error:
        say(f"{place.node}: {error}")
        return 1
    return _train(config, place, urls, master, began)


def _train(
    config: Config, place: Place, urls: Sequence[str], master: Mapping[str, object], began: float
) -> int:
    network = place.interface and {
        "NCCL_SOCKET_IFNAME": place.interface,
        "GLOO_SOCKET_IFNAME": place.interface,
    }
    os.environ.update(network or {})
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"resume": "auto"}),
            "servers": config.servers.model_copy(update={"urls": tuple(urls)}),
        }
    )

    def command(config_file: Path, nproc: int, urls: Sequence[str]) -> list[str]:
        return torchrun(config_file, nproc, urls, rendezvous(place, master))

    return run_job(
        config,
        trainer_procs(config),
        trainer_command=command,
        log=f"train-{place.node}.log",
        first=place.rank == 0,
        began=began,
    )


def enter(config: Config, environ: Mapping[str, str], role: str) -> tuple[Config, Place]:
    """The run of this member of an array job, and this step's place. Raises ValueError outside a fitting
    job."""
    if "SLURM_JOB_ID" not in environ:
        raise ValueError(
            f"SLURM_JOB_ID is not set: `{role}` runs inside a Slurm job. Submit one with "
            "`megatron-jackpot launch CONFIG --slurm`."
        )
    training_processes(config)
    cluster = config.cluster
    given = int(environ.get("SLURM_JOB_NUM_NODES", cluster.nodes))
    if given != cluster.nodes:
        raise ValueError(
            f"cluster.nodes = {cluster.nodes}, but the job has {given} nodes. Make `#SBATCH --nodes` and it "
            "agree."
        )
    tasks = int(environ.get("SLURM_NTASKS", 1))
    wanted = cluster.num_server_nodes if role == "serve" else cluster.num_trainer_nodes
    if tasks != wanted:
        raise ValueError(
            f"`{role}` was started on {tasks} nodes, but cluster.layout = {cluster.layout}, nodes = "
            f"{cluster.nodes}, "
            f"server_nodes = {cluster.server_nodes} ask for {wanted}. Make JACKPOT_SERVER_NODES, the script "
            "and the "
            "configuration agree."
        )
    config = array_member(config, environ.get("SLURM_ARRAY_TASK_ID"))
    address, interface = own_address(cluster.interface, alone=cluster.nodes == 1)
    place = Place(
        attempt=f"{environ['SLURM_JOB_ID']}-{environ.get('SLURM_RESTART_COUNT') or 0}",
        rank=int(environ.get("SLURM_PROCID", 0)),
        num_nodes=tasks,
        node=environ.get("SLURMD_NODENAME", platform.node()),
        address=address,
        interface=interface,
    )
    return config, place


def array_member(config: Config, task: str | None) -> Config:
    """Seed and folder of one task of an array job: the task's number is the seed."""
    if task is None:
        return config
    run = config.run.model_copy(update={"seed": int(task), "folder": config.run.folder / f"seed-{task}"})
    return config.model_copy(update={"run": run})


def own_address(interface: str | None, *, alone: bool) -> tuple[str, str | None]:
    """(IPv4 address, interface) by which other nodes reach this one; None leaves a single node's choice to
    gloo.

    Raises ValueError when there is no such interface, or none but the loopback one where other nodes must
    reach it.
    """
    found = {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    if interface is not None:
        if not found.get(interface):
            raise ValueError(
                f"cluster.interface = '{interface}' has no IPv4 address on {platform.node()}. It has: "
                f"{', '.join(name for name, addresses in found.items() if addresses)}."
            )
        return found[interface][0], interface
    if alone:
        return "127.0.0.1", None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # an address of no one: nothing is sent
            address = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"{platform.node()} has no default route ({error}). Set cluster.interface to the network of the "
            "nodes."
        ) from error
    return address, next((name for name, addresses in found.items() if address in addresses), None)


def wait_for_servers(config: Config, place: Place, stopped: Callable[[], bool]) -> list[str]:
    """Addresses of all servers of this attempt. Raises TimeoutError naming the nodes' files that are
    missing."""
    folder = place.folder(config) / "servers"
    wanted = [folder / f"{rank}.json" for rank in range(config.cluster.num_server_nodes)]
    limit_s = config.servers.start_timeout_s + MEETING_S
    parts = [read_when_there(path, limit_s, "the servers of a node", stopped) for path in wanted]
    return [url for part in parts for url in part["urls"]]


def meet(config: Config, place: Place, stopped: Callable[[], bool]) -> dict[str, Any]:
    """Where torch.distributed meets: the first training node chooses a free port and tells the others."""
    path = place.folder(config) / "master.json"
    if place.rank == 0:
        master = {"node": place.node, "host": place.address, "port": free_port(place.address)}
        publish(path, master)
        return master
    limit_s = MEETING_S + HELD_LIMIT_S
    return read_when_there(path, limit_s, "the first training node's address", stopped)


def rendezvous(place: Place, master: Mapping[str, Any]) -> list[str]:
    """torchrun's arguments on this node."""
    nodes = ["--nnodes", str(place.num_nodes), "--node-rank", str(place.rank)]
    return [*nodes, "--master-addr", str(master["host"]), "--master-port", str(master["port"])]


def publish(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    partial.replace(path)


def read_when_there(path: Path, limit_s: float, what: str, stopped: Callable[[], bool]) -> dict[str, Any]:
    """JSON of a file another node publishes. Raises TimeoutError, and InterruptedError once `stopped()`."""
    deadline = time.monotonic() + limit_s
    while not path.exists():
        if stopped():
            raise InterruptedError
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"Waited {limit_s:g} s for {what}, to be written to {path}. See that node's log; the run's "
                "folder "
                "must be on a disk that all nodes share."
            )
        try:
            os.listdir(path.parent)  # a network file system looks again
        except FileNotFoundError:
            pass
        time.sleep(0.2)
    return json.loads(path.read_text(encoding="utf-8"))
