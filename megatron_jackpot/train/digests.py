"""What files hold, as hashes: to know a checkpoint for whole, and a reference for the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_jackpot.run.manifest import Digests, digest


def digests(folder: Path, files: Sequence[Path]) -> Digests:
    """Those of a folder's files on shared disk, the work spread over the ranks, where there are any; every
    rank calls it."""
    if not dist.is_initialized():
        return {str(path.relative_to(folder)): digest(path) for path in files}
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = {str(path.relative_to(folder)): digest(path) for path in files[rank::world]}
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, mine)
    return {name: entry for part in parts for name, entry in part.items()}
