"""Labels against the reward before a server starts, in the reward's own workers, which may load anything."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_jackpot.config import Data
from megatron_jackpot.data.problems import file_problems
from megatron_jackpot.records import Prompt
from megatron_jackpot.rewards.label_cache import CheckedLabels
from megatron_jackpot.rewards.parts import written
from megatron_jackpot.rewards.pool import RewardPool


def label_mistakes(
    data: Data, files: Mapping[Path, Sequence[Prompt]], progress: Callable[[int], None]
) -> list[str]:
    """What is wrong with the labels of each file's prompts, by line; of a reward that can judge labels.

    `progress` is told the number of labels checked in a file. Labels that were found right before are not
    checked again, and where there are no others no worker is started.
    """
    known = CheckedLabels(written(data.judge), data.code.model_dump())
    new = {path: prompts for path, prompts in files.items() if any(p.label not in known for p in prompts)}
    mistakes = []
    if not new:
        return []
    try:
        pool = _pool(data, data.reward_workers)
    except ValueError as error:
        return [str(error)]
    with pool:
        for path, prompts in new.items():
            try:
                asyncio.run(pool.check_labels(prompts, path, progress))
            except ValueError as error:
                mistakes.append(str(error))
    return mistakes


def whole_rows(path: Path) -> list[Prompt]:
    """The rows of a file that can be read, where others keep it from giving prompts: without tokens."""
    return [Prompt(problem.id, (), problem.label) for problem in file_problems(path, [])]


def load_mistakes(data: Data) -> list[str]:
    """Why a worker cannot load the user's own reward; nothing where it can."""
    try:
        _pool(data, 1).close()
    except (ValueError, RuntimeError, TimeoutError) as error:
        return [str(error)]
    return []


def _pool(data: Data, workers: int) -> RewardPool:
    # No response is scored here, so the network may stay as it is.
    return RewardPool(
        data.judge,
        workers,
        data.reward_timeout_s,
        memory_bytes=int(data.reward_memory_gb * 2**30),
        network=True,
        code=data.code.model_dump(),
    )
