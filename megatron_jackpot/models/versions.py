"""What differs between the versions of megatron-core that this project runs on, 0.16.1 and 0.19.2; asked for by feature."""

import inspect
from typing import Any

from megatron.core import dist_checkpointing

_SAVE = inspect.signature(dist_checkpointing.save).parameters


def asynchronous_save() -> dict[str, Any]:
    """Arguments of dist_checkpointing.save for a save in two halves with Megatron's own writer.

    0.19's default is nvidia-resiliency-ext's, which is not among its dependencies.
    """
    return {
        "async_sharded_save": True,
        **({"async_strategy": "mcore"} if "async_strategy" in _SAVE else {}),
    }
