"""Candidates: the proposal's top-k union the policy's, and the Scores of what the models say about them.

The proposal's top-k is the server's, or that of the served model's scores where servers gave none.

Shapes: M micro-batches of T tokens, K the proposal's or the policy's top-k, C both: their candidates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_jackpot.records import Batch, Scores


def union_of_candidates(server_ids_MTK: Tensor, policy_ids_MTK: Tensor) -> Tensor:
    """[M, T, C]: the proposal's ids, then the policy's with those already listed replaced by -1."""
    listed = (policy_ids_MTK[..., :, None] == server_ids_MTK[..., None, :]).any(-1)
    return torch.cat([server_ids_MTK, policy_ids_MTK.masked_fill(listed, -1)], dim=-1)


def with_proposal(batch: Batch, served: Mapping[str, Tensor], versions: Sequence[int]) -> Batch:
    """The batch with the top-k of the scored served model in the place of the server's: topk_logp and
    topk_ids [M, T, K], each token's by the weights that produced it, of `versions`. Of others the law is not
    known."""
    unknown_MT1 = ~(batch.mask_MT & _sampled_by(batch, versions))[..., None]
    return replace(
        batch,
        topk_ids_MTK=served["topk_ids"].masked_fill(unknown_MT1, -1),
        topk_logp_MTK=served["topk_logp"].masked_fill(unknown_MT1, -math.inf),
    )


def make_scores(
    batch: Batch,
    ids_MTC: Tensor,
    policy: Mapping[str, Tensor],
    served: Mapping[str, Tensor],
    *,
    versions: Sequence[int],
    step: int,
) -> Scores:
    """The Scores of what the passes over a batch read; `ids_MTC` is the union of candidates.

    policy: logp [M, T], server_ids_logp [M, T, K], topk_logp and topk_ids [M, T, K], and entropy [M, T]
    where it was read. served, of the model
    that servers hold: topk_logp [M, T, K] at the policy's part of the candidates, logp [M, T] of an actor,
    exact_overlap [M, T] where it was asked for. `versions` are those of its weights whose scores tell q, each
    token by the one that produced it: all that were scored, or none where servers compute with other numbers.
    """
    target_MTC = torch.cat([policy["server_ids_logp"], policy["topk_logp"]], dim=-1)
    server_MTC = _server_logp(batch, served["topk_logp"], versions)
    padding = ids_MTC < 0
    return Scores(
        batch=batch,
        policy_logp_MT=policy["logp"],
        target_logp_MT=policy["logp"],
        actor_logp_MT=served.get("logp"),
        candidate_ids_MTK=ids_MTC,
        candidate_shared_MTK=_shared(ids_MTC, policy["topk_ids"]),
        candidate_target_logp_MTK=target_MTC.masked_fill(padding, -math.inf),
        candidate_server_logp_MTK=server_MTC.masked_fill(padding, -math.inf),
        exact_overlap_MT=served.get("exact_overlap"),
        entropy_MT=policy.get("entropy"),
        step=step,
    )


def retargeted(scores: Scores, policy: Mapping[str, Tensor]) -> Scores:
    """The same scores aimed at the policy as `policy`, a later pass over the same batch, reads it: logp,
    server_ids_logp, topk_logp, topk_ids and entropy as in `make_scores`.

    Its own top-k are candidates in place of the old policy's (P Alg. 1). Of ids that only it lists, q is
    known where the scored policy listed them too: the model that could tell of the others has moved since.
    """
    ids_MTC = union_of_candidates(scores.batch.topk_ids_MTK, policy["topk_ids"])
    target_MTC = torch.cat([policy["server_ids_logp"], policy["topk_logp"]], dim=-1)
    return replace(
        scores,
        target_logp_MT=policy["logp"],
        candidate_ids_MTK=ids_MTC,
        candidate_shared_MTK=_shared(ids_MTC, policy["topk_ids"]),
        candidate_target_logp_MTK=target_MTC.masked_fill(ids_MTC < 0, -math.inf),
        candidate_server_logp_MTK=_known_server_logp(ids_MTC, scores),
        entropy_MT=policy.get("entropy"),
    )


def _known_server_logp(ids_MTC: Tensor, scores: Scores) -> Tensor:
    """log q at the ids, [M, T, C], where `scores` knows it, else -inf: both begin with the server's own."""
    num_server = scores.batch.topk_ids_MTK.shape[-1]
    new_MTK, old_MTK = ids_MTC[..., num_server:], scores.candidate_ids_MTK[..., num_server:]
    same_MTKK = (new_MTK[..., :, None] == old_MTK[..., None, :]) & (new_MTK[..., :, None] >= 0)
    server_MTC = scores.candidate_server_logp_MTK
    found_MTK = torch.where(same_MTKK, server_MTC[..., None, num_server:], -math.inf).amax(-1)
    return torch.cat([server_MTC[..., :num_server], found_MTK], -1)


def of_own_versions(batch: Batch, read: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What the passes with several weights say, version -> name -> [M, T, ...]: each token's by the weights
    that produced it; the first's where there are no others of that version."""
    first, *others = read
    merged = dict(read[first])
    for version in others:
        own_MT = batch.weight_version_MT == version
        for name, value in read[version].items():
            own = own_MT.view(*own_MT.shape, *[1] * (value.ndim - 2))
            merged[name] = torch.where(own, value, merged[name])
    return merged


def _sampled_by(batch: Batch, versions: Sequence[int]) -> Tensor:
    """bool [M, T]: tokens that weights of these versions produced."""
    return torch.isin(batch.weight_version_MT, batch.weight_version_MT.new_tensor(versions))


def _server_logp(batch: Batch, served_logp_MTK: Tensor, versions: Sequence[int]) -> Tensor:
    """log q at the candidates. The server does not return q at policy-only ids: the scored log-prob of its
    model stands in, capped by the server's k-th, where those weights produced the token; 0 probability
    elsewhere."""
    kth_MT1 = batch.topk_logp_MTK.masked_fill(batch.topk_ids_MTK < 0, math.inf).amin(-1, keepdim=True)
    known_MT1 = _sampled_by(batch, versions)[..., None]
    policy_only = torch.minimum(served_logp_MTK, kth_MT1).masked_fill(~known_MT1, -math.inf)
    return torch.cat([batch.topk_logp_MTK, policy_only], dim=-1)


def _shared(ids_MTC: Tensor, policy_ids_MTK: Tensor) -> Tensor:
    """[M, T, C] bool: the proposal's ids that the policy's top-k holds too."""
    num_server = ids_MTC.shape[-1] - policy_ids_MTK.shape[-1]
    server_ids = ids_MTC[..., :num_server]
    both = (server_ids[..., :, None] == policy_ids_MTK[..., None, :]).any(-1) & (server_ids >= 0)
    return torch.cat([both, torch.zeros_like(policy_ids_MTK, dtype=torch.bool)], -1)
