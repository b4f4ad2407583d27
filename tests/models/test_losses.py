"""Terms that are added to the policy's loss, against dense log-softmax and by enumeration of what servers
sample."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_jackpot.algorithm.aggregation import SequenceMean, TokenMean
from megatron_jackpot.algorithm.controllers import SteeredWeight
from megatron_jackpot.algorithm.corrections import Jackpot
from megatron_jackpot.algorithm.importance import MaskedIS, NoCorrection, TokenIS
from megatron_jackpot.algorithm.objectives import DPPOTV, PPO
from megatron_jackpot.config.algorithm import ReferenceKL
from megatron_jackpot.parallel.linear import LinearLogits
from megatron_jackpot.parallel.reduce import make_number_alike
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.records import Scores
from megatron_jackpot.train.losses import actor_loss, policy_loss
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.own_methods import V, random_scores, sum_over_batch
from megatron_jackpot.train.terms import Terms, TermWeights, distance_metrics
from tests.models.test_methods import config
from tests.unit.flat import Flat, scores_of


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
        loss = policy_loss(scores, aggregated, n, PPO(), vocab, TermWeights(positive_nll=weight))
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


@pytest.mark.parametrize("anchor", ["server", "old"])
def test_a_divergence_over_candidates_is_that_of_the_live_logits(anchor: str) -> None:
    """Loss and gradient are those of tokens kept by the dense formula over the ids that the scores list."""
    scores = random_scores()
    batch, correction = scores.batch, NoCorrection()(scores, sum_over_batch)
    aggregated = TokenMean()(batch, correction, sum_over_batch, make_number_alike(None))
    generator = torch.Generator().manual_seed(7)
    logits_MTV = torch.randn(*batch.labels_MT.shape, V, generator=generator).requires_grad_()
    objective = DPPOTV(anchor=anchor, approximation="topk", delta_low=0.4, delta_high=0.4)
    loss = policy_loss(scores, aggregated, float(aggregated.count), objective, VocabSpec(V, None))
    value = sum(loss(logits_TV, m)[0] for m, logits_TV in enumerate(logits_MTV))

    old = anchor == "old"
    known = scores.candidate_target_logp_MTK if old else scores.candidate_server_logp_MTK
    anchor_MT = scores.policy_logp_MT if old else batch.server_logp_MT
    live_MTV = logits_MTV.log_softmax(-1)
    kept = []
    for at in batch.mask_MT.nonzero().tolist():
        live_V, label = live_MTV[*at].detach().exp(), int(batch.labels_MT[*at])
        q = {label: math.exp(anchor_MT[*at].item())}
        for number, logp in zip(scores.candidate_ids_MTK[*at].tolist(), known[*at].tolist(), strict=True):
            if number >= 0 and number != label and logp > -math.inf:
                q[number] = math.exp(logp)
        p = {number: float(live_V[number]) for number in q}
        far = sum(abs(p[number] - q[number]) for number in q) + abs(sum(q.values()) - sum(p.values()))
        rises = p[label] > q[label]
        outward = rises if batch.advantage_MT[*at] > 0 else p[label] < q[label]
        kept.append(not (outward and far / 2 > 0.4))
    assert any(kept) and not all(kept)
    logp_N = live_MTV.gather(-1, batch.labels_MT[..., None])[..., 0][batch.mask_MT]
    ratio_N = (logp_N - anchor_MT[batch.mask_MT]).detach().exp().clamp(max=20)
    terms_N = torch.tensor(kept) * ratio_N * batch.advantage_MT[batch.mask_MT] * logp_N
    dense = -terms_N.sum() / len(kept)
    torch.testing.assert_close(value, dense, rtol=1e-5, atol=1e-6)
    got, want = (torch.autograd.grad(one, logits_MTV, retain_graph=True)[0] for one in (value, dense))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


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
        policy = policy_loss(
            weighed, aggregated, 6.0, PPO(), vocab, TermWeights(positive_nll=0.1, entropy=0.1)
        )
        actor = actor_loss(weighed, methods, 40.0, vocab, None, rl_weight=1.0)
        told = [{**policy(logits, m)[1], **actor(logits, m)[1]} for m, logits in enumerate(logits_MTV)]
        names = ("policy", "positive_nll", "entropy", "actor_rl", "distill")
        return torch.stack([sum(float(sums[name]) for sums in told) * torch.ones(()) for name in names])

    numbers = batch.rollout_id_MT3[..., 1] * 2 + batch.rollout_id_MT3[..., 2]
    alone = torch.stack([losses((numbers == number).float()) for number in range(6)])
    weight_6 = torch.tensor([1.0, 0.5, 2.0, 3.0, 0.25, 10.0])
    assert (alone.abs().amax(0) > 0).all() and len(alone) == 6
    together = losses(weight_6[numbers.clamp(min=0)])
    torch.testing.assert_close(together, (weight_6[:, None] * alone).sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_entropy_bonus_is_the_mean_over_all_valid_tokens_whatever_is_rejected(blocks: bool) -> None:
    """Whole logits, and logits that exist in blocks; the gradient is that of the dense form."""
    scores, bonus = random_scores(), 0.2
    mask_MT = scores.batch.mask_MT
    correction = MaskedIS(cap=1.2)(scores, sum_over_batch)
    aggregated = SequenceMean()(scores.batch, correction, sum_over_batch, make_number_alike(None))
    generator = torch.Generator().manual_seed(7)
    hidden_MTH, weight_VH = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((*mask_MT.shape, 6), (V, 6))
    )

    def total(weight: float) -> tuple[torch.Tensor, float]:
        loss = policy_loss(
            scores, aggregated, 1.0, PPO(), VocabSpec(V, None, 0.8), TermWeights(entropy=weight)
        )
        parts = []
        for m, hidden_TH in enumerate(hidden_MTH):
            linear = LinearLogits(hidden_TH, weight_VH)
            parts.append(loss(linear if blocks else linear[:], m))
        return sum(value for value, _ in parts), sum(float(sums.get("entropy", 0.0)) for _, sums in parts)

    (without, _), (with_it, told) = total(0.0), total(bonus / float(mask_MT.sum()))
    logp_NV = (hidden_MTH @ weight_VH.T / 0.8).log_softmax(-1)[mask_MT]
    dense = -bonus * -(logp_NV.exp() * logp_NV).sum(-1).mean()
    assert float(with_it - without) == pytest.approx(float(dense), rel=1e-4)
    assert told == pytest.approx(float(dense), rel=1e-5)
    factors = (hidden_MTH, weight_VH)
    added, want = torch.autograd.grad(with_it - without, factors), torch.autograd.grad(dense, factors)
    for one, other in zip(added, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


COUNTS = (5, 3, 2, 1, 4, 1)
"""How often a server samples each id: each token of the batch is one of them, so that means are exact."""


def enumerated(old_logp_V: torch.Tensor, reference_logp_V: torch.Tensor) -> Scores:
    """Every draw of q, each a response of its own, at one position of the policy; Z is known exactly."""
    ids_T = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    q_logp_V, num = (torch.tensor(COUNTS) / sum(COUNTS)).log(), len(ids_T)
    zeros_T, every_TK = torch.zeros(num), torch.arange(len(COUNTS)).expand(num, -1)
    flat = Flat(
        policy_logp_T=old_logp_V[ids_T],
        target_logp_T=old_logp_V[ids_T],
        actor_logp_T=q_logp_V[ids_T],
        server_logp_T=q_logp_V[ids_T],
        mask_T=torch.ones(num, dtype=torch.bool),
        segment_T=torch.arange(num),
        rollout_id_T3=torch.stack([zeros_T.long(), zeros_T.long(), torch.arange(num)], -1),
        position_T=zeros_T.long(),
        advantage_T=zeros_T,
        correct_T=zeros_T.bool(),
        token_T=ids_T,
        microbatch_T=zeros_T.long(),
        candidate_ids_TK=every_TK,
        candidate_shared_TK=every_TK >= 0,
        candidate_target_logp_TK=old_logp_V.expand(num, -1),
        candidate_server_logp_TK=q_logp_V.expand(num, -1),
        exact_overlap_T=torch.minimum(old_logp_V, q_logp_V).exp().sum().expand(num),
    )
    return replace(scores_of(flat), reference_logp_MT=reference_logp_V[ids_T][None])


CORRECTED = {
    "tis": TokenIS(cap=math.inf),
    "jackpot": Jackpot(mask="expected", z="exact", cap=math.inf, denominator="accepted"),
}
"""Both make of the server's tokens the policy's: jackpot's weights are Z times too small, and so is its N."""


