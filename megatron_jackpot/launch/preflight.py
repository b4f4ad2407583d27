"""All mistakes of a configuration at once, before a server or torchrun starts. No torch, no Megatron.

Ranks check the same again: the machine that launches need not be the one that trains. Methods check their
own settings, in a child that may load torch and whose verdict is kept by content, so that no rule is written
twice; rows are kept by content too. A verdict on methods of the user's own is not kept.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from megatron_jackpot.config import Check, Config, Method
from megatron_jackpot.config.model_folder import WEIGHTS, check_stop_ids, stop_token_ids
from megatron_jackpot.config.model_shape import ModelShape, model_shapes
from megatron_jackpot.data.problems import files_behind
from megatron_jackpot.data.prompts import Limits, heldout_prompts, named_prompts, training_prompts
from megatron_jackpot.data.tokenizer import TOKENIZER_FILES, Vocabulary, check_same_tokenizer
from megatron_jackpot.data.value_table import ValueTable, table_path
from megatron_jackpot.launch.cached import cached, content
from megatron_jackpot.launch.folder import folder_mistakes
from megatron_jackpot.launch.labels import label_mistakes, load_mistakes, whole_rows
from megatron_jackpot.launch.ports import prometheus_mistakes, server_mistakes
from megatron_jackpot.records import Prompt
from megatron_jackpot.rewards.label_cache import judges
from megatron_jackpot.rewards.remote import address_mistake, is_remote
from megatron_jackpot.run.clock import started_at
from megatron_jackpot.run.provenance import versions

Command = Literal["launch", "submit", "plan", "train"]
METHODS_LIMIT_S = 120
HUB_NAME = re.compile(r"(?!(?:models|data|runs|checkpoints|examples)/)[\w-][\w.-]*/[\w.-]+")
"""A model as Hugging Face's hub calls it, OWNER/NAME; what begins with a usual folder is a place here."""
READ = (".safetensors", ".distcp")
"""Files of weights in HF's and in Megatron's format."""
FILE_NAME = re.compile(r"/|\.py:")
REWARDS = ("exact", "reasoning_gym", "math_verify", "code")

NOT_CHECKED = (
    "weights: that they are whole, and that models and servers fit the GPUs' memory",
    "fp8 and Transformer Engine on this GPU",
    "SGLang: its version, and that servers start and speak the trainer's log-probs",
    "a reward of your own: that it can score the labels",
)
"""What needs a GPU, a server or a response; docs/refused.md names it."""


@dataclass
class Subject:
    """What is checked, and what several checks read."""

    config: Config
    command: Command = "launch"
    nproc: int | None = None
    progress: Callable[[str, int], None] = field(default=lambda what, number: None)
    """Told how many "rows" or "labels" of a file have been checked, every thousand."""

    @property
    def folders(self) -> dict[str, Path]:
        return self.config.folders

    @cached_property
    def shapes(self) -> dict[str, ModelShape] | None:
        try:
            return model_shapes(self.config)
        except (ValueError, OSError):
            return None

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The policy's; None where it cannot be read, which another check says."""
        try:
            return Vocabulary.read(self.config.policy.hf)
        except (ValueError, OSError):
            return None

    @property
    def models_are_here(self) -> bool:
        """`plan` needs no more than config.json."""
        there = all((folder / "tokenizer.json").is_file() for folder in self.folders.values())
        return self.command != "plan" or there


def preflight(subject: Subject) -> list[str]:
    """Every mistake that can be found here, a line each; the configuration has passed its own checks."""
    found: list[str] = []
    for check in CHECKS:
        for mistake in check.find(subject):
            found += [line for line in mistake.splitlines() if line not in found]
    return found


