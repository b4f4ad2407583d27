"""What must hold inside a step, whatever the layout: the order of updates, the scores, the way a mini-batch
is skipped."""

import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_jackpot.algorithm.corrections import CORRECTIONS, make_correction
from megatron_jackpot.config import Parallel
from megatron_jackpot.models.engine import UpdateReport
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.train.guard import RollBack
from megatron_jackpot.train.losses import TRAINED_GAP, policy_loss
from megatron_jackpot.train.terms import Terms
from megatron_jackpot.train.trainer import MiniBatch
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.tiny import groups


def _on_one_rank(rank: int, world: int, folder: str) -> dict:
    trainer = load_trainer(make_config(Layout(num_minibatches=2), Path(folder)))
    return {
        "old": _policy_old_is_the_pass_before_any_update(trainer),
        "teacher": _teacher_is_what_was_scored(trainer),
        "plain": _plain_grpo(trainer),
        "scale": _loss_of_one_micro_batch_against_four(trainer),
        "numerics": _scored_and_trained_log_probs(trainer),
        "terms": _terms_beside_pruned_rollouts(trainer),
        "operations": _operations_of_corrections(trainer),
        "reads": [_reads_of_the_device(trainer, replicas) for replicas in (1, 3)],
    }


class _Reads(TorchDispatchMode):
    """Counts what makes a GPU's queue run empty, a number or a shape asked of the device, by the line of this
    package that asks. What models/local_layers.py asks of a micro-batch's lengths is not counted: a GPU's
    layers are Transformer Engine's, which do not."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            path = frame.f_code.co_filename
            if "/megatron_jackpot/" in path and not path.endswith("models/local_layers.py"):
                self.asked[f"{path}:{frame.f_lineno}"] += 1
        return func(*args, **(kwargs or {}))


def _reads_of_the_device(trainer, replicas: int) -> dict[str, int]:
    """In the update on a batch's micro-batches, `replicas` times over as one mini-batch."""
    batch = trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K)
    rows = list(range(batch.num_microbatches)) * replicas
    repeated = {
        name: value[rows] if torch.is_tensor(value) else tuple(value[row] for row in rows)
        for name, value in vars(batch).items()
        if name != "num_minibatches"
    }
    with _Reads() as reads:
        trainer.learn(replace(batch, **repeated, num_minibatches=1), trainer.measurements())
    return dict(reads.asked)


class _Operations(TorchDispatchMode):
    """Counts what a GPU would launch: no views, no scalars of the host."""

    VIEWS = frozenset(
        "alias detach expand lift_fresh permute scalar_tensor select slice split squeeze t unbind unsqueeze "
        "view _local_scalar_dense _unsafe_view".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ not in self.VIEWS
        return func(*args, **(kwargs or {}))


def _operations_of_corrections(trainer) -> dict[str, int]:
    """Of everything between scoring and the first update of a mini-batch, by method."""
    scores = trainer.scorer(trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K), step=0, served_version=0)
    own, counted = trainer.methods.correction, {}
    for name in CORRECTIONS:
        trainer.methods.correction = make_correction(name, {}, 0)
        with _Operations() as operations:
            correction = trainer.correct(scores)
            aggregated = trainer.aggregate(scores, correction)
            trainer.measure(scores, correction, aggregated, trainer.measurements())
            trainer.agree(scores, correction, aggregated)
        counted[name] = operations.count
    trainer.methods.correction = own
    return counted


