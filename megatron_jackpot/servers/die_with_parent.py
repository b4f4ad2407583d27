"""python die_with_parent.py ARGV...: become ARGV, ended by the kernel when the parent process ends (Linux).

A script of its own, on the standard library alone: it runs before the server's environment is entered.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
