"""The no-grad pass of the models over a batch: everything a correction may look at, as `Scores`.

Where servers hold the policy, its one pass is read in both roles: p_old, and what stands in for q. Where
servers give no top-k (rollout.top_k_logp = 0), the served model is scored first, and its top-k are taken.

Shapes: M micro-batches of T tokens, K the proposal's or the policy's top-k, C candidates of both.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_jackpot.algorithm.candidates import (
    make_scores,
    of_own_versions,
    retargeted,
    union_of_candidates,
    with_proposal,
)
from megatron_jackpot.algorithm.obrs import overlap_limit
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.head import FrozenHead, record_head
from megatron_jackpot.models.weight_ring import WeightRing
from megatron_jackpot.parallel.divergence import vocab_parallel_overlap
from megatron_jackpot.parallel.linear import Logits
from megatron_jackpot.parallel.vocab import (
    vocab_parallel_logp,
    vocab_parallel_scores,
)
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.records import Batch, Scores
from megatron_jackpot.train.reference import Reference


class Scorer:
    """Scores batches with the policy and, where they are, the actor and the reference; results exist on the
    last pipeline stage only."""

    def __init__(
        self,
        policy: MegatronModel,
        actor: MegatronModel | None,
        *,
        temperature: float,
        top_k: int,
        keep_head: bool = False,
        ring: WeightRing | None = None,
        reference: Reference | None = None,
        servers_alike: bool = True,
    ) -> None:
        """`ring` has the weights that older tokens were sampled with, where q is taken from scores.
        `servers_alike`: servers sample with the numbers that the same weights are scored with; where they
        do not, no score stands in for q."""
        self.policy = policy
        self.ring = ring
        self.actor = actor
        self.reference = reference
        self.servers_alike = servers_alike
        self.top_k = top_k
        self.temperature = temperature
        self.keep_head = keep_head
        """Keep the policy's last hidden states of a pass in `head`, for a teacher over the whole
        vocabulary."""
        self.head: FrozenHead | None = None

    def __call__(
        self, batch: Batch, *, step: int, served_version: int, exact_lam: float | None = None
    ) -> Scores | None:
        """Every model on the whole batch; once, before any update.

        `exact_lam` asks for Z over the whole vocabulary at that lam. `served_version` is that of the weights
        that are scored in the place of the servers'.
        """
        scores = self._of_trained(batch, step, served_version, exact_lam)
        if self.reference is None:
            return scores
        held = self.reference.score(batch, self._policy_head(batch) if self.reference.exact else None)
        return None if scores is None else replace(scores, **held)

    def _policy_head(self, batch: Batch) -> FrozenHead:
        """The policy's last hidden states, by a pass of their own."""
        with record_head(self.policy) as head:
            self.policy.score(batch, lambda logits, m: {})
        return head

    def _of_trained(
        self, batch: Batch, step: int, served_version: int, exact_lam: float | None
    ) -> Scores | None:
        """What policy and actor say."""
        versions = self._versions(batch, served_version, exact_lam)
        made = partial(make_scores, versions=versions if self.servers_alike else (), step=step)
        if self.actor is None and len(versions) == 1:
            return self._score_one(batch, exact_lam, versions, made)
        kept: dict[int, FrozenHead] = {}
        if len(versions) > 1 or batch.topk_ids_MTK.shape[-1] == 0:
            batch, kept = self._propose(batch, versions)
        policy, head = self._read_of_policy(batch, exact_lam, kept.get(served_version))
        ids_MTC = None if policy is None else union_of_candidates(batch.topk_ids_MTK, policy["topk_ids"])
        exact = None if head is None or exact_lam is None else (head, exact_lam)
        served = self.policy if self.actor is None else self.actor
        reader = partial(self._read_actor, self.vocab(served), batch, ids_MTC, exact)
        read = {version: one.score(reader) for version, one in kept.items()}
        if not kept:
            read = {served_version: served.score(batch, reader)}
        if policy is None or ids_MTC is None:
            return None
        found = {version: _there(one) for version, one in read.items()}
        # The actor's own log-prob is that of the weights which its update starts from.
        own = {"logp": found[served_version]["logp"]} if self.actor is not None else {}
        proposal = of_own_versions(batch, found)
        del proposal["logp"]
        return made(batch, ids_MTC, policy, proposal | own)

    def _versions(self, batch: Batch, served_version: int, exact_lam: float | None) -> tuple[int, ...]:
        """Those of the weights that are scored for q, the newest first: of all in the batch, on any rank,
        where q is taken from them; every rank calls it."""
        wanted = exact_lam is not None or batch.topk_ids_MTK.shape[-1] == 0
        if self.ring is None or not self.ring.versions or not wanted:
            return (served_version,)
        *older, newest = self.ring.versions
        if newest != served_version:
            raise RuntimeError(f"weights of version {newest} were pushed last, {served_version} are scored.")
        here = [int((batch.mask_MT & (batch.weight_version_MT == version)).any()) for version in older]
        asked = [
            version for version, any_ in zip(older, here, strict=True) if self.ring.model.mesh.largest(any_)
        ]
        return (served_version, *asked)

    def _propose(self, batch: Batch, versions: Sequence[int]) -> tuple[Batch, dict[int, FrozenHead]]:
        """The last hidden states of the served model with the weights of each version, for what is to be read
        later; and the batch, with its top-k where servers gave none."""
        served = self.policy if self.actor is None else self.actor
        reader = partial(self._read_top, self.vocab(served), batch)
        kept: dict[int, FrozenHead] = {}
        tops: dict[int, dict[str, Tensor] | None] = {}
        for version in versions:
            with self._weights(version, versions[0]), record_head(served) as kept[version]:
                tops[version] = served.score(batch, reader)
        found = {version: top for version, top in tops.items() if top is not None}
        if found and batch.topk_ids_MTK.shape[-1] == 0:
            batch = with_proposal(batch, of_own_versions(batch, found), versions)
        return batch, kept

    def _weights(self, version: int, current: int) -> AbstractContextManager[None]:
        """Within, the served model has the weights of that version."""
        if version == current:
            return nullcontext()
        assert self.ring is not None, "older versions are its"
        return self.ring.loaded(version)

    def _read_of_policy(
        self, batch: Batch, exact_lam: float | None, kept: FrozenHead | None
    ) -> tuple[dict[str, Tensor] | None, FrozenHead | None]:
        """What the policy says, and its last hidden states where they are asked for; `kept` are those of the
        served model, which in a run of one model is the policy."""
        reader = partial(self._read_policy, batch)
        if self.actor is None and kept is not None:
            return kept.score(reader), kept
        with record_head(self.policy) if self.keep_head or exact_lam is not None else nullcontext() as head:
            policy = self.policy.score(batch, reader)
        self.head = head if self.keep_head else None
        return policy, head

    def _score_one(
        self,
        batch: Batch,
        exact_lam: float | None,
        versions: Sequence[int],
        made: Callable[..., Scores],
    ) -> Scores | None:
        """Of the policy alone, which servers hold, where its weights of now produced all tokens."""
        policy = self.policy.score(batch, partial(self._read_policy, batch))
        if policy is None:
            return None
        if batch.topk_ids_MTK.shape[-1] == 0:
            batch = with_proposal(batch, policy, versions)
            policy["server_ids_logp"] = policy["topk_logp"]
        ids_MTC = union_of_candidates(batch.topk_ids_MTK, policy["topk_ids"])
        return made(batch, ids_MTC, policy, _own_proposal(policy, exact_lam))

    def retarget(self, scores: Scores | None, mini: Batch) -> Scores | None:
        """The same scores aimed at the current policy, by a fresh pass of it."""
        fresh = self.policy.score(mini, partial(self._read_policy, mini))
        if scores is None or fresh is None:
            return None
        return retargeted(scores, fresh)

    def teacher(self, microbatches: slice) -> FrozenHead | None:
        """The policy's logits on these micro-batches of the last pass; None unless `keep_head`."""
        return None if self.head is None else self.head.rows(microbatches.start, microbatches.stop)

    def logp(self, model: MegatronModel, batch: Batch) -> Tensor | None:
        """log-prob [M, T] of every label under one model, None off the last stage."""
        scored = model.score(batch, lambda logits, m: {"logp": self._logp(model, logits, batch.labels_MT[m])})
        return None if scored is None else scored["logp"]

    def _logp(self, model: MegatronModel, logits_TV: Logits, labels_T: Tensor) -> Tensor:
        return vocab_parallel_logp(logits_TV, labels_T, self.vocab(model))

    def vocab(self, model: MegatronModel) -> VocabSpec:
        """A model's vocabulary at the temperature of the rollouts."""
        return model.vocab(self.temperature)

    def _read_policy(self, batch: Batch, logits_TV: Logits, index: int) -> dict[str, Tensor]:
        labels_T, ids_TK = batch.labels_MT[index], batch.topk_ids_MTK[index]
        read = vocab_parallel_scores(
            logits_TV, labels_T, self.vocab(self.policy), ids_TK=ids_TK, k=self.top_k, entropy=True
        )
        return dict(
            logp=read.logp_T,
            server_ids_logp=_asked(read.at_ids_TK),
            topk_logp=_asked(read.topk_logp_TK),
            topk_ids=_asked(read.topk_ids_TK),
            entropy=_asked(read.entropy_T),
        )

    def _read_top(self, vocab: VocabSpec, batch: Batch, logits_TV: Logits, index: int) -> dict[str, Tensor]:
        read = vocab_parallel_scores(logits_TV, batch.labels_MT[index], vocab, k=self.top_k)
        return dict(topk_logp=_asked(read.topk_logp_TK), topk_ids=_asked(read.topk_ids_TK))

    def _read_actor(
        self,
        vocab: VocabSpec,
        batch: Batch,
        ids_MTC: Tensor | None,
        exact: tuple[FrozenHead, float] | None,
        logits_TV: Logits,
        index: int,
    ) -> dict[str, Tensor]:
        assert ids_MTC is not None, "readers run on the last stage only"
        policy_only_TK = ids_MTC[index, :, batch.topk_ids_MTK.shape[-1] :]
        scores = vocab_parallel_scores(logits_TV, batch.labels_MT[index], vocab, ids_TK=policy_only_TK)
        read = {"logp": scores.logp_T, "topk_logp": _asked(scores.at_ids_TK)}
        if exact is not None:
            head, lam = exact
            read["exact_overlap"] = vocab_parallel_overlap(
                head.logits(index), logits_TV, head.common(vocab), lam=lam
            )
        return read


def _own_proposal(policy: Mapping[str, Tensor], exact_lam: float | None) -> dict[str, Tensor]:
    """What the policy's pass says in the place of an actor's; sum min(q, p / lam) with q = p is min(1, 1 /
    lam)."""
    read = {"topk_logp": policy["topk_logp"]}
    if exact_lam is not None:
        read["exact_overlap"] = torch.full_like(policy["logp"], overlap_limit(exact_lam))
    return read


def _there(read: dict[str, Tensor] | None) -> dict[str, Tensor]:
    assert read is not None, "a last stage has results"
    return read


def _asked(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a read yields what it was asked for"
    return tensor