def _terms_beside_pruned_rollouts(trainer) -> tuple[float, float, float]:
    """1 over the entropy term's coefficient per bonus, the tokens that train, and those of all rollouts."""
    every = groups(range(NUM_PROMPTS))
    kept, pruned = [group[:1] for group in every], [group[1:] for group in every]
    own, trainer.methods.terms = trainer.methods.terms, Terms(entropy_bonus=0.5)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "update_actor", lambda *given: None)
        patch.setattr(trainer.policy, "update", lambda batch, loss, may_step: UpdateReport(0.0, 0.0, {}))
        patch.setattr(
            "megatron_jackpot.train.trainer.policy_loss", lambda *given: seen.append(given[-1].entropy)
        )
        trainer.learn(
            replace(trainer.packer.pack(kept, TOP_K, pruned), num_minibatches=1), trainer.measurements()
        )
    trainer.methods.terms = own
    tokens = [sum(int(r.valid.sum()) for group in part for r in group) for part in (kept, every)]
    return (0.5 / seen[0], *tokens)


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict:
    return run_ranks(_on_one_rank, 1, 180, str(folder))[0]


def _policy_old_is_the_pass_before_any_update(trainer) -> dict:
    batch = trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K)
    before = trainer.scorer.logp(trainer.policy, batch)
    seen = []
    update = trainer.update_policy

    def recorded(mini, *args, **kwargs):
        current = trainer.scorer.logp(trainer.policy, mini.batch)
        seen.append((mini.scores.policy_logp_MT.clone(), current, mini.batch.mask_MT))
        update(mini, *args, **kwargs)

    trainer.update_policy = recorded
    trainer.learn(batch, trainer.measurements())
    trainer.update_policy = update
    second = batch.minibatches()[1]
    mask = seen[1][2]
    return {
        "equal": torch.equal(seen[1][0][mask], before[second][mask]),
        "moved": float((seen[1][1] - seen[1][0])[mask].abs().max()),
        "first": float((seen[0][1] - seen[0][0])[seen[0][2]].abs().max()),
    }


def _scored_and_trained_log_probs(trainer) -> dict:
    """gap/trained_scored over two mini-batches, and what is said when the scoring pass sees other numbers."""
    batch = trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K)
    measured = trainer.measurements()
    trainer.learn(batch, measured)
    total, count = map(float, measured.sums[TRAINED_GAP])
    score = trainer.policy.score

    def shifted(*args):
        read = score(*args)
        return {**read, "logp": read["logp"] + 0.3}

    trainer.policy.score = shifted
    try:
        with pytest.raises(RuntimeError) as caught:
            trainer.learn(batch, trainer.measurements())
    finally:
        trainer.policy.score = score
    first = batch.mask_MT[batch.minibatches()[0]].sum().item()
    return dict(total=total, counted=count == first, message=str(caught.value))


def _teacher_is_what_was_scored(trainer) -> bool:
    batch = trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K)
    scores = trainer.scorer(batch, step=0, served_version=0)
    rows = batch.minibatches()[0]
    first = scores.rows(rows.start, rows.stop)
    trainer.update_actor(MiniBatch(first.batch, rows, first), 10.0, trainer.measurements())
    again = trainer.scorer.logp(trainer.policy, first.batch)
    mask = first.batch.mask_MT
    return torch.equal(again[mask], first.policy_logp_MT[mask])


def _plain_grpo(trainer) -> dict:
    """Rollouts whose proposal is the policy itself, with the whole vocabulary as candidates."""
    vocab = trainer.policy.family.vocab_size
    rollouts = groups(range(NUM_PROMPTS), top_k=vocab)
    batch = trainer.packer.pack(rollouts, vocab)
    logp = trainer.policy.score(
        batch, lambda logits, m: {"logp": logits[:][:, :vocab].double().log_softmax(-1).float()}
    )["logp"]
    ids = torch.arange(vocab).expand(*batch.tokens_MT.shape, vocab)
    sampled = logp.gather(-1, batch.labels_MT[..., None])[..., 0]
    batch = replace(batch, server_logp_MT=sampled, topk_ids_MTK=ids, topk_logp_MTK=logp, num_minibatches=1)
    scores = trainer.scorer(batch, step=0, served_version=0)
    jackpot = trainer.methods.correction(scores, trainer.sum_over_batch)
    none = CORRECTIONS["none"]()(scores, trainer.sum_over_batch)
    results = {}
    for name, correction in (("jackpot", jackpot), ("none", none)):
        loss = _policy_loss(trainer, scores, correction)
        results[name] = _loss_and_gradients(trainer, batch, loss)
    mask = batch.mask_MT
    return {"kept": bool(jackpot.keep_MT[mask].all()), "num": int(mask.sum()), **results}


