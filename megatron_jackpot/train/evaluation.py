"""Held-out accuracy of the models: the served one through the servers, another through Megatron."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, Protocol

import torch

from megatron_jackpot.config import Config
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.monitor.metrics import Row
from megatron_jackpot.parallel.reduce import reduce_metrics
from megatron_jackpot.parallel.vocab import vocab_parallel_argmax
from megatron_jackpot.records import Metrics, Pair, Prompt
from megatron_jackpot.rollout.collect import Interrupted
from megatron_jackpot.rollout.outcome import asking
from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.run.limits import evaluation_s
from megatron_jackpot.train.greedy import greedy
from megatron_jackpot.train.samples import answer_row, task_of
from megatron_jackpot.train.state import TrainState

MOST_TASKS = 32
"""Tasks of a set that have an accuracy of their own; of a set with more none has."""


Answers = list[list[list[int]]]
"""Of each prompt its answers, each as tokens."""


class Judge(Protocol):
    """Answers of the servers, verdicts on answers, their text; on DP leaders."""

    def answers(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        samples: int,
        temperature: float,
        stop: Stop = never,
    ) -> Answers: ...

    def verdicts(
        self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt], stop: Stop = never
    ) -> tuple[list[bool], float]: ...

    def text(self, tokens: Sequence[int]) -> str: ...

    def server_gib(self) -> float | None: ...


class Evaluated(NamedTuple):
    """What the main rank learns from an evaluation; both are empty elsewhere."""

    metrics: dict[str, float]
    samples: list[Row]
    """The models' answers to the first problems, for the report."""


