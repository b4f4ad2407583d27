"""Every run of examples/ loads, names methods that exist, and fits the machines it says it is for."""

import json
import runpy
from pathlib import Path

import pytest

from megatron_jackpot.config import load_config
from megatron_jackpot.plan.tables import turns_advice
from megatron_jackpot.train.methods import Methods

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(path for path in EXAMPLES.glob("*/*.yaml") if path.name != "warmup.yaml")
PAIRS = {"qwen2.5_1.5b_to_3b": 2, "qwen3_1.7b_to_4b": 8, "qwen3_1.7b_to_8b": 8}
"""Folder -> key-value heads of both models, which tp must divide."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_example_loads_and_its_methods_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where an example has methods of its own, its README has its folder on PYTHONPATH.
    monkeypatch.syspath_prepend(str(path.parent))
    Methods.from_config(load_config(path))


@pytest.mark.parametrize("pair", PAIRS)
def test_the_papers_pairs_have_its_hyper_parameters_and_fit_the_gpus(pair: str) -> None:
    for name, training in (("run", 4), ("h100x16", 8)):
        config = load_config(EXAMPLES / pair / f"{name}.yaml")
        methods = Methods.from_config(config)
        assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (64, 8)
        assert (config.rollout.max_new_tokens, config.rollout.top_k_logp) == (8192, 20)
        assert (methods.correction.lam, methods.correction.cap) == (1.0, 3.0)
        assert (methods.objective.clip_low, methods.objective.clip_high) == (0.2, 0.28)
        assert config.policy.optimizer.lr == config.actor.optimizer.lr == 1e-6
        assert config.precision.fp8 == "hybrid"
        # No GPU lends its memory, and none waits for its turn.
        assert config.rollout.ahead == 1 and turns_advice(config) is None
        assert training % config.parallel.tp == 0 and PAIRS[pair] % config.parallel.tp == 0
        assert training + config.servers.num * config.servers.tp == 2 * training


@pytest.mark.parametrize("name", ["jackpot", "no_clip", "tis"])
@pytest.mark.parametrize("responses", [2048, 4096])
def test_the_staleness_runs_have_the_papers_batches(name: str, responses: int) -> None:
    config = load_config(EXAMPLES / "staleness" / f"{name}_{responses}.yaml")
    batch = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    assert batch == responses and batch // config.algorithm.num_minibatches == 32


def test_problems_become_prompts_with_the_last_boxed_answer(tmp_path: Path, capsys) -> None:
    problems = [
        {"problem": "1 + 1?", "solution": "not \\boxed{3} but \\boxed{\\frac{4}{2}}"},
        {"question": "2 + 2?", "answer": 4},
        {"problem": "no answer", "solution": "it is \\boxed{open"},
    ]
    script = runpy.run_path(str(EXAMPLES / "qwen2.5_1.5b_to_3b" / "prompts.py"))
    for text in (json.dumps(problems), "\n".join(map(json.dumps, problems))):
        (tmp_path / "in").write_text(text)
        script["main"](tmp_path / "in", tmp_path / "out.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert rows == [
            {"prompt": "1 + 1?", "answer": "\\frac{4}{2}"},
            {"prompt": "2 + 2?", "answer": "4"},
        ]
        assert "2 problems" in capsys.readouterr().out
