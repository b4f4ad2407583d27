"""What launcher and planner load when they run: no torch, no engine, whatever their imports look like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import ACTOR, POLICY, hf_config, write_tokenizer

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "megatron", "transformer_engine", "transformers", "safetensors", "sglang", "triton")
PROBE = """
import sys
{body}
heavy = sorted({{name.split(".")[0] for name in sys.modules}} & {heavy!r})
assert not heavy, heavy
print("loaded", sorted(name for name in sys.modules if name.startswith("megatron_jackpot.")))
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run on one node of CPUs, of models without weights, served in fp8."""
    wide = dict(hidden_size=128, intermediate_size=256, num_key_value_heads=4, head_dim=32)
    for name, shape in (("policy", POLICY), ("actor", {**ACTOR, **wide, "num_attention_heads": 4})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(hf_config(**shape)))
        (tmp_path / name / "model.safetensors").touch()
        write_tokenizer(tmp_path / name)
    tree = dict(
        run=dict(folder=str(tmp_path / "run")),
        policy=dict(hf=str(tmp_path / "policy")),
        actor=dict(hf=str(tmp_path / "actor")),
        data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=100, size=200),
        evaluation=dict(size=4),
        rollout=dict(max_new_tokens=100),
        servers=dict(quantization="fp8"),
        cluster=dict(gpus_per_node=0, trainer_procs=1),
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def modules_after(body: str) -> str:
    """The package's modules that a fresh interpreter has after `body`; fails if a heavy one is among them."""
    probe = PROBE.format(body=body, heavy=set(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("command", [["launch", "--slurm", "--dry-run"], ["plan"]], ids=" ".join)
def test_a_command_that_only_reckons_loads_no_engine(command: list[str], run_file: Path) -> None:
    name, *options = command
    argv = [name, str(run_file), *options]
    loaded = modules_after(f"from megatron_jackpot.cli import main; assert main({argv!r}) == 0")
    assert "megatron_jackpot.plan.formulas" in loaded


def test_launching_checking_and_serving_load_no_engine(run_file: Path) -> None:
    body = f"""
from pathlib import Path
from megatron_jackpot.config import load_config
from megatron_jackpot.launch import children, doctor, local, node, slurm
from megatron_jackpot.servers import admin, client, process, supervisor
from megatron_jackpot.servers.gpus import place_servers
config = load_config(Path({str(run_file)!r}))
local.check(config)
assert local.served_folder(config).name == "served-fp8"
place_servers(config.servers)
"""
    loaded = modules_after(body)
    assert "megatron_jackpot.launch.node" in loaded and "megatron_jackpot.train" not in loaded
