"""The no-grad pass of both models over a batch: everything a correction may look at, as `Scores`.

Shapes: M micro-batches of T tokens, K the server's or the policy's top-k, C = 2K candidates.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

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

MINUS_INFINITY = float("-inf")


class Scorer:
    """Scores batches with policy and actor; results exist on the last pipeline stage only."""

    def __init__(
        self,
        policy: MegatronModel,
        actor: MegatronModel,
        *,
        temperature: float,
        top_k: int,
        keep_head: bool = False,
    ) -> None:
        self.policy = policy
        self.actor = actor
        self.top_k = top_k
        self.temperature = temperature
        self.keep_head = keep_head
        """Keep the policy's last hidden states of a pass in `head`, for a teacher over the whole
        vocabulary."""
        self.head: FrozenHead | None = None

    def __call__(
        self, batch: Batch, *, step: int, actor_version: int, exact_lam: float | None = None
    ) -> Scores | None:
        """Both models on the whole batch; once, before any update.

        `exact_lam` asks for Z over the whole vocabulary at that lam.
        """
        keep = self.keep_head or exact_lam is not None
        with record_head(self.policy) if keep else nullcontext() as head:
            policy = self.policy.score(batch, partial(self._read_policy, batch))
        ids_MTC = None if policy is None else union_of_candidates(batch.topk_ids_MTK, policy["topk_ids"])
        exact = None if head is None or exact_lam is None else (head, exact_lam)
        actor = self.actor.score(batch, partial(self._read_actor, batch, ids_MTC, exact))
        self.head = head if self.keep_head else None
        if policy is None or actor is None or ids_MTC is None:
            return None
        target_MTC = torch.cat([policy["server_ids_logp"], policy["topk_logp"]], dim=-1)
        server_MTC = self._server_logp(batch, actor["topk_logp"], actor_version)
        padding = ids_MTC < 0
        return Scores(
            batch=batch,
            policy_logp_MT=policy["logp"],
            target_logp_MT=policy["logp"],
            actor_logp_MT=actor["logp"],
            candidate_ids_MTK=ids_MTC,
            candidate_shared_MTK=_shared(ids_MTC, policy["topk_ids"]),
            candidate_target_logp_MTK=target_MTC.masked_fill(padding, MINUS_INFINITY),
            candidate_server_logp_MTK=server_MTC.masked_fill(padding, MINUS_INFINITY),
            exact_overlap_MT=None if exact_lam is None else actor["exact_overlap"],
            step=step,
        )

    def retarget(self, scores: Scores | None, mini: Batch) -> Scores | None:
        """The same scores aimed at the current policy: a fresh policy pass, whose own top-k are candidates in
        place of the old policy's (P Alg. 1). Of ids that only it lists, q is known where the scored policy
        listed them too; the actor that could tell of the others has moved since."""
        fresh = self.policy.score(mini, partial(self._read_policy, mini))
        if scores is None or fresh is None:
            return None
        ids_MTC = union_of_candidates(mini.topk_ids_MTK, fresh["topk_ids"])
        target_MTC = torch.cat([fresh["server_ids_logp"], fresh["topk_logp"]], dim=-1)
        return replace(
            scores,
            target_logp_MT=fresh["logp"],
            candidate_ids_MTK=ids_MTC,
            candidate_shared_MTK=_shared(ids_MTC, fresh["topk_ids"]),
            candidate_target_logp_MTK=target_MTC.masked_fill(ids_MTC < 0, MINUS_INFINITY),
            candidate_server_logp_MTK=_known_server_logp(ids_MTC, scores),
        )

    def teacher(self, microbatches: slice) -> FrozenHead | None:
        """The policy's logits on these micro-batches of the last pass; None unless `keep_head`."""
        return None if self.head is None else self.head.rows(microbatches.start, microbatches.stop)

    def logp(self, model: MegatronModel, batch: Batch) -> Tensor | None:
        """log-prob [M, T] of every label under one model, None off the last stage."""
        scored = model.score(batch, lambda logits, m: {"logp": self._logp(model, logits, batch.labels_MT[m])})
        return None if scored is None else scored["logp"]

    def _logp(self, model: MegatronModel, logits_TV: Logits, labels_T: Tensor) -> Tensor:
        return vocab_parallel_logp(logits_TV, labels_T, self.vocab(model))

    def _logp_and(
        self, model: MegatronModel, logits_TV: Logits, labels_T: Tensor, **ids_TK: Tensor
    ) -> dict[str, Tensor]:
        """logp [T] of the labels and, from the same read, a name's log-probs at its ids [T, K]."""
        ((name, at_TK),) = ids_TK.items()
        read = vocab_parallel_scores(logits_TV, labels_T, self.vocab(model), ids_TK=at_TK)
        return {"logp": read.logp_T, name: _asked(read.at_ids_TK)}

    def vocab(self, model: MegatronModel) -> VocabSpec:
        """A model's vocabulary at the temperature of the rollouts."""
        return model.vocab(self.temperature)

    def _read_policy(self, batch: Batch, logits_TV: Logits, index: int) -> dict[str, Tensor]:
        labels_T, ids_TK = batch.labels_MT[index], batch.topk_ids_MTK[index]
        read = vocab_parallel_scores(
            logits_TV, labels_T, self.vocab(self.policy), ids_TK=ids_TK, k=self.top_k
        )
        return dict(
            logp=read.logp_T,
            server_ids_logp=_asked(read.at_ids_TK),
            topk_logp=_asked(read.topk_logp_TK),
            topk_ids=_asked(read.topk_ids_TK),
        )

    def _read_actor(
        self,
        batch: Batch,
        ids_MTC: Tensor | None,
        exact: tuple[FrozenHead, float] | None,
        logits_TV: Logits,
        index: int,
    ) -> dict[str, Tensor]:
        assert ids_MTC is not None, "readers run on the last stage only"
        policy_only_TK = ids_MTC[index, :, batch.topk_ids_MTK.shape[-1] :]
        read = self._logp_and(self.actor, logits_TV, batch.labels_MT[index], topk_logp=policy_only_TK)
        if exact is not None:
            head, lam = exact
            read["exact_overlap"] = vocab_parallel_overlap(
                head.logits(index), logits_TV, head.common(self.vocab(self.actor)), lam=lam
            )
        return read

    def _server_logp(self, batch: Batch, actor_logp_MTK: Tensor, actor_version: int) -> Tensor:
        """log q at the candidates. The server does not return q at policy-only ids: the scored actor's
        log-prob stands in, capped by the server's k-th, where that actor produced the token; 0 probability
        elsewhere."""
        kth_MT1 = batch.topk_logp_MTK.masked_fill(batch.topk_ids_MTK < 0, float("inf")).amin(-1, keepdim=True)
        known_MT1 = (batch.weight_version_MT == actor_version)[..., None]
        policy_only = torch.minimum(actor_logp_MTK, kth_MT1).masked_fill(~known_MT1, MINUS_INFINITY)
        return torch.cat([batch.topk_logp_MTK, policy_only], dim=-1)


