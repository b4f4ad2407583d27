"""What travels between the stages of a step: the documented records alone, each made in one place."""

import ast
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_jackpot import records
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.records import Batch, Correction, DistillInputs, ObjectiveInputs, Prompt, Scores
from megatron_jackpot.rollout.collect import GroupSampler
from megatron_jackpot.servers.protocol import Completion, Sampling
from megatron_jackpot.servers.reply import parse_group
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.rollout.sources import ScriptedSource
from tests.servers.fake_server import flat_topk
from tests.tiny import rollout, rollout_arrays

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_jackpot"
AFTER_PACKING = ("Batch", "Scores", "Correction", "ObjectiveInputs", "DistillInputs")
EVERY_STEP = {"Completion", "Rollout", *AFTER_PACKING}


def makers(source: str, wanted: Sequence[str]) -> list[tuple[str, str]]:
    """(class, function around the call) of every call of a class of `wanted`, under whatever name."""
    tree = ast.parse(source)
    known = {name: name for name in wanted}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            known |= {a.asname: a.name for a in node.names if a.asname and a.name in wanted}
    found = []

    def visit(node: ast.AST, inside: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{inside}.{node.name}"
        if isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            if name in known:
                found.append((known[name], inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, "")
    return found


def test_each_record_from_packing_on_is_constructed_in_one_function() -> None:
    places = {name: set() for name in AFTER_PACKING}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, function in makers(path.read_text(), AFTER_PACKING):
            places[name].add(f"{path.relative_to(PACKAGE)}{function}")
    assert {name: len(functions) for name, functions in places.items()} == dict.fromkeys(places, 1), places


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    return Batch(a=1)", [("Batch", ".f")]),
        ("class A:\n    def f(self):\n        g(records.Scores())", [("Scores", ".A.f")]),
        ("from x import Batch as B\nasync def f():\n    B()", [("Batch", ".f")]),
        ("replace(batch, a=1)\nBatch.rows(batch, 0, 1)\nx: Batch = make_batch()", []),
    ],
)
def test_the_rule_finds_what_it_should(source: str, found: list[tuple[str, str]]) -> None:
    assert makers(source, AFTER_PACKING) == found


def arrays(record: object) -> dict[str, list[Tensor | np.ndarray]]:
    """Field -> the arrays in it, of a dataclass or a named tuple; numbers of the whole batch are none."""
    names = getattr(record, "_fields", None) or [item.name for item in dataclasses.fields(record)]
    held = {}
    for name in names:
        value = getattr(record, name)
        parts = value if isinstance(value, tuple | list) else [value]
        found = [part for part in parts if isinstance(part, Tensor | np.ndarray) and part.ndim]
        if found:
            held[name] = found
    return held


