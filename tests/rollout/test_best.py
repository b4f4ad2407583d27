"""run.keep_best: which checkpoints stay, what `latest` and `best` lead to, and what is refused."""

import json
from pathlib import Path

import pytest

from megatron_jackpot.config import ConfigError
from megatron_jackpot.config.run import Run
from megatron_jackpot.train.kept import check_measured, measured, set_aside, tidy

METRIC = "eval/policy_accuracy"


def publish(folder: Path, step: int, metrics: dict[str, float], **settings: object) -> tuple[list[str], dict]:
    """Names of the checkpoints that stay, and where the links lead, after one more was published."""
    run = Run(folder=folder, **{"keep": 1, "keep_best": METRIC, **settings})
    new = folder / "checkpoints" / f"step-{step:06d}"
    new.mkdir(parents=True)
    (new / "state.json").write_text(json.dumps({"measured": measured(run, metrics)}))
    tidy(run, new)
    links = {name: new.with_name(name) for name in ("latest", "best")}
    return sorted(path.name for path in new.parent.glob("step-*")), {
        name: path.resolve(strict=True).name for name, path in links.items() if path.is_symlink()
    }


def test_the_best_checkpoint_outlives_those_that_are_newer(tmp_path: Path) -> None:
    names = [f"step-{step:06d}" for step in range(6)]
    assert publish(tmp_path, 1, {METRIC: 0.5}) == ([names[1]], {"latest": names[1], "best": names[1]})
    assert publish(tmp_path, 2, {METRIC: 0.5})[1] == {"latest": names[2], "best": names[1]}
    # One that was not evaluated, or whose value is no number, is no better than any.
    for step, metrics in ((3, {}), (4, {METRIC: float("nan")})):
        assert publish(tmp_path, step, metrics) == (
            [names[1], names[step]],
            {"latest": names[step], "best": names[1]},
        )
    assert publish(tmp_path, 5, {METRIC: 0.6}) == ([names[5]], {"latest": names[5], "best": names[5]})


def test_a_minus_takes_the_lowest_and_without_a_metric_there_is_no_link(tmp_path: Path) -> None:
    for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        kept, links = publish(tmp_path, step, {"loss/policy": loss}, keep_best="-loss/policy")
    assert kept == ["step-000002", "step-000003"] and links["best"] == "step-000002"
    assert publish(tmp_path, 4, {}, keep_best=None) == (["step-000004"], {"latest": "step-000004"})


def test_a_checkpoint_whose_state_cannot_be_read_is_not_the_best(tmp_path: Path) -> None:
    publish(tmp_path, 1, {METRIC: 0.9}, keep=3)
    (tmp_path / "checkpoints" / "step-000001" / "state.json").write_text("{")
    assert publish(tmp_path, 2, {METRIC: 0.1}, keep=3)[1]["best"] == "step-000002"


def test_what_lies_after_a_new_checkpoint_is_set_aside_and_takes_no_place(tmp_path: Path) -> None:
    """The run went back from it, or it is damaged."""
    for step in (40, 50, 60, 70):
        publish(tmp_path, step, {}, keep=9, keep_best=None)
    names, links = publish(tmp_path, 55, {}, keep=1, keep_every=10, keep_best=None)
    assert names == ["step-000040", "step-000050", "step-000055"] and links == {"latest": "step-000055"}
    assert [path.name for path in tmp_path.glob("checkpoints/left-*")] == ["left-step-000070"]
    assert publish(tmp_path, 65, {}, keep=1, keep_best=None)[0] == ["step-000065"]
    # Where a course is left again at the same step, the later one stays.
    (tmp_path / "checkpoints/step-000070").mkdir()
    (tmp_path / "checkpoints/step-000070/new").touch()
    set_aside(tmp_path / "checkpoints/step-000065", 1)
    assert [path.name for path in tmp_path.glob("checkpoints/left-*/*")] == ["new"]


def test_an_evaluation_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    run = Run(folder=tmp_path, keep_best="eval/policy_acuracy")
    with pytest.raises(ConfigError, match="keep_best.*Did you mean 'eval/policy_accuracy'"):
        check_measured(run, [METRIC, "eval/actor_accuracy"])
    check_measured(Run(folder=tmp_path, keep_best="-reward/mean"), [METRIC])
