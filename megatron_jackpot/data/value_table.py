"""V* of every training prompt, which the objective a_star_po compares rewards with: what `megatron-jackpot
values` writes, and a run checks before it begins."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_jackpot.config import Config
from megatron_jackpot.data.loader import prompt_digest
from megatron_jackpot.records import Prompt

OBJECTIVE = "a_star_po"
"""Name of the objective that asks for a table."""
DEFAULT = "values.json"
"""Its default."""
COMMAND = "megatron-jackpot values CONFIG"
SHOWN = 5
"""Prompts that are named where some are missing."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the values are of. Example: Source(reference="9f86d0...", samples=8, beta=0.5, ...)."""

    reference: str
    """sha256 of the reference's configuration and weights."""
    samples: int
    beta: float
    """Of V* = beta log mean exp(r / beta)."""
    temperature: float
    max_new_tokens: int
    rewards: dict[str, str]
    """Name and weight of each reward function, by its key in the configuration."""


@dataclass(frozen=True, kw_only=True)
class ValueTable:
    """Example of a file: {"source": {...}, "values": [[7, "0c5e...", 0.53], ...]}."""

    source: Source
    values: dict[int, float] = field(default_factory=dict)
    """Prompt id -> V*."""
    digests: dict[int, str] = field(default_factory=dict)
    """Prompt id -> what the prompt was: its digest."""

    @classmethod
    def read(cls, path: Path) -> "ValueTable":
        """Raises ValueError naming the file where it is none."""
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            rows = [(int(number), str(digest), float(value)) for number, digest, value in held["values"]]
            source = Source(**held["source"])
        except FileNotFoundError as error:
            raise ValueError(
                f"algorithm.objective.values = {path} is not there. Make it with `{COMMAND}`."
            ) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"algorithm.objective.values = {path} cannot be read: {type(error).__name__}: {error}. "
                f"Delete it and make it anew with `{COMMAND}`."
            ) from error
        return cls(
            source=source,
            values={number: value for number, _, value in rows},
            digests={number: digest for number, digest, _ in rows},
        )

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [[number, self.digests[number], value] for number, value in self.values.items()]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(
            json.dumps({"source": asdict(self.source), "values": rows}) + "\n", encoding="utf-8"
        )
        partial.replace(path)

    def missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those that have no value, or had one when they were others."""
        return [prompt for prompt in prompts if self.digests.get(prompt.id) != prompt_digest(prompt)]

    def check(self, prompts: Sequence[Prompt], path: Path) -> None:
        """Raises ValueError naming the prompts that it does not cover."""
        missing = self.missing(prompts)
        if not missing:
            return
        named = ", ".join(str(prompt.id) for prompt in missing[:SHOWN])
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ValueError(
            f"algorithm.objective.values = {path} has no value for {len(missing)} of {len(prompts)} prompts "
            f"as they are: ids {named}{more}. Add them with `{COMMAND}`."
        )

    def check_source(self, config: Config, reference: str, path: Path) -> None:
        """Raises ValueError where rewards, limits or the reference are others than those of the values."""
        now = source_of(config, reference, samples=self.source.samples, beta=self.source.beta)
        if now != self.source:
            was, is_ = asdict(self.source), asdict(now)
            named = ", ".join(f"{key} = {is_[key]}, was {was[key]}" for key in was if was[key] != is_[key])
            raise ValueError(
                f"algorithm.objective.values = {path} is of other samples: {named}. Set what it was; or "
                f"delete it, or name another file, and use `{COMMAND}`."
            )


def source_of(config: Config, reference: str, *, samples: int, beta: float) -> Source:
    """What values would be of that are made for this configuration."""
    return Source(
        reference=reference,
        samples=samples,
        beta=beta,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        rewards={key: f"{name} x {_weight(config, key)}" for key, name in config.data.reward_names.items()},
    )


def _weight(config: Config, key: str) -> float:
    """Of a reward by its key, data.reward or data.rewards.NAME.reward."""
    parts = config.data.rewards
    return parts[key.split(".")[2]].weight if parts else 1.0


def table_path(config: Config) -> Path | None:
    """The table that a configuration's objective asks for; None where it asks for none."""
    chosen = config.algorithm.objective
    if chosen.name != OBJECTIVE:
        return None
    return Path(str(chosen.settings.get("values", DEFAULT))).expanduser()


def optimal_value(rewards: Sequence[float], beta: float) -> float:
    """V* = beta log mean exp(r / beta) (arXiv 2505.20686): the mean at beta = inf, the largest as beta falls.

    Of few samples it is too low (Jensen).
    """
    if beta == math.inf:
        return sum(rewards) / len(rewards)
    top = max(rewards)
    return top + beta * math.log(sum(math.exp((reward - top) / beta) for reward in rewards) / len(rewards))
