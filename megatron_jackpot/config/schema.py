"""Every knob: frozen pydantic models read from YAML plus dotted overrides. No torch import.

The text under a field is its documentation: `megatron-jackpot train --help` prints it.
"""

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError, model_validator

from megatron_jackpot.algorithm.registry import nearest
from megatron_jackpot.config.base import Method, Section
from megatron_jackpot.config.cluster import Cluster
from megatron_jackpot.config.models import Parallel, Precision
from megatron_jackpot.config.run import Guards, Run
from megatron_jackpot.config.yaml_tree import apply_override, read_tree

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Optimizer(Section):
    lr: float = Field(1e-6, ge=0)
    """Peak learning rate of AdamW."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after the warm-up."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW beta1."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW beta2."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_grad: float = Field(1.0, gt=0)
    """Global gradient-norm limit."""


class Policy(Section):
    hf: Path
    """Folder of the policy: HF's (config.json, safetensors, tokenizer) or in Megatron's format
    (docs/models.md)."""
    optimizer: Optimizer = Optimizer()


class Actor(Section):
    hf: Path
    """Folder of the actor, of either format, with the policy's tokenizer."""
    optimizer: Optimizer = Optimizer()
    tis_cap: float = Field(2.0, ge=1)
    """Cap of the truncated importance weight p_actor_old/q on the actor's own PPO loss (Eq. 6)."""
    rl_weight: float = Field(1.0, ge=0)
    """Weight of the actor's PPO loss; 0 trains the actor by distillation alone."""
    objective: Method = Method(name="ppo")
    """Per-token surrogate of the actor's own loss: a method of algorithm.objective."""
    distill: Method = Method(name="k3_sample")
    """Distillation towards the policy: k3_sample, forward_topk, forward_full or reverse_full."""
    distill_weight: float = Field(1.0, ge=0)
    """lambda_distill, the weight of the distillation loss."""
    distill_target_kl: float | None = Field(None, gt=0)
    """Set-point of KL(policy || server) that steers lambda_distill from distill_weight on; null keeps it."""


class Data(Section):
    source: Literal["reasoning_gym", "jsonl"] = "reasoning_gym"
    """Where prompts come from."""
    tasks: dict[str, dict[str, Any]] = {}
    """reasoning_gym: task name -> its options; mixed in equal shares."""
    size: int = Field(10_000, ge=1)
    """reasoning_gym: number of training problems."""
    seed: int = 0
    """reasoning_gym: seed of the problem generator; the order of prompts follows run.seed."""
    path: Path | None = None
    """jsonl: file with one {"prompt": ..., "answer": ...} or {"messages": [...], "answer": ...} a line."""
    heldout_path: Path | None = None
    """jsonl: held-out problems for evaluation."""
    template: str | None = None
    """Text around a problem, with {question}; null uses the tokenizer's chat template."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are dropped and counted."""
    reward: str = "exact"
    """exact, reasoning_gym, math_verify, or a dotted path to a function (response_text, label) -> float."""
    reward_workers: int = Field(2, ge=1)
    """Worker processes of the reward pool."""
    reward_memory_gb: float = Field(4.0, gt=0)
    """Memory one reward worker may take; beyond it the reward is 0 and the event is counted."""
    reward_network: bool = False
    """Leave the reward workers their network, for a reward that asks a service."""
    reward_timeout_s: float = Field(10.0, gt=0)
    """Time limit of one reward; on expiry the reward is 0 and the event is counted."""


class Servers(Section):
    urls: tuple[str, ...] = ()
    """Running servers to use, http://host:port; empty lets `launch` start its own."""
    num: int = Field(1, ge=1)
    """Servers that `launch` starts on this machine."""
    tp: int = Field(1, ge=1)
    """Tensor-parallel size of each server."""
    host: str = "127.0.0.1"
    """Address the servers bind to."""
    port: int = Field(0, ge=0, le=65535)
    """Port of the first server; 0 takes a free one."""
    python: Path | None = None
    """Interpreter of the environment that has SGLang; null uses the trainer's."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of the server's weights; null follows precision.dtype."""
    start_timeout_s: float = Field(300, gt=0)
    """Time limit for a server to answer /health."""
    max_restarts: int = Field(5, ge=0)
    """How often `launch` starts one server again after it ended or stopped answering."""
    hang_s: float = Field(120, gt=0)
    """Seconds without an answer to /health after which `launch` ends a server and starts it again."""
    quantization: Literal["fp8"] | None = None
    """fp8: servers hold and are sent e4m3 weights with a scale per 128 x 128 block; null sends them in the
    dtype."""
    release_memory: bool = False
    """Servers on the trainer's GPUs give back weights and KV cache while it learns: docs/gpu.md for those of
    `urls`."""
    max_total_tokens: int | None = Field(None, ge=1)
    """KV-cache size in tokens; null lets SGLang decide."""
    extra_args: tuple[str, ...] = ()
    """More sglang.launch_server arguments, passed on as they are."""


