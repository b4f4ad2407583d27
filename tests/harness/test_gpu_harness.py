"""The harness for an H200, without one: its plan, its benchmarks in CPU sizes, and the formulas they report
by."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_common import HALF, QWEN3_0_6B, QWEN3_1_7B, Shape
from benchmarks.gpu_models import close, make_batch, make_config, make_trainer
from tests.gpu.plan import LIMIT_S, STEPS
from tests.parallel.spawn import run_ranks
from tests.tiny import hf_config

ROOT = Path(__file__).parents[2]
RUN_ALL = ROOT / "tests/gpu/run_all.sh"
SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=160)


def run_all(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {key: value for key, value in os.environ.items() if key not in ("OUT", "TRITON_INTERPRET")}
    return subprocess.run(
        ["bash", str(RUN_ALL), *arguments],
        env={**inherited, "PYTHON": sys.executable, **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_a_dry_run_lists_steps_sizes_and_seconds_and_runs_nothing(tmp_path):
    done = run_all("--dry-run", OUT=str(tmp_path))
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    lines = done.stdout.splitlines()
    planned = [step for step in STEPS if not step.apart]
    assert [line.split()[0] for line in lines[1:]] == [*(step.name for step in planned), "together"]
    for line, step in zip(lines[1:], planned, strict=False):
        assert str(step.expected_s) in line and step.sizes in line
        assert all((ROOT / part).exists() for part in step.command if part.endswith(".py"))


def test_the_plan_fits_into_nine_minutes_and_no_estimate_is_above_its_own_limit():
    for apart in (False, True):
        assert 0 < sum(step.expected_s for step in STEPS if step.apart == apart) <= LIMIT_S <= 9 * 60
    assert all(0 < step.expected_s < step.limit_s for step in STEPS)
    assert len({step.name for step in STEPS}) == len(STEPS)


def check_tiny(tmp_path, *names):
    done = run_all("--tiny", *names, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["tiny"] and sorted(written["steps"]) == sorted(names)
    for name in names:
        step = written["steps"][name]
        assert step["status"] == "passed" and step["result"]["rows"], name
        assert step["result"]["machine"]["versions"]["torch"] == torch.__version__
        assert done.stdout.splitlines()[-len(names) :][names.index(name)].split()[:2] == [name, "passed"]
    return {name: written["steps"][name]["result"]["rows"] for name in names}


def test_the_quick_benchmarks_run_on_a_cpu_and_leave_one_json(tmp_path):
    rows = check_tiny(tmp_path, "vocab", "decode")
    assert {row["what"] for row in rows["vocab"]} >= {
        "exact Z",
        "forward KL and gradient",
        "linear in blocks",
    }
    assert all(row["gap"] <= 1e-3 for row in rows["vocab"] if "gap" in row)
    assert {row["what"] for row in rows["decode"] if "ratio" in row} == {"body", "top-k"}


@pytest.mark.full
def test_the_benchmarks_of_whole_models_run_on_a_cpu(tmp_path):
    rows = check_tiny(tmp_path, "correction", "trainer", "sync", "numerics")
    for row in rows["trainer"]:
        assert row["s"] > 0 and (row["what"] == "update" or row["update_policy_s"] > 0)
    parts = {"export", "to host", "fp8", "buckets", "hand-over", "push", "offload", "reload"}
    assert {row["what"] for row in rows["sync"]} == parts
    exact, bf16 = rows["numerics"]
    assert exact["gap_max"] == 0 and exact["overlap"] == pytest.approx(1.0) and bf16["gap_max"] > 0


def test_a_step_that_fails_or_does_not_exist_fails_the_run(tmp_path):
    done = run_all("te", OUT=str(tmp_path))
    if not torch.cuda.is_available():
        assert done.returncode == 1 and json.loads((tmp_path / "gpu.json").read_text())["steps"]["te"][
            "status"
        ] != ("passed")
    assert "are no steps" in run_all("nonsense", OUT=str(tmp_path)).stderr
    assert "OUT must name" in run_all("decode").stderr


def _counted(rank, world):
    """(FLOPs of all matrix products of a scoring pass, parameters) as torch sees them."""
    config = make_config(64, dict(dtype="float32"))
    trainer = make_trainer(config, dict(policy=SMALL, actor=SMALL))
    batch = make_batch(trainer, [64], SMALL["vocab_size"])
    with FlopCounterMode(display=False) as counter:
        trainer.policy.score(batch, lambda logits, m: {"done": logits[:].new_zeros(())})
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    number = sum(parameter.numel() for parameter in trainer.policy.chunks[0].module.parameters())
    close()
    return by_op, number


def test_the_flop_formula_counts_the_matrix_products_that_torch_counts():
    by_op, number = run_ranks(_counted, 1)[0]
    shape = Shape.of(hf_config(**SMALL))
    # A CPU's attention of short sequences multiplies all pairs; half of them are masked.
    batched = sum(flops for op, flops in by_op.items() if "bmm" in op)
    assert batched == 4 * shape.layers * shape.heads * shape.head_dim * 64**2
    linear = sum(by_op.values()) - batched
    assert linear == 2 * shape.matmul_weights * 64
    assert shape.parameters == number
    pairs = shape.forward_flops([64]) - linear
    assert pairs == 4 * shape.layers * shape.heads * shape.head_dim * 64 * 65 / 2
    assert shape.train_flops([64, 64]) == 6 * shape.forward_flops([64])


def test_the_shapes_have_the_published_sizes():
    # Qwen3-0.6B: 0.6B parameters, 0.44B without embedding; 1.7B: 1.7B and 1.4B.
    sizes = {name: Shape.of(hf_config(**shape)) for name, shape in (("0.6", QWEN3_0_6B), ("1.7", QWEN3_1_7B))}
    assert sizes["0.6"].parameters == 596_049_920 and sizes["1.7"].parameters == 1_720_574_976
    assert Shape.of(hf_config(**HALF)).parameters < sizes["0.6"].parameters / 2
