"""How rollouts become optimizer steps: the methods, and how sequences are packed."""

from typing import Literal

from pydantic import Field

from megatron_jackpot.config.base import Method, Section


class Overlong(Section):
    buffer: int = Field(ge=1)
    """Tokens before rollout.max_new_tokens over which the punishment grows (DAPO's L_cache)."""
    penalty: float = Field(default=1.0, gt=0)
    """What is taken off the reward of a response of rollout.max_new_tokens."""


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
    selector: Method = Method(name="all")
    """Which finished rollouts of a prompt train, and with what weight: docs/sampling.md."""
    prompt_weight: Literal["sample", "equal"] = "sample"
    """`sample`: each rollout weighs the same. `equal`: each prompt does, however many of its rollouts count;
    under a mean over tokens with weight mean(n) / n."""
    aggregation: Method = Method(name="token")
    """How the policy's token losses become one: `token` mean, `sequence` (mean over responses), `constant`
    (their sums over one length), `prompt`: docs/objectives.md."""
    overlong: Overlong | None = None
    """DAPO's soft overlong punishment, added to the reward before the advantage: docs/advantages.md."""
    mask_truncated: bool = False
    """Responses cut at the limit train neither model; their rewards still count in their group."""
    positive_nll: float = Field(default=0.0, ge=0)
    """Weight of the mean -log p of correct rollouts' tokens, added to the policy's loss (VAPO: 0.1)."""
    num_candidates: int | None = Field(default=None, ge=1)
    """How many of the policy's most probable ids become candidates, and of the served model's where servers
    return none; null is rollout.top_k_logp, or 20 where that is 0."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per rollout batch."""
    target: Literal["old", "current"] = "old"
    """What acceptance aligns to: the policy at the start of the step, or at the start of the mini-batch."""
    train_actor: bool = True
    """False freezes the actor: rollouts from a fixed model."""


class Packing(Section):
    enabled: bool = True
    """Pack several sequences into a micro-batch with block-diagonal attention; false gives each its own."""
    window: int | None = Field(default=None, ge=1)
    """Dense Prompt Packing: a micro-batch is filled from so many waiting sequences, the longest that fits
    first; null looks at all of them, first fit decreasing. Without packing there is nothing to fill."""
    tokens: int = Field(default=8192, ge=16)
    """Tokens per micro-batch."""
