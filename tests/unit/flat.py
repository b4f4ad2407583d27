"""Scores of a mini-batch as flat tensors, one entry a token, as formulas speak about them.

`run` lays them out in micro-batches, as training does, applies a correction and brings its decisions back.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_jackpot.algorithm.diagnostics import diagnostics, mean_over
from megatron_jackpot.algorithm.objectives_base import objective_inputs
from megatron_jackpot.records import Batch, Correction, ObjectiveInputs, Scores


@dataclass(frozen=True, kw_only=True)
class Flat:
    """T tokens with K candidates each; the names are those of Scores and of its Batch."""

    policy_logp_T: Tensor
    target_logp_T: Tensor
    actor_logp_T: Tensor
    server_logp_T: Tensor
    mask_T: Tensor
    segment_T: Tensor
    rollout_id_T3: Tensor
    position_T: Tensor
    advantage_T: Tensor
    correct_T: Tensor
    token_T: Tensor
    microbatch_T: Tensor
    """Which micro-batch a token lies in; its tokens keep their order there."""
    candidate_ids_TK: Tensor
    candidate_shared_TK: Tensor
    candidate_target_logp_TK: Tensor
    candidate_server_logp_TK: Tensor
    exact_overlap_T: Tensor | None = None
    entropy_T: Tensor | None = None
    reference_logp_T: Tensor | None = None
    step: int = 3


def identity(tensor):
    return tensor


def number_alone(ids):
    """As ranks number ids alike, of one rank."""
    known, index = torch.unique(ids.flatten(0, -2), dim=0, return_inverse=True)
    return index.view(ids.shape[:-1]), len(known)


def places(s: Flat) -> tuple[Tensor, Tensor, int, int]:
    """(row [T], column [T], M, T of a micro-batch): where each token goes."""
    if not len(s.microbatch_T):
        return s.microbatch_T, s.microbatch_T, 1, 1
    kinds, row_T = torch.unique(s.microbatch_T, return_inverse=True)
    order = torch.argsort(row_T, stable=True)
    counts = torch.bincount(row_T)
    starts = counts.cumsum(0) - counts
    column_T = torch.empty_like(row_T)
    column_T[order] = torch.arange(len(order)) - starts[row_T[order]]
    return row_T, column_T, len(kinds), int(counts.max())


def scores_of(s: Flat) -> Scores:
    """In micro-batches; what fills them up is padding outside the mask."""
    row_T, column_T, num, width = places(s)

    def laid(value_T: Tensor, padding: float | int | bool) -> Tensor:
        out = value_T.new_full((num, width, *value_T.shape[1:]), padding)
        out[row_T, column_T] = value_T
        return out

    mask_MT, zeros_MT = laid(s.mask_T, False), torch.zeros(num, width, dtype=torch.int64)
    batch = Batch(
        tokens_MT=zeros_MT,
        labels_MT=laid(s.token_T, 0),
        mask_MT=mask_MT,
        position_MT=laid(s.position_T, 0),
        segment_MT=laid(s.segment_T, -1),
        rollout_id_MT3=laid(s.rollout_id_T3, -1),
        server_logp_MT=laid(s.server_logp_T, 0.0),
        topk_ids_MTK=zeros_MT[..., None] - 1,
        topk_logp_MTK=torch.full((num, width, 1), -math.inf),
        weight_version_MT=zeros_MT,
        advantage_MT=laid(s.advantage_T, 0.0),
        correct_MT=laid(s.correct_T, False),
        loss_weight_MT=laid(torch.ones_like(s.advantage_T), 0.0),
        pruned_MP4=torch.zeros(num, 0, 4, dtype=torch.int64),
        cu_seqlens=tuple(torch.tensor([0, width], dtype=torch.int32) for _ in range(num)),
        longest=(width,) * num,
    )
    return Scores(
        batch=batch,
        policy_logp_MT=laid(s.policy_logp_T, 0.0),
        target_logp_MT=laid(s.target_logp_T, 0.0),
        actor_logp_MT=laid(s.actor_logp_T, 0.0),
        candidate_ids_MTK=laid(s.candidate_ids_TK, -1),
        candidate_shared_MTK=laid(s.candidate_shared_TK, False),
        candidate_target_logp_MTK=laid(s.candidate_target_logp_TK, -math.inf),
        candidate_server_logp_MTK=laid(s.candidate_server_logp_TK, -math.inf),
        exact_overlap_MT=None if s.exact_overlap_T is None else laid(s.exact_overlap_T, 0.0),
        reference_logp_MT=None if s.reference_logp_T is None else laid(s.reference_logp_T, 0.0),
        entropy_MT=None if s.entropy_T is None else laid(s.entropy_T, 0.0),
        step=s.step,
    )


def run(correction, s: Flat, sum_over_batch=identity) -> SimpleNamespace:
    """keep_T, weight_T, count, acceptance, kl, metrics of a correction, and the record itself."""
    scores = scores_of(s)
    record = correction(scores, sum_over_batch)
    row_T, column_T, _, _ = places(s)
    return SimpleNamespace(
        keep_T=record.keep_MT[row_T, column_T],
        weight_T=record.weight_MT[row_T, column_T],
        count=record.counted_MT.sum(),
        acceptance=mean_over(record.accept_MT, scores.batch.mask_MT),
        kl=record.kl,
        metrics=record.metrics,
        record=record,
    )


def diagnose(s: Flat, result: SimpleNamespace, sum_over_batch=identity) -> dict[str, tuple[Tensor, Tensor]]:
    assert isinstance(result.record, Correction)
    return diagnostics(scores_of(s), result.record, sum_over_batch)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The constants of a micro-batch beside the live log-probs."""

    old_logp_T: Tensor
    server_logp_T: Tensor
    advantage_T: Tensor
    mask_T: Tensor
    segment_T: Tensor
    candidates_TK3: Tensor | None = None
    """log-probs at the candidates under the live policy, the old one and the server; -inf is padding. None of
    them is the sampled token."""


