"""Terms that are added to the policy's loss, against dense log-softmax."""

import pytest
import torch

from megatron_jackpot.algorithm.aggregation import SequenceMean
from megatron_jackpot.algorithm.importance import MaskedIS
from megatron_jackpot.algorithm.objectives import PPO
from megatron_jackpot.parallel.reduce import make_number_alike
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.train.losses import policy_loss
from megatron_jackpot.train.own_methods import V, random_scores, sum_over_batch


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
