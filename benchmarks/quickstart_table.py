"""The README's table of quickstart runs, in Markdown. benchmarks/quickstart.sh makes the runs and calls it.

python benchmarks/quickstart_table.py RUN_FOLDER [RUN_FOLDER ...] [--control FILE]
"""

import argparse
import json
import statistics
from pathlib import Path

from megatron_jackpot.config import load_config
from megatron_jackpot.monitor.metrics import read_metrics, series
from megatron_jackpot.run.provenance import CONFIG_FILE, PROVENANCE_FILE

HEAD = (
    *("seed", "ranks x threads", "policy: start", "end", "best", "actor: start", "end"),
    *("acceptance, lowest to highest step", "s a step, median", "s in all"),
)


def layout(folder: Path) -> str:
    """Ranks (as they were asked for) and threads of each."""
    command = json.loads((folder / PROVENANCE_FILE).read_text())["command"]
    ranks = command[command.index("--nproc") + 1] if "--nproc" in command else "1"
    return f"{ranks} x {load_config(folder / CONFIG_FILE).parallel.threads}"


def row(folder: Path) -> list[str]:
    rows = read_metrics(folder)
    policy, actor = (series(rows, f"eval/{name}_accuracy")[1] for name in ("policy", "actor"))
    acceptance = series(rows, "jackpot/acceptance")[1]
    config = load_config(folder / CONFIG_FILE)
    seconds = folder / "seconds"
    return [
        str(config.run.seed),
        layout(folder),
        f"{policy[0]:.3f}",
        f"{policy[-1]:.3f}",
        f"{max(policy):.3f}",
        f"{actor[0]:.3f}",
        f"{actor[-1]:.3f}",
        f"{min(acceptance):.3f}-{max(acceptance):.3f}",
        f"{statistics.median(series(rows, 'time/step')[1]):.1f}",
        seconds.read_text().strip() if seconds.is_file() else "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--control", type=Path, help="control.jsonl")
    given = parser.parse_args()
    rows = [row(folder) for folder in given.folders]
    for cells in (HEAD, ["---"] * len(HEAD), *rows):
        print(f"| {' | '.join(cells)} |")
    if given.control:
        scores = series(read_metrics(given.control), "eval/policy_accuracy")[1]
        print(
            f"\nControl: {scores[0]:.3f} at the start, {max(scores[1:]):.3f} the best of {len(scores) - 1}."
        )


if __name__ == "__main__":
    main()
