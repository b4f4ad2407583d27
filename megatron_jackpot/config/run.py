"""A run's life: how long, what is saved and told, when it stops, what a failure leads to."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron_jackpot.config.base import Section


class Run(Section):
    folder: Path
    """Everything the run writes goes here."""
    steps: int = Field(default=100, ge=1)
    """Rollout batches."""
    seed: int = 0
    """Seed of prompt order, random draws and initialisation."""
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints of both models, optimizers and the loader; null saves only when asked to
    stop."""
    save_in_background: bool = True
    """Copy the state to host memory and write it while training goes on."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints whose step this divides stay on disk for good; null keeps none for good."""
    keep_best: str | None = Field(default=None, min_length=1)
    """Metric, for example eval/policy_accuracy: of the checkpoints whose step measured it, the one with the
    highest value stays, and RUN/checkpoints/best links to it; -loss/policy takes the lowest. null keeps
    none."""
    save_hf_every: int | None = Field(default=None, ge=1)
    """Steps between exports of both models as HF folders, RUN/hf/step-NNNNNN; null exports none along the
    way."""
    save_hf_at_end: bool = True
    """Export both models after the last step."""
    resume: bool | Literal["auto"] = False
    """Continue from the newest whole checkpoint in the folder; auto starts afresh where there is none."""
    time_limit_s: float | None = Field(default=None, gt=0)
    """Seconds after its start by which the run must have saved and ended; a Slurm job's own limit counts
    too."""
    stop_margin_s: float = Field(default=300, ge=0)
    """How long before a time limit the run interrupts its rollout, saves and ends."""
    phase_timeout_s: float = Field(default=3600, gt=0)
    """Time limit of what is waited for in one phase of a step, or of one save; two minutes past it every
    thread's stack is written and the rank ends."""
    max_restarts: int = Field(default=3, ge=0)
    """How often `launch` starts training again from the last checkpoint after it failed."""


class Guards(Section):
    max_skipped: int = Field(default=3, ge=0)
    """Optimizer steps in a row that may be skipped for a loss or gradient that is not finite."""
    acceptance_floor: float | None = Field(default=None, gt=0, lt=1)
    """Mean acceptance under which the policy pauses and the actor is trained by distillation alone; null
    never."""
    kl_ceiling: float | None = Field(default=None, gt=0)
    """KL(target || server) above which the policy pauses likewise; null never."""
    hysteresis: float = Field(default=0.2, ge=0, lt=1)
    """The pause ends this share beyond the bound: acceptance over floor * (1 + h), KL under ceiling * (1 -
    h)."""
    rollback: bool = False
    """When max_skipped is exceeded, go back to the last checkpoint once per checkpoint instead of ending."""


class Logging(Section):
    progress: bool = True
    """rich progress on the terminal."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package."""
    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the latest metrics for Prometheus, on the main rank's node; null opens none."""
    prometheus_host: str = "127.0.0.1"
    """Address that port is bound to; anyone who reaches it can read the metrics."""
    tokens_every: int | None = Field(default=10, ge=1)
    """Steps between records of what was accepted, token by token, and of wrong rollouts in words, for
    `megatron-jackpot report`; null keeps none."""
    tokens_rollouts: int = Field(default=8, ge=1)
    """Rollouts in such a record."""
    profile_steps: tuple[PositiveInt, ...] = ()
    """Steps, counted from 1, of which a trace is written into RUN/profile: docs/debugging.md."""
    profile_ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that write one."""
