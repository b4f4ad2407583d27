"""Every file of examples/ablations trains two steps, all on one server and in one process group: a third of
them by default, the others with --full."""

import math
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_jackpot.algorithm.advantages import ADVANTAGES
from megatron_jackpot.algorithm.aggregation import AGGREGATIONS
from megatron_jackpot.algorithm.allocators import ALLOCATORS
from megatron_jackpot.algorithm.corrections import CORRECTIONS
from megatron_jackpot.algorithm.distill import DISTILL
from megatron_jackpot.algorithm.filters import FILTERS
from megatron_jackpot.algorithm.objectives import OBJECTIVES
from megatron_jackpot.algorithm.selectors import SELECTORS
from megatron_jackpot.config import Config, Parallel, load_config
from megatron_jackpot.data.value_table import ValueTable
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.train import evaluate
from megatron_jackpot.train.run import run
from megatron_jackpot.train.values import make_values
from tests.parallel.spawn import run_ranks

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ABLATIONS = Path(__file__).parents[2] / "examples" / "ablations"
FILES = sorted(ABLATIONS.glob("*.yaml"))
CHECKED = ("on_policy", "candidates_of_the_trainer", "objective_a_star_po", "rewards_by_row")
"""Of which more is asked than that they train."""
FIRST = [path for i, path in enumerate(FILES) if i % 3 == 0 or path.stem in CHECKED]
OWN_REWARDS = ("code", "rewards", "rewards_by_row")
"""Files that are about rewards, of which random models may get none."""
REJECTING = ("correction_geo_rs", "correction_seq_mis_low")
"""Files that may reject whole responses, which may be all of random models'."""
BASE = "base: ../quickstart/run.yaml"


def _run_all(rank: int, world: int, folder: str, server: str, names: list[str]) -> dict[str, list[dict]]:
    """name -> metrics of a run with the file's changes to the tests' own tiny run."""
    rows = {}
    mesh = init_mesh(Parallel(), 0)
    sys.path.insert(0, str(ABLATIONS))
    for path in (ABLATIONS / name for name in names):
        file = Path(folder) / path.name
        chosen = load_config(path)
        file.write_text(path.read_text().replace(BASE, f"base: {folder}/run.yaml"))
        out = Path(folder) / "ablations" / path.stem
        # What test_run.py holds of every run is left out here: probes, exports, evaluation through Megatron.
        overrides = [
            f"servers.urls=['{server}']",
            f"run.folder={out}",
            "sync.method=disk",
            "sync.probe_every=1000",
            "logging.tensorboard=false",
            "run.save_hf_at_end=false",
            "rollout.prompts_per_step=4",
            "packing.tokens=512",
        ]
        if chosen.actor is None:
            # The server was started for models of the actor's shape.
            overrides += [f"policy.hf={folder}/actor", "sync.method=broadcast"]
        else:
            overrides += ["evaluation.size=0"]
        if chosen.policy.reference is not None and chosen.policy.reference.hf is not None:
            overrides += [f"policy.reference.hf={folder}/actor"]
        if chosen.algorithm.mask_truncated:
            # Random models seldom end within what is enough for the others.
            overrides += ["rollout.max_new_tokens=96"]
        if path.stem not in OWN_REWARDS:
            # Rewards that differ: nothing would train the policy of a run of random models else.
            overrides += ["data.reward=tests.e2e.digits:score"]
        started = time.perf_counter()
        if path.stem == "objective_a_star_po":
            overrides.append(f"algorithm.objective={{name: a_star_po, values: {folder}/values.json}}")
            _make_table(load_config(file, overrides), server)
        try:
            run(load_config(file, overrides), mesh)
        except Exception as error:
            raise RuntimeError(f"{path.name} failed") from error
        print(f"{path.stem}: {time.perf_counter() - started:.1f} s", flush=True)
        rows[path.stem] = read_metrics(out)
    return rows


def _make_table(config: Config, server: str) -> None:
    """By the command's own way, from answers of the server that is there, whatever model it holds."""

    @contextmanager
    def served(alone: Config, hf: Path, work: Path) -> Iterator[Config]:
        assert hf == config.policy.hf.resolve() and alone.served_hf == hf
        yield alone.model_copy(update={"servers": alone.servers.model_copy(update={"urls": (server,)})})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "served", served)
        for _ in range(2):
            # The second time there is nothing left to ask for.
            path = make_values(config, samples=2, beta=0.5)
            patch.setattr(evaluate, "served", None)
    values = ValueTable.read(path).values
    assert len(values) == config.data.size and all(0 <= value <= 1 for value in values.values())


