"""`megatron-jackpot evaluate`: a model's answers to named sets, from SGLang servers of its own, into its run.

Nothing of the run is touched, which may go on meanwhile: the servers take the last GPUs that
CUDA_VISIBLE_DEVICES leaves, and hold a copy of the weights that is removed at the end.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_jackpot.config import Config
from megatron_jackpot.data.prompts import Limits, heldout_prompts, named_prompts, training_prompts
from megatron_jackpot.data.tokenizer import load_tokenizer, text_of
from megatron_jackpot.models.convert import megatron_to_hf
from megatron_jackpot.models.dist_folder import is_dist_folder
from megatron_jackpot.monitor.evaluations import prefix, write_evaluations
from megatron_jackpot.monitor.metrics import Row
from megatron_jackpot.records import Prompt
from megatron_jackpot.run.clock import started_at
from megatron_jackpot.servers import api_key
from megatron_jackpot.servers.gpus import place_servers
from megatron_jackpot.servers.process import start_servers, stop_servers
from megatron_jackpot.train.assembly import checked_stop_ids, load_families, make_source, reward_pool
from megatron_jackpot.train.evaluand import Evaluand
from megatron_jackpot.train.evaluation import Judge, Scored, judged, kept, tasks_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

FOLDER = "evaluation"
"""In the run's folder: logs of the servers, and the copy of the weights."""
Sets = dict[str, list[Prompt]]
"""Name -> prompts; the data's own held-out problems are ""."""


@dataclass(frozen=True)
class Asked:
    """One evaluation: of what, of which sets, and the tokens that end an answer."""

    it: Evaluand
    config: Config
    sets: Sets
    stop_ids: tuple[int, ...]


def evaluate(it: Evaluand, config: Config) -> list[Row]:
    """Ask, judge and write down; the rows, one for each set, each written when its set is judged.

    Raises ValueError or FileNotFoundError, before a server is started, for anything that cannot work;
    RuntimeError or TimeoutError where servers do not start, ServerError where they stop to answer.
    """
    tokenizer = load_tokenizer(it.folder)
    families = load_families(config)
    eos = tokenizer.eos_token_id
    stop_ids = checked_stop_ids(config, families, eos if isinstance(eos, int) else None)
    log.info("reading the problems")
    limits = Limits(
        rows={name: family.vocab_size for name, family in families.items()},
        now=started_at(it.run, resume=True),
    )
    asked = Asked(it, config, sets_of(it, config, tokenizer, limits), stop_ids)
    log.info(f"checking the labels of {sum(map(len, asked.sets.values()))} problems")
    check_labels(asked)
    work = it.run / FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with weights(it, work) as hf, served(config, hf, work) as serving:
        with closing(make_source(serving, families, stop_ids, partial(text_of, tokenizer))) as judge:
            rows = list[Row]()
            for name in asked.sets:
                row, answers = ask(asked, name, judge)
                write_evaluations(it.run, [row], answers)
                rows.append(row)
            return rows


def sets_of(it: Evaluand, config: Config, tokenizer: "PreTrainedTokenizerFast", limits: Limits) -> Sets:
    """As the run itself has them: without problems that it trains on."""
    data, wanted = config.data, config.evaluation
    trained = training_prompts(data, tokenizer, limits=limits).texts if it.has_settings else frozenset()
    sets = {
        "": heldout_prompts(data, wanted, tokenizer, exclude=trained, limits=limits).prompts,
        **named_prompts(data, wanted, tokenizer, exclude=trained, limits=limits),
    }
    found = {name: prompts for name, prompts in sets.items() if prompts}
    if not found:
        raise ValueError("There is nothing to evaluate. Name a set with --data NAME=FILE.")
    return found


def check_labels(asked: Asked) -> None:
    """Raises ValueError naming the lines whose label no answer could match, or for a reward that cannot be
    loaded."""
    with reward_pool(asked.config.data) as pool:
        for name, prompts in asked.sets.items():
            path = asked.config.evaluation.sets[name].path if name else asked.config.data.heldout_path
            if path is not None:
                asyncio.run(pool.check_labels(prompts, path))


@contextmanager
def weights(it: Evaluand, work: Path) -> Iterator[Path]:
    """The model as an HF folder: itself, or a copy that is gone afterwards."""
    if not is_dist_folder(it.folder):
        yield it.folder
        return
    with tempfile.TemporaryDirectory(dir=work, prefix="weights-") as room:
        log.info(f"exporting {it.folder}")
        megatron_to_hf(it.folder, Path(room) / it.model)
        yield Path(room) / it.model


@contextmanager
def served(config: Config, hf: Path, work: Path) -> Iterator[Config]:
    """The configuration with the addresses of servers that hold `hf`, and end with the block."""
    api_key.provide(config.servers.host)
    log.info(f"starting {config.servers.num} SGLang server(s), logs in {work}")
    placement, began = place_servers(config.servers), time.monotonic()
    servers = start_servers(config.servers, hf, placement, work, dtype=config.server_dtype)
    try:
        urls = tuple(server.url for server in servers)
        log.info(f"servers answer after {time.monotonic() - began:.0f} s: {', '.join(urls)}")
        yield config.model_copy(update={"servers": config.servers.model_copy(update={"urls": urls})})
    finally:
        stop_servers(servers)


def ask(asked: Asked, name: str, judge: Judge) -> tuple[Row, list[Row]]:
    """The row of one set, and the first answers."""
    prompts, wanted, model = asked.sets[name], asked.config.evaluation, asked.it.model
    log.info(f"{name or 'held out'}: {len(prompts)} problems, {wanted.samples} answer(s) each")
    began = time.monotonic()
    answers = judge.answers(
        prompts, wanted.max_new_tokens, samples=wanted.samples, temperature=wanted.temperature
    )
    seconds = time.monotonic() - began
    right, failed = judged(prompts, answers, judge)
    scored = Scored(prefix({"set": name, "model": model}), prompts, right)
    pairs = scored.metrics(tasks_of(prompts)) | scored.passes(wanted.samples)
    row = {
        "step": asked.it.step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "folder": str(asked.it.folder),
        "model": model,
        "set": name,
        "problems": len(prompts),
        "samples": wanted.samples,
        "temperature": wanted.temperature,
        "max_new_tokens": wanted.max_new_tokens,
        "metrics": {key: float(total / count) for key, (total, count) in pairs.items() if count},
        "truncated": _cut(answers, asked.stop_ids),
        "failed_rewards": failed,
        "seconds": round(seconds, 3),
    }
    first = kept(name, f"{model} at T={wanted.temperature:g}", prompts[: wanted.keep], answers, right, judge)
    return row, [{"step": asked.it.step, **answer} for answer in first]


def _cut(answers: Sequence[Sequence[Sequence[int]]], stop_ids: Sequence[int]) -> float:
    """The share of answers that did not end by themselves."""
    ends = [bool(answer) and answer[-1] in stop_ids for group in answers for answer in group]
    return 1 - sum(ends) / len(ends)
