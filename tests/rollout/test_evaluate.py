"""`megatron-jackpot evaluate`: what it takes for the model and its settings, and what it writes."""

import json
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_jackpot.cli import main
from megatron_jackpot.config import ConfigError
from megatron_jackpot.models.convert import checksums, hf_to_megatron
from megatron_jackpot.monitor.evaluations import (
    ANSWERS_FILE,
    evaluation_table,
    read_evaluations,
    write_evaluations,
)
from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.servers.protocol import ServerError
from megatron_jackpot.train import evaluate as command
from megatron_jackpot.train.evaluand import evaluand, settings
from megatron_jackpot.train.evaluate import Asked, ask, weights
from tests.models.hf_models import write_hf
from tests.rollout.test_evaluation import Judge, pass_at, prompts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A joint run that was started in tmp_path, with two checkpoints and an export of the first."""
    folder = tmp_path / "run"
    for place in ("checkpoints/step-000010", "checkpoints/step-000020", "hf/step-000010"):
        for model in ("policy", "actor"):
            (folder / place / model).mkdir(parents=True)
            (folder / place / model / "config.json").write_text("{}")
    (folder / "checkpoints/best").symlink_to("step-000010")
    tree = {
        "run": {"folder": "run", "steps": 20, "phase_timeout_s": 77},
        "policy": {"hf": "gone"},
        "actor": {"hf": "gone"},
        "data": {
            "source": "jsonl",
            "path": "rows.jsonl",
            "heldout_path": "/held.jsonl",
        },
        "rollout": {"max_new_tokens": 9000, "concurrency": 5, "ahead": 1},
        "servers": {"urls": ["http://actor:1"], "quantization": "fp8", "max_total_tokens": 99},
        "guard": {"acceptance_floor": 0.1},
        "evaluation": {"policy": "off", "max_new_tokens": 300, "sets": {"hard": {"path": "hard.jsonl"}}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    (folder / "provenance.json").write_text(json.dumps({"format": 1, "folder": str(tmp_path)}))
    return folder


def test_of_a_run_the_newest_checkpoint_counts_and_of_one_step_the_export(run: Path, tmp_path: Path) -> None:
    def found(what: str, model: str | None = None) -> tuple[str, str, int]:
        it = evaluand(run / what, model, None)
        assert it.run.resolve() == run
        return str(it.folder.relative_to(run)), it.model, it.step

    assert found("") == ("checkpoints/step-000020/policy", "policy", 20)
    assert found("", "actor") == ("checkpoints/step-000020/actor", "actor", 20)
    assert found("checkpoints/best") == ("checkpoints/step-000010/policy", "policy", 10)
    assert found("hf/step-000010/actor") == ("hf/step-000010/actor", "actor", 10)
    (run / "checkpoints/step-000020").rename(tmp_path / "elsewhere")
    assert found("") == ("hf/step-000010/policy", "policy", 10)
    with pytest.raises(ConfigError, match="belongs to no run. Name .* --run FOLDER"):
        evaluand(tmp_path / "elsewhere", None, None)
    assert evaluand(tmp_path / "elsewhere", None, run).step == 0
    with pytest.raises(ConfigError, match="neither a model"):
        evaluand(tmp_path, None, run)


def test_an_export_under_way_or_killed_counts_for_the_models_that_are_whole_in_it(run: Path) -> None:
    (run / "hf/step-000020/.policy.123").mkdir(parents=True)
    (run / "hf/step-000020/.policy.123/0.unnamed").touch()

    def found(model: str | None) -> str:
        return str(evaluand(run, model, None).folder.relative_to(run))

    assert found(None) == "checkpoints/step-000020/policy"
    (run / "hf/step-000020/.policy.123").rename(run / "hf/step-000020/policy")
    (run / "hf/step-000020/policy/config.json").write_text("{}")
    assert found(None) == "hf/step-000020/policy" and found("actor") == "checkpoints/step-000020/actor"


def test_settings_are_the_runs_without_what_belongs_to_its_rollouts(run: Path, tmp_path: Path) -> None:
    config = settings(evaluand(run, None, None), [], ["evaluation.samples=4", "evaluation.temperature=1"])
    assert config.served == "policy" and config.served_hf == run / "checkpoints/step-000020/policy"
    assert (config.data.path, config.data.heldout_path) == (tmp_path / "rows.jsonl", Path("/held.jsonl"))
    assert config.evaluation.sets["hard"].path == tmp_path / "hard.jsonl"
    assert (config.evaluation.samples, config.rollout.max_new_tokens) == (4, 300)
    assert (config.rollout.concurrency, config.run.phase_timeout_s) == (5, 77)
    assert (config.servers.urls, config.servers.quantization, config.servers.max_total_tokens) == (
        (),
        None,
        99,
    )


def test_named_sets_take_the_place_of_the_runs_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    for name in ("a.jsonl", "b/math.jsonl"):
        (tmp_path / name).touch()
    config = settings(evaluand(run, None, None), ["aime=a.jsonl", "b/math.jsonl"], [])
    assert {name: str(one.path) for name, one in config.evaluation.sets.items()} == {
        "aime": "a.jsonl",
        "math": "b/math.jsonl",
    }
    assert config.evaluation.size == 0
    alone = evaluand(run / "hf/step-000010/policy", None, tmp_path / "new")
    assert settings(alone, ["a.jsonl"], ["data.reward=math_verify"]).data.reward == "math_verify"
    with pytest.raises(ConfigError, match="nothing to evaluate. Name a set with --data"):
        settings(alone, [], [])


def test_all_mistakes_are_told_with_their_places_and_nothing_is_left_behind(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.rglob("*"))
    wrong = ["evaluation.sampels=4", "servers.urls=[http://n:1]", "evaluation.temperature=-1", "run.steps=4"]
    assert main(["evaluate", str(run), "--data", "aime=none.jsonl", *wrong]) == 2
    told = capsys.readouterr().err
    for part in (
        "Unknown config key 'evaluation.sampels'. Did you mean 'evaluation.samples'? [command line]",
        "evaluation.temperature = -1",
        "servers.urls = ('http://n:1',): evaluate starts servers of its own",
        "--data aime=none.jsonl: no such file.",
        "'run.steps=4' says nothing of an evaluation. Leave it out",
    ):
        assert part in told
    assert sorted(run.rglob("*")) == before


def test_the_weights_of_a_checkpoint_are_there_as_an_hf_folder_for_as_long_as_needed(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", "qwen2")
    hf_to_megatron(hf, tmp_path / "run/checkpoints/step-000003/policy")
    (tmp_path / "run/provenance.json").write_text("{}")
    with weights(evaluand(tmp_path / "run", None, None), tmp_path) as copy:
        assert copy.is_relative_to(tmp_path) and checksums(copy).differences(checksums(hf)) == []
    assert not copy.exists() and not list(tmp_path.glob("weights-*"))
    with weights(evaluand(hf, None, tmp_path), tmp_path) as itself:
        assert itself == hf


def test_a_row_has_avg_and_pass_of_all_answers_and_the_share_that_was_cut(run: Path) -> None:
    it = evaluand(run, None, None)
    chosen = ["evaluation.samples=4", "evaluation.temperature=0.6", "evaluation.keep=1"]
    # Answers end with their number: 3 alone is an end-of-text id.
    asked = Asked(it, settings(it, [], chosen), {"hard": prompts(None, None, None, None, None)}, (3,))
    row, answers = ask(asked, "hard", Judge())
    assert row["metrics"] == {
        "eval/hard/policy_accuracy": pytest.approx((4 + 3 + 2 + 1 + 0) / 20),
        "eval/hard/policy_pass@2": pytest.approx((1 + 1 + pass_at(2, 4, 2) + pass_at(2, 4, 1)) / 5),
        "eval/hard/policy_pass@4": pytest.approx(4 / 5),
    }
    known = ("step", "model", "set", "problems", "samples", "temperature", "truncated")
    assert [row[name] for name in known] == [20, "policy", "hard", 5, 4, 0.6, 0.75]
    assert [(one["step"], one["model"], one["text"]) for one in answers] == [
        (20, "policy at T=0.6", "[0, 0]")
    ]
    heads, cells = evaluation_table([row])
    assert dict(zip(heads, cells[0], strict=True)) == {
        **{"step": "20", "model": "policy", "set": "hard", "problems": "5", "answers": "4", "T": "0.6"},
        **{"avg": "0.500", "pass@2": "0.667", "pass@4": "0.800", "cut": "75.0%"},
    }


class Breaks(Judge):
    """Servers that stop to answer where a set has but one problem."""

    def answers(self, prompts, *given, **options):
        if len(prompts) == 1:
            raise ServerError("no server answers")
        return super().answers(prompts, *given, **options)

    def close(self) -> None: ...


def test_a_set_that_was_judged_stays_when_a_later_one_fails(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"whole": prompts(None, None), "broken": prompts(None), "never": prompts(None, None)}
    for name, value in {
        "load_tokenizer": SimpleNamespace(eos_token_id=3),
        "load_families": {},
        "checked_stop_ids": (3,),
        "sets_of": sets,
        "check_labels": None,
        "weights": nullcontext(run),
        "served": nullcontext(None),
        "make_source": Breaks(),
    }.items():
        monkeypatch.setattr(command, name, lambda *given, value=value: value)
    it = evaluand(run, None, None)
    with pytest.raises(ServerError, match="no server answers"):
        command.evaluate(it, settings(it, [], ["evaluation.samples=2", "evaluation.temperature=1"]))
    assert [row["set"] for row in read_evaluations(run)] == ["whole"]
    assert {row["set"] for row in read_metrics(run / ANSWERS_FILE)} == {"whole"}


def test_rows_that_are_written_at_the_same_time_are_all_there_and_a_torn_one_is_cut(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"format": 1, "step": 0}\n{"format": 1, "st')
    writers = [
        threading.Thread(target=write_evaluations, args=(tmp_path, [{"step": step}] * 20, ()))
        for step in range(1, 6)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    steps = [row["step"] for row in read_evaluations(tmp_path)]
    assert sorted(steps) == [0, *(step for step in range(1, 6) for _ in range(20))]
