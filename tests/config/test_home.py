"""A path may begin with the home folder, which no shell has written out."""

from pathlib import Path

import pytest

from megatron_jackpot.config import parse_config

TREE = {"data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64}, "rollout": {"max_new_tokens": 64}}


def test_every_path_of_the_configuration_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config(
        {
            **TREE,
            "run": {"folder": "~/runs/a"},
            "policy": {"hf": "~/policy"},
            "actor": {"hf": "~"},
            "servers": {"python": "~/env/bin/python"},
        }
    )
    assert config.run.folder == tmp_path / "runs/a" and config.policy.hf == tmp_path / "policy"
    assert config.actor.hf == tmp_path and config.servers.python == tmp_path / "env/bin/python"


def test_the_home_of_nobody_is_refused():
    folder = {"hf": Path("m")}
    with pytest.raises(ValueError, match="~no-such-user/x.*in full"):
        parse_config({**TREE, "run": {"folder": "~no-such-user/x"}, "policy": folder, "actor": folder})
