"""What is learned from and judged by: prompts, rewards, evaluation."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_jackpot.config.base import Section


class RewardPart(Section):
    reward: str
    """As data.reward."""
    weight: float = 1.0
    """Of it in the sum; 0 measures it alone."""
    rows: Literal["all", "named"] = "all"
    """named: only rows that name it under `reward`."""


class Code(Section):
    credit: Literal["share", "all"] = "share"
    """The share of a row's tests that pass, or 1 where all do."""
    cpu_s: int = Field(default=2, ge=1)
    """Seconds a response's program may compute for each test, and three times as long by the clock."""
    memory_gb: float = Field(default=0.5, gt=0)
    """Memory that it may take."""
    check_answers: bool = True
    """Refuse rows whose own `answer` does not pass their tests; false where answers are no programs."""
    trusted: bool = False
    """Run programs unsealed, with the rights of this user: where the kernel cannot seal them."""


class Data(Section):
    source: Literal["reasoning_gym", "jsonl"] = "reasoning_gym"
    """Where prompts come from; jsonl stands for files of rows, parquet and data sets on disk among them."""
    tasks: dict[str, dict[str, Any]] = {}
    """reasoning_gym: task name -> its options; mixed in equal shares."""
    size: int = Field(default=10_000, ge=1)
    """reasoning_gym: number of training problems."""
    seed: int = 0
    """reasoning_gym: seed of the problem generator; the order of prompts follows run.seed."""
    path: Path | None = None
    """jsonl: file with one {"prompt": ..., "answer": ...} or {"messages": [...], "answer": ...} a line; or
    with these columns a .parquet file, or a data set's folder: docs/your-own.md."""
    heldout_path: Path | None = None
    """jsonl: held-out problems for evaluation."""
    template: str | None = None
    """Text around a problem, with {question}; null uses the tokenizer's chat template."""
    template_args: dict[str, Any] = {}
    """Variables of the chat template, for example {enable_thinking: false}."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """Longer prompts are dropped and counted."""
    changed_rows: tuple[int, ...] = ()
    """Rows (line - 1) that were trained on and may differ from the checkpoint's on resume; later rows always
    may."""
    reward: str = "exact"
    """exact, reasoning_gym, math_verify, code, your own package.module:name, called (response_text, label) ->
    float, or a service's http://HOST:PORT/PATH: docs/rewards.md."""
    rewards: dict[str, RewardPart] = {}
    """Several by name, in place of data.reward, for example {answer: {reward: exact}, short: {reward:
    package.module:name, weight: 0.1}}: docs/rewards.md."""
    reward_workers: int = Field(default=2, ge=1)
    """Worker processes of the reward pool."""
    reward_memory_gb: float = Field(default=4.0, gt=0)
    """Memory one reward worker may take; beyond it the reward is 0 and the event is counted."""
    reward_network: bool = False
    """Leave the reward workers their network, for a reward that asks a service."""
    reward_timeout_s: float = Field(default=10.0, gt=0)
    """Time limit of one reward; on expiry the reward is 0 and the event is counted."""
    reward_batch: int = Field(default=32, ge=1)
    """Responses that a reward's service is sent in one request."""
    code: Code = Code()
    """The reward `code`: docs/rewards.md."""
    max_failed_rewards: float = Field(default=0.05, ge=0, le=1)
    """Share of a step's rewards that may time out or crash; above it, and at 20 or more, the run stops."""

    @property
    def judge(self) -> "str | dict[str, RewardPart]":
        """What says how good a response is: the one reward, or name -> part of several."""
        return self.rewards or self.reward

    @property
    def reward_names(self) -> dict[str, str]:
        """Key -> reward, of every one that is used."""
        if not self.rewards:
            return {"data.reward": self.reward}
        return {f"data.rewards.{name}.reward": part.reward for name, part in self.rewards.items()}


class HeldoutSet(Section):
    path: Path
    """File like data.heldout_path, judged by data.reward."""
    size: int | None = Field(default=None, ge=1)
    """Problems, from the first on; null takes all."""


class Evaluation(Section):
    every: int = Field(default=10, ge=1)
    """Steps between evaluations; the first step and the last are always evaluated."""
    size: int = Field(default=128, ge=0)
    """Held-out problems; 0 leaves them out, and without `sets` nothing is evaluated."""
    sets: dict[str, HeldoutSet] = {}
    """More sets by name, for example {aime: {path: aime.jsonl}}: eval/aime/policy_accuracy."""
    samples: int = Field(default=1, ge=1)
    """Answers to each problem: accuracy is their mean (avg@k), and pass@2, pass@4 up to all of them are
    written."""
    temperature: float = Field(default=0.0, ge=0)
    """At which the answers are drawn; 0 takes the most probable one."""
    policy: Literal["recompute", "off"] = "recompute"
    """A policy that no server holds: greedy answers by recomputing each sequence for each token, up to 256
    tokens; off leaves it to `megatron-jackpot evaluate RUN`, with servers of its own."""
    seed: int = 1_000_003
    """reasoning_gym: seed of the held-out problems; any that also occur in training are removed."""
    max_new_tokens: int = Field(default=16, ge=1)
    """Longest answer."""
    keep: int = Field(default=8, ge=0)
    """Problems whose answers are kept in RUN/samples.jsonl for the report, the first ones of each set."""

    @field_validator("policy", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        """YAML reads a bare off as false."""
        if value == "servers":
            raise ValueError(
                "evaluation.policy = 'servers': those of a joint run hold the actor, whose shape is another. "
                "Set it to off, and judge checkpoints with `megatron-jackpot evaluate RUN`."
            )
        return "off" if value is False else value

    @property
    def wanted(self) -> bool:
        """Whether there is something to evaluate."""
        return self.size > 0 or bool(self.sets)
