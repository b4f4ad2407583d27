"""N steps are k steps, a checkpoint, a new process and N - k steps: bit for bit, and on another layout to
rounding. With rollouts ahead of training: test_resume_ahead.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.run.formats import FORMATS, current
from megatron_jackpot.run.manifest import digest
from megatron_jackpot.train import checkpoint
from tests.parallel.layouts import NUM_PROMPTS, Layout, load_trainer, make_config
from tests.parallel.resuming import BEGUN_ANEW, STEERED, same, train
from tests.parallel.spawn import run_ranks
from tests.tiny import rollout


@pytest.fixture(scope="module")
def saved(folder: Path) -> tuple[Path, tuple]:
    """A run of three steps with a checkpoint after each, and what it was."""
    run = folder / "saved"
    return run, train(folder, run, STEERED, 3, save="background")


def copy_without_last(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    shutil.rmtree(sorted((to / "checkpoints").glob("step-*"))[-1])
    return to


def test_resumed_on_the_same_layout_it_is_the_uninterrupted_run_bit_for_bit(saved, folder, tmp_path) -> None:
    run, whole = saved
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == ["latest", "step-000002", "step-000003"]  # keep = 2, nothing unfinished
    assert (run / "checkpoints" / "latest").resolve().name == "step-000003"
    got = train(folder, copy_without_last(run, tmp_path / "run"), STEERED, 3, resume=True)
    same(got, whole, exact=True, steps=1)


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, overlap=True), Layout(sharded_optimizer=False)],
    ids=["dp 2, overlapped", "optimizer not sharded"],
)
def test_a_save_holds_the_state_of_its_step_however_late_it_is_written(folder, tmp_path, layout) -> None:
    layout = Layout(**{**vars(layout), "correction": STEERED.correction})
    whole = train(folder, tmp_path / "run", layout, 3, save="background", save_at=[1], late=True)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000001"]
    train(folder, tmp_path / "at once", layout, 1, save="now")
    late, at_once = (hashes(tmp_path / name / "checkpoints" / "step-000001") for name in ("run", "at once"))
    assert late == at_once and len(late) > 8
    same(train(folder, tmp_path / "run", layout, 3, resume=True), whole, exact=True, steps=2)


def hashes(checkpoint: Path) -> dict[str, list]:
    """Of every file but those that name its folder."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if not name.endswith(".metadata")}


def test_saving_does_not_change_the_run(saved, folder, tmp_path) -> None:
    plain = train(folder, tmp_path / "none", STEERED, 3)
    same(plain, saved[1], exact=True, steps=3)


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2), Layout(pp=2, vpp=2), Layout(dp=2, overlap=True)],
    ids=["tp 2", "pp 2, vpp 2", "dp 2, overlapped"],
)
def test_resumed_on_another_layout_it_is_the_run_to_rounding(saved, folder, tmp_path, layout) -> None:
    run, whole = saved
    steered = Layout(**{**vars(layout), "correction": STEERED.correction})
    got = train(folder, copy_without_last(run, tmp_path / "run"), steered, 3, resume=True)
    same(got, whole, exact=False, steps=1)


def test_saved_on_two_ranks_it_resumes_on_one(saved, folder, tmp_path) -> None:
    layout = Layout(tp=2, correction=STEERED.correction)
    train(folder, tmp_path / "run", layout, 2, save="now")
    got = train(folder, tmp_path / "run", STEERED, 3, resume=True)
    same(got, saved[1], exact=False, steps=1)


@pytest.mark.parametrize(
    "after", [Layout(), pytest.param(Layout(dp=2), marks=pytest.mark.full)], ids=["one rank", "two leaders"]
)
def test_an_interrupted_step_keeps_its_groups_and_no_prompt_is_asked_twice(
    saved, folder, tmp_path, after
) -> None:
    layout = Layout(dp=2, correction=STEERED.correction)
    first = train(folder, tmp_path / "run", layout, 3, stop_at=2)
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-000002" and len(list(newest.glob("rollouts-*.npz"))) == 2
    layout = Layout(**{**vars(after), "correction": STEERED.correction})
    second = train(folder, tmp_path / "run", layout, 3, resume=True)
    same(second, saved[1], exact=False, steps=1)
    whole = saved[1][4]
    if layout.dp == 1:
        # Rank 0's part of the first run, and what was left for the second: the interrupted step's rest alone.
        assert len(second[4]) == NUM_PROMPTS - 2 and not {*first[4]} & {*second[4]}
        assert second[0][0][BEGUN_ANEW] == 1 - 2 / NUM_PROMPTS
        assert {*second[4]} < {*whole}


@pytest.mark.full
def test_stopped_before_the_first_step_it_goes_on_as_the_run(saved, folder, tmp_path) -> None:
    train(folder, tmp_path / "run", STEERED, 3, stop_at=0)
    same(train(folder, tmp_path / "run", STEERED, 3, resume=True), saved[1], exact=True, steps=3)


