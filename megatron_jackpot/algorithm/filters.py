"""What removes tokens or responses beside the one correction that weighs them: `algorithm.filters`.

Filters are the masks of ratio methods (importance.py) without their weights. Each looks at all tokens,
whatever the correction or another filter removes, so that their order changes nothing.
Shapes: M micro-batches of T tokens.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from megatron_jackpot.algorithm.diagnostics import mean_over
from megatron_jackpot.algorithm.entropy import EntropyFilter
from megatron_jackpot.algorithm.importance import (
    GeometricFilter,
    IcePop,
    Importance,
    KFilter,
    MaskedIS,
    SequenceMIS,
)
from megatron_jackpot.algorithm.registry import Registry, build
from megatron_jackpot.algorithm.tokens import SumOverBatch, sampled_logp
from megatron_jackpot.records import Correction, Scores

Filter = tuple[str, Importance]
"""(name in metrics, method)."""

FILTERS = Registry(
    Importance,
    {
        "mis": MaskedIS,
        "icepop": IcePop,
        "seq_mis": SequenceMIS,
        "geo_rs": GeometricFilter,
        "k_filter": KFilter,
        "entropy": EntropyFilter,
    },
)


def make_filters(chosen: Sequence[tuple[str, Mapping[str, object]]], where: str) -> list[Filter]:
    """The filters of (name, settings), the second one of a name called NAME_2. Raises ValueError, a line for
    each mistake, for what `build` refuses and for settings of a weight."""
    made, mistakes, seen = [], [], Counter[str]()
    for index, (name, settings) in enumerate(chosen):
        place = f"{where}[{index}]"
        try:
            method = build(name, settings, FILTERS, place)
        except ValueError as error:
            mistakes.append(str(error))
            continue
        mistakes += [
            f"{place}.{setting} = {settings[setting]!r}: a filter keeps or removes, algorithm.correction "
            "weighs. Leave it out."
            for setting in method.weight_only
            if setting in settings
        ]
        seen[name] += 1
        short = name.rpartition(":")[2]
        made.append((short if seen[name] == 1 else f"{short}_{seen[name]}", method))
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return made


@torch.no_grad()
def filtered(
    correction: Correction,
    filters: Sequence[Filter],
    scores: Scores,
    sum_over_batch: SumOverBatch,
    *,
    counts_all: bool,
) -> Correction:
    """The correction without the tokens that a filter removes; what it knows of all tokens (Z, kappa, a mean
    weight) stays. They count in N where `counts_all`.

    Metrics: filter/NAME, the share of tokens that one keeps, and filter/kept, that all keep.
    Raises ValueError for a non-finite server log-prob inside the mask. Sums over the batch as the filters'
    `prepare` do.
    """
    if not filters:
        return correction
    logp, mask_MT = sampled_logp(scores), scores.batch.mask_MT
    stays_MT, metrics = mask_MT, {}
    for name, method in filters:
        _, own_MT, _ = method.prepare(scores, sum_over_batch).weigh(logp, scores)
        metrics[f"filter/{name}"] = mean_over(own_MT, mask_MT)
        stays_MT = stays_MT & own_MT
    metrics["filter/kept"] = mean_over(stays_MT, mask_MT)
    keep_MT, counted_MT = correction.keep_MT & stays_MT, correction.counted_MT
    return replace(
        correction,
        keep_MT=keep_MT,
        weight_MT=torch.where(keep_MT, correction.weight_MT, 0.0),
        counted_MT=counted_MT if counts_all else torch.where(stays_MT, counted_MT, 0.0),
        accept_MT=torch.where(stays_MT, correction.accept_MT, 0),
        metrics={**correction.metrics, **metrics},
    )
