"""`packing.tokens: auto` becomes a number: the same on every rank, and on a resume that of the checkpoint."""

import json
import logging

import torch
import torch.distributed as dist

from megatron_jackpot.config import Config, Run
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.plan.microbatch import choose, with_tokens
from megatron_jackpot.run.provenance import checkpoints
from megatron_jackpot.train.kept import STATE

log = logging.getLogger(__name__)

SAVED = "packing_tokens"
"""Its key in a checkpoint's state."""


def with_number(config: Config, mesh: Mesh) -> Config:
    """The configuration with tokens per micro-batch that are a number; every rank calls it.

    The smallest memory of a rank decides: reductions: 1 over the world; broadcasts: 2. Raises ValueError, on
    every rank, where not even the longest sequence fits.
    """
    if config.packing.tokens != "auto":
        return config
    saved = mesh.from_main(_saved(config.run) if mesh.is_main else None)
    memory = device_memory(mesh)
    least = None if memory is None else -mesh.largest(-memory)
    if saved is not None and saved >= config.longest_sequence:
        tokens, why, trouble = (
            saved,
            "as in the checkpoint, so that bits stay; packing.tokens=N replaces it",
            None,
        )
    else:
        choice = choose(config, dist.get_world_size(), least)
        tokens, why, trouble = choice.tokens, choice.why, choice.trouble
    if trouble is not None:
        raise ValueError(trouble)
    if mesh.is_main:
        log.info(f"packing.tokens = auto: {tokens}, {why}")
    return with_tokens(config, tokens)


def device_memory(mesh: Mesh) -> int | None:
    """Bytes of this rank's GPU in all, whatever holds them; None on a CPU."""
    return None if mesh.device.type == "cpu" else torch.cuda.get_device_properties(mesh.device).total_memory


def _saved(run: Run) -> int | None:
    """That of the newest checkpoint which can be read, where the run goes on from one."""
    for folder in reversed(checkpoints(run.folder) if run.resume else []):
        try:
            found = json.loads((folder / STATE).read_text(encoding="utf-8")).get(SAVED)
            return found if isinstance(found, int) else None
        except (OSError, ValueError, AttributeError):
            continue  # It is damaged, and the resume passes it over too.
    return None
