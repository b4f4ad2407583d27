"""Import stand-in for SGLang's compiled kernel package on a machine without CUDA.

SGLang's CPU engine imports `*_cpu` names for speculative decoding only and computes with torch where AMX is
absent, so nothing here is ever called by the servers we start.
"""

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' (CPU stand-in) has no attribute '{name}'")

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} needs SGLang's compiled kernels, which this machine has not"
        )

    return missing
