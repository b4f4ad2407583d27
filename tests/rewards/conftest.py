"""A module of reward functions in a folder of its own, found by dotted path."""

import pytest

FUNCTIONS = '''
import os, signal, subprocess, sys, time
from pathlib import Path

def length(response_text, label):
    return len(response_text) / label

def hang(response_text, label):
    """Sleeps where the response says so, with a child process of its own."""
    if response_text == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        Path(label + ".new").write_text(f"{os.getpid()} {child.pid}")
        os.replace(label + ".new", label)
        time.sleep(60)
    return 1.0

def crash(response_text, label):
    if response_text == "crash":
        os._exit(3)
    if response_text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0

def odd(response_text, label):
    return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "int": 1}[response_text]

def pid(response_text, label):
    return float(os.getpid())

def slow(response_text, label):
    time.sleep(0.4)
    return 1.0

def greedy(response_text, label):
    """Takes memory, depth, CPU time or the network, as the response says."""
    if response_text == "memory":
        return float(len(bytearray(2**40)))
    if response_text == "depth":
        return greedy(response_text, label)
    if response_text == "cpu":
        while True: pass
    if response_text == "network":
        import socket
        try:
            socket.create_connection(("127.0.0.1", int(label)), timeout=2)
            return 0.25
        except OSError:
            return 0.5
    return 1.0

def of_one(response_text):
    return 1.0


def late(response_text, label):
    """Asks a service that does not answer."""
    raise TimeoutError("the judge did not answer")

not_a_function = 3
'''


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Checked labels are remembered there, and not in the user's."""
    monkeypatch.setenv("JACKPOT_HOME", str(tmp_path / "home"))


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "jackpot_test_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "jackpot_test_rewards"
