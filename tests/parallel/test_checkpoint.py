"""N steps are k steps, a checkpoint, a new process and N - k steps: bit for bit, and on another layout to rounding."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_jackpot import checkpoint
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.sync.export import export
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.tiny import ACTOR, POLICY, groups, rollout, write_model

STEERED = Layout(correction=(("name", "jackpot"), ("target_acceptance", 0.8)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "policy", 0, **POLICY)
    write_model(folder / "actor", 1, **ACTOR)
    return folder


def _train(
    rank: int, world: int, folder: str, run: str, layout: Layout, steps: int, resume: bool, save: bool
):
    """Steps on deterministic rollouts; (per-step numbers, weights, loader position) on rank 0."""
    trainer = load_trainer(make_config(layout, Path(folder)))
    mesh = trainer.mesh
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS * 2)]
    if mesh.is_leader:
        trainer.loader = PromptLoader(prompts, NUM_PROMPTS, mesh.dp_rank, mesh.dp, 5)
    troubles = checkpoint.resume(trainer, Path(run)) if resume else []
    numbers = []
    while trainer.num_steps < steps:
        mine = None
        if mesh.is_leader:
            _, chosen = trainer.loader.next()
            mine = [groups(range(p.id, p.id + 1))[0] for p in chosen]
        trainer.sums, trainer.values = {}, {}
        trainer.note_rollouts(mine or [], {}, 1.0)
        trainer.learn(trainer.packer.pack(mine, TOP_K))
        trainer.num_steps += 1
        metrics = trainer.reduced_metrics()
        numbers.append({k: v for k, v in metrics.items() if not k.startswith("time/")})
        if save:
            checkpoint.save(trainer, Path(run), keep=2)
    weights = {n: export(getattr(trainer, n)) for n in ("policy", "actor")}
    destroy_mesh()
    return (numbers, weights, trainer.methods.correction, troubles) if rank == 0 else None


def train(folder: Path, run: Path, layout: Layout, steps: int, *, resume: bool = False, save: bool = False):
    args = (str(folder), str(run), layout, steps, resume, save)
    return run_ranks(_train, layout.world, 200, *args)[0]


@pytest.fixture(scope="module")
def saved(folder: Path) -> tuple[Path, tuple]:
    """A run of three steps with a checkpoint after each, and what it was."""
    run = folder / "saved"
    return run, train(folder, run, STEERED, 3, save=True)


def copy_without_last(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    shutil.rmtree(sorted((to / "checkpoints").glob("step-*"))[-1])
    return to


def same(got: tuple, want: tuple, exact: bool, steps: int) -> None:
    (numbers, weights, correction, _), (all_numbers, all_weights, all_correction, _) = got, want
    assert len(numbers) == steps
    for mine, theirs in zip(numbers, all_numbers[-steps:], strict=True):
        if exact:
            assert mine == theirs
        else:
            for name in (
                "loss/policy",
                "loss/actor",
                "grad_norm/policy",
                "jackpot/acceptance",
                "jackpot/lam",
            ):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert correction.lam == pytest.approx(all_correction.lam, rel=0 if exact else 1e-4)
    assert correction.lam != 1.0
    for model, tensors in all_weights.items():
        for name, tensor in tensors.items():
            if exact:
                assert torch.equal(weights[model][name], tensor), (model, name)
            else:
                assert ((weights[model][name] - tensor).abs() > 1e-5).float().mean() < 0.05, (model, name)


def test_resumed_on_the_same_layout_it_is_the_uninterrupted_run_bit_for_bit(saved, folder, tmp_path) -> None:
    run, whole = saved
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == ["step-000002", "step-000003"]  # keep = 2, nothing unfinished
    got = train(folder, copy_without_last(run, tmp_path / "run"), STEERED, 3, resume=True)
    same(got, whole, exact=True, steps=1)


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
    train(folder, tmp_path / "run", layout, 2, save=True)
    got = train(folder, tmp_path / "run", STEERED, 3, resume=True)
    same(got, saved[1], exact=False, steps=1)


@pytest.mark.parametrize("victim", ["policy/*.distcp", "actor/.metadata", "state.json", "manifest.json"])
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


def _resume_error(rank: int, world: int, folder: str, run: str) -> str:
    trainer = load_trainer(make_config(Layout(), Path(folder)))
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS)]
    trainer.loader = PromptLoader(prompts, NUM_PROMPTS, 0, 1, 5)
    with pytest.raises(ValueError) as error:
        checkpoint.resume(trainer, Path(run))
    return str(error.value)


def test_no_checkpoint_and_other_prompts_are_refused(saved, folder, tmp_path) -> None:
    assert "holds no whole checkpoint" in run_ranks(_resume_error, 1, 100, str(folder), str(tmp_path))[0]
    message = run_ranks(_resume_error, 1, 100, str(folder), str(saved[0]))[0]
    assert "other prompts than data.*" in message
    manifest = json.loads((saved[0] / "checkpoints" / "step-000003" / "manifest.json").read_text())
    assert manifest["step"] == 3 and len(manifest["files"]) > 6
