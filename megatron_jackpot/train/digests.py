"""What files hold, as hashes: to know a checkpoint for whole, and a reference for the same."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

Digests = dict[str, list]
"""File, relative to its folder -> [bytes, sha256]."""


def digest(path: Path) -> list:
    """[bytes, sha256] of a file; [-1, the reason] of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        return [-1, str(error)]


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