def _processes(s: Subject) -> Iterator[str]:
    p = s.config.parallel
    model = p.tp * p.pp * p.cp
    if s.nproc is not None and s.nproc < 1:
        yield f"--nproc {s.nproc} must be at least 1."
    elif s.nproc is not None and s.nproc % model:
        yield f"--nproc {s.nproc} is not a multiple of tp * pp * cp = {model}. Use --nproc {model}."
    elif s.nproc is not None and s.config.rollout.prompts_per_step < s.nproc // model:
        yield (
            f"rollout.prompts_per_step = {s.config.rollout.prompts_per_step} leaves some of the "
            f"{s.nproc // model} data-parallel ranks without a prompt. Raise it."
        )


def _folders(s: Subject) -> Iterator[str]:
    for name, folder in s.folders.items():
        if folder.is_file():
            yield f"{name}.hf = {folder} is a file. Set it to the folder it is in: {folder.parent}."
            continue
        if not (folder / "config.json").is_file():
            name_there = folder if HUB_NAME.fullmatch(str(folder)) else "OWNER/NAME"
            fetch = f"; `hf download {name_there} --local-dir {folder}` makes one"
            fetch = "" if folder.exists() else fetch
            yield f"{name}.hf = {folder} holds no config.json. Set it to a Hugging Face model folder{fetch}."
            continue
        # safetensors' own writer makes files that only their owner may read: not a container's user, for one.
        closed = [path.name for path in sorted(folder.iterdir()) if not os.access(path, os.R_OK)]
        if closed:
            yield (
                f"{name}.hf = {folder}: user {os.geteuid()} may not read {', '.join(closed[:3])}. "
                f"As their owner: chmod -R a+rX {folder}"
            )
        held = [path.name for path in folder.iterdir() if path.name.endswith(WEIGHTS)]
        if s.command == "launch" and not any(file.endswith(READ) for file in held):
            other = f", only {', '.join(held[:3])}" if held else ""
            yield (
                f"{name}.hf = {folder} holds no weights (*.safetensors){other}. Download the whole model in "
                "that format."
            )


def _shapes(s: Subject) -> Iterator[str]:
    if all((folder / "config.json").is_file() for folder in s.folders.values()):
        try:
            model_shapes(s.config)
        except (ValueError, OSError) as error:
            yield str(error)


def _tokenizers(s: Subject) -> Iterator[str]:
    if s.models_are_here and all(folder.is_dir() for folder in s.folders.values()):
        try:
            check_same_tokenizer(s.folders)
            # Two copies of one that cannot be read are the same.
            Vocabulary.read(s.config.policy.hf)
        except (ValueError, OSError) as error:
            yield str(error)


def _stop_ids(s: Subject) -> Iterator[str]:
    if s.vocabulary is not None and s.shapes is not None:
        try:
            check_stop_ids(_ends(s), _rows(s))
        except ValueError as error:
            yield str(error)


def _methods(s: Subject) -> Iterator[str]:
    if s.command == "train":
        return  # The rank makes them at once.
    config = s.config
    sections = (*config.algorithm, *config.rollout, *(config.actor or ()))
    chosen = [value for _, value in sections if isinstance(value, Method)]
    if any(method.is_own for method in (*chosen, *config.algorithm.filters)):
        yield from _ask_methods(config)
        return
    # No method looks at the actor's folder or optimizer: runs of other models share a verdict.
    actor = config.actor and config.actor.model_dump(exclude={"hf", "optimizer"})
    given = config.rollout
    rollout = (given.max_new_tokens, given.ahead, given.samples_per_prompt, given.allocator)
    asked = (config.algorithm, actor, config.run.seed, rollout, config.policy.reference)
    key = content(*asked, sources=("algorithm/*.py", "train/method*.py"))
    yield from cached("methods", key, lambda: _ask_methods(config))