@contextmanager
def constructions() -> Iterator[list[object]]:
    """Every dataclass and named tuple of the package that is constructed within and holds an array."""
    made: list[object] = []

    def watched(method: Callable[..., Any], owner: type) -> Callable[..., Any]:
        def construct(first: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(first, *args, **kwargs)
            record = first if result is None else result
            if type(record) is owner and arrays(record):
                made.append(record)
            return result

        return construct

    modules = [module for name, module in sys.modules.items() if name.startswith("megatron_jackpot")]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    ours = {owner for owner in classes if owner.__module__.startswith("megatron_jackpot")}
    with pytest.MonkeyPatch.context() as patched:
        for owner in ours:
            if dataclasses.is_dataclass(owner):
                patched.setattr(owner, "__init__", watched(owner.__init__, owner))
            elif hasattr(owner, "_fields"):
                patched.setattr(owner, "__new__", watched(owner.__new__, owner))
        yield made


def reply(seed: int, sample: int) -> dict[str, Any]:
    """A response as SGLang writes it, sampled from a random proposal."""
    made = rollout_arrays(seed, sample, top_k=TOP_K)
    tokens = made["tokens"].tolist()
    sampled = zip(made["server_logp"].tolist(), tokens, strict=True)
    meta = {
        "finish_reason": {"type": "stop"},
        "weight_version": "0",
        "output_token_logprobs": [[logp, token, None] for logp, token in sampled],
        **flat_topk(made["topk_ids"], made["topk_logp"]),
    }
    return {"output_ids": tokens, "meta_info": meta}


class Replies:
    """An engine that reads replies, a function of the prompt."""

    async def generate_group(
        self, prompt: Sequence[int], n: int, sampling: Sampling, **_: object
    ) -> list[Completion]:
        group = [reply(sum(prompt), i) for i in range(n)]
        return parse_group(json.dumps(group).encode(), n, sampling, vocab_size=61)


class Source(ScriptedSource):
    """Rollouts of `Replies` on a DP leader."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = GroupSampler(
            client=Replies(),
            sampling=Sampling(temperature=1.0, max_new_tokens=16, top_k_logp=TOP_K),
            samples_per_prompt=4,
            reward=self.reward,
            num_ids=61,
            max_failed_groups=0.0,
        )

    async def reward(self, tokens: Sequence[int], prompt: Prompt) -> tuple[float, bool]:
        return float(tokens[0] % 2), bool(tokens[0] % 2)

    async def collect(self, epoch, prompts, *, stop, keep, losses) -> tuple[list, dict]:
        return await self.sampler.collect(epoch, prompts, stop, keep, losses=losses)


def storages(held: dict[str, list]) -> set[int]:
    return {part.untyped_storage().data_ptr() for parts in held.values() for part in parts if part.numel()}


def copies(made: list[object]) -> list[str]:
    """Fields that are a tensor of a Batch under another name: its memory, or, of what stands beside it
    whole, its numbers."""
    batches = [arrays(record) for record in made if isinstance(record, Batch)]
    of_batches = set().union(*map(storages, batches))
    fields = [part for batch in batches for parts in batch.values() for part in parts]
    found = []
    for record in made:
        if not isinstance(record, Scores | Correction | ObjectiveInputs | DistillInputs):
            continue
        for name, parts in arrays(record).items():
            shared = storages({name: parts}) & of_batches
            # ObjectiveInputs are a micro-batch's numbers, made 0 where nothing can be trained on.
            whole = isinstance(record, Scores | Correction)
            equal = whole and any(torch.equal(part, field) for part in parts for field in fields)
            if shared or equal:
                found.append(f"{type(record).__name__}.{name}")
    return found


def _one_step(rank: int, world: int, folder: str) -> tuple[Counter, list[str], list[str], dict]:
    """Records that a step constructs, copies among them and among forged ones, and the step's metrics."""
    layout = Layout(num_minibatches=2, target="current", distill="forward_topk")
    trainer = load_trainer(make_config(layout, Path(folder)))
    trainer.source = trainer.pipeline.source = Source()
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS)]
    trainer.state.loader = PromptLoader(prompts, NUM_PROMPTS, 0, 1, 5)
    with constructions() as made:
        metrics = trainer.step().metrics
    scores = next(record for record in made if isinstance(record, Scores))
    forged = [
        scores.batch,
        dataclasses.replace(scores, actor_logp_MT=scores.batch.server_logp_MT[:]),
        dataclasses.replace(scores, target_logp_MT=scores.batch.advantage_MT.clone()),
    ]
    return Counter(type(record).__name__ for record in made), copies(made), copies(forged), metrics


@pytest.fixture(scope="module")
def step(folder: Path) -> tuple:
    return run_ranks(_one_step, 1, 240, str(folder))[0]


def test_one_rollout_to_its_loss_constructs_the_documented_records_alone(step: tuple) -> None:
    made, *_, metrics = step
    documented = set(re.findall(r"\w+", records.__doc__))
    assert made.keys() <= documented, made.keys() - documented
    assert made.keys() >= EVERY_STEP, EVERY_STEP - made.keys()
    # Once per micro-batch and model; DistillInputs are the actor's alone.
    assert made["ObjectiveInputs"] == 2 * made["DistillInputs"] > 2
    assert 0.1 < metrics["jackpot/acceptance"] < 0.9 and metrics["grad_norm/policy"] > 0


def test_no_record_after_packing_holds_a_tensor_of_the_batch_a_second_time(step: tuple) -> None:
    _, found, forged, _ = step
    assert found == []
    assert forged == ["Scores.actor_logp_MT", "Scores.target_logp_MT"]
