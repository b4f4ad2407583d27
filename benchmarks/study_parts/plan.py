"""A stage of the study as its YAML says it: which runs, in which order, judged by what, made from which code.

A plan is committed before its runs begin. In every arm alike a seed starts from warm-up
`first_warmup + seed % warmups`.
"""

import ast
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study_parts import task
from benchmarks.study_parts.families import FAMILIES
from megatron_jackpot.config import Config, parse_config
from megatron_jackpot.config.yaml_tree import Tree, apply_override, read_tree

ROOT = Path(__file__).parents[2]
BASE = ROOT / "benchmarks" / "plans" / "base.yaml"
WATCHED = (
    *("megatron_jackpot/algorithm", "megatron_jackpot/train/losses.py", "megatron_jackpot/train/scoring.py"),
    *(f"benchmarks/study_parts/{name}.py" for name in ("decoder", "sampler", "task", "testbed")),
)
"""Code that results depend on, beside their family's: another meaning of it makes them stale."""
FIELDS = {
    *(
        "stage",
        "question",
        "steps",
        "every",
        "mismatches",
        "warmups",
        "seeds",
        "lrs",
        "actor_lr_factor",
        "arms",
    ),
    *("reference", "contrasts", "assumed_sd", "decision", "budget_h"),
}
MAY = {"samples", "problems", "task", "first_warmup"}
"""Fields that a plan need not have."""


@dataclass(frozen=True)
class Run:
    """One cell of the design. Example: Run("a", "tis", "far", 3e-4, 4, 1)."""

    stage: str
    arm: str
    mismatch: str
    lr: float
    seed: int
    warmup: int

    @property
    def name(self) -> str:
        return f"{self.mismatch}/lr{self.lr:g}/seed{self.seed}/{self.arm}"

    @property
    def key(self) -> dict[str, Any]:
        """What its lines are found by."""
        return {
            "arm": self.arm,
            "mismatch": self.mismatch,
            "lr": self.lr,
            "seed": self.seed,
            "warmup": self.warmup,
        }


@dataclass(frozen=True)
class Plan:
    """A checked plan; the fields are the YAML's keys, benchmarks/plans/README.md says what each means."""

    stage: str
    question: str
    steps: int
    every: int
    mismatches: tuple[str, ...]
    warmups: int
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    actor_lr_factor: float
    arms: dict[str, Tree]
    reference: str
    contrasts: tuple[tuple[str, str], ...]
    assumed_sd: float
    decision: str
    budget_h: float
    samples: int | None = None
    """Rollouts at which a run ends, where it has not done `steps` before."""
    problems: int | None = None
    """To train on, the first ones; None for all."""
    first_warmup: int = 0
    """Of the plan's `warmups`: models that no other plan has chosen by."""
    task: str = task.FIRST
    """A key of FAMILIES."""

    @property
    def runs(self) -> list[Run]:
        """In order: all arms, a seed of every warm-up, the mismatches; more seeds; the next rate."""
        rounds = [
            self.seeds[begin : begin + self.warmups] for begin in range(0, len(self.seeds), self.warmups)
        ]
        return [
            Run(self.stage, arm, mismatch, lr, seed, self.first_warmup + seed % self.warmups)
            for lr, seeds, mismatch in itertools.product(self.lrs, rounds, self.mismatches)
            for seed, arm in itertools.product(seeds, self.arms)
        ]

    def config(self, run: Run, folder: Path) -> Config:
        """The settings of a run whose models and problems lie in `folder`. Raises ConfigError."""
        tree = read_tree(BASE)
        home, lr = task.home(folder, self.task), run.lr
        place = home / "models" / f"warmup-{run.warmup}"
        overrides = [
            f"run.folder={run_folder(folder, run)}",
            f"run.seed={run.seed}",
            f"run.steps={self.steps}",
            f"evaluation.every={self.every}",
            f"policy.hf={place / 'policy'}",
            f"policy.optimizer.lr={lr!r}",
            f"actor.hf={place / run.mismatch}",
            f"actor.optimizer.lr={lr * self.actor_lr_factor!r}",
            f"data.path={task.training_file(home / 'data', self.problems)}",
            f"data.heldout_path={home / 'data' / task.HELDOUT}",
            *(f"{key}={json.dumps(value)}" for key, value in self.arms[run.arm].items()),
        ]
        for override in overrides:
            apply_override(tree, override)
        return parse_config(tree)


def read_plan(path: Path) -> Plan:
    """Raises ValueError naming the field for a plan that is not whole."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if wrong := ", ".join(sorted((set(tree) - MAY) ^ FIELDS)):
        raise ValueError(f"{path}: the keys {wrong} are missing or unknown. A plan has {sorted(FIELDS)}.")
    lists = {key: tuple(tree[key]) for key in ("mismatches", "seeds", "lrs")}
    plan = Plan(**{**tree, **lists, "contrasts": tuple(tuple(pair) for pair in tree["contrasts"])})
    for arm in {plan.reference, *itertools.chain(*plan.contrasts)} - plan.arms.keys():
        raise ValueError(f"{path}: contrasts or reference name {arm!r}, no arm of {list(plan.arms)}.")
    if plan.task not in FAMILIES:
        raise ValueError(f"{path}: task = {plan.task!r} is none of {sorted(FAMILIES)}.")
    if plan.steps % plan.every:
        raise ValueError(f"{path}: steps = {plan.steps} must be a multiple of every = {plan.every}.")
    return plan


def run_folder(folder: Path, run: Run) -> Path:
    return folder / f"stage_{run.stage}" / run.name


def watched(family: str) -> tuple[str, ...]:
    return (*WATCHED, f"benchmarks/study_parts/tasks/{family}.py")


def fingerprint(family: str, root: Path = ROOT) -> str:
    """Hash of what the watched files mean: comments, docstrings and layout do not count, names do."""
    digest = hashlib.sha256()
    for name in watched(family):
        place = root / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(
                f"{path.relative_to(root)}\n{_meaning(path.read_text(encoding='utf-8'))}\n".encode()
            )
    digest.update((root / BASE.relative_to(ROOT)).read_bytes())
    return digest.hexdigest()[:16]


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [item for item in node.body if not _is_text(item)]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