@pytest.mark.parametrize("files", [FIRST, pytest.param(None, marks=pytest.mark.full)], ids=["third", "rest"])
def test_every_file_trains(folder: Path, server: str, files: list[Path] | None) -> None:
    files = [path for path in FILES if path not in FIRST] if files is None else files
    rows = run_ranks(_run_all, 1, 560, str(folder), server, [path.name for path in files])[0]
    assert rows.keys() == {path.stem for path in files}
    for name, steps in rows.items():
        assert [row["step"] for row in steps] == [0, 1, 2], name
        models = ("policy",) if load_config(ABLATIONS / f"{name}.yaml").actor is None else ("policy", "actor")
        for row in steps[1:]:
            assert all(math.isfinite(row[f"loss/{model}"]) for model in models), name
            assert row[f"grad_norm/{models[-1]}"] > 0, name
    still = {name for name, steps in rows.items() if min(row["grad_norm/policy"] for row in steps[1:]) == 0}
    print("policies that did not move:", sorted(still), flush=True)
    assert still <= {*OWN_REWARDS, *REJECTING}, still - {*OWN_REWARDS, *REJECTING}
    documented = re.findall(r"`([^`]+)`", (FILES[0].parents[2] / "docs" / "metrics.md").read_text())
    written = {key for steps in rows.values() for row in steps for key in row} - {"step"}
    assert written <= set(documented), written - set(documented)
    if files is FIRST:
        check_one_model(rows["on_policy"])
        check_candidates(rows["candidates_of_the_trainer"])
        check_rewards_by_row(rows["rewards_by_row"])


def test_every_method_has_a_file() -> None:
    for path in FILES:
        assert BASE in path.read_text().splitlines(), path
        assert load_config(path).run.steps > 2, path
    configs = [load_config(path) for path in FILES]
    assert {one.name for config in configs for one in config.algorithm.filters} == set(FILTERS)
    named = {
        kind: {getattr(config.algorithm, kind).name for config in configs}
        for kind in ("correction", "objective", "advantage", "aggregation", "selector")
    }
    assert named["correction"] == set(CORRECTIONS)
    assert named["objective"] == set(OBJECTIVES)
    assert named["advantage"] == set(ADVANTAGES)
    assert named["aggregation"] == set(AGGREGATIONS)
    assert named["selector"] == set(SELECTORS)
    assert {config.rollout.allocator.name for config in configs} == set(ALLOCATORS)
    assert {config.actor.distill.name for config in configs if config.actor is not None} == set(DISTILL)


def check_candidates(rows: list[dict]) -> None:
    """fp32 on both sides: the trainer's candidates are those that the server would have named."""
    for row in rows[1:]:
        assert row["gap/actor_server"] < 1e-4 and 0 < row["jackpot/z_topk"] <= 1
        # What they cover is what is accepted, to the noise of about a hundred tokens.
        assert abs(row["jackpot/z_topk"] - row["jackpot/acceptance_expected"]) < 0.15
        assert row["jackpot/z_zero_fraction"] == 0 and "rollout/dropped_topk" not in row


def check_rewards_by_row(rows: list[dict]) -> None:
    """Each was measured, the number beside the first one's score is what that is made of, the sum trains."""
    for row in rows[1:]:
        number, form = row["reward/part/answer"], row["reward/part/answer/format"]
        assert form > 0 and number == pytest.approx(0.1 * form + 0.9 * row["reward/correct"])
        assert row["grad_norm/policy"] > 0
    assert any("reward/part/text" in row for row in rows)


def check_one_model(rows: list[dict]) -> None:
    """Servers hold the policy: its weights reach them, and nothing speaks of an actor."""
    assert not [name for row in rows for name in row if "actor" in name or "distill" in name]
    assert all(0 <= row["eval/policy_accuracy"] <= 1 for row in rows)
    for row in rows[1:]:
        assert row["sync/server_version"] == row["step"] and row["staleness/mean"] == 0
        assert row["rollout/equal_rewards"] < 1 and row["lr/policy"] > 0
        # fp32 on both sides: the server sampled from what the policy had learned in the step before.
        assert row["gap/policy_server"] < 1e-4 and row["jackpot/acceptance"] > 0.99
