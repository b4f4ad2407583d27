"""Limits of a reward worker: memory, CPU time of an item, and no network. Standard library only; Linux."""

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
    used = _address_space()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, resource.RLIM_INFINITY))
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
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _address_space() -> int:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
