"""Checks before training: what would silently poison a run stops it here, with the remedy."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jackpot.config import Config, Sync
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.families import Family
from megatron_jackpot.parallel.linear import Logits
from megatron_jackpot.parallel.vocab import vocab_parallel_gather_logp
from megatron_jackpot.records import Batch, Prompt, Rollout


def check_families(config: Config, policy: Family, actor: Family) -> None:
    """Raises ValueError when a model's context is shorter than the longest sequence of the run."""
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for name, family in (("policy", policy), ("actor", actor)):
        if family.context_length < longest:
            raise ValueError(
                f"{name}.hf: max_position_embeddings = {family.context_length} is shorter than "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}. Lower one of them."
            )


def probe(trainer: Any, prompts: list[Prompt]) -> dict[str, float]:
    """|server logp - trainer logp| of the actor on fresh completions, sampled and top-k tokens together.

    Every rank must call it; the result is the same everywhere. Raises RuntimeError when the gap exceeds the
    bounds of config.sync for the trainer's dtype: the numbers of server and trainer then do not speak of the
    same model.
    """
    mesh, config = trainer.mesh, trainer.config
    packer = Packer(
        mesh, tokens=config.packing.tokens, enabled=True, num_minibatches=1, vpp=config.parallel.vpp
    )
    groups: list[list[Rollout]] | None = None
    if mesh.is_leader:
        groups, _ = trainer.source.collect(0, prompts[mesh.dp_rank :: mesh.dp], samples=1)
    trainer.num_probes += 1
    mesh.wait_for_leaders(f"probe-{trainer.num_probes}", config.rollout.request_timeout_s * 2)
    batch = packer.pack(groups, config.rollout.top_k_logp).to(mesh.device)
    gaps = _gaps(trainer, batch)
    summary = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    if gaps is not None:
        parts: list[Any] = [None] * mesh.dp
        dist.all_gather_object(parts, gaps.cpu(), group=mesh.dp_group)
        summary = torch.tensor(_summary(torch.cat(parts).double()), dtype=torch.float64, device=mesh.device)
    largest, mean, quantile = mesh.from_last_stage(summary).tolist()
    report = {"probe/max": largest, "probe/mean": mean, "probe/quantile99": quantile}
    refuse_gap(report, config.precision.dtype, config.sync)
    return report


def refuse_gap(report: dict[str, float], dtype: str, bounds: Sync) -> None:
    """Raises RuntimeError when a probe's report lies outside the bounds for `dtype`; NaN counts as
    outside."""
    if dtype == "float32":
        checks = [("max", report["probe/max"], bounds.max_logp_gap, "sync.max_logp_gap")]
    else:
        checks = [
            ("mean", report["probe/mean"], bounds.mean_logp_gap, "sync.mean_logp_gap"),
            ("99% quantile", report["probe/quantile99"], bounds.quantile_logp_gap, "sync.quantile_logp_gap"),
        ]
    for what, value, bound, field in checks:
        if not value <= bound:
            raise RuntimeError(
                f"Server and trainer disagree about the actor: {what} of |server logp - trainer logp| is "
                f"{value:.3g}, "
                f"{field} allows {bound:g} in {dtype}. Check that the servers hold the actor's weights, use "
                "the "
                f"trainer's dtype, and sample with top_p = 1 and top_k = -1 at rollout.temperature."
            )


def _summary(gaps: Tensor) -> list[float]:
    """Largest, mean and 99% quantile; NaN, which no bound admits, where nothing could be compared."""
    if not gaps.numel():
        return [math.nan] * 3
    ordered = gaps.sort().values
    return [float(ordered[-1]), float(ordered.mean()), float(ordered[int(0.99 * (len(ordered) - 1))])]


def _gaps(trainer: Any, batch: Batch) -> Tensor | None:
    scorer, actor = trainer.scorer, trainer.actor

    def read(logits_TV: Logits, m: int) -> dict[str, Tensor]:
        ids_TK = torch.cat([batch.labels_MT[m][:, None], batch.topk_ids_MTK[m]], dim=-1)
        return {"logp": vocab_parallel_gather_logp(logits_TV, ids_TK, scorer.vocab(actor))}

    scored = actor.score(batch, read)
    if scored is None:
        return None
    server_MTK = torch.cat([batch.server_logp_MT[..., None], batch.topk_logp_MTK], dim=-1)
    known = batch.mask_MT[..., None] & server_MTK.isfinite()
    return (scored["logp"] - server_MTK)[known].abs()