def _ask_methods(config: Config) -> list[str]:
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_jackpot.train.methods"],
        input=json.dumps(config.model_dump(mode="json")),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        timeout=METHODS_LIMIT_S,
    )
    if done.returncode:
        raise RuntimeError(f"The check of the methods ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _prompts(s: Subject) -> Iterator[str]:
    config, data = s.config, s.config.data
    source = data.path if data.source == "jsonl" else data.tasks
    if not s.models_are_here or s.vocabulary is None or not source:
        return  # Another check says so.
    try:
        now = started_at(config.run.folder, config.run.resume)
    except ValueError as error:
        yield str(error)
        return
    limits = Limits(rows=_rows(s), now=now, progress=partial(s.progress, "rows"))
    sources = [path for path in (data.path, data.heldout_path) if path and data.source == "jsonl"]
    sources += [one.path for one in config.evaluation.sets.values()]
    files = []
    for path in sources:
        with suppress(ValueError, OSError):  # The reader says so.
            files += files_behind(path)
    files += [config.policy.hf / name for name in TOKENIZER_FILES]
    table = table_path(config)
    files += [] if table is None else [table]
    key = content(
        data.model_dump(exclude={"reward_workers", "changed_rows"}),
        config.evaluation.model_dump(mode="json"),
         limits.rows, versions()["reasoning-gym"], judges(), str(table),
        importlib.util.find_spec("pyarrow") is None,
        files=files, sources=("data/*.py",),
    )  # fmt: skip
    verdict = cached("rows", key, lambda: _read_rows(config, s.vocabulary, limits, s.progress))
    yield from verdict["mistakes"]
    if table is not None and table.exists():
        try:
            values = ValueTable.read(table)
            # Whose answers they are takes a hash of all its weights: the ranks compare that.
            values.check_source(config, values.source.reference, table)
        except ValueError as error:
            if str(error) not in verdict["mistakes"]:
                yield str(error)
    if not verdict["mistakes"] and config.rollout.prompts_per_step > verdict["usable"]:
        yield (
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step} is larger than the "
            f"{verdict['usable']} usable prompts. Lower it or add data."
        )


def _read_rows(
    config: Config, vocabulary: Any, limits: Limits, progress: Callable[[str, int], None]
) -> dict[str, Any]:
    data, mistakes, usable, texts = config.data, [], 0, frozenset()
    chosen: dict[Path | None, list[Prompt] | None] = {data.path: None}
    try:
        training = training_prompts(data, vocabulary, limits=limits)
        usable, texts, chosen[data.path] = len(training.prompts), training.texts, training.prompts
        if (table := table_path(config)) is not None:
            ValueTable.read(table).check(training.prompts, table)
    except (ValueError, OSError) as error:
        mistakes.append(str(error))
    if data.source == "jsonl" or not mistakes:
        if config.evaluation.size:
            chosen[data.heldout_path] = None
        try:
            heldout = heldout_prompts(data, config.evaluation, vocabulary, exclude=texts, limits=limits)
            chosen[data.heldout_path] = heldout.prompts
            named_prompts(data, config.evaluation, vocabulary, exclude=texts, limits=limits)
        except (ValueError, OSError) as error:
            mistakes.append(str(error))
    # A generated problem is right by construction, `exact` takes every text; rows may name one of several.
    if data.source == "jsonl" and (data.rewards or data.reward in REWARDS[1:]):
        files = {
            path: whole_rows(path) if prompts is None else prompts
            for path, prompts in chosen.items()
            if path is not None and path.exists()
        }
        mistakes += label_mistakes(data, files, partial(progress, "labels"))
    return {"mistakes": mistakes, "usable": usable}


