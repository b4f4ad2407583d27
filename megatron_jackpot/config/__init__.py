"""Every setting, frozen and checked; who runs where. No torch."""

from megatron_jackpot.config.base import Method
from megatron_jackpot.config.models import Parallel, Precision
from megatron_jackpot.config.schema import (
    Actor,
    Config,
    Data,
    Evaluation,
    Logging,
    Optimizer,
    Rollouts,
    Servers,
    Sync,
    describe,
    load_config,
    parse_config,
)

__all__ = [
    "Actor",
    "Config",
    "Data",
    "Evaluation",
    "Logging",
    "Method",
    "Optimizer",
    "Parallel",
    "Precision",
    "Rollouts",
    "Servers",
    "Sync",
    "describe",
    "load_config",
    "parse_config",
]
