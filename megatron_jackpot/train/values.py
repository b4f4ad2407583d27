"""`megatron-jackpot values`: V* of every training prompt, from SGLang servers of the frozen reference, into
the table that the objective a_star_po reads."""

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol

from megatron_jackpot.config import Config, ConfigError
from megatron_jackpot.config.load import examine
from megatron_jackpot.data.loader import prompt_digest
from megatron_jackpot.data.prompts import Limits, training_prompts
from megatron_jackpot.data.tokenizer import load_tokenizer, text_of
from megatron_jackpot.data.value_table import (
    OBJECTIVE,
    SHOWN,
    ValueTable,
    optimal_value,
    source_of,
    table_path,
)
from megatron_jackpot.records import Prompt
from megatron_jackpot.run.clock import started_at
from megatron_jackpot.train import evaluate
from megatron_jackpot.train.assembly import checked_stop_ids, load_families, make_source
from megatron_jackpot.train.evaluand import LENT, NO_PACKING, Evaluand
from megatron_jackpot.train.methods import method_mistakes
from megatron_jackpot.train.reference import content_digest

log = logging.getLogger(__name__)

FOLDER = "values"
"""In the run's folder: logs of the servers, and a copy of the weights where they are in Megatron's format."""
AT_ONCE = 256
"""Prompts that are asked for together, after which the table is written."""
SAMPLING = ("temperature", "max_new_tokens", "concurrency", "request_timeout_s", "retries")


class Answering(Protocol):
    """What samples and scores."""

    def answers(
        self, prompts: Sequence[Prompt], max_new_tokens: int, *, samples: int, temperature: float
    ) -> list[list[list[int]]]: ...

    def rewards(self, answers: Sequence[Sequence[int]], prompts: Sequence[Prompt]) -> list[float | None]: ...


def make_values(config: Config, *, samples: int, beta: float) -> Path:
    """Sample, score and write; the table's path. What a table of the same source has already is kept.

    Raises ValueError or FileNotFoundError, before a server is started, for anything that cannot work;
    RuntimeError or TimeoutError where servers do not start, ServerError where they stop to answer,
    RewardsFailing where too many rewards fail. ValueError also, in the end, where all of a prompt's failed.
    """
    path = table_path(config)
    if path is None:
        raise ConfigError(
            f"algorithm.objective.name = '{config.algorithm.objective.name}' asks for no table of values. "
            f"Set algorithm.objective to {{name: {OBJECTIVE}, values: FILE}}."
        )
    if mistakes := method_mistakes(config):
        raise ConfigError("\n".join(mistakes))
    if samples < 1 or not beta > 0:
        raise ConfigError(f"--samples {samples}, --beta {beta:g}: must be >= 1 and > 0. Use 8 and 0.5.")
    assert config.policy.reference is not None, "the objective was refused without one"
    folder = (config.policy.reference.hf or config.policy.hf).resolve()
    alone, tokenizer = of_reference(config, folder), load_tokenizer(config.policy.hf)
    families, eos = load_families(config), tokenizer.eos_token_id
    stop_ids = checked_stop_ids(config, families, eos if isinstance(eos, int) else None)
    rows = {name: family.vocab_size for name, family in families.items()}
    limits = Limits(rows=rows, now=started_at(config.run.folder, config.run.resume))
    prompts = training_prompts(config.data, tokenizer, limits=limits).prompts
    source = source_of(config, content_digest(folder), samples=samples, beta=beta)
    table = ValueTable.read(path) if path.exists() else ValueTable(source=source)
    if table.source != source:
        table.check_source(config, source.reference, path)
        raise ConfigError(
            f"{path} has samples = {table.source.samples}, beta = {table.source.beta:g}, asked are {samples} "
            f"and {beta:g}. Name another file in algorithm.objective.values, or delete it."
        )
    left = table.missing(prompts)
    log.info(f"{len(prompts)} prompts, {len(left)} without a value, {samples} answers of {folder} each")
    if left:
        work = config.run.folder / FOLDER
        work.mkdir(parents=True, exist_ok=True)
        it = Evaluand(folder, "policy", 0, config.run.folder)
        with evaluate.weights(it, work) as hf, evaluate.served(alone, hf, work) as serving:
            own = (load_families(alone), stop_ids, partial(text_of, tokenizer))
            with closing(make_source(serving, *own)) as judge:
                fill(table, left, judge, path)
    if missing := table.missing(prompts):
        named = ", ".join(str(prompt.id) for prompt in missing[:SHOWN])
        raise RuntimeError(
            f"{len(missing)} of {len(prompts)} prompts have no value, for the rewards of all their answers "
            f"failed: ids {named}{', ...' * (len(missing) > SHOWN)}. The others are in {path}. Raise "
            "data.reward_timeout_s, or leave those rows out, and run this again."
        )
    return path


def of_reference(config: Config, folder: Path) -> Config:
    """The configuration of servers that hold the reference alone, and are asked as the run asks its own."""
    given = config.model_dump(mode="json")
    tree = {
        "run": {"folder": str(config.run.folder), "phase_timeout_s": config.run.phase_timeout_s},
        "policy": {"hf": str(folder)},
        "actor": None,
        "data": given["data"],
        "rollout": {
            **{key: given["rollout"][key] for key in SAMPLING},
            **{"model": "policy", "prompts_per_step": 1, "top_k_logp": 1},
        },
        "servers": {key: value for key, value in given["servers"].items() if key not in LENT},
        "precision": {"dtype": config.precision.dtype},
        "packing": {"tokens": NO_PACKING},
        "evaluation": {"size": 0},
    }
    made, mistakes = examine(tree)
    if made is None or mistakes:
        raise ConfigError("\n".join(mistakes))
    return made


def fill(table: ValueTable, prompts: Sequence[Prompt], judge: Answering, path: Path) -> None:
    """Values of these prompts, written after each AT_ONCE of them: who is interrupted goes on from there.

    An answer whose reward failed is left out, as nobody knows what it is worth; a prompt that has no other
    gets no value.
    """
    asked, began = table.source, time.monotonic()
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first : first + AT_ONCE]
        groups = judge.answers(
            some, asked.max_new_tokens, samples=asked.samples, temperature=asked.temperature
        )
        flat = [answer for group in groups for answer in group]
        rewards = judge.rewards(flat, [prompt for prompt in some for _ in range(asked.samples)])
        for place, prompt in enumerate(some):
            own = _known(rewards[place * asked.samples : (place + 1) * asked.samples])
            if own:
                table.values[prompt.id] = optimal_value(own, asked.beta)
                table.digests[prompt.id] = prompt_digest(prompt)
        table.write(path)
        done, known = first + len(some), _known(rewards)
        log.info(
            f"{done} of {len(prompts)} prompts after {time.monotonic() - began:.0f} s, mean reward "
            f"{sum(known) / max(len(known), 1):.3f}; {len(rewards) - len(known)} answers left out, as their "
            "rewards failed"
        )


def _known(rewards: Sequence[float | None]) -> list[float]:
    return [reward for reward in rewards if reward is not None]