def _policy_loss(trainer, scores, correction):
    aggregated = trainer.aggregate(scores, correction)
    return policy_loss(
        scores,
        aggregated,
        float(aggregated.count),
        trainer.methods.objective,
        trainer.scorer.vocab(trainer.policy),
    )


def _loss_and_gradients(trainer, batch, loss) -> tuple[float, dict[str, torch.Tensor]]:
    chunk = trainer.policy.chunks[0]
    chunk.zero_grad_buffer()
    total = 0.0
    for _, sums in trainer.policy._run(batch, loss, forward_only=False):
        total += float(sums["policy"])
    return total, {name: p.main_grad.clone() for name, p in chunk.module.named_parameters()}


def _loss_of_one_micro_batch_against_four(trainer) -> dict:
    """The same four sequences as one micro-batch and as four: Megatron must not divide by their number."""
    four = [[r] for r in groups(range(1))[0]]
    out = {}
    for enabled in (True, False):
        trainer.packer.enabled, trainer.packer.num_minibatches = enabled, 1
        batch = trainer.packer.pack(four, TOP_K)
        scores = trainer.scorer(batch, step=0, served_version=0)
        correction = trainer.methods.correction(scores, trainer.sum_over_batch)
        loss, gradients = _loss_and_gradients(trainer, batch, _policy_loss(trainer, scores, correction))
        out[batch.num_microbatches] = (loss, float(sum(g.double().pow(2).sum() for g in gradients.values())))
    trainer.packer.enabled, trainer.packer.num_minibatches = True, 2
    return out


def test_no_number_is_asked_of_the_device_for_each_micro_batch(one_rank: dict) -> None:
    once, thrice = one_rank["reads"]
    assert once == thrice
    assert 0 < sum(once.values()) < 60


def test_added_terms_are_means_over_pruned_rollouts_too_which_the_others_stand_for(one_rank: dict) -> None:
    divisor, trained, counted = one_rank["terms"]
    assert trained < counted and divisor == pytest.approx(counted)


def test_a_correction_takes_no_more_operations_than_it_did(one_rank: dict) -> None:
    """The host of a GPU takes 20 us for each, longer than most take on the device; 120 of Jackpot's are
    draws."""
    counted = one_rank["operations"]
    assert counted.keys() == CORRECTIONS.keys()
    assert max(counted[name] for name in ("jackpot", "z_tis")) <= 430, counted
    assert max(counted[name] for name in counted.keys() - {"jackpot", "z_tis"}) <= 230, counted


def test_policy_old_of_the_second_mini_batch_is_the_pass_before_any_update(one_rank: dict) -> None:
    assert one_rank["old"]["equal"]
    assert one_rank["old"]["first"] == 0.0
    assert one_rank["old"]["moved"] > 1e-3


def test_the_teacher_of_the_actor_is_the_policy_that_was_scored_bit_for_bit(one_rank: dict) -> None:
    assert one_rank["teacher"] is True


def test_training_sees_the_scored_log_probs_bit_for_bit_and_a_run_where_it_does_not_is_stopped(
    one_rank: dict,
) -> None:
    numerics = one_rank["numerics"]
    assert numerics["total"] == 0.0 and numerics["counted"]
    assert "gap/trained_scored = 0.3 in the first mini-batch" in numerics["message"]
    assert "precision.max_trained_gap = 0.1" in numerics["message"]


