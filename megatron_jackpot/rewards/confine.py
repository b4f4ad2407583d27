"""Limits of a reward worker: memory, CPU time of an item, and no network. Standard library only; Linux.

Only soft limits are set, at most at the hard ones: a login node, PBS or Slurm's PropagateResourceLimits sets
those, and an ordinary user may not raise them.
"""

import ctypes
import os
import resource
import sys

_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000


def confine(memory_bytes: int, network: bool) -> str | None:
    """Apply the limits to this process. Returns why the network could not be taken away, or None.

    The address space grows by at most `memory_bytes` from here: beyond it an allocation raises MemoryError.
    """
    if not sys.platform.startswith("linux"):
        return "only Linux can take a process's network away"
    _limit(resource.RLIMIT_AS, _address_space() + memory_bytes)
    if network:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    # Root needs no user namespace; others do, and keep their files' permissions in it.
    if libc.unshare(_CLONE_NEWNET) and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        return os.strerror(ctypes.get_errno())
    return None


def limit_cpu(seconds: float) -> None:
    """The kernel ends this process when it has used `seconds` more of CPU time, on all its threads
    together."""
    _limit(resource.RLIMIT_CPU, int(_cpu_seconds() + seconds) + 1)


def cpu_left() -> float:
    """Seconds of CPU time until the hard limit, which ends this process whatever it does."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    return float("inf") if hard == resource.RLIM_INFINITY else hard - _cpu_seconds()


def _limit(what: int, soft: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _address_space() -> int:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
