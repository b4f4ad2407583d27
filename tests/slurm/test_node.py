"""What each node of a Slurm job agrees on with the others, and how it leaves, without a cluster."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_jackpot.launch import lock
from megatron_jackpot.launch.node import (
    Place,
    array_member,
    enter,
    join,
    meet,
    own_address,
    publish,
    wait_for_servers,
)
from megatron_jackpot.run.interrupt import SIGNALS
from tests.slurm.jobs import config_for, job_environment, tree

ROOT = Path(__file__).parents[2]
GPUS = dict(gpus_per_node=8, nodes=2)


def test_a_node_knows_its_place_and_a_requeued_job_is_another_attempt(tmp_path) -> None:
    config = config_for(tmp_path, cluster=dict(GPUS, interface="lo"))
    _, place = enter(config, job_environment(), "join")
    assert place == Place("17-0", 1, 2, "n2", "127.0.0.1", "lo")
    member, again = enter(config, job_environment(SLURM_RESTART_COUNT="3", SLURM_ARRAY_TASK_ID="5"), "join")
    assert again.attempt == "17-3" and again.folder(member) == tmp_path / "run/seed-5/slurm/17-3"
    assert (member.run.seed, array_member(config, None)) == (5, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(SLURM_JOB_NUM_NODES="3"), "cluster.nodes = 2, but the job has 3 nodes"),
        (dict(SLURM_NTASKS="1"), "`serve` was started on 1 nodes, .* ask for 2"),
        (None, "SLURM_JOB_ID is not set"),
    ],
)
def test_a_node_in_another_job_than_the_configured_one_is_refused(tmp_path, changes, message) -> None:
    environment = {} if changes is None else job_environment(**changes)
    with pytest.raises(ValueError, match=message):
        enter(config_for(tmp_path, cluster=dict(GPUS, interface="lo")), environment, "serve")


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'ib7' has no IPv4 address .* It has: .*lo"):
        own_address("ib7", alone=False)


def test_nodes_meet_through_the_shared_folder(tmp_path) -> None:
    config = config_for(tmp_path, cluster=dict(GPUS), servers=dict(start_timeout_s=5))
    places = [Place("17-0", rank, 2, f"n{rank + 1}", "127.0.0.1", None) for rank in range(2)]
    found = {}

    def node(place: Place) -> None:
        found[place.rank] = (
            wait_for_servers(config, place, lambda: False),
            meet(config, place, lambda: False),
        )

    threads = [threading.Thread(target=node, args=(place,)) for place in reversed(places)]
    for thread in threads:
        thread.start()
    for place in places:
        publish(place.folder(config) / "servers" / f"{place.rank}.json", {"urls": [f"http://{place.node}:1"]})
    for thread in threads:
        thread.join(timeout=10)
    assert found[0] == found[1]
    urls, master = found[0]
    assert urls == ["http://n1:1", "http://n2:1"]
    with socket.socket() as probe:
        probe.bind((master["host"], master["port"]))


def test_an_address_of_an_earlier_attempt_is_not_believed_and_the_wait_ends(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_jackpot.launch.node.MEETING_S", 0.0)
    config = config_for(tmp_path, cluster=dict(GPUS), servers=dict(start_timeout_s=0.5))
    earlier, now = (Place(f"17-{n}", 1, 2, "n2", "127.0.0.1", None) for n in (0, 1))
    publish(earlier.folder(config) / "servers/0.json", {"urls": ["http://gone:1"]})
    with pytest.raises(TimeoutError, match=r"Waited 0.5 s for the servers of a node.*17-1/servers/0.json"):
        wait_for_servers(config, now, lambda: False)


def test_where_the_folder_is_still_held_every_node_of_the_job_is_queued_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "HELD_LIMIT_S", 0.1)
    config = config_for(tmp_path, cluster=dict(nodes=2, gpus_per_node=0, trainer_procs=1, interface="lo"))
    for name, value in job_environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/lock").open("w") as left:
        fcntl.flock(left, fcntl.LOCK_EX)
        left.write(json.dumps(lock._own() | {"host": "n7", "boot": "another"}))
        left.flush()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setenv("SLURM_PROCID", "0")
        with pytest.raises(SystemExit) as first:
            join(config)
    monkeypatch.setenv("SLURM_PROCID", "1")
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    assert (first.value.code, join(config)) == (75, 75)
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("way", ["signal", "file", "time"])
def test_a_node_told_to_stop_before_training_asks_to_be_requeued(tmp_path, way) -> None:
    path = tmp_path / "run.yaml"
    cluster = dict(nodes=1, gpus_per_node=0, trainer_procs=1)
    limit = dict(time_limit_s=8, stop_margin_s=5) if way == "time" else {}
    path.write_text(
        json.dumps(tree(tmp_path, cluster=cluster, run=dict(folder=str(tmp_path / "run"), **limit)))
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").write_text("an earlier run's")
    environment = {
        **os.environ,
        **job_environment(SLURM_JOB_NUM_NODES="1", SLURM_NTASKS="1", SLURM_PROCID="0"),
    }
    node = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(path)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert node.stdout.readline() == b"waiting\n"
    time.sleep(0.3)
    assert node.poll() is None
    if way == "signal":
        node.send_signal(signal.SIGUSR1)
    if way == "file":
        (tmp_path / "run/stop").write_text("enough")
    assert node.wait(timeout=20) == 75
    assert (tmp_path / "run/slurm/17-0/ended.json").is_file()


DRIVER = """
import sys
from megatron_jackpot.launch import node
from megatron_jackpot.config import load_config
wait = node.read_when_there
def spoken(*args):
    print("waiting", flush=True)
    return wait(*args)
node.read_when_there = spoken
sys.exit(node.join(load_config(sys.argv[1])))
"""
