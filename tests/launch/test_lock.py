"""Two launches never share a folder; what a dead one left is no obstacle."""

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_jackpot.config import ConfigError
from megatron_jackpot.launch import lock
from megatron_jackpot.launch.lock import LOCK_FILE, StillHeld, only_launch, refuse_if_held

HOLD = """
import sys, time
from pathlib import Path
from megatron_jackpot.launch.lock import only_launch
with only_launch(Path(sys.argv[1])):
    print("held", flush=True); time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def held_by(tmp_path: Path, **changes: object) -> None:
    """A lock file that no process holds, as a dead launch leaves it."""
    (tmp_path / LOCK_FILE).write_text(json.dumps({**lock._own(), **changes}))


def test_a_second_launch_is_refused_by_pid_and_host_and_the_folder_is_free_when_the_first_was_killed(
    tmp_path, holder
):
    for enter in (refuse_if_held, lambda folder: only_launch(folder).__enter__()):
        with pytest.raises(ConfigError, match=f"in use by pid {holder.pid} on host {platform.node()}"):
            enter(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    refuse_if_held(tmp_path)
    with only_launch(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_folder_that_is_not_there_is_free_and_stays_away(tmp_path):
    refuse_if_held(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_lock_of_another_host_is_refused_with_the_way_to_remove_it(tmp_path):
    held_by(tmp_path, host="n7", boot="another")
    with pytest.raises(ConfigError, match=f"on host n7 .*no longer runs there, delete {tmp_path}/lock"):
        refuse_if_held(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == "n7"


@pytest.fixture
def in_job(tmp_path, monkeypatch):
    """Be an attempt of a Slurm job, where squeue is a script; with "" there is none, as in a container."""

    def be(job: str, attempt: str = "0", squeue: str = "") -> None:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        if squeue:
            (programs / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
            (programs / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setenv("SLURM_CLUSTER_NAME", "mini")
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
        monkeypatch.delenv("SLURM_JOB_DEPENDENCY", raising=False)

    return be


def test_another_attempt_of_the_same_slurm_job_takes_over_on_another_node(tmp_path, in_job):
    in_job("17")
    held_by(tmp_path, host="n7", boot="another")
    # Another job, and another launch in the same allocation, may both be running.
    for job, attempt in (("18", "1"), ("17", "0")):
        in_job(job, attempt)
        with pytest.raises(ConfigError, match="on host n7, Slurm job 17, since"):
            refuse_if_held(tmp_path)
    in_job("17", "1")
    with only_launch(tmp_path):
        pass


UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("squeue", "dependency", "taken"),
    [
        ("exit 0", "", True),  # it has ended a moment ago
        (UNKNOWN, "", True),
        ('[ "$*" = "--noheader --jobs 17" ] && echo "17 batch jackpot R"', "", False),
        ("echo 17 batch jackpot PD", "afterany:17", False),  # somebody has queued it once more
        (AWAY, "", False),
        ("sleep 5", "", False),
        ("", "", False),
        ("", "afterany:16:17", True),
        (AWAY, "afterok:3,afterany:17", True),
        ("", "afterany:9", True),  # the array that it was one of
        ("", "after:17,afterany:170", False),
    ],
)
def test_what_a_job_left_that_is_over_for_slurm_is_no_obstacle(
    tmp_path, monkeypatch, in_job, squeue, dependency, taken
):
    in_job("17")
    held_by(tmp_path, host="n7", boot="another", array="9")
    monkeypatch.setattr(lock, "SQUEUE_LIMIT_S", 0.5)
    in_job("18", squeue=squeue)
    monkeypatch.setenv("SLURM_JOB_DEPENDENCY", dependency)
    if taken:
        with only_launch(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["job"] == "18"
        return
    with pytest.raises(ConfigError, match="Slurm job 17"):
        refuse_if_held(tmp_path)


def test_a_job_of_another_cluster_is_not_asked_for_here(tmp_path, monkeypatch, in_job):
    in_job("17")
    held_by(tmp_path, host="n7", boot="another", cluster="maxi")
    in_job("18", squeue="exit 0")
    with pytest.raises(ConfigError, match="Slurm job 17"):
        refuse_if_held(tmp_path)


@pytest.mark.parametrize(("job", "attempt"), [("17", "1"), ("18", "0")])
def test_what_is_left_of_an_ended_job_is_waited_for_and_then_the_job_queued_again(
    tmp_path, monkeypatch, in_job, capsys, job, attempt
):
    """Processes of a node whose slurmd is dead, where the disk knows the kernel's locks of all nodes."""
    in_job("17")
    left = (tmp_path / LOCK_FILE).open("w")
    fcntl.flock(left, fcntl.LOCK_EX)
    held_by(tmp_path, host="n7", boot="another")
    in_job(job, attempt, squeue="exit 0")
    monkeypatch.setattr(lock, "HELD_LIMIT_S", 0.2)
    with pytest.raises(StillHeld) as ended:
        refuse_if_held(tmp_path)
    assert ended.value.code == 75
    said = capsys.readouterr().out
    assert (
        "held by what is left of attempt 0 of job 17" in said and "waited 0.2 s, to be queued again" in said
    )
    monkeypatch.setattr(lock, "HELD_LIMIT_S", 30.0)
    threading.Timer(0.5, left.close).start()
    with only_launch(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["job"] == job


def test_this_host_after_a_restart_of_the_machine_takes_over(tmp_path):
    held_by(tmp_path, boot="before")
    refuse_if_held(tmp_path)


@pytest.mark.parametrize("free", [False, True])
def test_without_the_kernels_lock_the_process_and_its_start_decide(tmp_path, monkeypatch, free):
    def unsupported(*_: object) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    began = lock._own()["began"]
    # This very process; with another start, one that had its number before.
    held_by(tmp_path, began=began - 1000 if free else began)
    if free:
        refuse_if_held(tmp_path)
    else:
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
            refuse_if_held(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "not JSON", "5", "[1]"])
def test_a_lock_that_says_nothing_is_taken(tmp_path, text):
    (tmp_path / LOCK_FILE).write_text(text)
    with only_launch(tmp_path):
        pass


TRAIN = """
import os, sys
from argparse import Namespace
from pathlib import Path
from megatron_jackpot import cli
from megatron_jackpot.config import parse_config
from megatron_jackpot.train import run
run.run = lambda config, stop: print("trains", flush=True)
folder = Path(sys.argv[1])
tree = {
    "run": {"folder": folder}, "policy": {"hf": folder}, "actor": {"hf": folder},
    "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64}, "rollout": {"max_new_tokens": 64},
}
for rank, started in (("0", None), ("1", None), ("0", "17.5")):
    os.environ["RANK"] = rank
    os.environ.update({"JACKPOT_STARTED": started} if started else {})
    print(cli._train(parse_config(tree), [], Namespace(config=folder, overrides=[])))
"""


def test_the_first_rank_of_a_torchrun_without_a_launch_takes_the_folder_itself(tmp_path, holder):
    body = "import megatron_jackpot.launch.preflight as p; p.CHECKS = ()" + TRAIN
    done = subprocess.run(
        [sys.executable, "-c", body, str(tmp_path)], capture_output=True, text=True, timeout=90
    )
    # Refused; another rank; one whose launch has the folder.
    assert done.stdout.split() == ["2", "trains", "0", "trains", "0"], done.stderr
    assert f"in use by pid {holder.pid}" in done.stderr
