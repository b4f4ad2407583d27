"""The command megatron-jackpot: train, launch and doctor. Thin: parse, build, run."""

import argparse
import shutil
import signal
import sys
import textwrap
from pathlib import Path

from megatron_jackpot import __version__
from megatron_jackpot.config import Config, describe, load_config


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a mistake in the config or the command line."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.command == "doctor":
        from megatron_jackpot.doctor import doctor

        return doctor(args.server_python)
    try:
        config = load_config(args.config, args.overrides)
    except (ValueError, OSError) as error:
        return refuse(error)
    if args.command == "train":
        return _train(config)
    return _launch(config, args.nproc)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-jackpot", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = {
        "train": "Run one rank of a training job; started by torchrun.",
        "launch": "Run a whole job on this machine: SGLang servers, then torchrun.",
    }
    for name, text in about.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            usage=f"megatron-jackpot {name} CONFIG [key=value ...]" + " [--nproc N]" * (name == "launch"),
            epilog=knobs(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="override, value in YAML")
        if name == "launch":
            command.add_argument("--nproc", type=int, help="training processes; default tp * pp * cp")
    command = commands.add_parser(
        "doctor", help="Check this machine, one line for each thing with its remedy."
    )
    command.add_argument("--server-python", type=Path, help="interpreter with SGLang; default this one")
    args, rest = parser.parse_known_args(argv)
    # argparse takes `key=value ...` only in one run; those after an option arrive here.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and args.command == "doctor"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def knobs() -> str:
    """Every knob with its default and meaning, for --help."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = ["knobs (key, default, meaning):"]
    for key, default, meaning in describe():
        lines.append(f"  {key} = {default}")
        lines += textwrap.wrap(
            " ".join(meaning.split()), width, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def refuse(error: Exception) -> int:
    print(f"megatron-jackpot: {error}", file=sys.stderr)
    return 2


def _train(config: Config) -> int:
    from megatron_jackpot.interrupt import StopRequest, die_with_parent

    # torchrun's end, however it came, asks its ranks to save; signals count from here on, also during the imports.
    die_with_parent(signal.SIGTERM)
    stop = StopRequest(config.run)
    stop.listen()
    from megatron_jackpot.assembly import Refused, run

    try:
        run(config, stop=stop)
    except Refused as error:
        return refuse(error)
    return 0


def _launch(config: Config, nproc: int | None) -> int:
    from megatron_jackpot.launch import check, launch

    try:
        check(config, nproc)
    except ValueError as error:
        return refuse(error)
    return launch(config, nproc)


if __name__ == "__main__":
    sys.exit(main())
