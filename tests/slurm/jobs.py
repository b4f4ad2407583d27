"""Configurations of Slurm jobs, and what Slurm tells a step of one."""

import json
from pathlib import Path

from megatron_jackpot.config import Config, parse_config
from tests.tiny import ACTOR, POLICY, hf_config


def tree(folder: Path, **sections: dict) -> dict:
    for name, shape in (("policy", POLICY), ("actor", ACTOR)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(hf_config(**shape)))
    made = dict(
        run=dict(folder=str(folder / "run")),
        policy=dict(hf=str(folder / "policy")),
        actor=dict(hf=str(folder / "actor")),
        data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=100, size=200),
        evaluation=dict(size=4),
        rollout=dict(max_new_tokens=100),
        precision=dict(dtype="float32"),
    )
    return made | sections


def config_for(folder: Path, **sections: dict) -> Config:
    return parse_config(tree(folder, **sections))


def job_environment(**changes: str) -> dict[str, str]:
    given = dict(
        SLURM_JOB_ID="17", SLURM_JOB_NUM_NODES="2", SLURM_NTASKS="2", SLURM_PROCID="1", SLURMD_NODENAME="n2"
    )
    return given | changes
