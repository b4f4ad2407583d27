"""The KL to the reference in the rewards: known only once a batch was scored, so that advantages are made
anew and the same rollouts are packed again."""

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_jackpot.algorithm.tokens import SumOverBatch
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Batch, Metrics, Rollout, Scores
from megatron_jackpot.train.methods import Methods

Found = dict[tuple[int, ...], float]
"""(epoch, prompt id, sample) -> what is added to the reward."""


def with_kl_in_rewards(
    batch: Batch,
    scores: Scores | None,
    groups: list[list[Rollout]] | None,
    step: int,
    methods: Methods,
    mesh: Mesh,
    sum_over_batch: SumOverBatch,
    packer: Packer,
) -> tuple[Batch, Scores | None, Metrics]:
    """The batch and its scores with advantages of the rewards less the KL, and the mean of what it adds.

    `groups` are a leader's, all of which train (configurations with another selector are refused), and `step`
    is the one they were curated with; every rank calls it. Gathers of objects: 1 over dp;
    broadcasts: 2 over pp, and those of packing; sums over the batch as corrections and advantages do.
    """
    added, metrics = _added(batch, scores, methods, mesh, sum_over_batch)
    if groups is not None:
        groups = methods.curator(groups, step, sum_over_batch, mesh.device, added).groups
    again = packer.pack(groups, batch.topk_ids_MTK.shape[-1])
    new = {"advantage_MT": again.advantage_MT}
    if scores is not None:
        # Of its own batch: scoring may have found the candidates.
        scores = replace(scores, batch=replace(scores.batch, **new))
    return replace(batch, **new), scores, metrics


def _added(
    batch: Batch, scores: Scores | None, methods: Methods, mesh: Mesh, sum_over_batch: SumOverBatch
) -> tuple[Found, Metrics]:
    """What the KL adds to every rollout's reward, on every rank; its mean, on the last pipeline stage.

    keep and weight are those of the correction at p_old, of each mini-batch.
    """
    everywhere: Found = {}
    metrics: Metrics = {}
    if scores is not None:
        mine: Found = {}
        for rows in batch.minibatches():
            part = scores.rows(rows.start, rows.stop)
            mine |= methods.terms.punishments(part, methods.correct(part, sum_over_batch))
        pair = torch.tensor([sum(mine.values()), len(mine)], dtype=torch.float64, device=mesh.device)
        metrics = {"reward/reference_kl": (pair[0], pair[1])}
        parts: list[Found] = [{} for _ in range(mesh.dp)]
        dist.all_gather_object(parts, mine, group=mesh.dp_group)
        everywhere = {key: value for part in parts for key, value in part.items()}
    return mesh.object_from_last_stage(everywhere), metrics
