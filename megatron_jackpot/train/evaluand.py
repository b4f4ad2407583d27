"""What `megatron-jackpot evaluate` is to judge: a model, the run it is of, and the settings that count."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_jackpot.config import Config, ConfigError, Evaluation
from megatron_jackpot.config.load import examine, placed
from megatron_jackpot.config.model_folder import read_json
from megatron_jackpot.config.yaml_tree import Tree, apply_override, read_tree
from megatron_jackpot.run.provenance import (
    CONFIG_FILE,
    MODELS,
    PROVENANCE_FILE,
    STEP,
    checkpoints,
    find_model,
    step_of,
)

SECTIONS = ("data", "evaluation", "servers", "precision")
"""What a run's own settings say of an evaluation, with the limits below."""
LIMITS = {
    "rollout": ("concurrency", "request_timeout_s", "retries"),
    "run": ("phase_timeout_s",),
}
TAKEN = f"Leave it out: here count {', '.join(SECTIONS)} and the limits of requests."
LENT = ("urls", "release_memory", "quantization")
"""Settings of a run's servers that are its own: those of an evaluation hold another model, alone."""
NO_PACKING = 2**40
"""Tokens of a micro-batch that hold any sequence, where none is packed."""


@dataclass(frozen=True)
class Evaluand:
    """Example: Evaluand(Path("RUN/checkpoints/step-000040/policy"), "policy", 40, Path("RUN"), True)."""

    folder: Path
    """The model, in HF's or Megatron's format."""
    model: str
    """policy or actor; a folder that belongs to no run counts as a policy."""
    step: int
    """0 where the folder's path names none."""
    run: Path
    """Whose record takes the result, and whose settings count if it has any."""

    @property
    def has_settings(self) -> bool:
        return (self.run / CONFIG_FILE).is_file()


def evaluand(what: Path, model: str | None, run: Path | None) -> Evaluand:
    """The model at `what`: a run (its newest checkpoint or export), a checkpoint, or a model's folder.

    Of two models the policy, unless `model` says otherwise. Raises ConfigError where there is none, or where
    it belongs to no run and none is named.
    """
    what = Path(what).resolve()
    if not what.is_dir():
        raise ConfigError(f"{what} is no folder. Name a run, a checkpoint or a model's folder.")
    exports = [path for path in sorted((what / "hf").glob("step-*")) if STEP.fullmatch(path.name)]
    # A step's folder is there before its models, each of which appears when it is whole.
    whole = [folder for folder in exports if (folder / (model or "policy") / "config.json").is_file()]
    saved = [*checkpoints(what), *whole]
    # Of one step the export, which need not be converted.
    newest = max(reversed(saved), key=step_of, default=what)
    try:
        folder = find_model(newest, model or _first_model(newest))
    except ValueError as error:
        raise ConfigError(*error.args) from error
    own = run or next((above for above in (what, *what.parents) if (above / PROVENANCE_FILE).is_file()), None)
    if own is None:
        raise ConfigError(f"{what} belongs to no run. Name the folder for record and logs with --run FOLDER.")
    inside = folder.relative_to(own.resolve()) if folder.is_relative_to(own.resolve()) else Path()
    steps = [int(found[1]) for part in inside.parts if (found := STEP.fullmatch(part))]
    named = folder.name if folder.name in MODELS else "policy"
    return Evaluand(folder, named, steps[-1] if steps else 0, Path(own))


def _first_model(folder: Path) -> str | None:
    return "policy" if (folder / "policy" / "config.json").is_file() else None


def settings(it: Evaluand, sets: Sequence[str], overrides: Sequence[str]) -> Config:
    """A configuration of the model alone. `sets` are NAME=FILE or FILE; none are the run's own held-out sets.

    Raises ConfigError with a line for each mistake.
    """
    tree = _of_run(it.run) if it.has_settings else {}
    tree["policy"], tree["actor"] = {"hf": str(it.folder)}, None
    tree["run"] = {**tree.get("run", {}), "folder": str(it.run)}
    tree["packing"] = {"tokens": NO_PACKING}
    named = [_named(one) for one in sets]
    chosen = dict(named)
    if len(chosen) < len(named):
        raise ConfigError(f"--data names two sets alike: {', '.join(name for name, _ in named)}. Rename one.")
    if not chosen and not it.has_settings:
        raise ConfigError("There is nothing to evaluate. Name a set with --data NAME=FILE.")
    if chosen:
        given = {name: {"path": path} for name, path in chosen.items()}
        tree["evaluation"] = {**tree.get("evaluation", {}), "sets": given, "size": 0}
    if not it.has_settings:
        # Not trained on: it says no more than that rows come from files.
        tree["data"] = {"source": "jsonl", "path": next(iter(chosen.values()))}
    for override in overrides:
        apply_override(tree, override)
    asked, limits = tree.get("evaluation"), tree.get("rollout", {})
    longest = asked.get("max_new_tokens") if isinstance(asked, dict) else None
    if isinstance(limits, dict):
        # One model, of which no rollout is asked.
        alone = {"model": "policy", "prompts_per_step": 1, "top_k_logp": 1}
        tree["rollout"] = {**limits, **alone, "max_new_tokens": longest or Evaluation().max_new_tokens}
    config, mistakes = examine(tree)
    for key in ("urls", "quantization"):
        if config is not None and (given := getattr(config.servers, key)):
            mistakes.append(
                f"servers.{key} = {given}: evaluate starts servers of its own, of the weights as they are. "
                "Leave it out."
            )
    absent = [(name, file) for name, file in named if not Path(file).exists()]
    mistakes += [f"--data {name}={file}: no such file. Correct it." for name, file in absent]
    mistakes += [
        f"'{given}' says nothing of an evaluation. {TAKEN}" for given in overrides if not _counts(given)
    ]
    if config is None or mistakes:
        place = it.run / CONFIG_FILE
        raise ConfigError("\n".join(placed(mistakes, place, [*overrides]) if it.has_settings else mistakes))
    return config


def _counts(override: str) -> bool:
    section, _, key = override.partition("=")[0].partition(".")
    return section in SECTIONS or key in LIMITS.get(section, ())


def _of_run(run: Path) -> Tree:
    """Of the run's settings those that say how its models are evaluated, paths as the run saw them."""
    held = read_tree(run / CONFIG_FILE)
    tree = {name: dict(held[name]) for name in SECTIONS if isinstance(held.get(name), dict)}
    tree["servers"] = {k: v for k, v in tree.get("servers", {}).items() if k not in LENT}
    for section, keys in LIMITS.items():
        tree[section] = {key: held[section][key] for key in keys if key in held.get(section, {})}
    began_in = Path(str(read_json(run / PROVENANCE_FILE, {}).get("folder", "")))
    for section, key in _paths(tree):
        section[key] = str(began_in / section[key])
    return tree


def _paths(tree: Tree) -> list[tuple[Tree, str]]:
    """Where a relative path may stand."""
    data, sets = tree.get("data", {}), tree.get("evaluation", {}).get("sets", {})
    places = [(data, key) for key in ("path", "heldout_path")] + [(one, "path") for one in sets.values()]
    return [(section, key) for section, key in places if section.get(key) is not None]


def _named(given: str) -> tuple[str, str]:
    """Example: "aime=/data/aime24.jsonl" or "aime.jsonl" -> ("aime", ...)."""
    name, equals, path = given.partition("=")
    return (name, path) if equals else (Path(given).stem, given)
