"""What the page says of its runs, as one tree of plain values: JSON without a number that is not finite."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from megatron_jackpot.monitor.console import final_rows
from megatron_jackpot.monitor.differences import config_of, groups, labels, names
from megatron_jackpot.monitor.evaluations import EVALUATIONS_FILE, evaluation_table, read_evaluations
from megatron_jackpot.monitor.metrics import Row, read_metrics
from megatron_jackpot.monitor.outputs import PROMPTS_FILE
from megatron_jackpot.monitor.report import allocated, curves, health, samples
from megatron_jackpot.monitor.report.rejections import NewestDecisions
from megatron_jackpot.monitor.report.tokens import Decode, token_view
from megatron_jackpot.monitor.report.utilisation import flops_per_token, peak_flops
from megatron_jackpot.monitor.token_log import FOLDER as TOKENS
from megatron_jackpot.monitor.token_log import record_files
from megatron_jackpot.run.provenance import METRICS_FILE, PROVENANCE_FILE, check_run_folder

MOST_RUNS = 30
Tree = Row
"""Names to whatever JSON can hold."""


def content(folders: Sequence[Path], newest: NewestDecisions | None = None) -> Tree:
    """Of one run everything; of several what can be compared. `newest` is what an earlier call has read of
    the run's tokens.

    Raises ValueError for a folder without metrics, a bad record, or too many runs.
    """
    if len(folders) > MOST_RUNS:
        raise ValueError(f"{len(folders)} runs: a page takes {MOST_RUNS}. Compare fewer at a time.")
    at = version(folders)
    runs = [run_content(Path(folder)) for folder in folders]
    for run, label, name in zip(runs, labels(folders), names(folders), strict=True):
        run |= {"label": label if len(folders) > 1 else "", "name": name}
    measured = dict.fromkeys(name for run in runs for name in run["points"])
    one = Path(folders[0]) if len(folders) == 1 else None
    return {
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "version": at,
        "runs": runs,
        "groups": [{"label": group.label, "members": group.members} for group in groups(folders)],
        "charts": curves.charts(measured),
        "meanings": curves.meanings(measured),
        "evaluations": _evaluations(folders, runs),
        "samples": [] if one is None else samples.kept(one),
        "allocated": None if one is None else allocated.kept(one),
        "tokens": None if one is None else _tokens(one, newest or NewestDecisions()),
    }


def version(folders: Sequence[Path]) -> str:
    """Another one when a run has written something that the page shows, and every minute: a run that falls
    silent has news, too."""
    parts = [str(int(time.time() // 60))]
    for folder in map(Path, folders):
        # Of the folder of tokens its own time: each record is a new name in it.
        names = (METRICS_FILE, EVALUATIONS_FILE, PROMPTS_FILE, *samples.FILES, TOKENS)
        held = (path.stat() for path in map(folder.joinpath, names) if path.exists())
        parts += [f"{one.st_mtime_ns}.{one.st_size}" for one in held]
    return hashlib.sha256("-".join(parts).encode()).hexdigest()[:16]


def run_content(folder: Path) -> Tree:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Name the folder of a run, run.folder in its configuration.")
    check_run_folder(folder)
    rows = rows_of(folder)
    if not rows:
        raise ValueError(
            f"{folder} has no rows in {METRICS_FILE}: name the folder of a run that has done a step."
        )
    config = config_of(folder)
    made = _provenance(folder)
    rollout, run = _section(config, "rollout"), _section(config, "run")
    found = health.findings(
        folder,
        rows,
        prompts=int(rollout.get("prompts_per_step", 0)),
        samples=int(rollout.get("samples_per_prompt", 0)),
    )
    judged = health.verdict(rows, found, steps=run.get("steps"), heard=health.signs(folder))
    rated = curves.with_rates(rows, flops_per_token(config), peak_flops(folder, made))
    return {
        "verdict": {"state": judged.state, "text": judged.text},
        "findings": [{"level": one.level, "text": one.text} for one in found],
        "facts": list(facts(config, made)),
        "numbers": final_rows(rows),
        "points": curves.points(rated),
        "phases": curves.phases(rows),
    }


def rows_of(folder: Path) -> list[Row]:
    """None yet of a run whose servers and models start. Raises ValueError as `read_metrics` does."""
    return read_metrics(folder) if (folder / METRICS_FILE).is_file() else []


def _evaluations(folders: Sequence[Path], runs: Sequence[Tree]) -> Tree | None:
    """The table of what `megatron-jackpot evaluate` found, set by set; of several runs with their names in
    front, beside each other."""
    found = [
        (run["label"] or run["name"], row)
        for run, folder in zip(runs, folders, strict=True)
        for row in read_evaluations(Path(folder))
    ]
    sets = list(dict.fromkeys(row["set"] for _, row in found))
    found.sort(key=lambda one: (sets.index(one[1]["set"]), one[1]["model"] != "policy", one[1]["step"]))
    heads, cells = evaluation_table([row for _, row in found])
    if len(folders) > 1:
        heads, cells = ["run", *heads], [[name, *row] for (name, _), row in zip(found, cells, strict=True)]
    return {"heads": heads, "rows": cells} if cells else None


def facts(config: Tree, made: Tree) -> Iterator[tuple[str, str]]:
    """What was run: models, methods, commit, versions, time."""
    for role in ("policy", "actor"):
        if config.get(role):
            yield role, str(_section(config, role).get("hf"))
    algorithm = _section(config, "algorithm")
    for part in ("correction", "objective", "advantage"):
        if part in algorithm:
            yield part, json.dumps(algorithm[part])
    if made:
        dirty = " and uncommitted changes" if made.get("dirty") else ""
        yield "commit", str(made.get("commit"))[:12] + dirty
        yield "started", f"{made.get('time')} on {made.get('host')}"
        machine = _section(made, "machine")
        if machine:
            yield "machine", ", ".join(f"{key} {value}" for key, value in machine.items())
        versions = _section(made, "versions")
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def decoder_of(config: Tree) -> Decode:
    """The policy's tokenizer; numbers in brackets where it is not there any more."""
    folder = Path(str(_section(config, "policy").get("hf", "")))
    if not (folder / "tokenizer_config.json").is_file():
        return lambda token: f"[{token}]"
    return _decoder(folder)


@lru_cache(maxsize=1)
def _decoder(folder: Path) -> Decode:
    """Loaded once: a served page asks for it at every row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda token: tokenizer.decode([token])


def _provenance(folder: Path) -> Tree:
    path = folder / PROVENANCE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _section(tree: Tree, name: str) -> Tree:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _tokens(folder: Path, newest: NewestDecisions) -> Tree | None:
    files = record_files(folder)
    return token_view(files, newest, decoder_of(config_of(folder))) if files else None
