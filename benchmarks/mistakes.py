"""How long each mistake of a first day (tests/launch/mistakes.py) takes to be told, from command to end.

python benchmarks/mistakes.py        a process for each, with an empty cache of verdicts; two minutes
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.study_parts.markdown import head, row
from megatron_jackpot.cli import EXIT_REFUSED
from tests.launch.mistakes import MISTAKES, Mistake, run_that_could_start

LIMIT_S = 120
SHOWN = 160
"""Characters of a message in the table."""


def tell(mistake: Mistake, folder: Path) -> tuple[float, str]:
    """(seconds, the line that tells it) of a launch.

    Raises:
        RuntimeError: it was not refused, its line is missing, or it left something behind
    """
    name, spoil, words, parts = mistake
    run_that_could_start(folder)
    spoil(folder)
    before = sorted(folder.rglob("*"))
    environment = {**os.environ, "JACKPOT_HOME": str(folder.with_suffix(".home"))}
    command = [sys.executable, "-m", "megatron_jackpot.cli", "launch", "run.yaml", *words]
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    seconds = time.monotonic() - begun
    lines = [line for line in done.stderr.splitlines() if all(part in line for part in parts)]
    if done.returncode != EXIT_REFUSED or not lines or done.stdout or sorted(folder.rglob("*")) != before:
        raise RuntimeError(f"{name}: ended with {done.returncode} and said\n{done.stdout}{done.stderr}")
    return seconds, lines[0].removeprefix("megatron-jackpot: ")


def main() -> None:
    taken = []
    print("\n".join(head(["mistake", "seconds", "what is said"])), flush=True)
    for mistake in MISTAKES:
        with tempfile.TemporaryDirectory() as place:
            seconds, line = tell(mistake, Path(place, "folder"))
        taken.append(seconds)
        line = line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."
        print(row([mistake[0], f"{seconds:.1f}", "`" + line.replace("|", "\\|") + "`"]), flush=True)
    print(
        f"\n{len(taken)} mistakes: {min(taken):.1f} to {max(taken):.1f} s, "
        f"{statistics.median(taken):.1f} in the median."
    )


if __name__ == "__main__":
    main()
