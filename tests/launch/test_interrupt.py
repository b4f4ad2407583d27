"""A run is asked to stop by a signal, a file or a time limit, and leaves word that it did."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_jackpot.config.run import Run
from megatron_jackpot.run import interrupt
from megatron_jackpot.run.interrupt import StopRequest, forget_stop, was_stopped, write_stop


def test_the_file_asks_and_becomes_word_of_the_stop(tmp_path: Path):
    stop = StopRequest(Run(folder=tmp_path))
    assert stop.reason() is None and was_stopped(tmp_path) is None
    write_stop(tmp_path, "preempted")
    assert stop.reason() == "preempted"
    stop.done()
    assert stop.reason() is None and was_stopped(tmp_path) == "preempted"
    forget_stop(tmp_path)
    assert was_stopped(tmp_path) is None and not list(tmp_path.iterdir())


def test_the_time_limit_counts_from_the_start_and_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: clock[0])
    stop = StopRequest(Run(folder=tmp_path, time_limit_s=1000, stop_margin_s=100))
    monkeypatch.setattr(interrupt.time, "time", lambda: 4e9)
    clock[0] = 999.0
    assert stop.reason() is None
    clock[0] = 1001.0
    assert stop.reason() == "the time limit is near"


def test_the_end_of_a_slurm_job_counts_too(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 50))
    assert StopRequest(Run(folder=tmp_path, stop_margin_s=100)).reason() == "the time limit is near"
    assert StopRequest(Run(folder=tmp_path, stop_margin_s=10)).reason() is None


@pytest.mark.parametrize("end", ["Unknown", "", "INVALID", "nan", "inf", "0"])
def test_a_slurm_job_without_an_end_sets_no_limit(tmp_path, monkeypatch, end):
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    assert StopRequest(Run(folder=tmp_path)).deadline is None


def test_the_time_that_a_launch_used_before_its_ranks_began_counts(tmp_path, monkeypatch):
    monkeypatch.setenv(interrupt.STARTED_VARIABLE, str(time.monotonic() - 500))
    limited = {"folder": tmp_path, "time_limit_s": 600, "stop_margin_s": 100}
    assert StopRequest(Run(**limited)).reason() == "the time limit is near"
    assert StopRequest(Run(**limited), started=time.monotonic()).reason() is None


LISTENS = """
import sys, time
from pathlib import Path
from megatron_jackpot.config.run import Run
from megatron_jackpot.run.interrupt import StopRequest
stop = StopRequest(Run(folder=Path(sys.argv[1])))
stop.listen()
print("ready", flush=True)
while stop.reason() is None: time.sleep(0.01)
print(stop.reason(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_every_rank_and_a_second_one_ends_this_one(tmp_path: Path, signum: int):
    command = [sys.executable, "-c", LISTENS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signum)
        name = signal.Signals(signum).name
        assert process.stdout.readline() == f"{name}\n"
        # Other ranks hear of it by the file.
        assert StopRequest(Run(folder=tmp_path)).reason() == name
        os.kill(process.pid, signum)  # the same request, as `timeout` sends it
        time.sleep(interrupt.ONE_REQUEST_S)
        assert process.poll() is None
        os.kill(process.pid, signum)
        assert process.wait(timeout=10) == 128 + signum


NODE = """
import sys
from pathlib import Path
from megatron_jackpot.config import parse_config
from contextlib import nullcontext
from megatron_jackpot.launch.folder import own_folder
from megatron_jackpot.launch.local import run_job
from megatron_jackpot.run.interrupt import forget_stop
folder, first = Path(sys.argv[1]), sys.argv[2] == "first"
tree = {
    "run": {"folder": folder}, "servers": {"urls": ["http://127.0.0.1:1"]}, "policy": {"hf": folder},
    "actor": {"hf": folder}, "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64},
    "rollout": {"max_new_tokens": 64},
}
train = "import pathlib, sys; print('asked to stop:', (pathlib.Path(sys.argv[1]) / 'stop').exists())"
command = [sys.executable, "-c", train, str(folder)]
with own_folder(folder) if first else nullcontext():
    if first:
        forget_stop(folder)
    run_job(parse_config(tree), 1, trainer_command=lambda *_: command, first=first)
"""


@pytest.mark.parametrize(("node", "asked"), [("first", False), ("second", True)])
def test_only_the_first_node_of_a_job_clears_what_was_asked(tmp_path: Path, node: str, asked: bool):
    write_stop(tmp_path, "the time limit is near")
    subprocess.run([sys.executable, "-c", NODE, str(tmp_path), node], check=True, timeout=60)
    assert f"asked to stop: {asked}" in (tmp_path / "train.log").read_text()


ORPHAN = """
import ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path
if len(sys.argv) == 2:  # torchrun, killed once its rank listens: the thread that started it ends first
    rank = subprocess.Popen([sys.executable, __file__, sys.argv[1], "rank"], stdout=subprocess.PIPE)
    rank.stdout.readline()
    def last():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=last).start()
    ctypes.CDLL(None).pthread_exit(None)
from megatron_jackpot.config.run import Run
from megatron_jackpot.run.interrupt import StopRequest, die_with_parent
die_with_parent(signal.SIGTERM)
folder = Path(sys.argv[1])
stop = StopRequest(Run(folder=folder)); stop.listen()
print("ready", flush=True)
while (reason := stop.reason()) is None: time.sleep(0.01)
stop.done()
(folder / "reason").write_text(reason)
"""


def test_the_end_of_torchrun_makes_a_rank_save_and_is_no_request_to_the_run(tmp_path: Path):
    script, folder = tmp_path / "orphan.py", tmp_path / "run"
    script.write_text(ORPHAN)
    folder.mkdir()
    parent = subprocess.run([sys.executable, str(script), str(folder)], timeout=60)
    assert parent.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while not (folder / "reason").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    assert (folder / "reason").read_text() == "torchrun has ended"
    assert [path.name for path in folder.iterdir()] == ["reason"]


def test_a_request_that_this_user_may_not_read_counts(tmp_path: Path, monkeypatch):
    def closed(*_args: object, **_more: object) -> str:
        raise PermissionError

    write_stop(tmp_path, "of root's")
    monkeypatch.setattr(Path, "read_text", closed)
    assert StopRequest(Run(folder=tmp_path)).reason() == "stop file"


FAILS = """
import atexit, os, sys
from argparse import Namespace
from pathlib import Path
from megatron_jackpot import cli
from megatron_jackpot.config import parse_config
from megatron_jackpot.train import run
def fails(config, stop):
    # As collectives under way do when the interpreter ends around them.
    atexit.register(os.abort)
    raise RuntimeError("the peer is gone")
run.run = fails
folder = Path(sys.argv[1])
tree = {
    "run": {"folder": folder}, "policy": {"hf": folder}, "actor": {"hf": folder},
    "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64}, "rollout": {"max_new_tokens": 64},
}
sys.exit(cli._train(parse_config(tree), [], Namespace()))
"""


def test_a_rank_that_fails_ends_with_a_plain_code_and_its_traceback(tmp_path: Path):
    command = [sys.executable, "-c", FAILS, str(tmp_path)]
    # The main rank would be refused: there is no model.
    env = {**os.environ, "RANK": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "RuntimeError: the peer is gone" in done.stderr


LOADS = """
import sys, time
from pathlib import Path
from megatron_jackpot import cli
from megatron_jackpot.launch import {module}
def slowly(*_, **__):
    print("loads", flush=True)
    time.sleep(30)
cli.examine_config = lambda *_: (cli.Config.model_construct(run=type("Run", (), dict(folder=Path("no")))), [])
cli._preflight = lambda *_: []
cli.placed = lambda mistakes, *_: mistakes
{slow} = slowly
sys.exit(cli.main(["{command}", "run.yaml"]))
"""


@pytest.mark.parametrize(
    ("command", "module", "slow"),
    [
        ("join", "node", "cli.examine_config"),
        ("join", "node", "node.join"),
        ("launch", "local", "local.launch"),
    ],
)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_counts_before_there_is_a_run(tmp_path: Path, command, module, slow, signum):
    """While the configuration is read, and until the run itself listens."""
    body = LOADS.format(command=command, module=module, slow=slow)
    with subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout.readline() == b"loads\n"
        process.send_signal(signum)
        assert process.wait(timeout=10) == 75
