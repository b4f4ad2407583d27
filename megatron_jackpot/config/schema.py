"""The whole configuration, and what its sections ask of each other.

The text under a field is its documentation: `megatron-jackpot train --help` prints it.
"""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from megatron_jackpot.config.algorithm import Algorithm, Packing
from megatron_jackpot.config.base import Section
from megatron_jackpot.config.cluster import Cluster
from megatron_jackpot.config.data import Data, Evaluation
from megatron_jackpot.config.models import Actor, Parallel, Policy, Precision
from megatron_jackpot.config.run import Guards, Logging, Run
from megatron_jackpot.config.servers import Rollouts, Servers, Sync

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Config(Section):
    run: Run
    policy: Policy
    actor: Actor
    data: Data = Data()
    rollout: Rollouts = Rollouts()
    servers: Servers = Servers()
    algorithm: Algorithm = Algorithm()
    packing: Packing = Packing()
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    sync: Sync = Sync()
    evaluation: Evaluation = Evaluation()
    guard: Guards = Guards()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()

    @property
    def server_dtype(self) -> Literal["float32", "bfloat16"]:
        """dtype of the servers' weights."""
        return self.servers.dtype or self.precision.dtype

    @model_validator(mode="after")
    def _fields_agree(self) -> "Config":
        p, n = self.parallel, self.algorithm.num_minibatches
        if p.cp != 1:
            raise ValueError(
                f"parallel.cp = {p.cp}: packed context parallelism is not supported. Set parallel.cp=1."
            )
        if p.vpp is not None and p.pp == 1:
            raise ValueError(f"parallel.vpp = {p.vpp} needs parallel.pp > 1, got 1. Set parallel.vpp=null.")
        if p.sequence_parallel and p.tp == 1:
            raise ValueError(
                "parallel.sequence_parallel = true needs parallel.tp > 1, got 1. Set it to false."
            )
        if p.overlap_param_gather and not p.distributed_optimizer:
            raise ValueError(
                "parallel.overlap_param_gather = true needs parallel.distributed_optimizer=true."
            )
        if self.precision.first_last_layers_bf16 and self.precision.fp8_recipe == "delayed":
            raise ValueError(
                "precision.first_last_layers_bf16 = true does not go with precision.fp8_recipe = 'delayed'. "
                "Use 'tensorwise' or 'blockwise'."
            )
        if self.precision.fp8_param and not p.distributed_optimizer:
            raise ValueError(
                "precision.fp8_param = true needs parallel.distributed_optimizer=true: Megatron's other "
                "optimizer "
                "does not know fp8 parameters."
            )
        self._servers_fit()
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if longest > self.packing.tokens:
            raise ValueError(
                f"packing.tokens = {self.packing.tokens} is smaller than data.max_prompt_tokens + "
                f"rollout.max_new_tokens = {longest}: a sequence must fit one micro-batch. Raise "
                "packing.tokens."
            )
        if self.rollout.prompts_per_step % n:
            raise ValueError(
                f"algorithm.num_minibatches = {n} does not divide rollout.prompts_per_step = "
                f"{self.rollout.prompts_per_step}. Change one of them."
            )
        if self.data.source == "jsonl" and self.data.path is None:
            raise ValueError("data.source = 'jsonl' needs data.path. Set data.path=FILE.")
        if self.data.source == "reasoning_gym" and not self.data.tasks:
            raise ValueError("data.source = 'reasoning_gym' needs data.tasks, for example {chain_sum: {}}.")
        return self

    def _servers_fit(self) -> None:
        """What servers on the trainer's GPUs, or with another format of weights, ask of the rest."""
        servers, dtype = self.servers, self.server_dtype
        if servers.quantization is not None and dtype != "bfloat16":
            raise ValueError(
                f"servers.quantization = '{servers.quantization}' needs servers.dtype='bfloat16' for what is "
                "not "
                f"quantised, got '{dtype}'. Set servers.dtype=bfloat16."
            )
        if self.parallel.offload_optimizer and self.precision.dtype != "bfloat16":
            raise ValueError(
                "parallel.offload_optimizer = true needs precision.dtype='bfloat16', got 'float32': there "
                "the optimizer's "
                "parameters are the model's own. Set it to false."
            )
        if self.sync.method == "ipc":
            strangers = [url for url in servers.urls if urlsplit(url).hostname not in LOOPBACK]
            if strangers:
                raise ValueError(
                    "sync.method = 'ipc' needs servers on this node at a loopback address, but servers.urls "
                    "has "
                    f"{strangers[0]}. Set sync.method=broadcast."
                )
            if self.cluster.nodes > 1:
                raise ValueError(
                    "sync.method = 'ipc' reaches servers of one node, but cluster.nodes = "
                    f"{self.cluster.nodes}. "
                    "Set sync.method=broadcast."
                )
