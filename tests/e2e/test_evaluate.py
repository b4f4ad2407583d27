"""`megatron-jackpot evaluate` against a real server: what it asks, judges and writes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_jackpot.cli import main
from megatron_jackpot.config import Config
from megatron_jackpot.monitor.evaluations import ANSWERS_FILE, read_evaluations
from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.train import evaluate

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_greedy_answer_is_right_where_the_set_asks_for_it_and_samples_count_each(
    folder: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def served(config: Config, hf: Path, work: Path) -> Iterator[Config]:
        """The server of all these tests, whatever weights it holds by now."""
        assert hf == folder / "actor"
        yield config.model_copy(update={"servers": config.servers.model_copy(update={"urls": (server,)})})

    monkeypatch.setattr(evaluate, "served", served)
    path, run = tmp_path / "sums.jsonl", tmp_path / "new"

    def judge(answers: list[str], *settings: str) -> dict:
        rows = [{"prompt": f"{place} + 1 =", "answer": answer} for place, answer in enumerate(answers)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["evaluate", str(folder / "actor"), "--run", str(run), "--data", str(path)]
        fixed = ('data.template="{question}"', "data.max_prompt_tokens=50", "evaluation.max_new_tokens=4")
        assert main([*command, *fixed, *settings]) == 0
        return read_evaluations(run)[-1]

    # The folder is named as one model of a run is: it counts as that one.
    judge(["nothing says this"] * 6)
    texts = [row["text"] for row in read_metrics(run / ANSWERS_FILE)]
    said = [text.strip() for text in texts]
    assert len(texts) == 6 and any(said)
    greedy = judge([text or "nothing says this" for text in said])
    assert greedy["metrics"] == {"eval/sums/actor_accuracy": pytest.approx(sum(map(bool, said)) / 6)}
    sampled = judge(["7", "8"], "evaluation.samples=4", "evaluation.temperature=1")
    assert [sampled[name] for name in ("step", "set", "problems", "samples")] == [0, "sums", 2, 4]
    parts = ("accuracy", "pass@2", "pass@4")
    assert set(sampled["metrics"]) == {f"eval/sums/actor_{part}" for part in parts}
    assert len(read_evaluations(run)) == 3