def _asked(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a read yields what it was asked for"
    return tensor


def union_of_candidates(server_ids_MTK: Tensor, policy_ids_MTK: Tensor) -> Tensor:
    """[M, T, 2K]: the server's ids, then the policy's with those already listed replaced by -1."""
    listed = (policy_ids_MTK[..., :, None] == server_ids_MTK[..., None, :]).any(-1)
    return torch.cat([server_ids_MTK, policy_ids_MTK.masked_fill(listed, -1)], dim=-1)


def _known_server_logp(ids_MTC: Tensor, scores: Scores) -> Tensor:
    """log q at the ids, [M, T, 2K], where `scores` knows it, else -inf: both begin with the server's own."""
    num_server = scores.batch.topk_ids_MTK.shape[-1]
    new_MTK, old_MTK = ids_MTC[..., num_server:], scores.candidate_ids_MTK[..., num_server:]
    same_MTKK = (new_MTK[..., :, None] == old_MTK[..., None, :]) & (new_MTK[..., :, None] >= 0)
    server_MTC = scores.candidate_server_logp_MTK
    found_MTK = torch.where(same_MTKK, server_MTC[..., None, num_server:], MINUS_INFINITY).amax(-1)
    return torch.cat([server_MTC[..., :num_server], found_MTK], -1)


def _shared(ids_MTC: Tensor, policy_ids_MTK: Tensor) -> Tensor:
    """[M, T, 2K] bool: the server's ids that the policy's top-k holds too."""
    num_server = ids_MTC.shape[-1] - policy_ids_MTK.shape[-1]
    server_ids = ids_MTC[..., :num_server]
    both = (server_ids[..., :, None] == policy_ids_MTK[..., None, :]).any(-1) & (server_ids >= 0)
    return torch.cat([both, torch.zeros_like(policy_ids_MTK, dtype=torch.bool)], -1)
