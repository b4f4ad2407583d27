"""What the command megatron-jackpot takes: its commands, their options and what they may be."""

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_jackpot import __version__

REPORT_PORT = 8300
Settings = Callable[[str], str]
"""A dotted key, or "" for all of them -> what to print. Raises ValueError for one that is none."""


def _positive(text: str, most: float = math.inf) -> float:
    """Raises ArgumentTypeError."""
    with suppress(ValueError):
        if 0 < float(text) <= most and float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is no number above 0" + f", at most {most:g}" * (most < math.inf)
    )


def _amount(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else _positive(text)


def _share(text: str) -> float:
    return _positive(text, most=1)


def _count(text: str) -> int:
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "launch": {
        "--nproc": dict(type=int, help="training processes; default tp * pp * cp"),
        "--slurm": dict(action="store_true", help="render a job from the cluster section and submit it"),
        "--dry-run": dict(action="store_true", help="with --slurm: print the job, submit nothing"),
        "--chain": dict(
            type=int,
            default=1,
            metavar="N",
            help="with --slurm: N jobs, each after the end of those before",
        ),
    },
    "plan": {
        "--gpus": dict(
            type=_count, help="training GPUs; default those of the cluster section, else of `launch`"
        ),
        "--gpu-memory": dict(type=_positive, metavar="GIB", help="of a GPU; default cluster.gpu_memory_gib"),
        "--mean-tokens": dict(type=_positive, help="prompt and response on average; default the longest"),
        "--acceptance": dict(type=_share, default=0.75, help="share of tokens kept; default 0.75"),
        "--tflops": dict(type=_positive, default=400.0, help="achieved per GPU; default 400"),
        "--tp-gbs": dict(type=_positive, default=300.0, help="achieved GB/s between tp peers; default 300"),
        "--server-tps": dict(
            type=_positive, help="measured tokens/s of a full server: asks for the timeline"
        ),
        "--stream-tps": dict(type=_positive, default=100.0, help="... of one response alone; default 100"),
        "--push-s": dict(type=_amount, default=5.0, help="seconds of a push; default 5"),
        "--spread": dict(type=_amount, default=0.8, help="sd of log response length; default 0.8"),
    },
    "values": {
        "--samples": dict(type=_count, default=8, help="answers of the reference to each prompt; default 8"),
        "--beta": dict(type=_positive, default=0.5, help="of V* = beta log mean exp(r / beta); default 0.5"),
    },
}
OVERRIDE = "override, value in YAML"
HELP = "everything, or what one key or section takes: --help rollout, --help algorithm.correction"


class _Help(argparse.Action):
    """--help, or --help KEY."""

    settings: Settings

    def __call__(
        self, parser: argparse.ArgumentParser, args: object, key: object, option: str | None = None
    ) -> None:
        try:
            text = self.settings("" if key is None else str(key))
        except ValueError as error:
            parser.error(str(error))
        if key is None:
            parser.print_help()
        print(text if key is not None else f"\n{text}")
        parser.exit()


def parse(argv: list[str], settings: Settings) -> argparse.Namespace:
    """`settings` says what --help says of a key, or of all. Ends the process for words that cannot be."""
    helps = type("_HelpOfSettings", (_Help,), {"settings": staticmethod(settings)})
    parser = argparse.ArgumentParser(
        prog="megatron-jackpot", description="A policy learns from another model's rollouts."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = {
        "train": "Run one rank of a training job; started by torchrun.",
        "launch": "Run a whole job on this machine: SGLang servers and torchrun; or submit it to Slurm.",
        "plan": "Memory, traffic and FLOPs of a run, by arithmetic: docs/planning.md.",
        "values": "V* of every training prompt, from SGLang servers of the reference: docs/objectives.md.",
        "serve": "This node's SGLang servers in a Slurm job; started by launch/jobs/common.sh.",
        "join": "This node's training processes in a Slurm job; started by launch/jobs/common.sh.",
    }
    for name, text in about.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            usage=f"megatron-jackpot {name} CONFIG [key=value ...]" + " [options]" * (name in OPTIONS),
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
        command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDE)
        command.add_argument("-h", "--help", nargs="?", action=helps, metavar="KEY", help=HELP)
        for option, arguments in OPTIONS.get(name, {}).items():
            command.add_argument(option, **arguments)
    command = commands.add_parser(
        "doctor",
        help="Check this machine, and a config where one is given: a line for each thing with its remedy.",
    )
    command.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDE)
    command.add_argument("--server-python", type=Path, help="interpreter with SGLang; default this one")
    _add_evaluate(commands)
    command = commands.add_parser("report", help="A run on one HTML page, or several beside each other.")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    command.add_argument("--out", type=Path, help="the page; default RUN/report.html, of one run")
    command.add_argument("--serve", action="store_true", help="show the page on loopback while runs go on")
    command.add_argument("--port", type=int, help=f"with --serve; default {REPORT_PORT}, 0 takes a free one")
    args, rest = parser.parse_known_args(argv)
    # argparse takes `key=value ...` only in one run; those after an option arrive here.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and args.command == "report"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}. Settings are written so: run.steps=5")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if args.command == "launch" and not args.slurm and (args.dry_run or args.chain != 1):
        parser.error("--dry-run and --chain go with --slurm")
    if args.command == "report" and (args.out if args.serve else args.port is not None):
        parser.error("--port goes with --serve, and --out without it")
    return args


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "evaluate",
        help="A model's answers to named sets, from SGLang servers of its own: docs/evaluation.md.",
        usage="megatron-jackpot evaluate RUN|CHECKPOINT|MODEL [--data NAME=FILE ...] [key=value ...]",
    )
    command.add_argument("what", type=Path, metavar="RUN|CHECKPOINT|MODEL", help="of a run the newest one")
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="data.*, evaluation.*, servers.*, precision.dtype",
    )
    command.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a set like data.heldout_path, once or more often; default the run's own held-out sets",
    )
    command.add_argument("--model", choices=("policy", "actor"), help="of a run's two; default policy")
    command.add_argument(
        "--run", type=Path, help="whose settings count and whose record it goes to; default the model's own"
    )
