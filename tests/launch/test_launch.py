"""The launcher ends exactly what it started, in bounded time, and says what went wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_jackpot.config import load_config
from megatron_jackpot.run.interrupt import EXIT_REQUEUE
from megatron_jackpot.run.provenance import git_commit

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 60


class Launch:
    """A launcher in its own process, as a shell would start it."""

    def __init__(self, folder: Path, server: str, trainer: str, *rest: str):
        self.folder = folder / "run"
        self.pids_folder = folder / "pids"
        self.out = folder / "out.txt"
        driver = [
            sys.executable,
            str(ROOT / "tests/launch/driver.py"),
            str(self.folder),
            server,
            trainer,
            *rest,
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.popen = subprocess.Popen(driver, stdout=self.out.open("wb"), stderr=subprocess.STDOUT, env=env)

    def wait_for(self, name: str, count: int = 1) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while len(list(self.pids_folder.glob(f"{name}-*"))) < count:
            assert time.monotonic() < deadline and self.popen.poll() is None, self.text()
            time.sleep(0.05)

    def code(self, limit_s: float) -> int:
        return self.popen.wait(timeout=limit_s)

    def text(self) -> str:
        return self.out.read_text()

    def names(self) -> set[str]:
        return {path.name.split("-")[0] for path in self.pids_folder.iterdir()}

    def alive(self) -> list[str]:
        return [path.name for path in self.pids_folder.iterdir() if is_alive(int(path.name.split("-")[1]))]


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def start(tmp_path):
    started = []

    def starter(*args: str) -> Launch:
        started.append(Launch(tmp_path, *args))
        return started[-1]

    yield starter
    for launch in started:
        if launch.popen.poll() is None:
            launch.popen.kill()
            launch.popen.wait()
        for path in launch.pids_folder.glob("*-*"):
            if is_alive(int(path.name.split("-")[1])):
                os.kill(int(path.name.split("-")[1]), signal.SIGKILL)


@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_of_torchrun_is_passed_on_and_the_server_is_ended(start, code):
    launch = start("steady", "exits", str(code))
    assert launch.code(START_LIMIT_S) == code, launch.text()
    assert launch.names() == {"server", "scheduler", "trainer"}
    assert launch.alive() == []
    assert (launch.folder / "train.log").read_text() == "step 1\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_every_child_and_nothing_else(start, signum):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        launch = start("steady", "works")
        launch.wait_for("worker")
        launch.popen.send_signal(signum)
        assert launch.code(limit_s=20) == 128 + signum, launch.text()
        last = launch.text().splitlines()[-1]
        assert "nothing is saved" in last and last.endswith(
            f"go on with: megatron-jackpot launch {launch.folder / 'config.yaml'} run.resume=auto"
        )
        assert launch.names() == {"server", "scheduler", "trainer", "worker"}
        assert launch.alive() == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_lets_training_save_and_says_that_the_job_is_to_be_queued_again(start, signum):
    launch = start("steady", "saves")
    launch.wait_for("worker")
    for _ in range(2):  # as `timeout` does: to its child, then to the child's group
        launch.popen.send_signal(signum)
        time.sleep(0.05)
    assert launch.code(limit_s=20) == EXIT_REQUEUE, launch.text()
    assert f"saved and ended ({signal.Signals(signum).name})" in launch.text()
    assert "go on with: megatron-jackpot launch" in launch.text().splitlines()[-1]
    assert launch.alive() == []


LONG_S, SHORT_S = "1000", "12"


@pytest.mark.parametrize(
    ("way", "code"),
    [("file", "0"), ("file", "134"), ("rank", "0"), ("launcher", "0"), ("Slurm", "0"), ("limit", "0")],
)
def test_every_way_of_asking_ends_the_launch_once_with_75_though_there_is_a_checkpoint(
    start, monkeypatch, way, code
):
    if way == "Slurm":
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + float(SHORT_S)))
    started = time.monotonic()
    launch = start("steady", "waits", SHORT_S if way == "limit" else LONG_S, code)
    launch.wait_for("listens")
    if way == "file":
        (launch.folder / "stop").write_text("please stop\n")
    elif way == "launcher":
        launch.popen.send_signal(signal.SIGUSR1)
    elif way == "rank":
        (trainer,) = launch.pids_folder.glob("listens-*")
        os.kill(int(trainer.name.split("-")[1]), signal.SIGUSR1)
    assert launch.code(limit_s=60) == EXIT_REQUEUE, launch.text()
    reason = dict(file="please stop", rank="SIGUSR1", launcher="SIGUSR1").get(way, "the time limit is near")
    assert launch.text().count("saved and ended") == 1 and f"({reason})" in launch.text()
    assert "starting again" not in launch.text() and launch.alive() == []
    assert len(list(launch.pids_folder.glob("trainer-*"))) == 1
    assert way not in ("limit", "Slurm") or time.monotonic() - started >= float(SHORT_S) - 3


@pytest.mark.parametrize("way", ["signal", "file"])
def test_training_that_fails_when_asked_to_stop_is_left_to_whoever_queues_it_again(start, way):
    launch = start("steady", "fails when asked")
    launch.wait_for("worker")
    if way == "file":
        (launch.folder / "stop").touch()
    else:
        launch.popen.send_signal(signal.SIGTERM)
    assert launch.code(limit_s=30) == EXIT_REQUEUE, launch.text()
    assert "exit code 7" in launch.text() and "not started again" in launch.text()
    assert len(list(launch.pids_folder.glob("trainer-*"))) == 1


@pytest.mark.parametrize("way", ["signal", "file", "limit"])
def test_asked_while_servers_start_it_ends_within_seconds(start, way):
    launch = start("slow", "waits", "5" if way == "limit" else LONG_S, "0")
    launch.wait_for("scheduler")
    if way == "file":
        (launch.folder / "stop").touch()
    elif way == "signal":
        launch.popen.send_signal(signal.SIGTERM)
    assert launch.code(limit_s=30) == EXIT_REQUEUE, launch.text()
    assert "before training began" in launch.text() and launch.names() == {"server", "scheduler"}
    assert launch.alive() == []


def test_training_that_fails_is_started_again_from_its_checkpoint_a_limited_number_of_times(start):
    launch = start("steady", "fails", "7")
    assert launch.code(START_LIMIT_S) == 7, launch.text()
    log = (launch.folder / "train.log").read_text().splitlines()
    assert log == ["arguments: ['7']", *["arguments: ['7', 'run.resume=auto']"] * 2]
    assert "starting again after step-000007: restart 2 of 2" in launch.text()
    assert launch.alive() == [] and len(list(launch.pids_folder.glob("server-*"))) == 1


def test_a_refused_input_is_not_tried_again(start):
    launch = start("steady", "fails", "2")
    assert launch.code(START_LIMIT_S) == 2
    assert (launch.folder / "train.log").read_text() == "arguments: ['2']\n"


def test_a_refused_start_says_last_why_and_that_its_folder_is_gone(start):
    launch = start("steady", "refuses")
    assert launch.code(START_LIMIT_S) == 2 and not launch.folder.exists()
    told, why = launch.text().splitlines()[-2:]
    assert str(launch.folder) in told and "gone again" in told and why == "actor.hf = x: no. Set it."


def test_a_server_that_ended_is_started_again_while_training_goes_on(start):
    launch = start("mortal", "works")
    launch.wait_for("server", count=2)
    assert "restart 1 of 2" in launch.text() and "a bad moment" in launch.text()
    launch.popen.send_signal(signal.SIGINT)
    assert launch.code(limit_s=20) == 130
    assert launch.alive() == [] and len(list(launch.pids_folder.glob("trainer-*"))) == 1


def test_a_server_that_hangs_is_ended_and_started_again(start):
    # The stand-ins answer nothing; here servers.hang_s = 2.
    launch = start("silent", "works")
    launch.wait_for("server", count=2)
    assert "has not answered /health_generate for 2 s" in launch.text()


def test_when_the_launcher_is_killed_its_children_end(start):
    launch = start("steady", "torchrun")
    launch.wait_for("worker", count=2)
    launch.popen.kill()
    deadline = time.monotonic() + 20
    while {name.split("-")[0] for name in launch.alive()} - {"scheduler"} and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {name.split("-")[0] for name in launch.alive()} <= {"scheduler"}


def test_a_dead_server_is_reported_with_its_last_lines_and_ends_the_run(start):
    launch = start("dying", "works")
    assert launch.code(START_LIMIT_S) == 1
    assert "ended with exit code 9" in launch.text() and "out of memory, said the server" in launch.text()
    assert launch.names() == {"server", "scheduler", "trainer", "worker"}
    assert launch.alive() == []


def test_training_is_started_once_and_beside_servers_that_do_not_answer_yet(start, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch = start("beside", "exits", "0")
    assert launch.code(START_LIMIT_S) == 0, launch.text()
    assert (launch.folder / "train.log").read_text() == "step 1\n"
    assert len(list(launch.pids_folder.glob("trainer-*"))) == 1 and launch.alive() == []


@pytest.mark.parametrize(("trainer", "code"), [("refuses", "2"), ("exits", "7")])
def test_training_that_ends_while_servers_start_ends_the_launch_at_once(start, monkeypatch, trainer, code):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch = start("slow beside", trainer, code)
    # The server never answers, and has 60 s.
    assert launch.code(limit_s=30) == int(code), launch.text()
    assert "the servers did not start" not in launch.text() and launch.alive() == []
    told = {"2": "actor.hf = x: no. Set it.", "7": f"exit code 7; its output is in {launch.folder}/train.log"}
    assert told[code] in launch.text().splitlines()[-1]


def test_training_that_failed_beside_servers_and_would_be_started_again_leaves_a_stop_to_the_queue(
    start, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    launch = start("slow beside", "fails", "7")  # It has saved.
    launch.wait_for("trainer")
    while any(name.startswith("trainer-") for name in launch.alive()):
        time.sleep(0.02)
    launch.popen.send_signal(signal.SIGTERM)
    assert launch.code(limit_s=30) == EXIT_REQUEUE, launch.text()
    assert "exit code 7" in launch.text() and "not started again" in launch.text()


def test_a_server_that_does_not_start_is_reported_and_no_training_begins(start):
    launch = start("stillborn", "works")
    assert launch.code(START_LIMIT_S) == 1
    assert "no such model" in launch.text() and "Traceback" not in launch.text()
    assert launch.names() == set()


def test_workers_of_a_killed_torchrun_are_ended_though_they_lead_their_own_sessions(start):
    launch = start("steady", "crashes")
    assert launch.code(START_LIMIT_S) == 128 + signal.SIGKILL
    assert "worker" in launch.names()
    assert launch.alive() == []


def test_a_second_signal_does_not_wait_for_a_trainer_that_ignores_the_first(start):
    launch = start("steady", "stubborn")
    launch.wait_for("worker")
    launch.popen.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert is_alive(launch.popen.pid)
    launch.popen.send_signal(signal.SIGINT)
    assert launch.code(limit_s=10) == 130
    assert launch.alive() == []


def test_real_torchrun_meets_on_loopback_and_leaves_no_rank_behind(start):
    launch = start("steady", "torchrun")
    launch.wait_for("worker", count=2)
    launch.popen.send_signal(signal.SIGINT)
    assert launch.code(limit_s=50) == 130, launch.text()
    assert launch.alive() == []
    assert "ranks: 2" in (launch.folder / "train.log").read_text()


def test_the_run_folder_says_what_was_run(start):
    launch = start("steady", "exits", "0")
    assert launch.code(START_LIMIT_S) == 0
    assert load_config(launch.folder / "config.yaml").run.folder == launch.folder
    written = json.loads((launch.folder / "provenance.json").read_text())
    assert written["versions"]["torch"] and written["python"].startswith("3.")
    assert set(written) >= {"commit", "dirty", "command", "time"}
    assert written["machine"].keys() == {"processor", "cores", "threads"}
    assert written["machine"]["processor"] and written["machine"]["cores"] >= 1


def test_a_checkout_that_does_not_hold_the_package_is_not_its_commit(tmp_path):
    folder = tmp_path / "site-packages" / "megatron_jackpot"
    folder.mkdir(parents=True)
    (folder / "cli.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "else"]):
        subprocess.run([*git, *words], check=True, timeout=20)
    assert git_commit(folder) == (None, None)
    for words in (["add", "."], ["commit", "-q", "-m", "its own"]):
        subprocess.run([*git, *words], check=True, timeout=20)
    commit, dirty = git_commit(folder)
    assert commit is not None and len(commit) == 40 and dirty is False
