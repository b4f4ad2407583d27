"""How rollouts become optimizer steps: the methods, and how sequences are packed."""

from typing import Literal

from pydantic import Field

from megatron_jackpot.config.base import Method, Section


class Algorithm(Section):
    correction: Method = Method(name="jackpot")
    """From server samples to the policy's loss: docs/corrections.md; jackpot takes a `preset` too.

    This and every other method may be your own, named package.module:Class: examples/own_methods."""
    filters: tuple[Method, ...] = ()
    """What else removes tokens or responses, whatever the correction weighs: `mis`, `icepop`, `seq_mis`,
    `geo_rs`, `k_filter` with their bounds. A token stays where all of them keep it: docs/corrections.md."""
    objective: Method = Method(name="ppo")
    """Per-token surrogate of the policy: docs/objectives.md."""
    advantage: Method = Method(name="grpo")
    """Advantage from a group's rewards."""
    aggregation: Method = Method(name="token")
    """How the policy's token losses become one: `token` mean, `sequence` (mean over responses), `constant`
    (their sums over one length), `prompt`: docs/objectives.md."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per rollout batch."""
    target: Literal["old", "current"] = "old"
    """What acceptance aligns to: the policy at the start of the step, or at the start of the mini-batch."""
    train_actor: bool = True
    """False freezes the actor: rollouts from a fixed model."""


class Packing(Section):
    enabled: bool = True
    """Pack several sequences into a micro-batch with block-diagonal attention; false gives each its own."""
    tokens: int = Field(default=8192, ge=16)
    """Tokens per micro-batch."""