def test_plain_grpo_is_recovered_when_the_server_is_the_policy(one_rank: dict) -> None:
    plain = one_rank["plain"]
    assert plain["kept"] and plain["num"] > 100
    (jackpot_loss, jackpot_gradients), (none_loss, none_gradients) = plain["jackpot"], plain["none"]
    np.testing.assert_allclose(jackpot_loss, none_loss, rtol=1e-5, atol=1e-7)
    for name, gradient in none_gradients.items():
        torch.testing.assert_close(jackpot_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_loss_and_gradient_do_not_depend_on_the_number_of_micro_batches(one_rank: dict) -> None:
    scale = one_rank["scale"]
    assert sorted(scale) == [1, 4]
    np.testing.assert_allclose(scale[1], scale[4], rtol=1e-5)


def _skip_on_two_stages(rank: int, world: int, folder: str) -> tuple[float, float]:
    """A batch without one valid token, then a good one: both stages must take the same way."""
    trainer = load_trainer(make_config(Layout(pp=2), Path(folder)))
    mine = groups(range(NUM_PROMPTS)) if trainer.mesh.is_leader else None
    invalid = mine and [[replace(r, valid=np.zeros_like(r.valid)) for r in group] for group in mine]
    empty, full = trainer.measurements(), trainer.measurements()
    trainer.learn(trainer.packer.pack(invalid, TOP_K), empty)
    trainer.learn(trainer.packer.pack(mine, TOP_K), full)
    return empty.values.get("batch/skipped", 0.0), full.values["grad_norm/policy"]


def test_a_mini_batch_without_valid_tokens_is_skipped_by_every_pipeline_stage(folder: Path) -> None:
    (first, norm), (last, last_norm) = run_ranks(_skip_on_two_stages, 2, 120, str(folder))
    assert first == last == 1.0
    assert norm == last_norm > 0


def _guards_on_two_stages(rank: int, world: int, folder: str) -> dict:
    """A batch with a NaN advantage, a good one, then one under an acceptance floor that nothing reaches."""
    config = make_config(Layout(pp=2), Path(folder))
    guard = config.guard.model_copy(update={"max_skipped": 1})
    trainer = load_trainer(config.model_copy(update={"guard": guard}))
    good = groups(range(NUM_PROMPTS)) if trainer.mesh.is_leader else None
    bad = good and [[replace(r, advantage=math.nan) for r in group] for group in good]

    def learn(batch: list | None) -> dict:
        measured, models = trainer.measurements(), trainer.state.models
        before = {name: digest(model) for name, model in models.items()}
        trainer.learn(trainer.packer.pack(batch, TOP_K), measured)
        moved = {name: digest(model) != before[name] for name, model in models.items()}
        return {"moved": moved, **{k: v for k, v in measured.values.items() if k.startswith("guard/")}}

    seen = {"bad": learn(bad), "good": learn(good)}
    trainer.guard.config = guard.model_copy(update={"acceptance_floor": 0.999})
    seen["paused"] = learn(good)
    seen["still"] = learn(good)
    trainer.guard.config = guard
    seen["again"] = learn(good)
    learn(bad)
    with pytest.raises(RollBack, match="2. time in a row"):
        learn(bad)
    return seen


def digest(model) -> float:
    return float(sum(p.double().abs().sum() for chunk in model.chunks for p in chunk.parameters()))


def test_bad_gradients_are_skipped_and_a_pause_trains_the_actor_alone_on_every_stage(folder: Path) -> None:
    for seen in run_ranks(_guards_on_two_stages, 2, 120, str(folder)):
        assert seen["bad"]["moved"] == {"policy": False, "actor": False}
        assert seen["bad"]["guard/skipped_policy"] == seen["bad"]["guard/skipped_actor"] == 1
        assert seen["good"]["moved"] == {"policy": True, "actor": True} and seen["good"]["guard/paused"] == 0
        for step in ("paused", "still"):
            assert seen[step]["moved"] == {"policy": False, "actor": True} and seen[step]["guard/paused"] == 1
        assert seen["again"]["moved"] == {"policy": True, "actor": True}


def test_tp_that_does_not_divide_the_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="does not divide the 2 ranks"):
        init_mesh(Parallel(tp=3), 0)