class Rollouts(Section):
    prompts_per_step: int = Field(64, ge=1)
    """Prompts per step over all data-parallel ranks."""
    samples_per_prompt: int = Field(8, ge=1)
    """Completions per prompt: the group behind the advantage."""
    max_new_tokens: int = Field(8192, ge=1)
    """Longest response."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; trainer logits are divided by the same number."""
    top_k_logp: int = Field(20, ge=1)
    """k: how many of the server's and of the policy's most probable ids become candidates."""
    concurrency: int = Field(256, ge=1)
    """Requests in flight per data-parallel leader."""
    request_timeout_s: float = Field(1800, gt=0)
    """Time limit of one request."""
    retries: int = Field(3, ge=0)
    """How often a failed request is tried again, on another server where there is one."""
    max_staleness: int = Field(1, ge=0)
    """Oldest acceptable weight version, in steps behind the current one; older tokens are an error."""
    max_failed_groups: float = Field(0.1, ge=0, le=1)
    """Share of a step's groups that may be lost to failed requests before the run stops."""


class Packing(Section):
    enabled: bool = True
    """Pack several sequences into a micro-batch with block-diagonal attention; false gives each its own."""
    tokens: int = Field(8192, ge=16)
    """Tokens per micro-batch."""


class Algorithm(Section):
    correction: Method = Method(name="jackpot")
    """From server samples to the policy's loss: docs/corrections.md; jackpot takes a `preset` too."""
    objective: Method = Method(name="ppo")
    """Per-token surrogate of the policy: docs/objectives.md."""
    advantage: Method = Method(name="grpo")
    """Advantage from a group's rewards."""
    num_minibatches: int = Field(1, ge=1)
    """Optimizer steps per rollout batch."""
    target: Literal["old", "current"] = "old"
    """What acceptance aligns to: the policy at the start of the step, or at the start of the mini-batch."""
    train_actor: bool = True
    """False freezes the actor: rollouts from a fixed model."""


class Sync(Section):
    method: Literal["disk", "broadcast", "ipc"] = "broadcast"
    """How the actor's weights reach the servers: safetensors on a shared disk, a collective group, or, on one
    node, CUDA IPC."""
    backend: Literal["nccl", "gloo"] | None = None
    """Backend of the broadcast group; null is nccl with CUDA and gloo without."""
    bucket_bytes: int = Field(512 * 2**20, ge=1)
    """Weights are sent in buckets of about this size."""
    timeout_s: float = Field(120, gt=0)
    """Time limit of one update."""
    probe_every: int = Field(50, ge=1)
    """Steps between comparisons of server and trainer log-probs."""
    probe_prompts: int = Field(4, ge=1)
    """Completions compared by one probe."""
    max_logp_gap: float = Field(1e-3, gt=0)
    """float32: largest allowed |server logp - trainer logp|."""
    mean_logp_gap: float = Field(0.05, gt=0)
    """bfloat16: largest allowed mean of |server logp - trainer logp|."""
    quantile_logp_gap: float = Field(0.2, gt=0)
    """bfloat16: largest allowed 99% quantile of |server logp - trainer logp|."""


class Evaluation(Section):
    every: int = Field(10, ge=1)
    """Steps between evaluations; the first step and the last are always evaluated."""
    size: int = Field(128, ge=0)
    """Held-out problems; 0 turns evaluation off."""
    seed: int = 1_000_003
    """reasoning_gym: seed of the held-out problems; any that also occur in training are removed."""
    max_new_tokens: int = Field(16, ge=1)
    """Longest greedy answer of the policy and of the actor."""


class Logging(Section):
    progress: bool = True
    """rich progress on the terminal."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package."""
    prometheus_port: int | None = Field(None, ge=1, le=65535)
    """Port of the latest metrics for Prometheus, on the main rank's node; null opens none."""
    prometheus_host: str = "127.0.0.1"
    """Address that port is bound to; anyone who reaches it can read the metrics."""
    tokens_every: int | None = Field(10, ge=1)
    """Steps between records of what was accepted, token by token, for `megatron-jackpot report`; null keeps
    none."""
    tokens_rollouts: int = Field(8, ge=1)
    """Rollouts in such a record."""


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


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read YAML, apply `a.b=value` overrides (values are YAML), check everything.

    `base: FILE`, relative to the YAML, is a file whose keys count where the YAML has none; a method counts
    whole.
    Raises ValueError naming the field, the value and what to do, FileNotFoundError for a missing file.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Check a nested mapping. Raises ValueError with one line per mistake."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(item) for item in error.errors())) from error


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section: Any = Config
        prefix = item["loc"][:-1]
        for part in prefix:
            section = section.model_fields[part].annotation
        full = [".".join([*map(str, prefix), name]) for name in section.model_fields]
        return f"Unknown config key '{where}'. {nearest(where, full)}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"Config key '{where}' is missing. Set it in the YAML file or as {where}=VALUE."
    return f"{where} = {item['input']!r}: {item['msg']}."


def describe(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(dotted key, default, meaning) of every knob, in file order."""
    rows = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            rows += describe(field.annotation, f"{key}.")
        else:
            default = "required" if field.is_required() else str(field.get_default(call_default_factory=True))
            rows.append((key, default, field.description or ""))
    return rows