def three_laws() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the policy at the start, of the live one, and log-probs of the reference, over six ids."""
    old_V, step_V, reference_V = torch.randn(3, len(COUNTS), generator=torch.Generator().manual_seed(3))
    return old_V, old_V + 0.4 * step_V, reference_V.log_softmax(-1)


@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "unbiased"])
def test_value_and_gradient_of_each_form_of_the_reference_kl_are_its_laws(estimator: str, name: str) -> None:
    old_V, moved_V, reference_logp_V = three_laws()
    # Only the unbiased form is one where the policy has left p_old.
    logits_V = (moved_V if estimator == "unbiased" else old_V).double().requires_grad_()
    scores = enumerated(old_V.log_softmax(-1), reference_logp_V)
    batch, method = scores.batch, CORRECTED[name]
    correction = method(scores, sum_over_batch)
    aggregated = TokenMean()(batch, correction, sum_over_batch, make_number_alike(None))
    terms = TermWeights(reference_kl=0.3, estimator=estimator)
    vocab, n = VocabSpec(len(COUNTS), None), float(aggregated.count)
    loss = policy_loss(scores, aggregated, n, PPO(), vocab, terms)
    value, sums = loss(logits_V.expand(sum(COUNTS), -1), 0)
    assert float(value.detach()) == pytest.approx(float(sums["reference_kl"])) and float(sums["policy"]) == 0
    (grad_V,) = torch.autograd.grad(value / 0.3, logits_V)

    p_V, d_V = logits_V.softmax(-1), logits_V.log_softmax(-1) - reference_logp_V
    kl, reverse = (p_V * d_V).sum(), -(reference_logp_V.exp() * d_V).sum()
    wanted_value = (p_V * d_V.square() / 2).sum() if estimator == "k2" else kl
    gradient_of = {"k1": 0 * kl, "k3": reverse}.get(estimator, kl)
    assert float(value.detach()) / 0.3 == pytest.approx(float(wanted_value.detach()), rel=1e-5)
    (wanted_V,) = torch.autograd.grad(gradient_of, logits_V)
    torch.testing.assert_close(grad_V, wanted_V, rtol=1e-4, atol=1e-6)


def test_without_a_correction_the_reference_kl_is_that_of_the_servers_tokens() -> None:
    old_V, _, reference_logp_V = three_laws()
    scores = enumerated(old_V.log_softmax(-1), reference_logp_V)
    d_V, q_V = old_V.log_softmax(-1) - reference_logp_V, torch.tensor(COUNTS) / sum(COUNTS)
    biased, kl = (float((law_V * (torch.exp(-d_V) - 1 + d_V)).sum()) for law_V in (q_V, old_V.softmax(-1)))
    assert abs(biased / kl - 1) > 0.05
    for method, wanted in ((NoCorrection(), biased), (TokenIS(cap=math.inf), kl)):
        correction = method(scores, sum_over_batch)
        aggregated = TokenMean()(scores.batch, correction, sum_over_batch, make_number_alike(None))
        found = distance_metrics(scores, aggregated)
        mean = {name: float(total / count) for name, (total, count) in found.items()}
        assert mean["kl/policy_reference"] == pytest.approx(wanted, rel=1e-5)
        assert mean["kl/policy_reference_unweighted"] == pytest.approx(biased, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_the_reference_kl_takes_off_the_rewards_is_its_mean_under_the_policy(estimator: str) -> None:
    old_V, _, reference_logp_V = three_laws()
    scores = enumerated(old_V.log_softmax(-1), reference_logp_V)
    kl = ReferenceKL(place="reward", estimator=estimator, weight=0.3)
    terms = Terms(kl=kl, kl_weight=0.3)
    added = terms.punishments(scores, CORRECTED["tis"](scores, sum_over_batch))
    assert sorted(added) == [(0, 0, sample) for sample in range(sum(COUNTS))]
    p_V, d_V = old_V.softmax(-1), old_V.log_softmax(-1) - reference_logp_V
    wanted = (p_V * (d_V.square() / 2 if estimator == "k2" else d_V)).sum()
    assert sum(added.values()) / len(added) == pytest.approx(-0.3 * float(wanted), rel=1e-5)
    assert terms.weights(10.0, 1.0).reference_kl == 0.0  # Not in the loss as well.


def test_the_reference_kl_is_steered_by_the_weighted_one() -> None:
    old_V, _, reference_logp_V = three_laws()
    scores = enumerated(old_V.log_softmax(-1), reference_logp_V)
    aggregated = TokenMean()(
        scores.batch, CORRECTED["tis"](scores, sum_over_batch), sum_over_batch, make_number_alike(None)
    )
    total, count = distance_metrics(scores, aggregated)["kl/policy_reference"]
    kl = float(total / count)
    for wanted, sign in ((kl / 2, 1), (kl, 0), (2 * kl, -1)):
        control = SteeredWeight(wanted=wanted, weight=0.01)
        terms = Terms(kl=ReferenceKL(target=wanted), kl_weight=0.01, kl_control=control)
        metrics = terms.steer(scores, aggregated, sum_over_batch)
        moved = 0.01 * 2 ** (sign * (control.gain_p + control.gain_i))
        assert terms.kl_weight == pytest.approx(moved, rel=1e-5)
        assert float(metrics["policy/reference_weight"][0]) == terms.kl_weight
