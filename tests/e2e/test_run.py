"""Whole runs on tiny random models: launch with two ranks, then every sync and correction on one shared server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_jackpot.assembly import assemble, run
from megatron_jackpot.config import load_config
from megatron_jackpot.gates import probe
from megatron_jackpot.metrics import METRICS, read_metrics
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.rollout.server import start_servers, stop_servers
from tests.parallel.spawn import run_ranks
from tests.tiny import ACTOR, POLICY, write_model, write_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

RUN = dict(
    policy=dict(optimizer=dict(lr=1e-3)),
    actor=dict(optimizer=dict(lr=1e-3)),
    data=dict(tasks=dict(chain_sum=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)), size=40),
    rollout=dict(
        prompts_per_step=4, samples_per_prompt=3, max_new_tokens=8, temperature=0.7, request_timeout_s=60
    ),
    packing=dict(tokens=256),
    precision=dict(dtype="float32"),
    servers=dict(max_total_tokens=8192),
    sync=dict(probe_every=1, timeout_s=60),
    evaluation=dict(every=1, size=4, max_new_tokens=4),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    for name, seed, shape in (("policy", 0, POLICY), ("actor", 1, ACTOR)):
        write_tokenizer(write_model(folder / name, seed, **shape))
    tree = {**RUN, "run": dict(folder=str(folder / "run"), steps=2)}
    tree["policy"] = {**RUN["policy"], "hf": str(folder / "policy")}
    tree["actor"] = {**RUN["actor"], "hf": str(folder / "actor")}
    tree["data"] = {**RUN["data"], "template": None, "max_prompt_tokens": 100}
    # The questions of chain_sum hold capitals, which this tokenizer reads as '?'; nothing here depends on it.
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path):
    servers = start_servers(
        folder / "actor", dtype="float32", folder=folder, max_total_tokens=8192, start_timeout_s=180
    )
    yield servers[0].url
    stop_servers(servers)


def _run(rank: int, world: int, config: str, overrides: list[str]) -> None:
    run(load_config(Path(config), overrides))


def _probe_of_a_wrong_actor(rank: int, world: int, config: str, overrides: list[str]) -> str:
    """The server holds the actor; the trainer's copy is then moved a little."""
    loaded = load_config(Path(config), overrides)
    assembly = assemble(loaded, init_mesh(loaded.parallel, 0))
    try:
        assembly.trainer.push()
        good = probe(assembly.trainer, assembly.probes)["probe/max"]
        with torch.no_grad():
            for parameter in assembly.trainer.actor.chunks[0].parameters():
                parameter.mul_(1.01)
        with pytest.raises(RuntimeError) as error:
            probe(assembly.trainer, assembly.probes)
    finally:
        assembly.close()
    return f"{good} {error.value}"


def check_rows(rows: list[dict], steps: int) -> None:
    assert [row["step"] for row in rows] == list(range(steps + 1))
    assert [row["sync/server_version"] for row in rows[1:]] == list(range(1, steps + 1))
    # T = 0.7, sampled and top-k tokens, before the first step and after every sync.
    assert all(row["probe/max"] <= 1e-3 for row in rows)
    assert all(row["staleness/mean"] == 0 for row in rows[1:])
    assert all(0 <= row[f"eval/{model}_accuracy"] <= 1 for row in rows for model in ("policy", "actor"))


def test_launch_trains_two_steps_on_two_ranks(folder: Path) -> None:
    out = folder / "launched"
    command = [sys.executable, "-m", "megatron_jackpot.cli", "launch", str(folder / "run.yaml")]
    done = subprocess.run(
        [*command, f"run.folder={out}", "--nproc", "2"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read_metrics(out)
    check_rows(rows, 2)
    assert METRICS.keys() <= rows[-1].keys(), METRICS.keys() - rows[-1].keys()
    assert 0 < rows[-1]["jackpot/acceptance"] < 1
    assert {"config.yaml", "provenance.json", "train.log", "metrics.jsonl"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "provenance.json").read_text())


@pytest.mark.parametrize(
    "overrides",
    [
        ["sync.method=disk", "algorithm.correction.name=tis", "algorithm.advantage.name=rloo"],
        ["sync.method=broadcast", "algorithm.correction.name=none", "algorithm.num_minibatches=2"],
    ],
    ids=["disk, tis, rloo", "broadcast, none, two mini-batches"],
)
def test_other_ways_of_the_same_run(folder: Path, server: str, overrides: list[str]) -> None:
    out = folder / overrides[1].replace("=", "-")
    run_ranks(
        _run,
        1,
        200,
        str(folder / "run.yaml"),
        [*overrides, f"run.folder={out}", f"servers.urls=['{server}']"],
    )
    check_rows(read_metrics(out), 2)


def test_the_probe_refuses_a_trainer_that_disagrees_with_the_server(folder: Path, server: str) -> None:
    overrides = [f"servers.urls=['{server}']", f"run.folder={folder / 'probe'}"]
    good, message = run_ranks(_probe_of_a_wrong_actor, 1, 200, str(folder / "run.yaml"), overrides)[0].split(
        " ", 1
    )
    assert float(good) <= 1e-3
    assert "sync.max_logp_gap allows 0.001" in message
