"""Curves of one or more runs in one picture.

python tools/plot.py RUN_FOLDER [RUN_FOLDER ...] [--control FILE] [--out PNG]

PNG is RUN_FOLDER/curves.png for one run; of several it must be named, for it is no single run's.
FILE is a metrics.jsonl of a run without reinforcement learning (eval/policy_accuracy over step).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_jackpot.monitor.curves import plot_runs  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Curves of one or more runs in one picture.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--control", type=Path, help="metrics.jsonl with eval/policy_accuracy of a control")
    parser.add_argument("--out", type=Path, help="PNG to write; of one run its curves.png by default")
    given = parser.parse_args()
    if given.out is None and len(given.folders) > 1:
        parser.error("several runs: name their picture with --out.")
    out = given.out or given.folders[0] / "curves.png"
    if out.suffix != ".png":
        parser.error(f"--out {out} must be a PNG file. Name it so: {out.with_suffix('.png')}")
    try:
        plot_runs(given.folders, out, given.control)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(out)


if __name__ == "__main__":
    main()
