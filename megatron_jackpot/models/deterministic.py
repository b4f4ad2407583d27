"""The same bits from the same inputs, run after run on one layout: what the libraries must be told, and when.

Names and accepted values: megatron-core 0.19's own list (megatron/training/determinism.py); each library
reads its variable once, cuBLAS at its first handle, NCCL at the first group, Transformer Engine in its
attention.
"""

import os
from collections.abc import MutableMapping

import torch

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
"""Set where the environment does not name a value."""
ACCEPTED = {
    "CUBLAS_WORKSPACE_CONFIG": {":4096:8", ":16:8"},
    "NCCL_ALGO": {"Ring", "CollnetDirect", "CollnetChain", "^NVLS"},
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": {"0"},
}
"""Values that keep a run deterministic; NCCL_ALGO may list several. Tree is not one: its order of sums may
vary."""


def be_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables and torch's switches; before anything of CUDA or NCCL starts.

    Raises ValueError for a variable that asks for the opposite, and when CUDA has started in this process.
    """
    for name, accepted in ACCEPTED.items():
        asked = [part.strip() for part in environment.get(name, ENVIRONMENT[name]).split(",")]
        if not accepted.issuperset(asked):
            raise ValueError(
                f"precision.deterministic = true, but the environment has {name}={environment[name]}: must "
                "be one of "
                f"{', '.join(sorted(accepted))}. Unset {name}, or set precision.deterministic=false."
            )
    if torch.cuda.is_initialized():
        raise ValueError(
            "precision.deterministic = true came after CUDA had started in this process: cuBLAS may have "
            "chosen its "
            "workspaces. Start the run in a process of its own."
        )
    for name, value in ENVIRONMENT.items():
        environment.setdefault(name, value)
    # cuDNN's own search for the fastest algorithm times them, and may choose another one every time.
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
