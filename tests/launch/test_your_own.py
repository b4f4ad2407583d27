"""examples/your_own is what docs/your-own.md says, and can be run."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_jackpot.config import load_config
from megatron_jackpot.data.prompts import Limits, heldout_prompts, training_prompts
from megatron_jackpot.data.tokenizer import Vocabulary
from megatron_jackpot.launch.preflight import Subject, preflight
from megatron_jackpot.rewards.pool import RewardPool

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "your_own"


def test_the_example_has_no_mistake_and_every_row_fits(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(EXAMPLE)
    config = load_config(EXAMPLE / "run.yaml", [f"run.folder={tmp_path / 'run'}"])
    assert preflight(Subject(config)) == []
    vocabulary = Vocabulary.read(config.policy.hf)
    training = training_prompts(config.data, vocabulary, limits=Limits())
    heldout = heldout_prompts(
        config.data, config.evaluation, vocabulary, exclude=training.texts, limits=Limits()
    )
    assert (len(training.prompts), len(heldout.prompts)) == (50, 12)
    longest = max(len(prompt.tokens) for prompt in (*training.prompts, *heldout.prompts))
    assert longest + config.rollout.max_new_tokens <= config.packing.tokens


def test_the_reward_is_given_what_its_signature_asks_for(monkeypatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    label = json.loads((EXAMPLE / "rows.jsonl").read_text().splitlines()[0])
    right = int(label["answer"])

    async def ask(pool: RewardPool, text: str, finish: str) -> float:
        return (await pool(text, label, seen={"finish_reason": finish}))[0]

    with RewardPool("your_reward:near", 1, 10.0) as pool:
        assert pool.asks == ["finish_reason"]
        told = [(str(right), "stop"), (str(right + 3), "stop"), (str(right + 4), "stop"), ("?", "stop")]
        rewards = [asyncio.run(ask(pool, *one)) for one in (*told, (str(right), "length"))]
    assert rewards == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_the_page_shows_the_files_of_the_example() -> None:
    page = (ROOT / "docs" / "your-own.md").read_text()
    assert (EXAMPLE / "your_reward.py").read_text() in page


@pytest.mark.full
def test_the_example_trains(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_jackpot.cli", "launch", "examples/your_own/run.yaml"]
    path = os.pathsep.join(map(str, (EXAMPLE, ROOT)))
    done = subprocess.run(
        [*command, f"run.folder={tmp_path / 'run'}"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20 and {"policy", "actor"} <= {
        path.name for path in (tmp_path / "run" / "hf" / "step-000020").iterdir()
    }
    assert len((tmp_path / "run" / "progress.log").read_text().splitlines()) >= 20
