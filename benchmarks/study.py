"""The study: arms x learning rates x seeds x mismatches of a plan, resumable, and tables of what is there.

    python benchmarks/study.py prepare FOLDER [SEED ...]             problems, warmed models and the runs of
                                       [--task sorting]              benchmarks/kept; another family than sums
    python benchmarks/study.py run PLAN.yaml FOLDER --dry-run        what it would take, what it could resolve
    python benchmarks/study.py run PLAN.yaml FOLDER [--limit-s 840]  goes on where an earlier call ended
    python benchmarks/study.py report PLAN.yaml FOLDER [--into docs/evidence.md]    tables and pictures
    python benchmarks/study.py revalidate PLAN.yaml FOLDER           whether stale runs would come out so
    python benchmarks/study.py keep PLAN.yaml FOLDER                 its finished runs into benchmarks/kept
    python benchmarks/study.py compare PLAN.yaml FOLDER --arm tis --seed 0    the same run on SGLang

Of several callers with one FOLDER each takes runs that no other is at. One core each: OMP_NUM_THREADS=1.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.study_parts.compare import compare  # noqa: E402
from benchmarks.study_parts.estimate import estimate  # noqa: E402
from benchmarks.study_parts.families import FAMILIES  # noqa: E402
from benchmarks.study_parts.kept import keep, take_out  # noqa: E402
from benchmarks.study_parts.picture import draw  # noqa: E402
from benchmarks.study_parts.plan import Plan, read_plan, run_folder  # noqa: E402
from benchmarks.study_parts.report import put_into, write_report  # noqa: E402
from benchmarks.study_parts.revalidate import revalidate  # noqa: E402
from benchmarks.study_parts.runner import DONE, FIRST_STEPS, Stale, perform  # noqa: E402
from benchmarks.study_parts.task import FIRST  # noqa: E402
from benchmarks.study_parts.warmup import warm_up  # noqa: E402
from megatron_jackpot.config import Parallel  # noqa: E402
from megatron_jackpot.models.mesh import init_mesh  # noqa: E402
from megatron_jackpot.parallel.context import Mesh  # noqa: E402


def run_all(plan: Plan, folder: Path, mesh: Mesh, limit_s: float) -> int:
    """0 when every run is done, 3 when the limit came first, 4 when the rest is stale or somebody else's."""
    deadline = time.monotonic() + limit_s
    waiting = 0
    for run in plan.runs:
        if (run_folder(folder, run) / DONE).is_file():
            continue
        if time.monotonic() > deadline:
            return 3
        started = time.monotonic()
        try:
            done = perform(plan, run, folder, mesh, deadline)
        except BlockingIOError:
            waiting += 1
            continue
        except Stale as error:
            print(f"STALE: {error}", flush=True)
            waiting += 1
            continue
        what = "done" if done else "saved at the limit"
        print(f"{run.name}: {what}, {time.monotonic() - started:.0f} s", flush=True)
        if not done:
            return 3
    return 4 if waiting else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare")
    prepare.add_argument("folder", type=Path)
    prepare.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2])
    prepare.add_argument("--task", choices=FAMILIES, default=FIRST)
    for name in ("run", "report", "revalidate", "keep", "compare"):
        command = commands.add_parser(name)
        command.add_argument("plan", type=Path)
        command.add_argument("folder", type=Path)
        if name == "run":
            command.add_argument("--dry-run", action="store_true")
            command.add_argument("--limit-s", type=float, default=1e9, help="save and end soon after that")
        if name == "report":
            command.add_argument(
                "--into", type=Path, help="a document with the stage's marks; the picture beside"
            )
        if name == "revalidate":
            command.add_argument("--steps", type=int, default=FIRST_STEPS, help="to repeat in every arm")
        if name == "compare":
            command.add_argument("--arm", required=True)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--steps", type=int, help="on SGLang; all of them if not given")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.command == "prepare":
        print(f"{take_out(folder)} finished runs of benchmarks/kept put into {folder}", flush=True)
        mesh = init_mesh(Parallel(threads=1), 0)
        for seed in given.seeds:
            warm_up(folder, given.task, seed, mesh)
        return
    plan = read_plan(given.plan)
    if given.command == "report":
        text, pictures = write_report(plan, folder), draw(plan, folder)
        print("\n".join([text, *map(str, pictures)]))
        if given.into:
            put_into(given.into, plan, text)
            for picture in pictures[-1:]:
                shutil.copy(picture, given.into.with_name(f"study_{plan.stage}.png"))
    elif given.command == "revalidate":
        sys.exit(min(1, revalidate(plan, folder, init_mesh(Parallel(threads=1), 0), given.steps)))
    elif given.command == "keep":
        print(keep(plan, folder))
    elif given.command == "compare":
        compare(plan, folder, given.arm, given.seed, given.steps or plan.steps)
    else:
        mesh = init_mesh(Parallel(threads=1), 0)
        begun = (folder / f"stage_{plan.stage}").exists()
        if (given.dry_run or not begun) and not estimate(plan, folder, mesh):
            sys.exit(2)
        if not given.dry_run:
            sys.exit(run_all(plan, folder, mesh, given.limit_s))


if __name__ == "__main__":
    main()
