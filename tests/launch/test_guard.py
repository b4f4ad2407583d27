"""Pauses have hysteresis, skipped steps are bounded, and a stuck phase ends its process with every stack
written."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_jackpot.config.run import Guards
from megatron_jackpot.run.watchdog import EXIT_STUCK, Watchdog, read_doing
from megatron_jackpot.train.guard import Guard, RollBack


def pauses(knobs: dict, *seen: tuple[float, float]) -> list[bool]:
    guard = Guard(Guards(**knobs))
    states = []
    for acceptance, kl in seen:
        guard.watch(acceptance, kl)
        states.append(guard.paused)
    return states


def test_without_bounds_nothing_pauses():
    assert pauses({}, (0.0, 1e9), (math.nan, math.nan)) == [False, False]


def test_the_policy_pauses_under_the_floor_and_goes_on_only_clearly_above_it():
    seen = [(0.6, 0), (0.49, 0), (0.55, 0), (0.59, 0), (0.61, 0), (0.55, 0)]
    assert pauses({"acceptance_floor": 0.5}, *seen) == [False, True, True, True, False, False]


def test_the_policy_pauses_over_the_ceiling_and_goes_on_only_clearly_below_it():
    assert pauses({"kl_ceiling": 1.0}, (1, 1.1), (1, 0.9), (1, 0.79), (1, 0.95)) == [True, True, False, False]


def test_a_floor_near_one_can_be_left():
    assert pauses({"acceptance_floor": 0.9}, (0.89, 0), (0.94, 0), (0.96, 0)) == [True, True, False]


def test_a_number_that_is_none_counts_as_out_of_bounds():
    assert pauses({"acceptance_floor": 0.5}, (math.nan, 0)) == [True]
    assert pauses({"kl_ceiling": 1.0}, (1.0, math.nan)) == [True]


def test_skipped_steps_are_counted_in_a_row_for_each_model():
    guard = Guard(Guards(max_skipped=2))
    assert [guard.may_step("policy", x) for x in (math.nan, math.inf, 1.0, math.nan, math.nan)] == [
        *(False, False, True, False, False)
    ]
    assert guard.may_step("actor", math.nan) is False
    with pytest.raises(
        RollBack, match="grad_norm/policy is nan for the 3. time in a row, guard.max_skipped = 2"
    ):
        guard.may_step("policy", math.nan)


def test_a_pause_outlives_a_checkpoint():
    guard = Guard(Guards(acceptance_floor=0.5))
    guard.watch(0.4, 0.0)
    again = Guard(Guards(acceptance_floor=0.5))
    again.load_state_dict(guard.state_dict())
    again.watch(0.55, 0.0)
    assert again.paused


STUCK = """
import sys, time
from pathlib import Path
from megatron_jackpot.run import limits
from megatron_jackpot.run.watchdog import Watchdog
limits.MARGIN_S = 0.1
dog = Watchdog(Path(sys.argv[1]), 3, 0.8)
def stuck_here(): time.sleep(60)
with dog.phase("step 7"):
    for _ in range(6):
        with dog.phase("score of step 7"): time.sleep(0.4)
    with dog.phase("push of version 7", at_least_s=3.0): time.sleep(2.0)
    print("within limits", flush=True)
    if sys.argv[2] == "within":
        with dog.phase("update_policy of step 7"): stuck_here()
    stuck_here()
"""


@pytest.mark.parametrize(("where", "what"), [("within", "update_policy of step 7"), ("outside", "step 7")])
def test_a_stuck_phase_is_named_with_every_stack_and_ends_the_process(tmp_path: Path, where: str, what: str):
    """The time of phases within another one, each with its own limit, is none of that one's."""
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), where], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == EXIT_STUCK and done.stdout == "within limits\n"
    written = (tmp_path / "stacks-rank-3.txt").read_text()
    assert written.startswith(f"rank 3: '{what}' has run for 1 s. What waits in it has at most 0.8 s")
    assert "stuck_here" in written and "stuck_here" in done.stderr and "Thread" in written


def test_a_stuck_rank_ends_also_where_its_stacks_cannot_be_written(tmp_path: Path):
    (tmp_path / "stacks-rank-3.txt").symlink_to("/dev/full")
    (tmp_path / "doing").touch()  # no folder
    body = STUCK.replace("range(6)", "range(0)").replace("time.sleep(2.0)", "pass")
    done = subprocess.run(
        [sys.executable, "-c", body, str(tmp_path), "outside"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == EXIT_STUCK and "stuck_here" in done.stderr


def test_the_time_of_a_phase_counts_once_in_none_of_those_around_it(tmp_path: Path):
    dog = Watchdog(tmp_path, 3, 100.0)

    def deadlines() -> list[float]:
        return [phase.deadline for phase in dog._phases.values()]

    with dog.phase("step"), dog.phase("rollout"):
        before = deadlines()
        with dog.phase("wait"):
            time.sleep(0.2)
        rollout = deadlines()[1] - before[1]
    assert 0.2 <= rollout < 0.35
    with dog.phase("step"):
        step = deadlines()[0]
        began = time.monotonic()
        with dog.phase("rollout"), dog.phase("wait"):
            time.sleep(0.2)
        assert deadlines()[0] - step < time.monotonic() - began + 0.02


def test_what_a_rank_said_last_goes_on_for_as_long_as_its_watchdog_lets_it(tmp_path: Path):
    dog = Watchdog(tmp_path, 0, 100.0)
    assert read_doing(tmp_path, 0) is None
    with dog.phase("step"), dog.phase("evaluation", at_least_s=500.0):
        said = read_doing(tmp_path, 0)
        assert said.phases == ("step", "evaluation") and said.within_s == 620 and said.goes_on
        os.utime(dog.doing, (time.time() - 619,) * 2)
        assert read_doing(tmp_path, 0).goes_on
        os.utime(dog.doing, (time.time() - 621,) * 2)
        assert not read_doing(tmp_path, 0).goes_on
    said = read_doing(tmp_path, 0)
    assert said.phases == () and said.age_s < 60 and not said.goes_on


def test_what_a_rank_is_doing_can_be_read_while_it_does(tmp_path: Path):
    dog = Watchdog(tmp_path, 3, 100.0)
    seen = []

    def look() -> None:
        seen.append((tmp_path / "doing" / "rank-3").read_text())

    with dog.phase("step of step 7"):
        with dog.phase("score of step 7"):
            look()
        with dog.phase("x" * 400):
            look()
        look()
    look()
    # 100 s, and two minutes in which those who wait say what for.
    assert [text.split(f":{os.getpid()}", 1)[1].strip()[:60] for text in seen] == [
        "within 220 s: step of step 7; score of step 7",
        ("within 220 s: step of step 7; " + "x" * 400)[:60],
        "within 220 s: step of step 7",
        "",
    ]
    assert {(len(text), text.count("\n"), text[-1]) for text in seen} == {(256, 1, "\n")}
