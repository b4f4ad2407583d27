"""Answers in words, from RUN/samples.jsonl: of the models at each evaluation, and of wrong rollouts."""

from pathlib import Path

from megatron_jackpot.monitor.evaluations import ANSWERS_FILE
from megatron_jackpot.monitor.metrics import Row, read_metrics
from megatron_jackpot.monitor.outputs import SAMPLES_FILE

FILES = (SAMPLES_FILE, ANSWERS_FILE)

SHOWN_STEPS = 12
"""Newest steps with samples that are on the page."""
LONGEST = 4000
"""Letters of an answer that are shown."""


def kept(folder: Path) -> list[Row]:
    """Rows of the newest steps and of the first one, by step, long texts cut. Raises ValueError as
    `read_metrics` does."""
    rows = [row for path in map(folder.joinpath, FILES) if path.is_file() for row in read_metrics(path)]
    rows.sort(key=lambda row: row["step"])
    steps = sorted({row["step"] for row in rows})
    shown = {*steps[:1], *steps[-SHOWN_STEPS:]}
    return [{key: _cut(value) for key, value in row.items()} for row in rows if row["step"] in shown]


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]} ... ({len(value) - LONGEST} letters more)"
    return value
