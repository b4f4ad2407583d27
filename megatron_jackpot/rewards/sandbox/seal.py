"""What a sealed process may still ask of the kernel: to compute, and to use the pipes it has. Linux.

A seccomp filter with a list of what is allowed; all else fails with EPERM: to open or look at any file, a
socket, another process or its limits, to send a signal, to start a process (threads may be started). It
needs no rights, holds in containers, and cannot be taken off again.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine -> (AUDIT_ARCH, column of the tables)."""
ALLOWED = {
    **{"read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67)},
    **{"close": (3, 57), "fstat": (5, 80), "lseek": (8, 62), "poll": (7, None), "ppoll": (271, 73)},
    **{"select": (23, None), "pselect6": (270, 72), "mmap": (9, 222), "mprotect": (10, 226)},
    **{"munmap": (11, 215), "mremap": (25, 216), "brk": (12, 214), "futex": (202, 98)},
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139)},
    **{"sigaltstack": (131, 132), "restart_syscall": (219, 128), "sched_yield": (24, 124)},
    **{"set_robust_list": (273, 99), "rseq": (334, 293), "nanosleep": (35, 101)},
    **{"clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114)},
    **{"gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165)},
    **{"getrandom": (318, 278), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178)},
    **{"getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177)},
    **{"uname": (63, 160), "sysinfo": (99, 179), "sched_getaffinity": (204, 123)},
    **{"wait4": (61, 260), "exit": (60, 93), "exit_group": (231, 94)},
}
"""Number of each call on either machine; wait4 reaches children alone, and there are none to come."""
BY_ARGUMENT = {
    "fcntl": ((72, 25), 1, (1, 2, 3)),  # F_GETFD, F_SETFD, F_GETFL: F_SETOWN would send signals
    "ioctl": ((16, 29), 1, (0x5401, 0x5451)),  # TCGETS, which isatty asks, and FIOCLEX
    "madvise": ((28, 233), 2, (0, 1, 2, 3, 4, 8, 14, 15)),  # others take pages off the machine
}
"""Call -> its numbers, which argument, and the values that it may have."""
CLONE, CLONE_THREAD, CLONE3 = (56, 220), 0x10000, 435
KILL = (62, 129)

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2


class CannotSeal(RuntimeError):
    """This machine's kernel does not do what is needed."""


def filter_of(machine: str, may_kill: Sequence[int] = ()) -> bytes:
    """The filter's instructions, 8 bytes each; at most 120 processes may be sent signals. Raises CannotSeal
    for a machine whose calls are not known."""
    if machine not in ARCHITECTURES:
        raise CannotSeal(f"no list of system calls for {machine}, only for {', '.join(ARCHITECTURES)}")
    architecture, column = ARCHITECTURES[machine]
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # glibc then asks clone, whose flags a filter can see.
    steps += [(_EQUAL, 0, 1, CLONE3), (_RETURN, 0, 0, _ENOSYS)]
    threads = [(_ANY_BIT, 0, 1, CLONE_THREAD), (_RETURN, 0, 0, _ALLOW)]
    steps += _where(CLONE[column], 0, threads)
    for numbers, which, values in (*BY_ARGUMENT.values(), *([(KILL, 0, may_kill)] if may_kill else [])):
        checks = [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
        steps += _where(numbers[column], which, checks)
    steps.append((_RETURN, 0, 0, _EPERM))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _where(
    number: int, which: int, checks: list[tuple[int, int, int, int]]
) -> list[tuple[int, int, int, int]]:
    """`checks` on the low half of argument `which` of one call, refused where none of them allows it."""
    inner = [(_LOAD, 0, 0, 16 + 8 * which), *checks, (_RETURN, 0, 0, _EPERM)]
    return [(_EQUAL, 0, len(inner), number), *inner]


def seal(may_kill: Sequence[int] = ()) -> None:
    """From here on this process is sealed, but for ending those. Raises CannotSeal where it is not."""
    libc = ctypes.CDLL(None, use_errno=True)
    instructions = filter_of(platform.machine(), may_kill)
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(buffer))
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _MODE_FILTER, program, 0, 0):
        raise CannotSeal(f"seccomp: {os.strerror(ctypes.get_errno())}")
    try:
        os.stat("/")
    except PermissionError:
        return
    raise CannotSeal("the kernel took the filter and does not heed it")
