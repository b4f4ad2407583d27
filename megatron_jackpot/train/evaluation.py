"""Held-out accuracy of the models: the served one through the servers, another through Megatron."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from megatron_jackpot.config import Config
from megatron_jackpot.monitor.metrics import Row
from megatron_jackpot.parallel.reduce import reduce_metrics
from megatron_jackpot.parallel.vocab import vocab_parallel_argmax
from megatron_jackpot.records import Metrics, Prompt
from megatron_jackpot.train.greedy import greedy
from megatron_jackpot.train.samples import answer_row, task_of
from megatron_jackpot.train.state import TrainState

MOST_TASKS = 32
"""Tasks of a set that have an accuracy of their own; of a set with more none has."""


class Judge(Protocol):
    """Greedy answers of the servers, verdicts on answers, their text; on DP leaders."""

    def greedy(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]: ...

    def verdicts(
        self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt]
    ) -> tuple[list[bool], float]: ...

    def text(self, tokens: Sequence[int]) -> str: ...

    def server_gib(self) -> float | None: ...


class Evaluated(NamedTuple):
    """What the main rank learns from an evaluation; both are empty elsewhere."""

    metrics: dict[str, float]
    samples: list[Row]
    """The models' answers to the first problems, for the report."""


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
        tasks = sorted({task for prompt in prompts if (task := task_of(prompt)) is not None})
        self.tasks = tasks if 1 < len(tasks) <= MOST_TASKS else []

    def __call__(self) -> Evaluated:
        """eval/NAME_accuracy of every model, of each task where there are several, and eval/failed_rewards.
        Every rank must call it."""
        mesh, limit = self.state.mesh, self.config.evaluation.max_new_tokens
        mine = self.prompts[mesh.dp_rank :: mesh.dp]
        answers = self._recomputed(mine, limit)
        pairs: Metrics = {}
        samples: list[Row] = []
        failed = judged = 0.0
        if self.judge is not None:
            answers[self.state.served.name] = self.judge.greedy(mine, limit)
            for name, given in answers.items():
                right, lost = self.judge.verdicts(given, mine)
                failed, judged = failed + lost, judged + len(mine)
                pairs |= self._accuracies(name, mine, right)
                samples += self._kept(name, mine, given, right)
            pairs["eval/failed_rewards"] = _pair(failed, judged)
        mesh.wait_for_leaders(f"eval-{self.state.num_steps}", self.config.rollout.request_timeout_s * 2)
        metrics = reduce_metrics(pairs, mesh.dp_group) if mesh.is_leader else {}
        if not mesh.is_main:
            return Evaluated({}, [])
        if self.judge is not None and (held := self.judge.server_gib()) is not None:
            metrics["memory/server_gib"] = held
        return Evaluated(metrics, samples)

    def _recomputed(self, prompts: list[Prompt], limit: int) -> dict[str, list[list[int]]]:
        """Answers of the models that no server holds."""
        return {
            name: greedy(
                model,
                [prompt.tokens for prompt in prompts],
                partial(vocab_parallel_argmax, vocab=model.vocab()),
                max_new_tokens=limit,
                stop_ids=self.stop_ids,
                packing_tokens=self.packing_tokens,
            )
            for name, model in self.state.models.items()
            if model is not self.state.served
        }

    def _accuracies(self, name: str, prompts: list[Prompt], right: list[bool]) -> Metrics:
        """The same names on every leader, whatever its prompts."""
        pairs = {f"eval/{name}_accuracy": _pair(sum(right), len(right))}
        for task in self.tasks:
            own = [good for prompt, good in zip(prompts, right, strict=True) if task_of(prompt) == task]
            pairs[f"eval/{name}_accuracy/{task}"] = _pair(sum(own), len(own))
        return pairs

    def _kept(
        self, name: str, prompts: list[Prompt], given: list[list[int]], right: list[bool]
    ) -> Iterator[Row]:
        assert self.judge is not None
        few = self.config.evaluation.keep
        for prompt, tokens, good in list(zip(prompts, given, right, strict=True))[:few]:
            yield {"model": name, **answer_row(prompt, tokens, good, self.judge.text)}


def _pair(total: float, count: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(float(total)), torch.tensor(float(count))
