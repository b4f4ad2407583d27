"""How samples are had: the servers, what they are asked, how weights reach them."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from megatron_jackpot.config.base import Method, Section

CONTEXT_MARGIN = 2
"""SGLang lets prompt + response grow to context_length - 2 and shortens longer requests without an error."""


class Servers(Section):
    urls: tuple[str, ...] = ()
    """Running servers to use, http://host:port; empty lets `launch` start its own."""
    num: int = Field(default=1, ge=1)
    """Servers that `launch` starts on this machine."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel size of each server."""
    host: str = "127.0.0.1"
    """Address the servers bind to."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the first server; 0 takes a free one."""
    python: Path | None = None
    """Interpreter of the environment that has SGLang; null uses the trainer's."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of the server's weights; null follows precision.dtype."""
    start_timeout_s: float = Field(default=300, gt=0)
    """Time limit for a server to answer /health."""
    max_restarts: int = Field(default=5, ge=0)
    """How often `launch` starts one server again after it ended or stopped answering."""
    hang_s: float = Field(default=120, gt=0)
    """Seconds without an answer to /health_generate after which `launch` starts a server again; /health where
    it lends its memory. Not below sync.timeout_s where a call of a push takes long: a server that loads
    weights may answer nothing else."""
    quantization: Literal["fp8"] | None = None
    """fp8: servers hold and are sent e4m3 weights with a scale per 128 x 128 block; null sends them in the
    dtype."""
    release_memory: bool = False
    """Servers on the trainer's GPUs give back weights and KV cache while it learns: docs/gpu.md for those of
    `urls`."""
    max_total_tokens: int | None = Field(default=None, ge=1)
    """KV-cache size in tokens; null lets SGLang decide."""
    prefix_cache: bool = True
    """Servers keep the keys and values of a prompt for all its samples. false, for short prompts: `launch`
    starts them without, and of `urls` it says that they were started so."""
    extra_args: tuple[str, ...] = ()
    """More sglang.launch_server arguments, passed on as they are."""


class Rollouts(Section):
    model: Literal["actor", "policy"] = "actor"
    """Which model samples: the servers hold it and get its weights. policy goes with actor=null."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts per step over all data-parallel ranks."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Completions per prompt: the group behind the advantage."""
    allocator: Method = Method(name="fixed")
    """How many rollouts each prompt gets, in rounds, with samples_per_prompt on average or at first:
    docs/allocation.md."""
    max_new_tokens: int = Field(default=8192, ge=1)
    """Longest response."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; trainer logits are divided by the same number."""
    top_k_logp: int = Field(default=20, ge=0)
    """How many of their most probable ids servers return with each token, as candidates. 0: the sampled
    token's log-prob alone; candidates then come from the trainer's scores: docs/corrections.md."""
    concurrency: int = Field(default=256, ge=1)
    """Requests in flight per data-parallel leader; one asks for all samples of a prompt."""
    request_timeout_s: float = Field(default=1800, gt=0)
    """Time limit of one request."""
    retries: int = Field(default=3, ge=0)
    """How often a failed request is tried again, on another server where there is one."""
    ahead: int = Field(default=0, ge=0)
    """Steps whose rollouts are asked for before their turn: servers sample while the trainer learns. 0 takes
    turns; at n, tokens are at most n weight versions old: docs/pipeline.md."""
    max_staleness: int = Field(default=1, ge=0)
    """Oldest acceptable weight version, in steps behind the current one; a group with older tokens, which
    takes a fault, is sampled anew."""
    max_failed_groups: float = Field(default=0.1, ge=0, le=1)
    """Share of a step's groups that may be lost to failed requests before the run stops."""


class Sync(Section):
    method: Literal["disk", "broadcast", "ipc"] = "broadcast"
    """How the sampling model's weights reach the servers: safetensors on a shared disk, a collective group,
    or, on one node, CUDA IPC."""
    backend: Literal["nccl", "gloo"] | None = None
    """Backend of the broadcast group; null is nccl with CUDA and gloo without."""
    bucket_bytes: int = Field(default=512 * 2**20, ge=1)
    """Weights are sent in buckets of about this size."""
    in_flight: Literal["retract", "wait"] = "retract"
    """What a push does to responses under way (rollout.ahead > 0): they are prefilled again and go on with
    the new weights, or the push waits for them to end. SGLang's in_place is refused: docs/pipeline.md."""

    @field_validator("in_flight", mode="before")
    @classmethod
    def _of_one_law(cls, value: object) -> object:
        if value == "in_place":
            raise ValueError(
                "sync.in_flight = 'in_place': a response would go on with the keys and values of older "
                "weights, so that no version says what its tokens were drawn from. Set sync.in_flight="
                "retract, which computes them anew, or wait."
            )
        return value

    timeout_s: float = Field(default=120, gt=0)
    """Time limit of one update."""
    checksums_every: int = Field(default=1, ge=1)
    """Of every so many pushes one asks the servers for checksums of all their weights; the first two from the
    start and from a fault on always do: docs/survival.md."""
    probe_every: int = Field(default=50, ge=1)
    """Steps between comparisons of server and trainer log-probs."""
    probe_prompts: int = Field(default=4, ge=1)
    """Completions compared by one probe."""
    max_logp_gap: float = Field(default=1e-3, gt=0)
    """float32: largest allowed |server logp - trainer logp|."""
    mean_logp_gap: float = Field(default=0.05, gt=0)
    """bfloat16: largest allowed mean of |server logp - trainer logp|."""
    quantile_logp_gap: float = Field(default=0.2, gt=0)
    """bfloat16: largest allowed 99% quantile of |server logp - trainer logp|."""