def _reward(s: Subject) -> Iterator[str]:
    own = {key: name for key, name in s.config.data.reward_names.items() if name not in REWARDS}
    mistakes: list[str] = []
    for key, name in own.items():
        if is_remote(name):
            mistakes += [f"{key} = '{name}': {told}" for told in [address_mistake(name)] if told]
            continue
        package, *inside = re.split("[.:]", name)
        if not inside:
            known = f"must be one of {', '.join(REWARDS)}, or package.module:name. Set one."
            mistakes.append(f"{key} = '{name}': {known}")
        elif FILE_NAME.search(name):
            module, _, function = name.rpartition(":")
            mistakes.append(
                f"{key} = '{name}': is a file's name. Write {Path(module).stem}:{function}, and put the "
                "file's folder on PYTHONPATH."
            )
        elif not package.isidentifier() or importlib.util.find_spec(package) is None:
            mistakes.append(f"{key} = '{name}': there is no package {package}. Put its folder on PYTHONPATH.")
    if not mistakes and not all(map(is_remote, own.values())) and s.command == "launch":
        mistakes = load_mistakes(s.config.data)
    yield from mistakes


def _servers(s: Subject) -> Iterator[str]:
    if s.command == "launch" and not s.config.servers.urls:
        yield from server_mistakes(s.config.servers)


def _prometheus(s: Subject) -> Iterator[str]:
    if s.command == "launch":
        yield from prometheus_mistakes(s.config.logging)


def _run_folder(s: Subject) -> Iterator[str]:
    if s.command in ("launch", "submit"):
        yield from folder_mistakes(s.config, new=s.command == "launch")


def _rows(s: Subject) -> dict[str, int]:
    return {name: shape.vocab_size for name, shape in (s.shapes or {}).items()}


def _ends(s: Subject) -> tuple[int, ...]:
    """Raises ValueError where no folder names one."""
    folders = [section.hf for section in s.config.models.values()]
    return stop_token_ids(s.vocabulary.eos if s.vocabulary else None, folders)


CHECKS: tuple[Check[Subject], ...] = (
    Check("--nproc", "is a multiple of tp * pp * cp, with a prompt for each rank", "change it", _processes),
    Check(
        "policy.hf, actor.hf, policy.reference.hf",
        "are folders with config.json and weights (*.safetensors) that this user may read",
        "set the folder, or chmod",
        _folders,
    ),
    Check(
        "config.json against parallel, data, rollout, evaluation",
        "is a known dense architecture that tp and pp divide, long enough for prompt and response (servers "
        "keep 2 tokens free), with at least rollout.top_k_logp and algorithm.num_candidates ids",
        "change the layout or the lengths",
        _shapes,
    ),
    Check(
        "tokenizer.json of policy.hf, actor.hf and policy.reference.hf",
        "is there, and all give ids, special ids and the end of a text the same meaning",
        "use models of one family",
        _tokenizers,
    ),
    Check(
        "eos_token_id of tokenizer, config.json, generation_config.json",
        "is given, and lies inside both embeddings",
        "mend it in the file",
        _stop_ids,
    ),
    Check(
        "algorithm, rollout.allocator, actor.objective, actor.distill",
        "name methods and settings that exist, within their bounds, that go together",
        "as the method says",
        _methods,
    ),
    Check(
        "data.path, data.heldout_path, data.tasks, data.template, algorithm.objective.values",
        "give enough rows that are whole, with a label that data.reward can score, that the template takes, "
        "whose ids lie inside both embeddings, that do not end with an end-of-text id or the answer; a table "
        "has each of them",
        "mend the row that is named, by file and line; `megatron-jackpot values` fills the table",
        _prompts,
    ),
    Check(
        "data.reward, data.rewards",
        "is known, or a dotted path to what a worker can load and call",
        "set it",
        _reward,
    ),
    Check(
        "servers.python, servers.host, servers.port",
        "can be run, is of this machine, are free",
        "set another",
        _servers,
    ),
    Check("logging.prometheus_host, logging.prometheus_port", "are free", "set another", _prometheus),
    Check(
        "run.folder, run.resume",
        "can be written, hold no other run and no config.yaml that no launch wrote, or a checkpoint of a "
        "format that is read, of the same models, with links to it that are none of their copies",
        "set run.folder or run.resume",
        _run_folder,
    ),
)
