"""The models: folders and optimizers, their layout over the ranks, in what numbers they compute."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_jackpot.config.base import Method, Section


class Optimizer(Section):
    lr: float = Field(default=1e-6, ge=0)
    """Peak learning rate of AdamW."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after the warm-up."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW beta1."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW beta2."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Global gradient-norm limit."""


class Reference(Section):
    hf: Path | None = None
    """Folder of the reference, of either format, with the policy's tokenizer; null is the policy's own, that
    is the policy as it was at the start."""
    offload: bool = False
    """Keep its weights in host memory and bring them to the device for its pass alone, once a step."""


class Policy(Section):
    hf: Path
    """Folder of the policy: HF's (config.json, safetensors, tokenizer) or in Megatron's format
    (docs/models.md)."""
    optimizer: Optimizer = Optimizer()
    reference: Reference | None = None
    """A frozen model that algorithm.reference_kl holds the policy near, and that some objectives ask for: {}
    is the policy at the start."""


class Actor(Section):
    hf: Path
    """Folder of the actor, of either format, with the policy's tokenizer; actor=null is a run without one
    (rollout.model)."""
    optimizer: Optimizer = Optimizer()
    tis_cap: float = Field(default=2.0, ge=1, allow_inf_nan=True)
    """Cap of the truncated importance weight p_actor_old/q on the actor's own PPO loss (Eq. 6)."""
    rl_weight: float = Field(default=1.0, ge=0)
    """Weight of the actor's PPO loss; 0 trains the actor by distillation alone."""
    objective: Method = Method(name="ppo")
    """Per-token surrogate of the actor's own loss: a method of algorithm.objective."""
    distill: Method = Method(name="k3_sample")
    """Distillation towards the policy: k3_sample, forward_topk, forward_full or reverse_full."""
    distill_weight: float = Field(default=1.0, ge=0)
    """lambda_distill, the weight of the distillation loss."""
    distill_target_kl: float | None = Field(default=None, gt=0)
    """Set-point of KL(policy || server) that steers lambda_distill from distill_weight on; null keeps it."""


class Parallel(Section):
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel size."""
    pp: int = Field(default=1, ge=1)
    """Pipeline-parallel size."""
    vpp: int | None = Field(default=None, ge=2)
    """Virtual pipeline chunks per rank (interleaved 1F1B); null runs plain 1F1B."""
    cp: int = Field(default=1, ge=1)
    """Context-parallel size; only 1 is supported."""
    sequence_parallel: bool = False
    """Split activations outside attention and MLP over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the parameter all-gather with the next forward pass (distributed optimizer)."""
    recompute: bool = False
    """Keep only the input of every layer and run its forward again in backward: less memory, a third more
    work."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory and no gradient buffers from a push to the next update, for servers
    on the trainer's GPUs."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each rank on a machine without a GPU. Other counts add in another order: the same number
    after a resume gives the same bits."""
    timeout_s: float = Field(default=600, gt=0)
    """Time limit of every collective."""


class Precision(Section):
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameters and activations of the trainer."""
    fp8: Literal["hybrid", "e4m3"] | None = None
    """fp8 format of the Transformer Engine layers; needs Transformer Engine and a capable GPU."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    """Scaling recipe of fp8."""
    fp8_param: bool = False
    """Keep the parameters in fp8 as well."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layers in bf16 under fp8 (not with the delayed recipe)."""
    fused_linear: bool = True
    """Make logits only in blocks, from hidden states and output weight: no [T, V/TP], one more product in
    backward."""
    deterministic: bool = False
    """The trainer computes the same bits from the same rollouts on one layout, at the price of speed."""
    max_trained_gap: float = Field(default=0.1, gt=0)
    """Largest mean |trained logp - scored logp| in a step's first mini-batch; above it the run stops."""
