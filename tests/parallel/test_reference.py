"""The reference: what it holds, what it says, and that a checkpoint knows it by its files or holds it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.parallel.linear import LinearLogits
from megatron_jackpot.train import checkpoint
from megatron_jackpot.train.reference import content_digest
from megatron_jackpot.train.trainer import Trainer
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.resuming import STEERED, same, train
from tests.parallel.spawn import run_ranks
from tests.tiny import groups

HELD = (("weight", 0.1),)
KL = (*HELD, ("exact", True))


def _two_steps(rank: int, world: int, folder: str) -> dict:
    """A run of one model whose reference is the policy at the start, kept on the host between passes."""
    trainer = load_trainer(make_config(Layout(one_model=True, reference_kl=KL), Path(folder)))
    reference = trainer.state.reference
    parameters = [p for chunk in reference.model.chunks for p in chunk.parameters()]
    batch = trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K)
    found: dict = {"held": {p.nbytes for p in parameters if hasattr(p, "main_grad") or p.requires_grad}}
    found["optimizer"] = reference.model.optimizer
    found["names"] = [*trainer.state.models]
    scores = [trainer.scorer(batch, step=0, served_version=0)]
    metrics = []
    for _ in range(2):
        measured = trainer.measurements()
        trainer.learn(batch, measured)
        metrics.append({name: float(total / count) for name, (total, count) in measured.sums.items()})
        scores.append(trainer.scorer(batch, step=0, served_version=0))
    mask_MT = batch.mask_MT
    found["logp"] = [
        (one.policy_logp_MT[mask_MT], one.reference_logp_MT[mask_MT], one.reference_kl_MT[mask_MT])
        for one in scores
    ]
    found["metrics"] = metrics
    found["exact"] = _dense_kl(trainer, batch)[mask_MT]
    found["state"] = reference.state_dict()
    return found


def _dense_kl(trainer, batch) -> torch.Tensor:
    """KL(policy || reference) from the whole logits of both."""

    def read(logits, m):
        whole = logits[:] if isinstance(logits, LinearLogits) else logits
        return {"logp": whole[:, : trainer.policy.family.vocab_size].log_softmax(-1)}

    policy = trainer.policy.score(batch, read)["logp"]
    with trainer.state.reference._host.on_device():
        reference = trainer.state.reference.model.score(batch, read)["logp"]
    return (policy.exp() * (policy - reference)).sum(-1)


def test_the_reference_is_the_policy_at_the_start_bit_for_bit_and_stays_so(folder: Path) -> None:
    (found,) = run_ranks(_two_steps, 1, 120, str(folder))
    assert found["held"] == set() and found["optimizer"] is None and found["names"] == ["policy"]
    start = found["logp"][0][0]
    for policy, reference, _ in found["logp"]:
        assert torch.equal(reference, start)
        assert torch.equal(policy, start) is (policy is start)
    assert found["logp"][0][2].abs().max() < 1e-6 < found["logp"][-1][2].mean()
    torch.testing.assert_close(found["logp"][-1][2], found["exact"], rtol=1e-4, atol=1e-6)
    first, second = found["metrics"]
    assert first["kl/policy_reference"] == first["loss/reference_kl"] == 0.0
    assert first["kl/policy_reference_exact"] == pytest.approx(0.0, abs=1e-6)
    mean = float(found["logp"][1][2].mean())
    assert second["kl/policy_reference_exact"] == pytest.approx(mean, rel=1e-5)
    assert second["loss/reference_kl"] == pytest.approx(0.1 * second["kl/policy_reference"], rel=1e-4)
    assert found["state"]["path"].endswith("policy") and len(found["state"]["sha256"]) == 64


def _digests(rank: int, world: int, folders: list[str]) -> list[str]:
    trainer = load_trainer(
        make_config(Layout(dp=2, one_model=True, reference_kl=KL), Path(folders[0]).parent)
    )
    reference = trainer.state.reference
    found = [content_digest(Path(folder)) for folder in folders]
    nowhere = Path("none")
    reference.load_state_dict(None, nowhere)
    reference.load_state_dict({"path": "elsewhere", "sha256": found[0]}, nowhere)
    with pytest.raises(ValueError, match="policy.reference = .*holds other files than elsewhere did"):
        reference.load_state_dict({"path": "elsewhere", "sha256": found[2]}, nowhere)
    with pytest.raises(ValueError, match="refresh_every is null, but .* was refreshed every 2 steps"):
        reference.load_state_dict({**reference.state_dict(), "refresh_every": 2}, nowhere)
    return found


def test_a_reference_is_known_by_its_weights_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    """The same in another place, with another README; then one number that is another."""
    copies = [tmp_path / name for name in ("same", "other")]
    for copy in copies:
        copy.mkdir()
        for file in (folder / "policy").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    (copies[0] / "README.md").write_text("moved")
    tensors = load_file(copies[1] / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, copies[1] / "model.safetensors")
    one, two = run_ranks(_digests, 2, 120, [str(folder / "policy"), *map(str, copies)])
    assert one == two and one[0] == one[1] != one[2]


@pytest.mark.parametrize(
    ("layout", "offload"),
    [(Layout(), True), pytest.param(Layout(tp=2), False, marks=pytest.mark.full)],
    ids=["same layout", "tp 2"],
)
def test_a_refreshed_reference_is_the_policy_of_that_step_also_after_a_resume(
    folder: Path, tmp_path: Path, layout: Layout, offload: bool
) -> None:
    """Saved after step 3, where it is the policy after step 2; at the start and after 4 it is that of now."""
    refreshed = {"refresh": {"refresh_every": 2}}
    held = Layout(reference_kl=HELD, correction=STEERED.correction)
    whole = train(folder, tmp_path, held, 5, save="background", save_at=[3], **refreshed)
    apart = [row["kl/policy_reference_unweighted"] for row in whole[0]]
    assert [value == 0.0 for value in apart] == [True, False, True, False, True]
    assert (tmp_path / "checkpoints" / "step-000003" / "reference").is_dir()
    refreshed["refresh"]["offload"] = offload
    again = Layout(**{**vars(layout), "reference_kl": HELD, "correction": STEERED.correction})
    got = train(folder, tmp_path, again, 5, resume=True, **refreshed)
    name = "kl/policy_reference_unweighted"
    if layout.world == 1:
        same(got, whole, exact=True, steps=2)
    else:
        assert got[0][0][name] == pytest.approx(apart[3], rel=1e-3)
        # Refreshed from the policy after step 4, which is another by rounding.
        assert got[0][1][name] == pytest.approx(0.0, abs=1e-9)


def _refreshing(layout: Layout, folder: str, **settings: object) -> Trainer:
    config = make_config(layout, Path(folder))
    held = config.policy.reference.model_copy(update=settings)
    return load_trainer(
        config.model_copy(update={"policy": config.policy.model_copy(update={"reference": held})})
    )


def _step(trainer: Trainer) -> None:
    mesh = trainer.mesh
    mine = groups(range(mesh.dp_rank, NUM_PROMPTS, mesh.dp)) if mesh.is_leader else None
    trainer.learn(trainer.packer.pack(mine, TOP_K), trainer.measurements())
    trainer.state.finish_step()


def _scored_after_each(rank: int, world: int, folder: str, layout: Layout, offload: bool) -> list | None:
    """(the policy's log-probs, the reference's) before the first of three steps and after each; on the last
    stage."""
    trainer = _refreshing(layout, folder, refresh_every=2, offload=offload)
    mesh = trainer.mesh
    mine = groups(range(mesh.dp_rank, NUM_PROMPTS, mesh.dp)) if mesh.is_leader else None
    batch = trainer.packer.pack(mine, TOP_K)
    found = []
    for step in range(4):
        if step:
            _step(trainer)
        if (scores := trainer.scorer(batch, step=0, served_version=0)) is not None:
            found.append((scores.policy_logp_MT[batch.mask_MT], scores.reference_logp_MT[batch.mask_MT]))
    return found or None


@pytest.mark.parametrize(
    ("layout", "offload"),
    [
        (Layout(dp=2, overlap=True, one_model=True, reference_kl=HELD), False),
        (Layout(pp=2, one_model=True, reference_kl=HELD), True),
    ],
    ids=["dp 2, shards of the optimizer not gathered yet", "pp 2, offloaded"],
)
def test_on_two_ranks_a_refreshed_reference_is_the_policy_bit_for_bit(
    folder: Path, layout: Layout, offload: bool
) -> None:
    ranks = [found for found in run_ranks(_scored_after_each, 2, 120, str(folder), layout, offload) if found]
    assert len(ranks) == layout.dp
    for found in ranks:
        policies, references = zip(*found, strict=True)
        assert not any(torch.equal(one, other) for one, other in zip(policies, policies[1:], strict=False))
        for reference, step in zip(references, (0, 0, 2, 2), strict=True):
            assert torch.equal(reference, policies[step])


def _resumed_with_one(rank: int, world: int, folder: str, run: str) -> dict:
    """A step without a reference, saved, and resumed with one that is refreshed every 100 steps."""
    trainer = load_trainer(make_config(Layout(one_model=True), Path(folder)))
    _step(trainer)
    saving = trainer.config.run.model_copy(update={"folder": Path(run)})
    checkpoint.Saver(trainer.state, saving, trainer.watchdog).save(background=False)
    destroy_mesh()
    layout = Layout(one_model=True, reference_kl=HELD)
    trainer = _refreshing(layout, folder, refresh_every=100, offload=False)
    start = [p.clone() for chunk in trainer.state.reference.model.chunks for p in chunk.parameters()]
    told = checkpoint.resume(trainer.state, Path(run))
    models = (trainer.policy, trainer.state.reference.model)
    policy, reference = ([p.detach() for c in model.chunks for p in c.parameters()] for model in models)
    return {"told": told, "start": start, "policy": policy, "reference": reference}


def test_a_refreshed_reference_that_the_checkpoint_knew_nothing_of_is_the_policy_it_holds(
    folder: Path, tmp_path: Path
) -> None:
    """Not the one at the start, which may be any number of steps ago."""
    (found,) = run_ranks(_resumed_with_one, 1, 120, str(folder), str(tmp_path))
    (line,) = found["told"]
    assert line.startswith("policy.reference.refresh_every = 100: the checkpoint knew of no reference")
    assert line.endswith("it is the policy after step 1.")
    equal = [torch.equal(*pair) for pair in zip(found["reference"], found["policy"], strict=True)]
    assert all(equal)
    assert not all(torch.equal(*pair) for pair in zip(found["reference"], found["start"], strict=True))
