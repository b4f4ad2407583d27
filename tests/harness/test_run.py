"""The tests' own command: what it could not run is no pass and no failure."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stages_for_which_no_time_was_left_are_counted_apart_and_fail_the_command():
    done = subprocess.run(
        ["bash", str(ROOT / "tests/run.sh"), "laws", "rollout"],
        env={**os.environ, "JACKPOT_TEST_LIMIT_S": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "0 passed, 0 failed, 0 skipped, 2 stages not run"
    assert "laws: not run, the limit of 0 s is used up" in done.stdout and done.returncode == 1
