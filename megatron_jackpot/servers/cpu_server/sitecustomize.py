"""Stock SGLang on a machine without CUDA: torchvision can be imported, and processes are forked.

Python imports this module at start-up because its folder is on the server's PYTHONPATH, as it is for CPU
servers alone.
"""

import multiprocessing
import os
import sys

import torchvision_operators  # noqa: F401

# A debugging aid of SGLang's imports Megatron where there is one, for a second of each start. A server has no
# use for it.
sys.modules["megatron"] = None


def fork_in_place_of_spawn() -> None:
    """SGLang asks for spawned processes, because CUDA does not outlive a fork. Without it the scheduler and
    the detokenizer can be forked from the front, which has imported everything by then and has one thread:
    the same imports twice more were two thirds of the processor time of a start."""
    choose = multiprocessing.set_start_method

    def set_start_method(method: str, force: bool = False) -> None:
        # A lock that another thread holds stays locked in a forked process.
        alone = len(os.listdir("/proc/self/task")) == 1
        choose("fork" if method == "spawn" and alone else method, force=force)

    multiprocessing.set_start_method = set_start_method


fork_in_place_of_spawn()
