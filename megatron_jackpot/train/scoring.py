"""The no-grad pass of the models over a batch: everything a correction may look at, as `Scores`.

Where servers hold the policy, its one pass is read in both roles: p_old, and what stands in for q.

Shapes: M micro-batches of T tokens, K the server's or the policy's top-k, C = 2K candidates.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_jackpot.algorithm.candidates import make_scores, retargeted, union_of_candidates
from megatron_jackpot.algorithm.obrs import overlap_limit
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.head import FrozenHead, record_head
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
        reference: Reference | None = None,
    ) -> None:
        self.policy = policy
        self.actor = actor
        self.reference = reference
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

        `exact_lam` asks for Z over the whole vocabulary at that lam.
        """
        reference = self.reference
        keep = self.keep_head or (exact_lam is not None and self.actor is not None)
        keep = keep or (reference is not None and reference.exact)
        with record_head(self.policy) if keep else nullcontext() as head:
            policy = self.policy.score(batch, partial(self._read_policy, batch))
        self.head = head if self.keep_head else None
        held = {} if reference is None else reference.score(batch, head if reference.exact else None)
        ids_MTC = None if policy is None else union_of_candidates(batch.topk_ids_MTK, policy["topk_ids"])
        if self.actor is None:
            served = None if policy is None else _own_proposal(policy, exact_lam)
        else:
            exact = None if head is None or exact_lam is None else (head, exact_lam)
            reader = partial(self._read_actor, self.vocab(self.actor), batch, ids_MTC, exact)
            served = self.actor.score(batch, reader)
        if policy is None or served is None or ids_MTC is None:
            return None
        made = make_scores(batch, ids_MTC, policy, served, served_version=served_version, step=step)
        return replace(made, **held)

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


def _asked(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a read yields what it was asked for"
    return tensor
