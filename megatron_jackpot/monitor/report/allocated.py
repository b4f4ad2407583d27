"""What an allocator did, prompt by prompt, from RUN/prompts.jsonl."""

from pathlib import Path

from megatron_jackpot.monitor.metrics import Row, read_metrics
from megatron_jackpot.monitor.outputs import PROMPTS_FILE

SHOWN_STEPS = 12
"""Newest steps that are on the page, beside the first one."""
FIELDS = ("prompt", "round", "planned", "rollouts", "rounds", "correct", "live", "trained")


def kept(folder: Path) -> Row | None:
    """`steps`, [step, prompts, fetched, planned, rollouts, correct, live, trained] of each that is shown, and
    `prompts`, by step a row of FIELDS for each prompt; None of a run whose prompts all get the same.

    Raises ValueError as `read_metrics` does.
    """
    path = folder / PROMPTS_FILE
    told = [row for row in read_metrics(path) if "allocated" in row] if path.is_file() else []
    if not told:
        return None
    told = [*told[:-SHOWN_STEPS][:1], *told[-SHOWN_STEPS:]]
    steps = [[row["step"], *_total(row["allocated"])] for row in told]
    rows = {str(row["step"]): [*zip(*map(row["allocated"].get, FIELDS), strict=True)] for row in told}
    return {"steps": steps, "prompts": rows}


def _total(columns: Row) -> list[int]:
    fetched = sum(number > 0 for number in columns["round"])
    summed = [sum(columns[name]) for name in ("planned", "rollouts", "correct", "live", "trained")]
    return [len(columns["prompt"]), fetched, *summed]
