"""Every setting, frozen and checked; who runs where. No torch."""

from megatron_jackpot.config.algorithm import Algorithm, Packing
from megatron_jackpot.config.base import Check, ConfigError, Method
from megatron_jackpot.config.cluster import Cluster
from megatron_jackpot.config.data import Data, Evaluation
from megatron_jackpot.config.load import describe, examine_config, load_config, parse_config, placed
from megatron_jackpot.config.models import Actor, Optimizer, Parallel, Policy, Precision
from megatron_jackpot.config.run import Guards, Logging, Run
from megatron_jackpot.config.schema import Config
from megatron_jackpot.config.servers import Rollouts, Servers, Sync
from megatron_jackpot.config.yaml_tree import as_yaml

__all__ = [
    "Actor",
    "Algorithm",
    "Check",
    "Cluster",
    "Config",
    "ConfigError",
    "Data",
    "Evaluation",
    "Guards",
    "Logging",
    "Method",
    "Optimizer",
    "Packing",
    "Parallel",
    "Policy",
    "Precision",
    "Rollouts",
    "Run",
    "Servers",
    "Sync",
    "as_yaml",
    "describe",
    "examine_config",
    "load_config",
    "parse_config",
    "placed",
]
