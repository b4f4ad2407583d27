"""A run with real servers and real ranks survives what kills them, one after another, and loses no prompt."""

import json
import math
import signal
import time
from pathlib import Path

import pytest

from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.run.interrupt import EXIT_REQUEUE
from tests.faults.harness import (
    PHASES,
    STEP_LIMIT_S,
    FaultRun,
    check_account,
    kill_in_phase,
    make_models,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
AHEAD = pytest.mark.parametrize("ahead", [0, 2])


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("faults"))


@pytest.mark.full
@AHEAD
def test_one_run_survives_server_rank_and_launcher_deaths_and_a_hang(tmp_path: Path, ahead: int) -> None:
    yaml_file = make_models(tmp_path, ahead=ahead)
    with FaultRun(yaml_file, ranks=2) as run:
        run.wait_steps(2)
        run.hit(run.servers()[0], signal.SIGKILL)
        run.wait_steps(2)
        assert "restart 1 of" in run.text() and len(run.ranks()) == 2
        run.hit(run.ranks()[1], signal.SIGKILL)
        run.wait_steps(2)
        assert "starting again after step-" in run.text() and "resumed after step" in run.text()
        for process in (run.servers()[0], *run.servers()[0].children(recursive=True)):
            run.hit(process, signal.SIGSTOP)
        run.wait_steps(2)
        assert "has not answered /health_generate for 8 s" in run.text()
        assert run.stop(signal.SIGUSR1) == EXIT_REQUEUE, run.text()[-3000:]
    done = check_account(run.folder)
    with FaultRun(yaml_file, ranks=1) as run:
        run.wait_steps(1)
        run.popen.kill()
        run.popen.wait()
    with FaultRun(yaml_file, f"run.steps={done + 4}", ranks=1) as run:
        assert run.popen.wait(timeout=300) == 0, run.text()[-3000:]
    assert check_account(run.folder) == done + 4


@pytest.mark.full
@pytest.mark.timeout(3600)
@AHEAD
def test_one_run_survives_a_rank_killed_in_every_phase_and_its_server_in_the_middle_of_an_update(
    tmp_path, ahead: int
) -> None:
    table = []
    heard = 'servers.extra_args=["--log-level-http", "info"]'
    with FaultRun(make_models(tmp_path, ahead=ahead), heard, ranks=2) as run:
        run.wait_steps(2)
        for number, phase in enumerate(["server", *PHASES]):
            run.note_children()
            started, steps = time.monotonic(), run.steps()
            if phase == "server":
                seen = run.kill_server_in_an_update(STEP_LIMIT_S)
            else:
                victim = 0 if phase == "publish step-" else number % 2
                seen = kill_in_phase(run.folder / "doing" / f"rank-{victim}", phase, STEP_LIMIT_S)
            run.wait_steps(2, limit_s=2 * STEP_LIMIT_S)
            table.append(f"{seen} | steps {steps} -> {run.steps()} | {time.monotonic() - started:.0f} s")
            print(table[-1], flush=True)
        assert run.text().count("starting again after step-") == len(PHASES), run.text()[-3000:]
        assert run.stop(signal.SIGTERM) == EXIT_REQUEUE, run.text()[-3000:]
    done = check_account(run.folder)
    rows = read_metrics(run.folder)
    assert [row["sync/server_version"] for row in rows[1:]] == list(range(1, done + 1))
    for row in rows[1:]:
        assert all(math.isfinite(row[name]) for name in ("loss/policy", "loss/actor", "grad_norm/policy"))
        assert row["grad_norm/actor"] > 0 and row["staleness/max"] <= ahead, row


@pytest.mark.full
@pytest.mark.timeout(1800)
@AHEAD
def test_groups_of_a_server_killed_in_a_rollout_come_from_the_other_and_of_both_after_they_are_back(
    tmp_path, ahead: int
) -> None:
    with FaultRun(make_models(tmp_path, ahead=ahead), "servers.num=2", ranks=2) as run:
        run.wait_steps(2)
        doing = run.folder / "doing" / "rank-0"
        steps = run.steps()
        kill_in_phase(doing, "rollout of step", STEP_LIMIT_S, victim=lambda _: run.servers()[1].pid)
        run.wait_steps(1)
        # That step was over before a server could be started again.
        assert "Sending the weights again" not in run.text() and "restart 1 of" in run.text()
        one_left = time.monotonic()
        run.wait_steps(3)
        print(
            f"one of two: steps {steps} -> {run.steps()}, the last 3 in {time.monotonic() - one_left:.0f} s",
            flush=True,
        )
        started, steps = time.monotonic(), run.steps()
        run.wait_for(lambda: len(run.servers()) == 2)
        for victim in (0, 0):
            kill_in_phase(
                doing, "rollout of step", STEP_LIMIT_S, victim=lambda _, n=victim: run.servers()[n].pid
            )
        run.wait_steps(2, limit_s=2 * STEP_LIMIT_S)
        print(f"both: steps {steps} -> {run.steps()}, {time.monotonic() - started:.0f} s", flush=True)
        # Ahead of training the next push may ask for them again, before their step is taken.
        assert ahead or "Sending the weights again" in run.text()
        assert run.stop(signal.SIGTERM) == EXIT_REQUEUE, run.text()[-3000:]
    done = check_account(run.folder)
    rows = [json.loads(line) for line in (run.folder / "prompts.jsonl").read_text().splitlines()]
    assert [row["lost"] for row in rows] == [[]] * done
    versions = [row["sync/server_version"] for row in read_metrics(run.folder)[1:]]
    assert versions == list(range(1, done + 1))


@pytest.mark.parametrize("ahead", [0, pytest.param(2, marks=pytest.mark.full)])
def test_asked_to_stop_in_a_rollout_it_goes_on_where_it_was_after_its_server_died(
    yaml_file: Path, ahead: int
) -> None:
    """And, where rollouts run ahead, after its rank did, too."""
    folder = yaml_file.parent / f"short-{ahead}"
    where = (f"run.folder={folder}", f"rollout.ahead={ahead}", f"rollout.max_staleness={max(1, ahead)}")
    with FaultRun(yaml_file, *where) as run:
        run.folder = folder
        run.wait_steps(1)
        run.hit(run.servers()[0], signal.SIGKILL)
        run.wait_steps(1)
        if ahead:
            run.hit(run.ranks()[0], signal.SIGKILL)
            run.wait_steps(1 + ahead)
            assert "starting again after step-" in run.text() and "resumed after step" in run.text()
        assert run.stop(signal.SIGTERM) == EXIT_REQUEUE, run.text()[-3000:]
    done = check_account(folder)
    with FaultRun(yaml_file, *where, f"run.steps={done + 1}") as run:
        assert run.popen.wait(timeout=200) == 0, run.text()[-3000:]
        assert f"resumed after step {done}" in run.text()
    assert check_account(folder) == done + 1
    ages = [row["staleness/max"] for row in read_metrics(folder)[1:]]
    assert max(ages) == ahead, ages
