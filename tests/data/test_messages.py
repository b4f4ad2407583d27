"""The package's logger in a process of its own: plain lines, of all ranks but the main one warnings only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_jackpot

PROGRAM = """
import logging
from megatron_jackpot.monitor.messages import configure
logging.basicConfig()  # as a library may do
configure()
log = logging.getLogger("megatron_jackpot.train.run")
log.info("resumed after step 3")
log.warning("the run goes on: %s", "no space")
logging.getLogger("megatron").info("of no interest")
"""


@pytest.mark.parametrize("rank", [None, "0", "3"])
def test_information_is_a_plain_line_of_the_main_rank_and_a_warning_a_line_of_every_rank(rank):
    environment = {"PYTHONPATH": str(Path(megatron_jackpot.__file__).parents[1])}
    if rank is not None:
        environment["RANK"] = rank
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ("" if rank == "3" else "resumed after step 3\n")
    assert done.stderr == "WARNING: the run goes on: no space\n"


def test_nothing_but_answers_to_the_user_is_printed():
    """Files that may print: the command's and the launcher's answers, where the report is served, and the
    watchdog's last words."""
    may = {"cli.py", "launch", "run/watchdog.py", "monitor/messages.py", "monitor/report/serve.py"}
    package = Path(megatron_jackpot.__file__).parent
    for path in package.rglob("*.py"):
        name = path.relative_to(package)
        if str(name) in may or name.parts[0] in may:
            continue
        assert not calls_print(path), f"{name} prints: use logging.getLogger(__name__)"


def calls_print(path: Path) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
