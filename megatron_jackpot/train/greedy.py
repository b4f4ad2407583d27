"""Greedy decoding with a MegatronModel by full recomputation, for evaluating a policy no server holds.

Cost grows with the square of the answer length: meant for short answers and small evaluations.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_jackpot.data.bins import fill_bins
from megatron_jackpot.data.packing import make_batch, pack_row, stack_rows
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.parallel.linear import Logits
from megatron_jackpot.records import Batch, Prompt, Rollout

Argmax = Callable[[Logits], Tensor]

NOTHING: dict[str, np.ndarray] = dict(
    tokens=np.empty(0, np.int32),
    server_logp=np.empty(0, np.float32),
    topk_ids=np.empty((0, 0), np.int32),
    topk_logp=np.empty((0, 0), np.float32),
    valid=np.empty(0, np.bool_),
    weight_version=np.empty(0, np.int32),
)


def greedy(
    model: MegatronModel,
    prompts: Sequence[Sequence[int]],
    argmax: Argmax,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    packing_tokens: int,
    each: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Greedy answers, stop token included. `argmax` maps logits [T, V/TP] to ids [T] on the last stage;
    `each` is called before each token, to end it by raising.

    Every rank of one copy of the model must call it with the same prompts; copies may differ within the
    model's `fresh_parameters`.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not running:
            break
        each()
        sequences = [[*prompts[i], *answers[i]] for i in running]
        for i, token in zip(running, _next_tokens(model, sequences, argmax, packing_tokens), strict=True):
            answers[i].append(token)
        running = [i for i in running if answers[i][-1] not in stop_ids]
    return answers


def _next_tokens(model: MegatronModel, sequences: list[list[int]], argmax: Argmax, tokens: int) -> list[int]:
    bins = fill_bins([len(s) for s in sequences], tokens)
    multiple = model.mesh.pp if len(model.chunks) > 1 else 1
    bins += [[]] * (math.ceil(len(bins) / multiple) * multiple - len(bins))
    batch = _pack(sequences, bins, tokens, model.mesh.device)
    scored = model.score(batch, lambda logits, _: {"id": argmax(logits)})
    shape = batch.tokens_MT.shape
    ids_MT = (
        torch.empty(shape, dtype=torch.int64, device=model.mesh.device) if scored is None else scored["id"]
    )
    ids_MT = model.mesh.from_last_stage(ids_MT.contiguous()).cpu()
    following = [0] * len(sequences)
    for row, content in enumerate(bins):
        end = 0
        for index in content:
            end += len(sequences[index])
            following[index] = int(ids_MT[row, end - 1])
    return following


def _pack(sequences: list[list[int]], bins: list[list[int]], tokens: int, device: torch.device) -> Batch:
    """Prompts without a response, as micro-batches on `device`."""
    rows = []
    for content in bins:
        bare = [
            Rollout(
                prompt=Prompt(i, tuple(sequences[i]), None),
                epoch=0,
                sample=0,
                finish="stop",
                reward=0.0,
                parts={},
                correct=False,
                advantage=0.0,
                loss_weight=1.0,
                **NOTHING,
            )
            for i in content
        ]
        rows.append(pack_row(bare, tokens, 0, first_segment=0))
    return make_batch({name: column.to(device) for name, column in stack_rows(rows).items()})
