"""What travels between the stages of a step, and the one place where its shapes are written.

reply -> Completion (servers) -> Rollout -> Batch [M, T] -> Scores [M, T] -> Correction [M, T] ->
Aggregated [M, T] -> one ObjectiveInputs [T] per micro-batch, with DistillInputs [T] beside the actor's ->
loss. From Batch on each is constructed in one function and changed by `replace` alone, and no tensor of a
Batch is held by another record. Nothing else holds numbers of tokens, but for what a function hands to its
caller and nobody keeps (Local and VocabScores in parallel, SampledLogp, Group and Selection in algorithm) and
the TokenRecord that monitor writes to disk.

Shapes: R response tokens of one rollout, M micro-batches on this DP rank, T packed tokens per micro-batch
(the same for every micro-batch and rank), P pruned rollouts, K ids per token: the server's top-k in a Batch,
candidates in Scores.
Row t of every packed field speaks about the prediction made at position t, that is about `labels_MT[m, t]`,
the token that follows `tokens_MT[m, t]` in its sequence; nothing is ever rolled across a sequence boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    # Only annotations need them: the launcher's checks read prompts without torch.
    import numpy as np
    from torch import Tensor

Direction = Literal["forward", "reverse"]
"""Of a KL between policy and actor: forward is KL(policy || actor)."""
Pair: TypeAlias = "tuple[Tensor, Tensor]"
"""(sum, count) on this rank, float64 scalars; divided once, after both were summed over all ranks."""
Metrics = dict[str, Pair]
"""Name -> (sum, count)."""


@dataclass(frozen=True)
class Prompt:
    """One problem. Example: Prompt(id=7, tokens=(1, 42, 9), label={"answer": "12"})."""

    id: int
    """Position of the problem in its data set: stable across runs, epochs and DP sizes."""
    tokens: tuple[int, ...]
    """The prompt after the chat template, as token ids."""
    label: Any
    """What the reward needs (an answer string, a reasoning-gym entry, ...); never opened as a path."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion of one prompt by a server, with the server's own log-probs as the proposal.

    Example: Rollout(prompt=Prompt(7, (1, 42, 9), "12"), epoch=0, sample=3, tokens=[17, 18, 2], ...).
    """

    prompt: Prompt
    epoch: int
    sample: int
    """Index of the completion within its group, 0 .. n-1."""
    tokens: np.ndarray
    """[R] int32, response tokens including the stop token when one was hit."""
    server_logp: np.ndarray
    """[R] float32, log-prob of each sampled token under the server, after temperature."""
    topk_ids: np.ndarray
    """[R, K] int32, the server's k most probable ids, best first; -1 is padding. K = 0 where servers were not
    asked for any."""
    topk_logp: np.ndarray
    """[R, K] float32, their log-probs, -inf where the id is -1."""
    valid: np.ndarray
    """[R] bool, False where the server's sampled log-prob was not finite, and from the first id on that one
    of the models has no row for: counted, masked, never trained on."""
    weight_version: np.ndarray
    """[R] int32, version of the served weights that produced each token."""
    finish: str
    """"stop", "length" or "abort"."""
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    """Each reward's number, where there are several: `reward` is their weighted sum."""
    correct: bool = False
    advantage: float | np.ndarray = 0.0
    """Of each token alike, or [R] float32. Computed once, after collection and selection, before any
    rejection."""
    loss_weight: float = 1.0
    """What multiplies its part of both losses: a selector's, after every cap."""

    @property
    def key(self) -> tuple[int, int, int]:
        """(epoch, prompt id, sample): the identity of a rollout on any layout."""
        return self.epoch, self.prompt.id, self.sample

    @property
    def num_tokens(self) -> int:
        """Length of the sequence, prompt included."""
        return len(self.prompt.tokens) + len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed micro-batches of one DP rank, identical on its tensor- and pipeline-parallel peers.

    Example: two rollouts of 5 and 3 tokens packed into T = 8 give tokens_MT of shape [1, 8],
    cu_seqlens[0] = [0, 5, 8] and segment_MT[0] = [0, 0, 0, 0, 0, 1, 1, 1].
    """

    tokens_MT: Tensor
    """int64, inputs."""
    labels_MT: Tensor
    """int64, the next token of the same sequence; 0 at the last position of a sequence and on padding."""
    mask_MT: Tensor
    """bool, True where the label is a response token with a finite server log-prob."""
    position_MT: Tensor
    """int64, position of the input token in its own sequence (rotary embedding, random draws)."""
    segment_MT: Tensor
    """int64, index of the sequence in this rank's mini-batch; padding has -1. A sequence never spans two
    rows."""
    rollout_id_MT3: Tensor
    """int64 [M, T, 3], (epoch, prompt id, sample); -1 on padding."""
    server_logp_MT: Tensor
    """float32, the proposal q at the sampled token; 0 outside the mask."""
    topk_ids_MTK: Tensor
    """int64, the top-k ids of the proposal: the server's, or after scoring those of the served model where
    servers gave none (K = 0); -1 is padding."""
    topk_logp_MTK: Tensor
    """float32, their log-probs; -inf is padding."""
    weight_version_MT: Tensor
    """int64, version of the served weights behind each label; -1 outside the response."""
    advantage_MT: Tensor
    """float32, the advantage of each response token: its rollout's, or its own."""
    correct_MT: Tensor
    """bool, the rollout's verdict on each of its tokens."""
    loss_weight_MT: Tensor
    """float32, the rollout's weight in both losses on each of its tokens; 0 outside the response."""
    pruned_MP4: Tensor
    """int64, (epoch, prompt id, tokens, tokens of a correct one) of each rollout of the mini-batch that does
    not train but counts in N, all of them in its first micro-batch; (-1, -1, 0, 0) is padding."""
    cu_seqlens: tuple[Tensor, ...]
    """M int32 tensors [S_m + 1]: where each packed sequence starts; padding comes last, as sequences of its
    own."""
    longest: tuple[int, ...]
    """M lengths, of each micro-batch's longest sequence: known on the host, so that no layer asks the device
    for it."""
    num_minibatches: int = 1

    @property
    def num_microbatches(self) -> int:
        return self.tokens_MT.shape[0]

    def rows(self, start: int, stop: int) -> Batch:
        """Micro-batches start .. stop - 1 as a batch with one mini-batch."""
        return replace(self, **_rows(self, start, stop), num_minibatches=1)

    def minibatches(self) -> list[slice]:
        """The micro-batches of each mini-batch, that is of each optimizer step, in order."""
        size = self.num_microbatches // self.num_minibatches
        return [slice(i * size, (i + 1) * size) for i in range(self.num_minibatches)]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the no-grad pass of the models says about a batch; it exists on the last pipeline stage. All
    detached.

    What the rollouts brought (server_logp, mask, advantage, ...) stays in `batch`.
    """

    batch: Batch
    """What was scored: as many micro-batches, in the same order."""
    policy_logp_MT: Tensor
    """log p_old of the sampled token: policy_old, the policy at the start of the step."""
    target_logp_MT: Tensor
    """log p_target of the sampled token: equal to policy_logp_MT when the target is "old"."""
    actor_logp_MT: Tensor | None
    """log-prob of the sampled token under the trainer's copy of the actor, before its update; None where the
    policy samples: its own is policy_logp_MT."""
    candidate_ids_MTK: Tensor
    """int64, the proposal's top-k (of the batch) union the policy's; -1 is padding. The sampled token is
    never added."""
    candidate_target_logp_MTK: Tensor
    """log p_target at the candidates, -inf on padding."""
    candidate_server_logp_MTK: Tensor
    """log q at the candidates: the proposal's top-k, the served model's log-prob, capped by the proposal's
    k-th, at policy-only ids; -inf otherwise."""
    candidate_shared_MTK: Tensor
    """bool, ids in both the proposal's and the policy's top-k."""
    exact_overlap_MT: Tensor | None = None
    """Z over the whole vocabulary, q being the served model's log-probs; only where a correction asks for
    it."""
    entropy_MT: Tensor | None = None
    """Entropy of the target over its vocabulary, nats; None where nobody read it."""
    reference_logp_MT: Tensor | None = None
    """log-prob of the sampled token under the frozen reference; only where there is one."""
    reference_kl_MT: Tensor | None = None
    """KL(policy_old || reference) over the whole vocabulary; only where it is asked for."""
    step: int
    """Number of the optimizer step's batch: key of the random draws."""

    def rows(self, start: int, stop: int) -> Scores:
        """The scores of micro-batches start .. stop - 1, with their batch."""
        return replace(self, **_rows(self, start, stop), batch=self.batch.rows(start, stop))


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Which tokens of a mini-batch train the policy, and with what weight."""

    keep_MT: Tensor
    """bool, False removes the token from the numerator."""
    weight_MT: Tensor
    """float32, detached; finite everywhere."""
    counted_MT: Tensor
    """float64, what each token counts in the denominator; 0 outside the mask."""
    accept_MT: Tensor
    """Probability with which each token was to be kept; 0 outside the mask."""
    kl: Pair
    """KL(p_target || q) over the candidates: a lower bound of that over the vocabulary."""
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """What the loss of a mini-batch needs: policy loss = -sum keep * weight * surrogate / N."""

    keep_MT: Tensor
    """bool, the correction's."""
    weight_MT: Tensor
    """float32, the correction's weight times the token's share in the loss; 0 where it is removed."""
    count: Tensor
    """float64 scalar, this rank's contribution to N (summed over DP x CP by the caller)."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveInputs:
    """The live log-probs and the constants of a micro-batch: all an objective may look at.

    Every number is 0 outside `counted_T`, at candidates -inf, and at least fp32. Rejected tokens are there,
    so that a response's ratio is whole, and so are those that nothing trains on because a model gives them
    probability 0. A rollout never spans two micro-batches, so sums over a segment are complete.
    """

    logp_T: Tensor
    """log p of the sampled token under the model that is trained: the only tensor with a gradient."""
    old_logp_T: Tensor
    """The same at the start of the step."""
    server_logp_T: Tensor
    """log q of the sampled token."""
    reference_logp_T: Tensor
    """The same under the frozen reference; 0 where there is none."""
    candidate_logp_TK: Tensor
    """log p at the candidates but for the sampled token, constants; -inf on padding. K = 0 where the method
    needs none, here and below."""
    candidate_old_logp_TK: Tensor
    """The same under the target of the mini-batch, the policy at the start of the step where `target` is
    "old"."""
    candidate_server_logp_TK: Tensor
    """log q there; -inf also where it is not known."""
    advantage_T: Tensor
    """The rollout's advantage on each of its tokens, or the token's own; 0 outside `valid_T`."""
    segment_T: Tensor
    """int64, which rollout of this rank a token belongs to; -1 outside `counted_T`."""
    rollout_id_T3: Tensor
    """int64, (epoch, prompt id, sample): with the position a token's own key of random draws."""
    position_T: Tensor
    """int64, position of the input token in its own sequence."""
    valid_T: Tensor
    """bool, tokens that can be trained on."""

    @property
    def counted_T(self) -> Tensor:
        """bool, the rollouts' tokens: what looks at a whole rollout looks at these."""
        return self.segment_T >= 0


@dataclass(frozen=True, kw_only=True)
class DistillInputs:
    """What a distillation may look at in a micro-batch; the actor's log-probs carry gradient, the policy's
    none."""

    actor_logp_T: Tensor
    """log-prob of the sampled token under the live actor."""
    policy_logp_T: Tensor
    """The same under the policy that was scored."""
    actor_logp_TK: Tensor
    """At the candidates, -inf on padding; K = 0 where the method needs none."""
    policy_logp_TK: Tensor
    """The same under the target of the mini-batch."""
    kl: Callable[[Direction], Tensor]
    """The exact divergence over the vocabulary, [T]. Only where the method needs logits."""


def _rows(record: Batch | Scores, start: int, stop: int) -> dict[str, Any]:
    """The fields of a record that have a first dimension of micro-batches, cut."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return {name: value[start:stop] for name, value in values.items() if hasattr(value, "__getitem__")}
