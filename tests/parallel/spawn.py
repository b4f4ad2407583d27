"""Run a function on several gloo ranks of this machine, with a hard time limit."""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch", "torch._dynamo", "megatron_jackpot.train.run", "pytest", "tests.parallel.layouts"]
"""What ranks and the tests' own modules import, here once and not in every rank. torch imports its compiler
when a first optimizer is made."""
OF_A_RUN = ["transformers.models.auto.tokenization_auto", "reasoning_gym"]
"""What a run imports besides for its tokenizer and its problems, for seconds: stages of whole runs add them
to PRELOADED."""


def run_ranks(fn: Callable[..., Any], world: int, timeout_s: float = 120.0, *args: Any) -> list[Any]:
    """[fn(rank, world, *args) for every rank]: new processes in one gloo group, a single thread each.

    They are forked from a server that has imported everything and done nothing: importing takes longer than
    most tests.

    fn is a module-level function; what it returns must survive torch.save. RANK, LOCAL_RANK and WORLD_SIZE
    are set as torchrun sets them. Raises RuntimeError with the traceback of the first rank that failed,
    TimeoutError after timeout_s; either way every child is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_ranks(fn, world, timeout_s, folder, *args)
        try:
            _wait(context, Path(folder), time.monotonic() + timeout_s, timeout_s, fn.__name__)
        finally:
            for child in context.processes:
                if child.is_alive():
                    child.kill()
                child.join()
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world)]


def start_ranks(fn: Callable[..., Any], world: int, timeout_s: float, folder: str, *args: Any) -> Any:
    """The processes of `run_ranks`, started and not waited for: a context with `processes`, which the caller
    ends."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return mp.start_processes(
        _rank,
        args=(world, folder, timeout_s, dict(os.environ), fn, args),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )


def _wait(context: Any, folder: Path, deadline: float, timeout_s: float, name: str) -> None:
    alive = context.processes
    while any(child.is_alive() for child in alive):
        errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime)
        if errors:
            raise RuntimeError(f"{name} failed on rank {errors[0].name[5:]}:\n{errors[0].read_text()}")
        if time.monotonic() > deadline:
            stuck = [rank for rank, child in enumerate(alive) if child.is_alive()]
            raise TimeoutError(f"{name}: ranks {stuck} were still running after {timeout_s} s.")
        time.sleep(0.02)
    errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime)
    if errors:
        raise RuntimeError(f"{name} failed on rank {errors[0].name[5:]}:\n{errors[0].read_text()}")
    for rank, child in enumerate(alive):
        if child.exitcode:
            raise RuntimeError(f"{name}: rank {rank} ended with exit code {child.exitcode}.")


def _rank(
    rank: int,
    world: int,
    folder: str,
    timeout_s: float,
    env: dict[str, str],
    fn: Callable[..., Any],
    args: tuple,
) -> None:
    # The server's environment is that of its start.
    os.environ.clear()
    os.environ.update(env)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        torch.save(fn(rank, world, *args), Path(folder, f"result{rank}"))
        dist.destroy_process_group()
    except BaseException:
        # Written in one move: the parent must not read half a traceback.
        Path(folder, f"partial{rank}").write_text(traceback.format_exc())
        os.replace(Path(folder, f"partial{rank}"), Path(folder, f"error{rank}"))
        raise SystemExit(1) from None
