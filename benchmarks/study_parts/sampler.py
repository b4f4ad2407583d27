"""Rollouts of the study: sampled in the trainer's process, with the log-probs that a server would report.

Shapes: B sequences, R response tokens of one, K the proposal's top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from benchmarks.study_parts.decoder import Decoder
from megatron_jackpot.algorithm.obrs import counter_uniform
from megatron_jackpot.records import Prompt
from megatron_jackpot.servers.protocol import Completion

STREAM = 1 << 62
"""In the place of a step in the key of the draws: none of the accept draws has it."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How to sample: as servers.protocol.Sampling, and the key of the draws."""

    seed: int
    temperature: float
    max_new_tokens: int
    top_k: int
    stop_ids: tuple[int, ...]


def sample_groups(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    samples: Sequence[range],
    epoch: int,
    version: int,
    draws: Draws,
) -> list[list[Completion]]:
    """A completion of each prompt for every number of a sample in its range. What is drawn is a function of
    (seed, epoch, prompt id, sample, position) and of the weights."""
    logits, state = decoder.prefill([prompt.tokens for prompt in prompts], draws.max_new_tokens)
    times = torch.tensor([len(numbers) for numbers in samples])
    logits, state = logits.repeat_interleave(times, 0), state.repeated(times)
    own = zip(prompts, samples, strict=True)
    key = torch.tensor([(epoch, prompt.id, sample) for prompt, numbers in own for sample in numbers])
    stop, running = torch.tensor(draws.stop_ids), torch.ones(len(key), dtype=torch.bool)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    length = torch.full((len(key),), draws.max_new_tokens)
    for position in range(draws.max_new_tokens):
        logp = (logits / draws.temperature).log_softmax(-1)
        uniform = counter_uniform(draws.seed, STREAM, key, torch.full((len(key),), position))
        ids = draw(logp, uniform)
        best = logp.topk(draws.top_k, -1)
        columns.append((ids, logp.gather(-1, ids[:, None])[:, 0], best.indices, best.values))
        ended = running & torch.isin(ids, stop)
        length[ended] = position + 1
        running = running & ~ended
        if not bool(running.any()) or position == draws.max_new_tokens - 1:
            break
        logits = decoder.step(ids, state)
    ids, logp, topk_ids, topk_logp = (torch.stack(column, 1).numpy() for column in zip(*columns, strict=True))
    made = [
        _completion(ids[row, :n], logp[row, :n], topk_ids[row, :n], topk_logp[row, :n], version, bool(late))
        for row, (n, late) in enumerate(zip(length.tolist(), running, strict=True))
    ]
    rows = iter(made)
    return [list(islice(rows, len(numbers))) for numbers in samples]


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Ids [B] by the inverse of the cumulated probabilities [B, V]; never one of probability 0."""
    cumulated = logp.double().exp().cumsum(-1)
    return torch.searchsorted(cumulated, uniform.double()[:, None] * cumulated[:, -1:], right=True)[:, 0]


def _completion(
    ids: np.ndarray, logp: np.ndarray, topk_ids: np.ndarray, topk_logp: np.ndarray, version: int, late: bool
) -> Completion:
    return Completion(
        tokens=ids.astype(np.int32),
        server_logp=logp,
        topk_ids=topk_ids.astype(np.int32),
        topk_logp=topk_logp,
        valid=np.ones(len(ids), np.bool_),
        weight_version=np.full(len(ids), version, np.int32),
        finish="length" if late else "stop",
    )
