"""docs/refused.md, the table of what is refused at start, made of the checks themselves.

python tools/refused.py
"""

from pathlib import Path

from megatron_jackpot.config import Check
from megatron_jackpot.config.agreement import AGREEMENT
from megatron_jackpot.launch.preflight import CHECKS, NOT_CHECKED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "refused.md"
HEAD = """# What is refused at start

`launch`, `launch --slurm`, `plan` and `train` check all of this first, without torch, and end with exit code
2 and every mistake on a line of its own: field, value, rule, remedy. Ranks check the same again. Rows and
methods are checked once for each content: the verdicts lie in `$JACKPOT_HOME/checked`. Of 65 mistakes of a
first day each is told 0.3 to 5 s after the command, on two busy cores and with nothing checked before
([all of them](../benchmarks/results/2026-11-28-mistakes.md)). This page is made by `python tools/refused.py`.

Every setting is checked for its type and bounds, which `megatron-jackpot launch --help` lists; an unknown key
is refused with the nearest known one.
"""


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        *_table("Between sections of the configuration", AGREEMENT),
        *_table("Folders, models, methods, rows", CHECKS),
        "## Not checked here\n",
        *(f"- {thing}" for thing in NOT_CHECKED),
        "",
    ]
    return "\n".join(parts)


def _table(title: str, checks: tuple[Check, ...]) -> list[str]:
    rows = [f"| {check.name} | {check.rule} | {check.remedy} |" for check in checks]
    return [f"## {title}\n", "| What | Must hold | Otherwise |", "|---|---|---|", *rows, ""]


if __name__ == "__main__":
    PAGE.write_text(page())
