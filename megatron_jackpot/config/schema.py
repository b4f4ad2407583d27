"""The whole configuration, and what its sections ask of each other.

The text under a field is its documentation: `megatron-jackpot train --help` prints it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationInfo, model_validator

from megatron_jackpot.config.agreement import AGREEMENT, new_tokens
from megatron_jackpot.config.algorithm import Algorithm, Packing
from megatron_jackpot.config.base import Method, Section, section_of
from megatron_jackpot.config.cluster import Cluster
from megatron_jackpot.config.data import Data, Evaluation
from megatron_jackpot.config.models import Actor, Parallel, Policy, Precision
from megatron_jackpot.config.run import Guards, Logging, Run
from megatron_jackpot.config.servers import Rollouts, Servers, Sync

REFERENCE = "policy.reference"
"""Name of the model that the policy is held near."""
DEFAULT_CANDIDATES = 20
"""The paper's k."""
MISTAKES = "mistakes"
"""Key of the validation context: a list there takes what sections ask of each other, in place of an error."""


class Config(Section):
    run: Run
    policy: Policy
    actor: Actor | None
    data: Data = Data()
    rollout: Rollouts = Rollouts()
    servers: Servers = Servers()
    algorithm: Algorithm = Algorithm()
    packing: Packing = Packing()
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    sync: Sync = Sync()
    evaluation: Evaluation = Evaluation()
    guard: Guards = Guards()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()

    @property
    def models(self) -> dict[str, Policy | Actor]:
        """Name -> the section of each model that is trained, the policy first."""
        return {"policy": self.policy, **({} if self.actor is None else {"actor": self.actor})}

    @property
    def folders(self) -> dict[str, Path]:
        """Name -> folder of every model that has one of its own; NAME.hf is its key."""
        folders = {name: section.hf for name, section in self.models.items()}
        reference = self.policy.reference
        return folders if reference is None or reference.hf is None else {**folders, REFERENCE: reference.hf}

    @property
    def served(self) -> Literal["policy", "actor"]:
        """The model that servers hold and whose weights are pushed to them: `rollout.model`, where it is
        one of this configuration."""
        return "policy" if self.actor is None else "actor"

    @property
    def served_hf(self) -> Path:
        """Its folder."""
        return self.models[self.served].hf

    @property
    def server_dtype(self) -> Literal["float32", "bfloat16"]:
        """dtype of the servers' weights."""
        return self.servers.dtype or self.precision.dtype

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with the longest response, of rollouts and of evaluation."""
        return self.data.max_prompt_tokens + max(new_tokens(self).values())

    @property
    def num_candidates(self) -> int:
        """k of the policy's top-k, and of the served model's where servers return none."""
        return self.algorithm.num_candidates or self.rollout.top_k_logp or DEFAULT_CANDIDATES

    @model_validator(mode="after")
    def _fields_agree(self, info: ValidationInfo) -> "Config":
        mistakes = [mistake for check in AGREEMENT for mistake in check.find(self)]
        found = (info.context or {}).get(MISTAKES)
        if found is not None:
            found += mistakes
        elif mistakes:
            raise ValueError("\n".join(mistakes))
        return self


def _method_keys(section: type[Section], kind: object, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if field.annotation == kind:
            yield f"{prefix}{name}"
        elif (below := section_of(field.annotation)) is not None:
            yield from _method_keys(below, kind, f"{prefix}{name}.")


METHOD_KEYS = tuple(_method_keys(Config, Method))
"""Keys whose value is a method of a registry: {name: ..., setting: value}, or the name alone."""
METHOD_LIST_KEYS = tuple(_method_keys(Config, tuple[Method, ...]))
"""Keys whose value is a list of such methods."""
