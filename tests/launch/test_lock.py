"""Two launches never share a folder; what a dead one left is no obstacle."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_jackpot.config import ConfigError
from megatron_jackpot.launch import lock
from megatron_jackpot.launch.lock import LOCK_FILE, only_launch, refuse_if_held

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


def test_another_attempt_of_the_same_slurm_job_takes_over_on_another_node(tmp_path, monkeypatch):
    held_by(tmp_path, host="n7", boot="another", job="17", attempt="0")
    # Another job, and another launch in the same allocation, may both be running.
    for job, attempt in (("18", "1"), ("17", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
        with pytest.raises(ConfigError):
            refuse_if_held(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with only_launch(tmp_path):
        pass


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
