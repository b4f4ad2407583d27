"""Mistakes of a first day: what is wrong in a run that could start, the words after `launch run.yaml`, and
what the line that tells it must hold."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.tiny import hf_config, write_tokenizer

Spoil = Callable[[Path], object]
Mistake = tuple[str, Spoil, list[str], list[str]]
"""What it is, what spoils the run, words of the command line, parts of the line that tells it."""
LINE = "[command line]"


def run_that_could_start(folder: Path) -> None:
    """Fills the folder: run.yaml, two models of 61 ids, eight rows."""
    for name in ("policy", "actor"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(hf_config()))
        (folder / name / "model.safetensors").touch()
        write_tokenizer(folder / name)
    write_rows(folder, *({"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)))
    tree = dict(
        run=dict(folder="runs/first", steps=3),
        policy=dict(hf="policy"),
        actor=dict(hf="actor"),
        data=dict(source="jsonl", path="rows.jsonl", max_prompt_tokens=100),
        rollout=dict(max_new_tokens=100, prompts_per_step=4),
        packing=dict(tokens=256),
        evaluation=dict(size=0),
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))


def write_rows(folder: Path, *rows: object) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def in_yaml(key: str, value: object) -> Spoil:
    """A key in the file itself."""

    def write(folder: Path) -> None:
        tree = yaml.safe_load((folder / "run.yaml").read_text())
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))

    return write


def remove(name: str) -> Spoil:
    return lambda folder: os.unlink(folder / name)


def write(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


def own_file_in_the_run(folder: Path) -> None:
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "config.yaml").write_text("# what I changed, and why\n")


def followed_links(folder: Path) -> None:
    """A saved run, copied with `cp -rL`: `latest` is a folder then."""
    for name in ("step-000002", "latest"):
        for model in ("policy", "actor"):
            (folder / "runs/first/checkpoints" / name / model).mkdir(parents=True)
        (folder / "runs/first/checkpoints" / name / "manifest.json").write_text('{"step": 2}')


def other_weights(folder: Path) -> None:
    os.rename(folder / "actor/model.safetensors", folder / "actor/q4.gguf")


def same(folder: Path) -> None:
    """Nothing is spoiled: the mistake is on the command line."""


MISTAKES: list[Mistake] = [
    ("a key of other trainers", same, ["policy.learning_rate=1e-5"],
     ["'policy.learning_rate'", "Did you mean 'policy.optimizer.lr'?", LINE]),
    ("a key without its section", same, ["steps=5"], ["'steps'", "Did you mean 'run.steps'?", LINE]),
    ("a key in another section", same, ["data.temperature=0.7"],
     ["'data.temperature'", "Did you mean 'rollout.temperature' or 'evaluation.temperature'?", LINE]),
    ("an unknown section", in_yaml("trainer", {"num_generations": 4}), [],
     ["'trainer.num_generations'", "Did you mean 'rollout.samples_per_prompt'?", "[run.yaml]"]),
    ("a misspelled section", in_yaml("rolout", {"temperature": 1.0}), [],
     ["'rolout'", "Did you mean 'rollout'?", "[run.yaml]"]),
    ("a misspelled key", same, ["run.stepz=5"], ["'run.stepz'", "Did you mean 'run.steps'?", LINE]),
    ("an unknown method", same, ["algorithm.correction=tiss"],
     ["algorithm.correction.name = 'tiss'", "Did you mean 'tis'?", LINE]),
    ("a method that is no name", same, ["algorithm.objective=[ppo]"],
     ["algorithm.objective = ['ppo']", "must be a method's name", "Write it so", LINE]),
    ("a method's bound", same, ["algorithm.correction={name: tis, cap: 0.5}"],
     ["algorithm.correction.cap = 0.5", "must be >= 1", "Use .inf", LINE]),
    ("a number out of its bounds", same, ["run.steps=0"],
     ["run.steps = 0", "greater than or equal to 1", "default is 100", "launch --help run.steps", LINE]),
    ("a word for a number", in_yaml("rollout.temperature", "hot"), [],
     ["rollout.temperature = 'hot'", "valid number", "default is 1.0", "[run.yaml]"]),
    ("an unknown choice", same, ["sync.method=nccl"],
     ["sync.method = 'nccl'", "'disk', 'broadcast' or 'ipc'", "default is broadcast", LINE]),
    ("a value for a section", in_yaml("rollout", 3), [],
     ["rollout = 3", "must be a section", "Put its keys below it", "[run.yaml]"]),
    ("a key that is missing", in_yaml("policy", {}), [], ["'policy.hf' is missing", "policy.hf=VALUE"]),
    ("an override without a value", same, ["run.steps"], ["'run.steps'", "section.key=value", "Write it so"]),
    ("an override below a value", same, ["run.folder.name=a"], ["'run.folder.name=a'", "Leave out"]),
    ("no YAML", write("run.yaml", "run: [1"), [],
     ["run.yaml", "not valid YAML", "in line 1, column 6", "Mend"]),
    ("a base that is not there", in_yaml("base", "none.yaml"), [],
     ["none.yaml does not exist", "There is run.yaml"]),
    ("a model that is not there", same, ["policy.hf=missing"],
     ["policy.hf = missing", "no config.json", "Set it to", LINE]),
    ("a model without weights", remove("actor/model.safetensors"), [],
     ["actor.hf = actor", "no weights", "Download", "[run.yaml]"]),
    ("a model of an unknown kind", write("actor/config.json", '{"architectures": ["MambaForCausalLM"]}'), [],
     ["actor", "MambaForCausalLM", "Known"]),
    ("a broken tokenizer", write("actor/tokenizer.json", "{}"), [],
     ["actor/tokenizer.json cannot be read", "Copy it anew"]),
    ("a model that is on the hub alone", same, ["policy.hf=Qwen/Qwen3-0.6B"],
     ["policy.hf = Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir", LINE]),
    ("a file without rows", write("rows.jsonl", "\n\n"), [], ["data.path = rows.jsonl holds no", "Write"]),
    ("a file in UTF-16", lambda folder: (folder / "rows.jsonl").write_bytes("{}".encode("utf-16")), [],
     ["rows.jsonl: line 1 begins UTF-16", "iconv"]),
    ("a list in place of lines", write("rows.jsonl", '[{"prompt": "1="}]'), [],
     ["rows.jsonl: line 1 begins one JSON list", "jq -c '.[]' rows.jsonl"]),
    ("braces that are no text", same, ["data.template={question}"],
     ["data.template = {'question': None}", "put it in quotes", LINE]),
    ("a reward's file in place of its module", same, ["data.reward=rewards/mine.py:length"],
     ["data.reward = 'rewards/mine.py:length'", "Write mine:length", "PYTHONPATH", LINE]),
    ("a data file that is not there", remove("rows.jsonl"), [],
     ["rows.jsonl: no such file", "Set data.path"]),
    ("a row without an answer", lambda folder: write_rows(folder, *[{"prompt": "1="}] * 4), [],
     ["rows.jsonl, line 1", "'answer'"]),
    ("fewer rows than a step takes", lambda folder: write_rows(folder, {"prompt": "1=", "answer": "1"}), [],
     ["rollout.prompts_per_step = 4", "1 usable", "Lower it or add data", "[run.yaml]"]),
    ("a template without a place for the text", same, ["data.template=hello"],
     ["data.template = 'hello'", "{question}", "Put it", LINE]),
    ("a reward that is not there", same, ["data.reward=my_rewards:length"],
     ["data.reward = 'my_rewards:length'", "no package my_rewards", "PYTHONPATH", LINE]),
    ("a reward that is misspelled", same, ["data.reward=exakt"],
     ["data.reward = 'exakt'", "must be one of", "Set one", LINE]),
    ("a layout that does not divide", same, ["parallel.tp=3"],
     ["parallel.tp = 3", "num_", "Set one that", "[run.yaml]"]),
    ("sequences longer than a micro-batch", same, ["packing.tokens=100"],
     ["packing.tokens = 100", "Raise packing.tokens", LINE]),
    ("an evaluation without problems", same, ["evaluation.size=8"],
     ["evaluation.size = 8", "data.heldout_path", "Set it", LINE]),
    ("a run folder that is a file", write("runs", ""), [], ["run.folder = runs/first", "Set", "[run.yaml]"]),
    ("a resume without a checkpoint", same, ["run.resume=true"],
     ["run.resume = true", "holds no checkpoint", "run.resume=auto", LINE]),
    ("a file of one's own where the run writes its own", own_file_in_the_run, [],
     ["run.folder = runs/first", "config.yaml", "mv runs/first/config.yaml runs/first.yaml", "[run.yaml]"]),
    ("a run that was copied with its links followed", followed_links, ["run.resume=auto"],
     ["run.folder", "checkpoints/latest is a folder where a link belongs", "step-000002 is beside it",
      "rm -r runs/first/checkpoints/latest"]),
    ("a key that stands twice", write("run.yaml", "run: {folder: a}\nrun: {steps: 3}\n"), [],
     ["run.yaml", "the key 'run' stands here a second time", "line 2", "Mend"]),
    ("a tab in YAML", write("run.yaml", "run:\n\tsteps: 3\n"), [],
     ["run.yaml is not valid YAML", "'\\t'", "line 2", "Mend"]),
    ("an empty configuration", write("run.yaml", ""), [],
     ["run.yaml must hold a mapping of sections, got nothing", "See examples"]),
    ("a word that is none of several kinds", same, ["run.resume=Auto"],
     ["run.resume = 'Auto'", "a valid boolean, or 'auto'", "default is false", LINE]),
    ("spaces around an equals sign", same, ["run.steps", "=", "5"],
     ["'run.steps'", "section.key=value", "without spaces"]),
    ("a table of text", write("rows.csv", "prompt,answer\n1=,1\n"), ["data.path=rows.csv"],
     ["rows.csv: is a table of text", "csv.DictReader", "< rows.csv > NEW.jsonl"]),
    ("columns of other names", lambda folder: write_rows(folder, *[{"question": "1=", "gold": "1"}] * 4), [],
     ["rows.jsonl, line 1", "needs either 'prompt' or 'messages'", "['gold', 'question']", "Rename"]),
    ("Python's quotes", write("rows.jsonl", "{'prompt': '1=', 'answer': '1'}\n"), [],
     ["rows.jsonl, line 1: not JSON", "Write an object with double quotes"]),
    ("no prompt that is short enough", same, ["data.max_prompt_tokens=1"],
     ["No training prompt is left of 8: 8 have more than data.max_prompt_tokens = 1", "Raise it"]),
    ("weights of another format", other_weights, [],
     ["actor.hf = actor", "no weights (*.safetensors), only q4.gguf", "Download", "[run.yaml]"]),
    ("a model's file in place of its folder", same, ["policy.hf=policy/model.safetensors"],
     ["policy.hf = policy/model.safetensors is a file", "Set it to", "policy.", LINE]),
    ("rollouts without chance", same, ["rollout.temperature=0"],
     ["rollout.temperature = 0", "greater than 0", "default is 1.0", LINE]),
    ("a server's address without its kind", same, ["servers.urls=[localhost:30000]"],
     ["servers.urls has 'localhost:30000'", "http://HOST:PORT", "Write it so", LINE]),
    ("an interpreter that is not there", same, ["servers.python=/nowhere/python"],
     ["servers.python = /nowhere/python is no program", "Set it to", LINE]),
    ("an environment in place of its interpreter", same, ["servers.python=policy"],
     ["servers.python = policy is a folder", "Set it to", "policy/bin/python", LINE]),
    ("a model's place that has not been filled", same, ["policy.hf=models/Qwen3-0.6B"],
     ["policy.hf = models/Qwen3-0.6B", "hf download OWNER/NAME --local-dir models/Qwen3-0.6B", LINE]),
    ("a date for a name", same, ["run.folder=2026-11-28"],
     ["run.folder = 2026-11-28: must be a path", "It is a date in YAML: put it in quotes", LINE]),
    ("a date that is none", same, ["run.folder=2026-13-45"],
     ["'run.folder=2026-13-45'", "month must be in 1..12", "Quote it"]),
    ("a task's option that is misspelled", same,
     ["data.source=reasoning_gym", "data.tasks={chain_sum: {min_term: 2}}", "data.reward=reasoning_gym"],
     ["data.tasks.chain_sum", "no option 'min_term'", "'min_terms'", LINE]),
    ("the home of nobody", same, ["data.path=~nobody-of-that-name/rows.jsonl"],
     ["path = '~nobody-of-that-name/rows.jsonl'", "Write the path in full"]),
    ("Python's None", same, ["run.save_every=None"],
     ["run.save_every = 'None'", "Its default is null", LINE]),
    ("a path through a file", lambda folder: (folder / "run.yaml").rename(folder / "other.yaml"),
     [], ["run.yaml does not exist", "There is other.yaml"]),
    ("an actor that does not sample", same, ["rollout.model=policy"],
     ["leaves nothing to do for the actor", "Set actor=null", LINE]),
    ("processes that do not make a mesh", same, ["parallel.pp=2", "--nproc", "3"],
     ["--nproc 3", "multiple", "Use --nproc 2"]),
]  # fmt: skip
