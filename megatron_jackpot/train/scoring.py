"""The no-grad pass of both models over a batch: everything a correction may look at, as `Scores`.

Shapes: M micro-batches of T tokens, K the server's or the policy's top-k, C = 2K candidates.
"""

from contextlib import nullcontext
from functools import partial

from torch import Tensor

from megatron_jackpot.algorithm.candidates import make_scores, retargeted, union_of_candidates
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
        return make_scores(batch, ids_MTC, policy, actor, actor_version=actor_version, step=step)

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


def _asked(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a read yields what it was asked for"
    return tensor