def inputs_of(logp_T: Tensor, tokens: Tokens) -> ObjectiveInputs:
    """What an objective sees of one micro-batch."""
    batch, at_TK3 = batch_of(tokens), tokens.candidates_TK3
    if at_TK3 is None:
        return objective_inputs(logp_T, tokens.old_logp_T, batch, 0)
    # The sampled token's id is 0.
    ids_TK = torch.where(at_TK3[..., 0] > -math.inf, 1, -1)
    at = (ids_TK, *at_TK3.unbind(-1))
    return objective_inputs(logp_T, tokens.old_logp_T, batch, 0, candidates=at)


def batch_of(tokens: Tokens) -> Batch:
    """One micro-batch with nothing that an objective must not look at."""
    zeros_MT = torch.zeros(1, len(tokens.mask_T), dtype=torch.int64)
    return Batch(
        tokens_MT=zeros_MT,
        labels_MT=zeros_MT,
        mask_MT=tokens.mask_T[None],
        position_MT=zeros_MT,
        segment_MT=tokens.segment_T[None],
        rollout_id_MT3=zeros_MT[..., None].expand(-1, -1, 3),
        server_logp_MT=tokens.server_logp_T[None],
        topk_ids_MTK=zeros_MT[..., None] - 1,
        topk_logp_MTK=torch.full((*zeros_MT.shape, 1), -math.inf),
        weight_version_MT=zeros_MT,
        advantage_MT=tokens.advantage_T[None],
        correct_MT=tokens.mask_T[None],
        loss_weight_MT=torch.ones(zeros_MT.shape),
        pruned_MP4=torch.zeros(1, 0, 4, dtype=torch.int64),
        cu_seqlens=(torch.tensor([0, len(tokens.mask_T)], dtype=torch.int32),),
        longest=(len(tokens.mask_T),),
    )


def on_ranks(items: list, call: Callable) -> list:
    """[call(item, sum_over_batch)] on several ranks at once: threads that meet in each sum over the batch."""
    barrier, box, results, errors = threading.Barrier(len(items)), {}, {}, []

    def on_rank(rank):
        def sum_over_batch(tensor):
            box[rank] = tensor
            barrier.wait(10)
            total = torch.stack(list(dict(sorted(box.items())).values())).sum(0)
            barrier.wait(10)
            return total

        try:
            results[rank] = call(items[rank], sum_over_batch)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(len(items))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not errors, errors
    return [results[rank] for rank in range(len(items))]
