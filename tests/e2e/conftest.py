"""Two tiny models, a configuration, and one server that whole runs share."""

import os
from pathlib import Path

import pytest
import yaml

from megatron_jackpot.config import Servers
from megatron_jackpot.servers import api_key
from megatron_jackpot.servers.gpus import place_servers
from megatron_jackpot.servers.process import start_servers, stop_servers
from tests.parallel import spawn
from tests.tiny import write_models, write_tokenizer

spawn.PRELOADED += spawn.OF_A_RUN

RUN = dict(
    policy=dict(optimizer=dict(lr=1e-3)),
    actor=dict(optimizer=dict(lr=1e-3)),
    data=dict(
        tasks=dict(chain_sum=dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)),
        size=40,
        reward_workers=1,
    ),
    rollout=dict(
        prompts_per_step=4, samples_per_prompt=3, max_new_tokens=8, temperature=0.7, request_timeout_s=60
    ),
    packing=dict(tokens=256),
    precision=dict(dtype="float32"),
    servers=dict(max_total_tokens=8192),
    sync=dict(probe_every=1, timeout_s=60),
    evaluation=dict(every=1, size=4, max_new_tokens=4),
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    write_models(folder)
    for name in ("policy", "actor"):
        write_tokenizer(folder / name)
    tree = {**RUN, "run": dict(folder=str(folder / "run"), steps=2)}
    tree["policy"] = {**RUN["policy"], "hf": str(folder / "policy")}
    tree["actor"] = {**RUN["actor"], "hf": str(folder / "actor")}
    tree["data"] = {**RUN["data"], "template": None, "max_prompt_tokens": 100}
    # The questions of chain_sum hold capitals, which this tokenizer reads as '?'; nothing here depends on it.
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="session")
def server(folder: Path):
    """With an API key, which clients, syncs and ranks take from the environment."""
    os.environ[api_key.VARIABLE] = "-a key of the tests"
    settings = Servers(max_total_tokens=8192, start_timeout_s=180, release_memory=True)
    servers = start_servers(settings, folder / "actor", place_servers(settings), folder, dtype="float32")
    yield servers[0].url
    stop_servers(servers)
    del os.environ[api_key.VARIABLE]
