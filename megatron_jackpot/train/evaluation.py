"""Held-out accuracy of the models: the served one through the servers, another through Megatron."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from megatron_jackpot.config import Config
from megatron_jackpot.parallel.reduce import reduce_metrics
from megatron_jackpot.parallel.vocab import vocab_parallel_argmax
from megatron_jackpot.records import Prompt
from megatron_jackpot.train.greedy import greedy
from megatron_jackpot.train.state import TrainState


class Judge(Protocol):
    """Greedy answers of the servers, and verdicts on answers; on DP leaders."""

    def greedy(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]: ...

    def accuracy(
        self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt]
    ) -> tuple[float, float, float]: ...


class Evaluator:
    """Greedy accuracy of every model on `prompts`."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        judge: Judge | None,
        prompts: list[Prompt],
        *,
        stop_ids: tuple[int, ...],
        packing_tokens: int,
    ) -> None:
        self.config, self.state, self.judge, self.prompts = config, state, judge, prompts
        self.stop_ids, self.packing_tokens = stop_ids, packing_tokens

    def __call__(self) -> dict[str, float]:
        """eval/NAME_accuracy of every model and eval/failed_rewards on the main rank, {} elsewhere. Every
        rank must call it."""
        mesh, served = self.state.mesh, self.state.served
        limit = self.config.evaluation.max_new_tokens
        mine = self.prompts[mesh.dp_rank :: mesh.dp]
        answers = {
            name: greedy(
                model,
                [prompt.tokens for prompt in mine],
                partial(vocab_parallel_argmax, vocab=model.vocab()),
                max_new_tokens=limit,
                stop_ids=self.stop_ids,
                packing_tokens=self.packing_tokens,
            )
            for name, model in self.state.models.items()
            if model is not served
        }
        pairs = {}
        failed = judged = 0.0
        if self.judge is not None:
            answers[served.name] = self.judge.greedy(mine, limit)
            for name, texts in answers.items():
                correct, count, lost = self.judge.accuracy(texts, mine)
                failed, judged = failed + lost, judged + count
                pairs[f"eval/{name}_accuracy"] = (torch.tensor(correct), torch.tensor(count))
            pairs["eval/failed_rewards"] = (torch.tensor(failed), torch.tensor(judged))
        mesh.wait_for_leaders(f"eval-{self.state.num_steps}", self.config.rollout.request_timeout_s * 2)
        metrics = reduce_metrics(pairs, mesh.dp_group) if mesh.is_leader else {}
        return metrics if mesh.is_main else {}