CHANGED = dict(lr=1e-5, min_lr=1e-6, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1, clip_grad=2.0)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(sharded_optimizer=False)], ids=["sharded", "optimizer not sharded"]
)
def test_settings_of_an_optimizer_that_a_resumed_run_changes_are_applied_and_told(
    folder, tmp_path, layout
) -> None:
    first = train(folder, tmp_path / "run", layout, 1, save="now")
    numbers, *_, told, _, settings = train(
        folder, tmp_path / "run", layout, 2, resume=True, optimizer=CHANGED
    )
    assert first[0][0]["lr/policy"] == 1e-3 and numbers[0]["lr/policy"] == 1e-5
    assert numbers[0]["lr/actor"] == 1e-3  # The actor's were left as they are.
    assert settings["betas"] == (0.8, 0.99) and settings["eps"] == 1e-6 and settings["clip"] == 2.0
    assert settings["weight_decay"] == 0.1
    assert [line.split(" ")[0] for line in told] == [f"policy.optimizer.{name}" for name in sorted(CHANGED)]
    assert "policy.optimizer.lr = 1e-05 from here on, the checkpoint was made with 0.001." in told
    plain = train(folder, tmp_path / "run", layout, 2, resume=True)
    assert not plain[3] and not torch.equal(
        *(
            run[1]["policy"]["model.norm.weight"]
            for run in (
                plain,
                train(folder, tmp_path / "run", layout, 2, resume=True, optimizer=dict(beta1=0.0)),
            )
        )
    )


def test_a_run_made_longer_is_told_that_its_decay_moves(folder, tmp_path) -> None:
    decay = dict(decay="linear")
    first = train(folder, tmp_path / "run", Layout(), 1, save="now", optimizer=decay, total=2)
    longer = train(folder, tmp_path / "run", Layout(), 2, resume=True, optimizer=decay, total=10)
    assert first[0][0]["lr/policy"] == 1e-3
    assert longer[0][0]["lr/policy"] == pytest.approx(1e-3 * (1 - 1 / 10))
    (line,) = longer[3]
    assert line.startswith(
        "run.steps x algorithm.num_minibatches = 10, and was 2: the linear decay of policy's"
    )


def test_checkpoints_for_good_stay(folder, tmp_path) -> None:
    train(folder, tmp_path / "run", Layout(), 4, save="now", keep_every=2)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-000002", "step-000003", "step-000004"]


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "victim",
    [
        "policy/*.distcp",
        pytest.param("actor/.metadata", marks=FULL),
        pytest.param("state.json", marks=FULL),
        "manifest.json",
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(saved, folder, tmp_path, victim) -> None:
    run, whole = saved
    shutil.copytree(run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-000003"
    path = sorted(newest.glob(victim))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    got = train(folder, tmp_path / "run", STEERED, 3, resume=True)
    assert "step-000003 is damaged and passed over" in got[3][0]
    same(got, whole, exact=True, steps=1)


ONE_MODEL = Layout(one_model=True, correction=STEERED.correction)


def test_a_run_of_one_model_resumes_bit_for_bit_and_not_as_one_of_two_nor_the_other_way_round(
    saved, folder, tmp_path
) -> None:
    run = tmp_path / "run"
    whole = train(folder, run, ONE_MODEL, 3, save="background", save_at=[2])
    same(train(folder, run, ONE_MODEL, 3, resume=True), whole, exact=True, steps=1)
    assert whole[1].keys() == {"policy"} and not (run / "checkpoints" / "latest" / "actor").exists()
    message = run_ranks(_resume_error, 1, 100, str(folder), str(run))[0]
    assert "step-000002 holds policy, this run has actor and policy. Set rollout.model" in message
    message = run_ranks(_resume_error, 1, 100, str(folder), str(saved[0]), ONE_MODEL)[0]
    assert "step-000003 holds actor and policy, this run has policy. Set rollout.model" in message


def _resume_error(rank: int, world: int, folder: str, run: str, layout: Layout = STEERED) -> str:
    state = load_trainer(make_config(layout, Path(folder))).state
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS)]
    state.loader = PromptLoader(prompts, NUM_PROMPTS, 0, 1, 5)
    with pytest.raises(ValueError) as error:
        checkpoint.resume(state, Path(run))
    return str(error.value)


def test_a_checkpoint_of_another_format_is_refused_with_the_commit_that_reads_it(
    saved, folder, tmp_path
) -> None:
    """It is whole, and the one before it is not taken in its place."""
    shutil.copytree(saved[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-000003"
    state = json.loads((newest / "state.json").read_text())
    assert state.pop("format") == current("checkpoint")
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["state.json"] = digest(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    message = run_ranks(_resume_error, 1, 100, str(folder), str(tmp_path / "run"))[0]
    assert "step-000003/state.json has checkpoint format 0" in message
    assert f"Commit {FORMATS['checkpoint'][0]} reads it" in message


def test_no_checkpoint_and_other_prompts_are_refused(saved, folder, tmp_path) -> None:
    assert "holds no whole checkpoint" in run_ranks(_resume_error, 1, 100, str(folder), str(tmp_path))[0]
    message = run_ranks(_resume_error, 1, 100, str(folder), str(saved[0]))[0]
    assert "other prompts than data.*" in message
    manifest = json.loads((saved[0] / "checkpoints" / "step-000003" / "manifest.json").read_text())
    assert manifest["step"] == 3 and len(manifest["files"]) > 6
