"""The GPUs of this machine, and which of them the servers take. No torch."""

import os
import re
import subprocess
from dataclasses import dataclass
from typing import Literal

from megatron_jackpot.config import Servers

Device = Literal["cuda", "cpu"]
LIST_LIMIT_S = 30


@dataclass(frozen=True)
class Placement:
    """What servers of a machine run on. Example: Placement("cuda", gpus=(6, 7), all_gpus=tuple(range(8)))."""

    device: Device
    gpus: tuple[int, ...] | None = None
    """servers.num * servers.tp of them, taken in turn; None leaves the choice to SGLang."""
    all_gpus: tuple[int, ...] | None = None
    """What every server sees, `gpus` among them: CUDA IPC maps only what both sides see. None: its own."""


def place_servers(servers: Servers, *, see_all: bool = False) -> Placement:
    """On the last GPUs that this process may use, since ranks take theirs from the front; else on the CPU."""
    found = visible_gpus()
    if not found:
        return Placement("cpu")
    if not all(gpu.isdigit() for gpu in found):
        return Placement("cuda")
    numbers, needed = tuple(map(int, found)), servers.num * servers.tp
    enough = len(numbers) >= needed
    return Placement("cuda", numbers[-needed:] if enough else None, numbers if see_all else None)


def visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use, as CUDA_VISIBLE_DEVICES spells them."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=LIST_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or not found:
        return found
    return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
