"""Supervised training of a MegatronModel on corpus examples: the warm-up, and the control that continues
it."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.parallel.vocab import vocab_parallel_logp
from megatron_jackpot.records import Batch, Rollout


@dataclass(frozen=True)
class Progress:
    step: int
    loss: float
    tokens: int
    """Prompt and answer tokens seen so far."""


def train(
    model: MegatronModel,
    corpus: Iterator[Rollout],
    packer: Packer,
    *,
    batch: int,
    steps: int,
    on_step: Callable[[Progress], bool | None],
) -> None:
    """Cross-entropy on the answers, mean over answer tokens; stops early when `on_step` returns True."""
    tokens = 0
    vocab = model.vocab()
    for step in range(1, steps + 1):
        rows = list(itertools.islice(corpus, batch))
        packed = packer.pack([[row] for row in rows], 0)
        count = int(packed.mask_MT.sum())

        def loss(
            logits_TV: Tensor, m: int, packed: Batch = packed, count: int = count
        ) -> tuple[Tensor, dict[str, Tensor]]:
            logp_T = vocab_parallel_logp(logits_TV, packed.labels_MT[m], vocab)
            value = -torch.where(packed.mask_MT[m], logp_T, 0.0).sum() / count
            return value, {"loss": value.detach()}

        report = model.update(packed, loss)
        tokens += sum(row.num_tokens for row in rows)
        if on_step(Progress(step, float(report.sums["loss"]), tokens)):
            return
