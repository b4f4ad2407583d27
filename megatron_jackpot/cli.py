"""The command megatron-jackpot. Thin: parse, build, run."""

import argparse
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path

from megatron_jackpot.config import Config, ConfigError, examine_config, placed
from megatron_jackpot.launch.arguments import REPORT_PORT, parse
from megatron_jackpot.launch.folder import REFUSED
from megatron_jackpot.monitor.messages import let_go_of_output
from megatron_jackpot.run.interrupt import ending_when_asked, forget_stop

log = logging.getLogger("megatron_jackpot.cli")  # By name: a module that is run has another.

EXIT_FAILED = 1
EXIT_REFUSED = 2


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a mistake in the config or the command line."""
    if argv is None and sys.getfilesystemencoding() != "utf-8":
        # The names of files, too, follow the locale; only a new interpreter changes that.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    began = time.monotonic()
    try:
        args = parse(sys.argv[1:] if argv is None else argv, _settings)
        # What asks a run to stop counts before there is one: while it is checked, and libraries are loaded.
        with ending_when_asked() if args.command == "join" or _is_here(args) else nullcontext():
            return _run(args, began)
    except KeyboardInterrupt:
        print("megatron-jackpot: interrupted; nothing was started", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    finally:
        let_go_of_output()


def _settings(key: str) -> str:
    from megatron_jackpot.train.settings_help import settings

    return settings(key)


def _run(args: argparse.Namespace, began: float) -> int:
    if args.command == "report":
        return _report(args)
    if args.command == "evaluate":
        return _evaluate(args)
    config, mistakes = None, []
    if args.config is not None:
        try:
            config, mistakes = examine_config(args.config, args.overrides)
            if config is not None and _is_here(args):
                _take_up(config.run.folder)
            if config is not None and args.command in ("launch", "plan", "doctor"):
                mistakes += _preflight(config, args)
            mistakes = placed(list(dict.fromkeys(mistakes)), args.config, args.overrides)
        except (ValueError, OSError) as error:
            config, mistakes = None, str(error).splitlines()
    if args.command == "doctor":
        return _doctor(config, mistakes, args)
    if args.command == "train":
        return _train(config, mistakes, args)
    if config is None or mistakes:
        return refuse(mistakes)
    if args.command == "values":
        return _values(config, args)
    if args.command == "plan":
        return _plan(config, args)
    if args.command in ("serve", "join"):
        return _node(args.command, config, began)
    if args.slurm:
        from megatron_jackpot.launch.slurm import submit

        return submit(config, dry_run=args.dry_run, chain=args.chain)
    from megatron_jackpot.launch.local import launch

    return launch(config, args.nproc, began=began)


def _is_here(args: argparse.Namespace) -> bool:
    """A launch on this machine, no job that is submitted."""
    return args.command == "launch" and not args.slurm


def _take_up(folder: Path) -> None:
    """What an earlier run was asked is forgotten before the checks, which may take minutes: from here on it
    is this one that is asked. Raises ConfigError when another launch has the folder."""
    from megatron_jackpot.launch.lock import refuse_if_held

    refuse_if_held(folder)
    with suppress(OSError):  # A folder that cannot be one; the checks say so.
        forget_stop(folder)


def _preflight(config: Config, args: argparse.Namespace) -> list[str]:
    from megatron_jackpot.launch.preflight import Command, Subject, preflight

    command: Command = "launch" if args.command == "doctor" else args.command
    mistakes = []
    if args.command == "launch" and args.slurm:
        from megatron_jackpot.launch.slurm import job_mistakes

        _hush()
        command = "plan" if args.dry_run else "submit"
        mistakes = list(job_mistakes(config, args.chain))
    found = preflight(Subject(config, command, getattr(args, "nproc", None), _say_progress))
    return list(dict.fromkeys([*found, *mistakes]))


def _say_progress(what: str, number: int) -> None:
    if number % 10_000 == 0:
        print(f"megatron-jackpot: {number} {what} checked", file=sys.stderr, flush=True)


def refuse(mistakes: Iterable[str]) -> int:
    for line in mistakes:
        print(f"{REFUSED}{line}", file=sys.stderr)
    return EXIT_REFUSED


def _doctor(config: Config | None, mistakes: list[str], args: argparse.Namespace) -> int:
    """Mistakes of the configuration, where one is given, and then the machine."""
    from megatron_jackpot.launch.doctor import doctor

    code = refuse(mistakes) if mistakes else 0
    server_python = args.server_python or (config and config.servers.python)
    return doctor(server_python, args.config if config is not None and not mistakes else None) or code


def _train(config: Config | None, mistakes: list[str], args: argparse.Namespace) -> int:
    main_rank = os.environ.get("RANK", "0") == "0"
    if config is None:
        return refuse(mistakes if main_rank else ())
    from megatron_jackpot.launch.preflight import Subject, preflight
    from megatron_jackpot.monitor.messages import configure
    from megatron_jackpot.run.interrupt import STARTED_VARIABLE, StopRequest, die_with_parent

    # torchrun's end, however it came, asks its ranks to save; signals count from here on, also during the
    # imports.
    die_with_parent(signal.SIGTERM)
    stop = StopRequest(config.run)
    stop.listen()
    configure()
    if main_rank:
        mistakes += placed(preflight(Subject(config, "train")), args.config, args.overrides)
    if mistakes:
        return refuse(mistakes if main_rank else ())
    _hush()
    from megatron_jackpot.launch.folder import own_folder
    from megatron_jackpot.train.run import run

    # A launch has the folder already; of a bare torchrun the first rank takes it.
    alone = main_rank and STARTED_VARIABLE not in os.environ
    try:
        with own_folder(config.run.folder) if alone else nullcontext():
            run(config, stop=stop)
    except ConfigError as error:
        return refuse(str(error).splitlines())
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        # Not the interpreter's own end: with collectives of other ranks under way it aborts (134), which
        # looks like a crash of another kind. What was open is closed by now.
        os._exit(EXIT_FAILED)
    return 0


def _node(role: str, config: Config, began: float) -> int:
    from megatron_jackpot.launch.node import join, serve

    try:
        return serve(config) if role == "serve" else join(config, began)
    except ValueError as error:
        return refuse(str(error).splitlines())


def _report(args: argparse.Namespace) -> int:
    _hush()
    from megatron_jackpot.monitor.report.page import write_report
    from megatron_jackpot.monitor.report.serve import serve

    try:
        if args.serve:
            serve(args.runs, REPORT_PORT if args.port is None else args.port)
        else:
            print(write_report(args.runs, args.out))
    except (ValueError, OSError) as error:
        return refuse(str(error).splitlines())
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    _hush()
    from megatron_jackpot.monitor.console import print_evaluations
    from megatron_jackpot.train.evaluand import evaluand, settings

    def ask() -> None:
        it = evaluand(args.what, args.model, args.run)
        config = settings(it, args.data, args.overrides)
        log.info(f"loading libraries, to evaluate {it.folder}")
        from megatron_jackpot.train.evaluate import evaluate  # It takes a while: not before a wrong name.

        print_evaluations(evaluate(it, config))

    return _with_servers(ask, "sets that were judged are in evaluations.jsonl")


def _values(config: Config, args: argparse.Namespace) -> int:
    _hush()

    def ask() -> None:
        log.info("loading libraries")
        from megatron_jackpot.train.values import make_values

        print(make_values(config, samples=args.samples, beta=args.beta))

    return _with_servers(ask, "what the table has stays there")


def _with_servers(ask: Callable[[], None], left: str) -> int:
    """The exit code of `ask`, which starts servers and ends them; `left` says what an interruption leaves."""
    from megatron_jackpot.monitor.messages import configure

    configure()
    try:
        with ending_when_asked():
            ask()
    except (RuntimeError, TimeoutError) as error:
        refuse(str(error).splitlines())
        return EXIT_FAILED
    except (ValueError, OSError) as error:
        return refuse(str(error).splitlines())
    except KeyboardInterrupt:
        print(f"megatron-jackpot: interrupted; the servers have ended, {left}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _hush() -> None:
    """Keep what libraries say of themselves out of the log; errors and this project's own words stay.

    At import Megatron warns, on every rank, of each optional package that is missing (`doctor` says it once),
    and torch of its own deprecated calls inside Megatron. Python's -W or PYTHONWARNINGS brings them back.
    """
    if not sys.warnoptions:
        for module in (r"megatron\.", r"torch\.", r"transformer_engine"):
            warnings.filterwarnings("ignore", module=module)
        # The compiler's, of packages that are compiled when they are first needed, as uv installs them.
        warnings.filterwarnings("ignore", category=SyntaxWarning)
        # A CUDA build of torch says at its import that a machine without a GPU has none.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _plan(config: Config, args: argparse.Namespace) -> int:
    _hush()
    from megatron_jackpot.config.placement import expected_processes
    from megatron_jackpot.plan.seconds import Assumptions
    from megatron_jackpot.plan.splits import Measured, show_timeline
    from megatron_jackpot.plan.tables import show_plan

    assumed = Assumptions(args.mean_tokens, args.acceptance, args.tflops, args.tp_gbs)
    try:
        gpus, why = (args.gpus, "--gpus") if args.gpus is not None else expected_processes(config)
        if args.gpu_memory is not None:
            cluster = config.cluster.model_copy(update={"gpu_memory_gib": args.gpu_memory})
            config = config.model_copy(update={"cluster": cluster})
        plan, fits = show_plan(config, gpus, assumed, why=why)
        if args.server_tps is not None:
            rates = {key: getattr(args, key) for key in ("server_tps", "stream_tps", "push_s", "spread")}
            show_timeline(plan, assumed, Measured(**rates))
        return int(not fits)
    except ValueError as error:
        return refuse(str(error).splitlines())


if __name__ == "__main__":
    sys.exit(main())
