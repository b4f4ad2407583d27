"""Terms that are added to the policy's loss, against dense log-softmax."""

from dataclasses import replace

import pytest
import torch

from megatron_jackpot.algorithm.aggregation import SequenceMean
from megatron_jackpot.algorithm.importance import MaskedIS
from megatron_jackpot.algorithm.objectives import PPO
from megatron_jackpot.parallel.reduce import make_number_alike
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.train.losses import actor_loss, policy_loss
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.own_methods import V, random_scores, sum_over_batch
from tests.models.test_methods import config


def test_the_nll_of_correct_rollouts_is_added_unweighted_over_their_own_tokens() -> None:
    scores, mu = random_scores(), 0.3
    batch = scores.batch
    correction = MaskedIS(cap=1.2)(scores, sum_over_batch)
    aggregated = SequenceMean()(batch, correction, sum_over_batch, make_number_alike(None))
    right_MT = batch.mask_MT & batch.correct_MT
    rejected_MT = right_MT & ~correction.keep_MT
    assert right_MT.any() and (batch.mask_MT & ~right_MT).any() and rejected_MT.any()
    num = float(right_MT.sum())

    def total(logits_MTV: torch.Tensor, weight: float) -> tuple[torch.Tensor, float]:
        vocab, n = VocabSpec(V, None), float(aggregated.count)
        loss = policy_loss(scores, aggregated, n, PPO(), vocab, nll_weight=weight)
        parts = [loss(logits_TV, m) for m, logits_TV in enumerate(logits_MTV)]
        assert all(("positive_nll" in sums) == bool(weight) for _, sums in parts)
        told = sum(float(sums.get("positive_nll", 0.0)) for _, sums in parts)
        return sum(value for value, _ in parts), told

    generator = torch.Generator().manual_seed(7)
    logits_MTV = torch.randn(*batch.labels_MT.shape, V, generator=generator).requires_grad_()
    (without, _), (with_it, told) = total(logits_MTV, 0.0), total(logits_MTV, mu / num)
    (added,) = torch.autograd.grad(with_it - without, logits_MTV)
    dense = torch.nn.functional.cross_entropy(logits_MTV[right_MT], batch.labels_MT[right_MT])
    (want,) = torch.autograd.grad(mu * dense, logits_MTV)
    assert float(with_it - without) == pytest.approx(mu * float(dense), rel=1e-5)
    assert told == pytest.approx(mu * float(dense), rel=1e-5)
    torch.testing.assert_close(added, want, rtol=1e-4, atol=1e-7)


def test_both_losses_are_linear_in_a_selection_s_weights() -> None:
    """The same weight multiplies a rollout's part of the policy's loss and of both of the actor's."""
    scores = random_scores()
    batch, correction = scores.batch, MaskedIS(cap=1.2)(scores, sum_over_batch)
    generator = torch.Generator().manual_seed(7)
    logits_MTV = torch.randn(*batch.labels_MT.shape, V, generator=generator)
    methods = Methods.from_config(config()).actor
    assert methods is not None
    methods.distill_weight = 0.5

    def losses(weight_MT: torch.Tensor) -> torch.Tensor:
        weighed = replace(scores, batch=replace(batch, loss_weight_MT=weight_MT))
        aggregated = SequenceMean()(weighed.batch, correction, sum_over_batch, make_number_alike(None))
        vocab = VocabSpec(V, None)
        policy = policy_loss(weighed, aggregated, 6.0, PPO(), vocab, nll_weight=0.1)
        actor = actor_loss(weighed, methods, 40.0, vocab, None, rl_weight=1.0)
        told = [{**policy(logits, m)[1], **actor(logits, m)[1]} for m, logits in enumerate(logits_MTV)]
        names = ("policy", "positive_nll", "actor_rl", "distill")
        return torch.stack([sum(float(sums[name]) for sums in told) * torch.ones(()) for name in names])

    numbers = batch.rollout_id_MT3[..., 1] * 2 + batch.rollout_id_MT3[..., 2]
    alone = torch.stack([losses((numbers == number).float()) for number in range(6)])
    weight_6 = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.25, 10.0])
    assert (alone.abs().amax(0) > 0).all() and len(alone) == 6
    together = losses(weight_6[numbers.clamp(min=0)])
    torch.testing.assert_close(together, (weight_6[:, None] * alone).sum(0), rtol=1e-4, atol=1e-6)
