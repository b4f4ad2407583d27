"""Makes a family's problems and warmed models: a policy and an actor of each mismatch a warm-up seed.
examples/quickstart trains and writes them.

In task.home: data/*.jsonl; models/warmup-0/{policy,near,far}/ with policy.json, near.json, far.json beside.
"""

import hashlib
import itertools
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.study_parts import task
from benchmarks.study_parts.decoder import Decoder, greedy
from benchmarks.study_parts.families import FAMILIES
from benchmarks.study_parts.task import Family
from megatron_jackpot.config import Optimizer, Parallel, Precision
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.families import family_of
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.records import Rollout
from megatron_jackpot.sync.stream import export

PLANS = Path(__file__).parents[1] / "plans"
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
TOLD_EVERY = 100


def quickstart() -> Any:
    """The example's modules, which are no package: (corpus.example, prepare, supervised.train, tokenizer)."""
    if str(QUICKSTART) not in sys.path:
        sys.path.insert(0, str(QUICKSTART))
    import corpus
    import prepare
    import supervised
    import tokenizer

    return corpus.example, prepare, supervised.train, tokenizer.build()


def read_settings() -> dict[str, Any]:
    return yaml.safe_load((PLANS / "warmup.yaml").read_text(encoding="utf-8"))


def warm_up(folder: Path, family: str, seed: int, mesh: Mesh) -> None:
    """Make the family's models/warmup-SEED and, where they are missing, its problems. Minutes of one core."""
    home = task.home(folder, family)
    data = home / "data"
    if not (data / task.DEVELOPMENT).is_file():
        data.mkdir(parents=True, exist_ok=True)
        FAMILIES[family].write_problems(data)
    settings = read_settings()
    for name in settings["models"]:
        told = home / "models" / f"warmup-{seed}" / f"{name}.json"
        if told.is_file():
            continue
        made = _warm_up_one(name, settings, family, seed, mesh, home)
        told.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(f"warm-up {seed}, {name}: {made}", flush=True)


def _warm_up_one(
    name: str, settings: dict[str, Any], family: str, seed: int, mesh: Mesh, home: Path
) -> dict[str, Any]:
    _, prepare, train, tokenizer = quickstart()
    data, place = home / "data", home / "models" / f"warmup-{seed}" / name
    knobs = settings["models"][name]
    lr, steps = knobs["lr"], knobs["steps"]
    shape = settings["models"][knobs["from"]]["hf"] if "from" in knobs else knobs["hf"]
    hf_config = prepare.hf_config(shape, tokenizer)
    torch.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()))
    shaped = family_of(hf_config)
    model = MegatronModel.load(
        name,
        shaped,
        place.parent / knobs["from"] if "from" in knobs else None,
        mesh=mesh,
        parallel=Parallel(),
        precision=Precision(dtype="float32", fused_linear=False),
        padded_vocab=shaped.vocab_size,
    )
    model.add_optimizer(
        Optimizer(lr=lr, min_lr=lr / 10, warmup_steps=50, decay="cosine", weight_decay=0.01), steps
    )
    packer = Packer(mesh, tokens=settings["packing_tokens"], enabled=True, num_minibatches=1, vpp=None)
    forbidden = task.read_questions(data, task.HELDOUT, task.DEVELOPMENT)
    guesses = knobs.get("guesses", 0.0)
    carelessness = settings["carelessness"][family]
    corpus = examples(FAMILIES[family], tokenizer, carelessness, f"{seed}/{name}", forbidden, guesses)
    decoder, last, started = Decoder(hf_config), None, time.perf_counter()

    def on_step(progress: Any) -> bool:
        nonlocal last
        last = progress
        if progress.step % TOLD_EVERY:
            return False
        decoder.load(export(model))
        found = accuracy(decoder, data / task.DEVELOPMENT, tokenizer)
        print(f"warm-up {seed}, {name}: {progress.step}, loss {progress.loss:.3f}, {found:.3f}", flush=True)
        return False

    train(model, corpus, packer, batch=settings["batch"], steps=steps, on_step=on_step)
    shutil.rmtree(place, ignore_errors=True)  # What an earlier call that was ended left.
    prepare.write(model, tokenizer, place)
    decoder.load({key: tensor.half().float() for key, tensor in export(model).items()})
    return dict(
        accuracy=accuracy(decoder, data / task.HELDOUT, tokenizer),
        parameters=sum(p.numel() for p in model.chunks[0].parameters()),
        steps=last.step,
        tokens=last.tokens,
        seconds=round(time.perf_counter() - started),
        sha256=hashlib.sha256((place / "model.safetensors").read_bytes()).hexdigest(),
    )


def examples(
    family: Family,
    tokenizer: Any,
    carelessness: float,
    seed: str,
    forbidden: frozenset[str],
    guesses: float = 0.0,
) -> Iterator[Rollout]:
    """Endless careless answers; none to a question in `forbidden`. Of the last two characters of an item's
    answer (tens and units of a sum) a share `guesses` is any symbol."""
    example, *_ = quickstart()
    chance, luck = random.Random(f"{seed}/careless"), random.Random(f"{seed}/guesses")
    for items in family.problems(f"warm-up/{seed}"):
        question = task.question(items)
        if question not in forbidden:
            text = _guessed(family.answer(items, chance, carelessness), family.symbols, luck, guesses)
            yield example(
                tokenizer.encode(f"{question}\n"), [*tokenizer.encode(text), tokenizer.eos_token_id]
            )


def _guessed(text: str, symbols: str, luck: random.Random, guesses: float) -> str:
    answers = [list(answer) for answer in text.split(",")]
    for characters, place in itertools.product(answers, (-2, -1)):
        if luck.random() < guesses:
            characters[place] = luck.choice(symbols)
    return ",".join(map("".join, answers))


def accuracy(decoder: Decoder, path: Path, tokenizer: Any, size: int | None = None) -> float:
    """Share of the items of a file (its first `size` lines) that the model answers rightly, greedily."""
    lines = itertools.islice(path.read_text(encoding="utf-8").splitlines(), size)
    rows = [json.loads(line) for line in lines]
    prompts = [tokenizer.encode(f"{row['prompt']}\n") for row in rows]
    answers = greedy(decoder, prompts, max_new_tokens=task.RESPONSE_TOKENS, stop_ids=[tokenizer.eos_token_id])
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(task.score(text, row) for text, row in zip(texts, rows, strict=True)) / len(rows)
