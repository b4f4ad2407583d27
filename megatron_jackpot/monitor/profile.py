"""Where the time and the memory of chosen steps go: RUN/profile/step-000003-rank-0/.

trace.json.gz opens in chrome://tracing or ui.perfetto.dev. memory.pickle, for pytorch.org/memory_viz, is of
CUDA's allocator and is left out without CUDA.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_jackpot.config import Logging

FOLDER = "profile"
MEMORY_EVENTS = 200_000
"""Newest allocations and frees in a snapshot."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def profiled(run_folder: Path, config: Logging, step: int, rank: int) -> Iterator[None]:
    """Around a step, counted from 1: records it where `config` ask for this step and rank, else does nothing.

    What was recorded is written however the step ends. A disk that refuses is reported, not raised.
    """
    if step not in config.profile_steps or rank not in config.profile_ranks:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    recording = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda])
    try:
        with recording, record_function(f"step {step}"):
            yield
    finally:
        try:
            _write(Path(run_folder) / FOLDER / f"step-{step:06d}-rank-{rank}", recording, cuda)
        except OSError as error:
            log.warning(f"the profile of step {step} was not written: {error}")
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def _write(folder: Path, recording: profile, cuda: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".trace.json.gz"
    recording.export_chrome_trace(str(partial))
    partial.replace(folder / "trace.json.gz")
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
