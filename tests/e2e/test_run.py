"""Whole runs on tiny random models: launch with two ranks, then every sync and correction on one shared
server."""

import asyncio
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_jackpot.config import load_config
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.monitor.metrics import METRICS, read_metrics
from megatron_jackpot.monitor.token_log import load, record_files
from megatron_jackpot.servers import api_key
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.protocol import ServerError
from megatron_jackpot.train.assembly import assemble
from megatron_jackpot.train.run import run
from tests.data.runs import tree_of
from tests.parallel.spawn import run_ranks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def _run(rank: int, world: int, config: str, overrides: list[str]) -> None:
    run(load_config(Path(config), overrides))


def _probe_of_a_wrong_actor(rank: int, world: int, config: str, overrides: list[str]) -> str:
    """The server holds the actor; the trainer's copy is then moved a little."""
    loaded = load_config(Path(config), overrides)
    assembly = assemble(loaded, init_mesh(loaded.parallel, 0))
    try:
        assembly.trainer.push()
        good = assembly.probe()["probe/max"]
        with torch.no_grad():
            for parameter in assembly.trainer.actor.chunks[0].parameters():
                parameter.mul_(1.01)
        with pytest.raises(RuntimeError) as error:
            assembly.probe()
    finally:
        assembly.close()
    return f"{good} {error.value}"


def check_rows(rows: list[dict], steps: int, ahead: int = 0) -> None:
    assert [row["step"] for row in rows] == list(range(steps + 1))
    assert [row["sync/server_version"] for row in rows[1:]] == list(range(1, steps + 1))
    # T = 0.7, sampled and top-k tokens, before the first step and after every sync.
    assert all(row["probe/max"] <= 1e-3 for row in rows)
    assert all(0 <= row["staleness/mean"] <= row["staleness/max"] <= ahead for row in rows[1:])
    assert all(0 <= row[f"eval/{model}_accuracy"] <= 1 for row in rows for model in ("policy", "actor"))


def test_launch_trains_two_steps_on_two_ranks(folder: Path) -> None:
    out = folder / "launched"
    command = [sys.executable, "-m", "megatron_jackpot.cli", "launch", str(folder / "run.yaml")]
    profile = ("logging.profile_steps=[2]", "logging.profile_ranks=[1]")
    done = subprocess.run(
        [*command, f"run.folder={out}", *profile, "--nproc", "2"], capture_output=True, text=True, timeout=300
    )
    console = done.stdout + done.stderr
    assert done.returncode == 0, console[-3000:]
    # Of others: what is not ours to say, at the start as at the end.
    assert not [word for word in ("Warning", "nanobind", "Traceback") if word in console], console[-3000:]
    rows = read_metrics(out)
    check_rows(rows, 2)
    # Where no response happened to be correct, there is no share of them.
    missing = METRICS.keys() - rows[-1].keys() - {"rejected/correct"}
    assert not missing, missing
    assert 0 < rows[-1]["jackpot/acceptance"] < 1
    assert {"config.yaml", "provenance.json", "train.log", "metrics.jsonl"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "provenance.json").read_text())
    check_report(out)
    check_profile(out)


def check_profile(out: Path) -> None:
    """Of the chosen step on the chosen rank alone, with the phases of the step in it."""
    (folder,) = (out / "profile").iterdir()
    assert folder.name == "step-000002-rank-1"
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "rollout", "score", "correct", "update_actor", "update_policy", "sync"} <= names


def check_report(out: Path) -> None:
    """Of the run's own first step: whole responses of its prompts, and a page that shows them."""
    (record,) = map(load, record_files(out))
    trained = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    first = next(row for row in trained if row["step"] == 1)
    assert record.step == 1 and set(record.rollout_S3[:, 1]) <= set(first["trained"])
    assert (record.trained_N == record.response_N).all() and record.response_N.sum() > 8
    assert (record.actor_logp_N - record.server_logp_N)[record.trained_N] == pytest.approx(0, abs=1e-3)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_jackpot.cli", "report", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and Path(done.stdout.strip()) == out / "report.html", done.stderr
    tree = tree_of((out / "report.html").read_text())
    (shown,) = tree["tokens"]["records"]
    assert shown["kind"].count("p") == (~record.response_N).sum()
    assert tree["runs"][0]["verdict"]["text"].startswith("Finished: 2 of 2 steps")
    answered = [row for row in tree["samples"] if row["kind"] == "evaluation" and row["step"] == 2]
    assert {row["model"] for row in answered} == {"policy", "actor"}
    assert all(row["prompt"] and row["answer"] for row in tree["samples"])
    missed = [row for row in tree["samples"] if row["kind"] == "rollout"]
    assert {row["step"] for row in missed} <= {1} and len(missed) <= 4


@pytest.mark.parametrize(
    "overrides",
    [
        ["sync.method=disk", "algorithm.correction.name=tis", "algorithm.advantage.name=rloo"],
        [
            *("sync.method=broadcast", "algorithm.correction.name=none", "algorithm.num_minibatches=2"),
            "rollout.ahead=1",
        ],
        [
            "sync.method=ipc",
            "servers.release_memory=true",
            "precision.deterministic=true",
            "run.save_every=1",
        ],
    ],
    ids=[
        "disk, tis, rloo",
        "broadcast, none, two mini-batches, a step ahead",
        "ipc, memory lent, deterministic",
    ],
)
def test_other_ways_of_the_same_run(folder: Path, server: str, overrides: list[str]) -> None:
    out = folder / overrides[1].replace("=", "-")
    run_ranks(
        _run,
        1,
        200,
        str(folder / "run.yaml"),
        [*overrides, "run.save_hf_at_end=false", f"run.folder={out}", f"servers.urls=['{server}']"],
    )
    check_rows(read_metrics(out), 2, ahead=int("rollout.ahead=1" in overrides))


def test_the_probe_refuses_a_trainer_that_disagrees_with_the_server(folder: Path, server: str) -> None:
    overrides = [f"servers.urls=['{server}']", f"run.folder={folder / 'probe'}"]
    good, message = run_ranks(_probe_of_a_wrong_actor, 1, 200, str(folder / "run.yaml"), overrides)[0].split(
        " ", 1
    )
    assert float(good) <= 1e-3
    assert "sync.max_logp_gap allows 0.001" in message


def test_a_server_with_a_key_turns_strangers_away(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(ServerAdmin([server]).labels())
    monkeypatch.delenv(api_key.VARIABLE)
    with pytest.raises(ServerError, match="HTTP 401"):
        asyncio.run(ServerAdmin([server]).labels())


@pytest.mark.parametrize(("host", "made"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_a_key_is_made_where_others_can_reach_the_servers(host: str, made: bool, monkeypatch) -> None:
    monkeypatch.setenv(api_key.VARIABLE, "")
    monkeypatch.delenv(api_key.VARIABLE)
    api_key.provide(host)
    assert bool(api_key.headers()) == made == bool(api_key.arguments())
