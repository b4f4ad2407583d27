"""Checks before training: what would silently poison a run stops it here, with the remedy."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_jackpot.config import Config, Sync
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.parallel.linear import Logits
from megatron_jackpot.parallel.vocab import vocab_parallel_gather_logp
from megatron_jackpot.records import Batch, Prompt, Rollout
from megatron_jackpot.rollout.outcome import asking
from megatron_jackpot.rollout.protocol import Source
from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.train.scoring import Scorer
from megatron_jackpot.train.state import TrainState


class Prober:
    """|server logp - trainer logp| of the served model on fresh completions: sampled and top-k tokens
    together."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        scorer: Scorer,
        source: Source | None,
        prompts: list[Prompt],
        stop: Stop = never,
    ) -> None:
        """`source` exists on DP leaders; a completion of each of `prompts` is compared."""
        self.config, self.state, self.scorer, self.source = config, state, scorer, source
        self.prompts, self.stop = prompts, stop
        self.packer = Packer(
            state.mesh,
            tokens=config.packing.size,
            enabled=True,
            num_minibatches=1,
            vpp=config.parallel.vpp,
        )

    def __call__(self) -> dict[str, float]:
        """probe/max, mean and quantile99, the same on every rank; every rank must call it.

        Raises RuntimeError when the gap exceeds the bounds of config.sync for the trainer's dtype: the
        numbers of server and trainer then do not speak of the same model. StopRun where it was interrupted.
        """
        mesh, config = self.state.mesh, self.config
        groups: list[list[Rollout]] | None = None
        self.state.num_probes += 1
        limit_s = config.run.phase_timeout_s
        with asking(mesh, f"probe-{self.state.num_probes}", limit_s):
            if self.source is not None:
                mine = self.prompts[mesh.dp_rank :: mesh.dp]
                asked = self.source.collect(0, mine, samples=1, stop=self.stop, aside=True)
                groups, _ = self.source.thread.wait(asked, limit_s, "the completions of a probe")
        gaps = self._gaps(self.packer.pack(groups, config.rollout.top_k_logp))
        summary = torch.zeros(3, dtype=torch.float64, device=mesh.device)
        if gaps is not None:
            parts: list[Tensor] = [torch.empty(0)] * mesh.dp
            dist.all_gather_object(parts, gaps.cpu(), group=mesh.dp_group)
            numbers = _summary(torch.cat(parts).double())
            summary = torch.tensor(numbers, dtype=torch.float64, device=mesh.device)
        largest, mean, quantile = mesh.from_last_stage(summary).tolist()
        report = {"probe/max": largest, "probe/mean": mean, "probe/quantile99": quantile}
        refuse_gap(report, self.state.served.name, config.precision.dtype, config.sync)
        return report

    def _gaps(self, batch: Batch) -> Tensor | None:
        vocab = self.scorer.vocab(self.state.served)

        def read(logits_TV: Logits, m: int) -> dict[str, Tensor]:
            ids_TK = torch.cat([batch.labels_MT[m][:, None], batch.topk_ids_MTK[m]], dim=-1)
            return {"logp": vocab_parallel_gather_logp(logits_TV, ids_TK, vocab)}

        scored = self.state.served.score(batch, read)
        if scored is None:
            return None
        server_MTK = torch.cat([batch.server_logp_MT[..., None], batch.topk_logp_MTK], dim=-1)
        # Tokens of other weights say nothing about these.
        current_MT = batch.mask_MT & (batch.weight_version_MT == self.state.num_steps)
        known = current_MT[..., None] & server_MTK.isfinite()
        return (scored["logp"] - server_MTK)[known].abs()


def refuse_gap(report: dict[str, float], model: str, dtype: str, bounds: Sync) -> None:
    """Raises RuntimeError when a probe's report on `model` lies outside the bounds for `dtype`; NaN counts as
    outside, and so does what no gap can be."""
    if dtype == "float32":
        checks = [("max", report["probe/max"], bounds.max_logp_gap, "sync.max_logp_gap")]
    else:
        checks = [
            ("mean", report["probe/mean"], bounds.mean_logp_gap, "sync.mean_logp_gap"),
            ("99% quantile", report["probe/quantile99"], bounds.quantile_logp_gap, "sync.quantile_logp_gap"),
        ]
    for what, value, bound, field in checks:
        if not 0 <= value <= bound:
            raise RuntimeError(
                f"Server and trainer disagree about the {model}: {what} of |server logp - trainer logp| is "
                f"{value:.3g}, "
                f"{field} allows {bound:g} in {dtype}. Check that the servers hold the {model}'s weights, "
                f"use the trainer's dtype, and sample with top_p = 1 and top_k = -1 at rollout.temperature."
            )


def _summary(gaps: Tensor) -> list[float]:
    """Largest, mean and 99% quantile; NaN, which no bound admits, where nothing could be compared."""
    if not gaps.numel():
        return [math.nan] * 3
    ordered = gaps.sort().values
    return [float(ordered[-1]), float(ordered.mean()), float(ordered[int(0.99 * (len(ordered) - 1))])]
