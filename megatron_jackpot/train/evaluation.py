"""Held-out accuracy of both models: the actor through the servers, the policy through Megatron."""

from functools import partial
from typing import Any

import torch

from megatron_jackpot.parallel.reduce import reduce_metrics
from megatron_jackpot.parallel.vocab import vocab_parallel_argmax
from megatron_jackpot.records import Prompt
from megatron_jackpot.train.greedy import greedy


def evaluate(trainer: Any, prompts: list[Prompt], stop_ids: tuple[int, ...]) -> dict[str, float]:
    """Greedy accuracy of policy and actor on `prompts`; {} off the main rank. Every rank must call it."""
    mesh, knobs = trainer.mesh, trainer.config.evaluation
    mine = prompts[mesh.dp_rank :: mesh.dp]
    answers = greedy(
        trainer.policy,
        [prompt.tokens for prompt in mine],
        partial(vocab_parallel_argmax, vocab=trainer.policy.vocab()),
        max_new_tokens=knobs.max_new_tokens,
        stop_ids=stop_ids,
        packing_tokens=trainer.packer.tokens,
    )
    pairs = {}
    if mesh.is_leader:
        served = trainer.source.greedy(mine, knobs.max_new_tokens)
        for name, texts in (("policy", answers), ("actor", served)):
            correct, count = trainer.source.accuracy(texts, mine)
            pairs[f"eval/{name}_accuracy"] = (torch.tensor(correct), torch.tensor(count))
    mesh.wait_for_leaders(f"eval-{trainer.num_steps}", trainer.config.rollout.request_timeout_s * 2)
    metrics = reduce_metrics(pairs, mesh.dp_group) if mesh.is_leader else {}
    return metrics if mesh.is_main else {}
