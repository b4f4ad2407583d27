"""Runs without an actor: servers hold the policy. In fp32, with a server that says what scoring says, they
are plain GRPO; what differs from it is corrected by every correction."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_jackpot.algorithm.corrections import CORRECTIONS, make_correction
from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.parallel.vocab import vocab_parallel_logp
from megatron_jackpot.records import Batch, Scores
from megatron_jackpot.sync.stream import export
from megatron_jackpot.train.scoring import Scorer
from megatron_jackpot.train.trainer import Trainer
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.tiny import groups

LAMS = (0.5, 1.0, 2.0)
ARMS = {
    "none": dict(name="none"),
    "exact": dict(name="jackpot", z="exact"),
    "topk": dict(name="jackpot"),
}
SETTINGS = {"geo_rs": dict(low=0.95, high=1.05, cap=2.0), "k_filter": dict(cap=2.0)}
"""So that noise of 0.05 leaves some responses, and weights that are not 1."""


def _trainer(folder: str, **changes: object) -> Trainer:
    return load_trainer(make_config(Layout(one_model=True, **changes), Path(folder)))


def _as_scored(trainer: Trainer, *, noise: float = 0.0, prompts: int = NUM_PROMPTS) -> Batch:
    """The recorded rollouts under a server with the policy's own log-probs, all ids of the vocabulary among
    its top-k; `noise` is the standard deviation of what its numerics add."""
    vocab = trainer.policy.family.vocab_size
    batch = trainer.packer.pack(groups(range(prompts), top_k=vocab), vocab)
    ids_MTV = torch.arange(vocab).expand(*batch.tokens_MT.shape, vocab)
    scores = trainer.scorer(replace(batch, topk_ids_MTK=ids_MTV), step=0, served_version=0)
    logp_MTV = scores.candidate_target_logp_MTK[..., :vocab]
    own_MT = scores.policy_logp_MT
    if noise:
        generator = torch.Generator().manual_seed(0)
        logp_MTV = (logp_MTV + noise * torch.randn(logp_MTV.shape, generator=generator)).log_softmax(-1)
        own_MT = logp_MTV.gather(-1, batch.labels_MT[..., None])[..., 0]
    server_MT = torch.where(batch.mask_MT, own_MT, 0.0)
    return replace(batch, server_logp_MT=server_MT, topk_ids_MTK=ids_MTV, topk_logp_MTK=logp_MTV)


def _learned(folder: str, correction: dict) -> dict:
    """Loss, gradient norm and weights of a step of a new run."""
    trainer = _trainer(folder, correction=tuple(correction.items()))
    measured = trainer.measurements()
    trainer.learn(_as_scored(trainer), measured)
    total, count = measured.sums["loss/policy"]
    result = dict(loss=float(total / count), grad_norm=measured.values["grad_norm/policy"])
    destroy_mesh()
    return result | dict(weights=export(trainer.policy))


def _grpo(folder: str) -> dict:
    """The same of -mean(s A), s = p / p.detach(), written out here."""
    trainer = _trainer(folder)
    batch, policy = _as_scored(trainer), trainer.policy
    vocab, count = trainer.scorer.vocab(policy), float(batch.mask_MT.sum())

    def loss(logits_TV, m):
        logp_T = vocab_parallel_logp(logits_TV, batch.labels_MT[m], vocab)
        gained_T = (logp_T - logp_T.detach()).exp() * batch.advantage_MT[m]
        value = -torch.where(batch.mask_MT[m], gained_T, 0.0).sum() / count
        return value, {"policy": value.detach()}

    report = policy.update(batch, loss, lambda grad_norm: math.isfinite(grad_norm))
    result = dict(loss=float(report.sums["policy"]), grad_norm=report.grad_norm)
    destroy_mesh()
    return result | dict(weights=export(policy))


def _corrections(folder: str) -> dict[str, dict]:
    """Of each correction: its largest |keep x weight - 1| where server and policy agree, and two steps in
    which they do not."""
    trainer = _trainer(folder, num_minibatches=2, target="current")
    found = {}
    for name in CORRECTIONS:
        method = trainer.methods.correction = make_correction(name, SETTINGS.get(name, {}), 0)
        agreed = _as_scored(trainer, prompts=4)
        scores = trainer.scorer(agreed, step=0, served_version=0)
        correction = method(scores, trainer.sum_over_batch)
        used_MT = torch.where(correction.keep_MT, correction.weight_MT, 0.0)
        off = float((used_MT - 1)[agreed.mask_MT].abs().max())
        found[name] = dict(off=off, lost=float(agreed.mask_MT.sum() - correction.counted_MT.sum()), steps=[])
        for _ in range(2):
            measured = trainer.measurements()
            trainer.learn(_as_scored(trainer, noise=0.05, prompts=4), measured)
            found[name]["steps"].append({**measured.sums, **measured.values})
    return found


def _exact_overlaps(folder: str) -> list[tuple[float, Scores, Scores]]:
    """lam, the scores without an actor, and those with the policy scored a second time in its place."""
    trainer = _trainer(folder)
    batch = trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K)
    twice = Scorer(trainer.policy, trainer.policy, temperature=1.0, top_k=TOP_K)
    pairs = []
    for lam in LAMS:
        both = (s(batch, step=0, served_version=0, exact_lam=lam) for s in (trainer.scorer, twice))
        pairs.append((lam, *both))
    destroy_mesh()
    return pairs


def _all(rank: int, world: int, folder: str) -> dict:
    arms = {name: _learned(folder, correction) for name, correction in ARMS.items()}
    return dict(grpo=_grpo(folder), pairs=_exact_overlaps(folder), corrections=_corrections(folder), **arms)


@pytest.fixture(scope="module")
def done(folder: Path) -> dict:
    return run_ranks(_all, 1, 180, str(folder))[0]


@pytest.mark.parametrize("arm", ["none", "exact"])
def test_with_a_server_that_is_the_policy_it_is_grpo_bit_for_bit(done: dict, arm: str) -> None:
    got, want = done[arm], done["grpo"]
    assert got["loss"] == want["loss"] != 0 and got["grad_norm"] == want["grad_norm"] > 1e-3
    for name, tensor in want["weights"].items():
        assert torch.equal(got["weights"][name], tensor), name


def test_so_it_is_with_z_over_candidates_that_cover_the_vocabulary_to_rounding(done: dict) -> None:
    got, want = done["topk"], done["grpo"]
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
    # AdamW's first step is lr * sign(gradient): rounding may turn a gradient that is next to none.
    moved = [(got["weights"][n] - t).abs() > 1e-5 for n, t in want["weights"].items()]
    assert sum(int(m.sum()) for m in moved) < 1e-3 * sum(m.numel() for m in moved)


@pytest.mark.parametrize("name", sorted(CORRECTIONS))
def test_every_correction_leaves_agreement_alone_and_trains_two_steps_without_it(
    done: dict, name: str
) -> None:
    found = done["corrections"][name]
    assert found["off"] < 1e-4 and found["lost"] == 0
    for step in found["steps"]:
        assert step["grad_norm/policy"] > 1e-3 and all(map(math.isfinite, map(float, step["loss/policy"])))
        assert not [metric for metric in step if "actor" in metric or "distill" in metric]
        total, count = map(float, step["gap/policy_server"])
        assert total / count > 0.01
        if name != "none":
            mean, square = (float(step[f"weight/{n}"][0]) for n in ("mean", "mean_square"))
            assert abs(square - mean) > 1e-3  # Weights other than 0 and 1.


def test_one_pass_of_the_policy_says_what_a_second_in_the_actors_place_would(done: dict) -> None:
    for lam, once, twice in done["pairs"]:
        assert once.actor_logp_MT is None and torch.equal(twice.actor_logp_MT, twice.policy_logp_MT)
        mask_MT = once.batch.mask_MT
        torch.testing.assert_close(once.exact_overlap_MT[mask_MT], twice.exact_overlap_MT[mask_MT])
        assert (once.exact_overlap_MT == min(1, 1 / lam)).all()
        for item in fields(Scores):
            if item.name.endswith(("MT", "MTK")) and item.name not in ("actor_logp_MT", "exact_overlap_MT"):
                torch.testing.assert_close(getattr(once, item.name), getattr(twice, item.name))