class Evaluator:
    """Accuracy of the models on named sets of prompts, that of the data's own held-out problems being ""."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        judge: Judge | None,
        sets: Mapping[str, list[Prompt]],
        *,
        stop_ids: tuple[int, ...],
        packing_tokens: int,
        stop: Stop = never,
    ) -> None:
        self.config, self.state, self.judge, self.stop = config, state, judge, stop
        self.sets = {name: prompts for name, prompts in sets.items() if prompts}
        self.stop_ids, self.packing_tokens = stop_ids, packing_tokens

    def __call__(self) -> Evaluated:
        """eval/MODEL_accuracy of every model, of each task where there are several, pass@k where answers are
        several, all under eval/SET/ for a named set; and eval/failed_rewards. Every rank must call it. Raises
        StopRun where it was interrupted."""
        mesh = self.state.mesh
        pairs: Metrics = {}
        samples: list[Row] = []
        failed = counted = 0.0
        # Before servers are asked: ranks that ask none wait in the store then, not in a model's collective.
        recomputed, stopped = self._recomputed()
        with asking(mesh, f"eval-{self.state.num_steps}", self.limit_s):
            if stopped is not None:
                raise stopped
            for name, (mine, prompts) in self._parts().items():
                if self.judge is None:
                    continue
                given = recomputed[name] | {self.state.served.name: self._served(mine, self.judge)}
                for model, answers in given.items():
                    right, lost = judged(mine, answers, self.judge, self.stop)
                    failed, counted = failed + lost, counted + sum(map(len, answers))
                    scored = Scored(f"eval/{name}/{model}" if name else f"eval/{model}", mine, right)
                    pairs |= scored.metrics(tasks_of(prompts)) | scored.passes(self._samples(model))
                    first = self.config.evaluation.keep
                    samples += kept(name, model, mine[:first], answers, right, self.judge)
            if self.judge is not None:
                pairs["eval/failed_rewards"] = pair(failed, counted)
        metrics = reduce_metrics(pairs, mesh.dp_group) if mesh.is_leader else {}
        if not mesh.is_main:
            return Evaluated({}, [])
        if self.judge is not None and (held := self.judge.server_gib()) is not None:
            metrics["memory/server_gib"] = held
        return Evaluated(metrics, samples)

    @property
    def limit_s(self) -> float:
        """How long a leader may be at its servers and rewards."""
        return evaluation_s(self.config.run.phase_timeout_s, len(self.sets), len(self.state.models))

    def _parts(self) -> dict[str, tuple[list[Prompt], list[Prompt]]]:
        """(this rank's part, the whole) of every set."""
        mesh = self.state.mesh
        return {name: (whole[mesh.dp_rank :: mesh.dp], whole) for name, whole in self.sets.items()}

    def _samples(self, model: str) -> int:
        """Answers of a model to each problem: the same on every leader, also on one without a problem."""
        return self.config.evaluation.samples if model == self.state.served.name else 1

    def _served(self, prompts: list[Prompt], judge: Judge) -> Answers:
        wanted = self.config.evaluation
        return judge.answers(
            prompts,
            wanted.max_new_tokens,
            samples=wanted.samples,
            temperature=wanted.temperature,
            stop=self.stop,
        )

    def _go_on(self) -> None:
        """Raises Interrupted, on every rank of this copy of the models alike."""
        reason = self.state.mesh.from_leader(self.stop())
        if reason is not None:
            raise Interrupted(reason, [], {})

    def _recomputed(self) -> tuple[dict[str, dict[str, Answers]], Interrupted | None]:
        """Greedy answers to every set of the models that no server holds, none where they are left out; and
        what this copy of the models was stopped by."""
        state, left_out = self.state, self.config.evaluation.policy == "off"
        models = {} if left_out else {n: m for n, m in state.models.items() if m is not state.served}
        found: dict[str, dict[str, Answers]] = {name: {} for name in self.sets}
        with ExitStack() as fresh:
            # Once for all: copies come to different numbers of tokens, and not all hear a stop at the same.
            for model in models.values():
                fresh.enter_context(model.fresh_parameters())
            try:
                for name, (mine, _) in self._parts().items():
                    found[name] = {model: self._greedy(models[model], mine) for model in models}
            except Interrupted as stopped:
                return found, stopped
        return found, None

    def _greedy(self, model: MegatronModel, prompts: list[Prompt]) -> Answers:
        answers = greedy(
            model,
            [prompt.tokens for prompt in prompts],
            partial(vocab_parallel_argmax, vocab=model.vocab()),
            max_new_tokens=self.config.evaluation.max_new_tokens,
            stop_ids=self.stop_ids,
            packing_tokens=self.packing_tokens,
            each=self._go_on,
        )
        return [[answer] for answer in answers]


def judged(
    prompts: Sequence[Prompt], answers: Answers, judge: Judge, stop: Stop = never
) -> tuple[list[list[bool]], float]:
    """Verdicts in the shape of `answers`, and the number of rewards that failed."""
    flat = [answer for group in answers for answer in group]
    asked = [prompt for prompt, group in zip(prompts, answers, strict=True) for _ in group]
    right, failed = judge.verdicts(flat, asked, stop)
    verdicts = iter(right)
    return [[next(verdicts) for _ in group] for group in answers], failed


def kept(
    name: str, model: str, prompts: Sequence[Prompt], answers: Answers, right: list[list[bool]], judge: Judge
) -> Iterator[Row]:
    """The first answer to each of `prompts`, which may be fewer than were asked."""
    for prompt, given, good in zip(prompts, answers, right, strict=False):
        yield {"set": name, "model": model, **answer_row(prompt, given[0], good[0], judge.text)}


class Scored(NamedTuple):
    """Verdicts on one model's answers to one set, on one leader."""

    name: str
    """Example: "eval/policy"."""
    prompts: list[Prompt]
    right: list[list[bool]]
    """Of each prompt its answers'."""

    def metrics(self, tasks: list[str]) -> Metrics:
        """(sum, count), the same names on every leader, whatever its prompts."""
        pairs = {f"{self.name}_accuracy": self._mean(self.right)}
        for task in tasks:
            own = [r for p, r in zip(self.prompts, self.right, strict=True) if task_of(p) == task]
            pairs[f"{self.name}_accuracy/{task}"] = self._mean(own)
        return pairs

    def passes(self, samples: int) -> Metrics:
        """pass@k for k = 2, 4, 8 ... and all samples."""
        sizes = {2**power for power in range(1, samples.bit_length()) if 2**power <= samples} | {samples}
        return {
            f"{self.name}_pass@{k}": pair(
                sum(pass_at(k, len(good), sum(good)) for good in self.right), len(self.right)
            )
            for k in sorted(sizes - {1})
        }

    @staticmethod
    def _mean(right: list[list[bool]]) -> Pair:
        """avg@k: the share of all answers."""
        return pair(sum(map(sum, right)), sum(map(len, right)))


def pass_at(k: int, samples: int, right: int) -> float:
    """The unbiased estimate of the chance that one of k answers is right, of which `right` of `samples` were:
    1 - C(samples - right, k) / C(samples, k) (2107.03374, equation 1). k is at most `samples`."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def tasks_of(prompts: Sequence[Prompt]) -> list[str]:
    """The tasks of a set that have an accuracy of their own."""
    tasks = sorted({task for prompt in prompts if (task := task_of(prompt)) is not None})
    return tasks if 1 < len(tasks) <= MOST_TASKS else []


def pair(total: float, count: float) -> Pair:
    return torch.tensor(float(total)), torch.tensor(float(count))
