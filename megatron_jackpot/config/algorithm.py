"""How rollouts become optimizer steps: the methods, and how sequences are packed."""

from typing import Literal

from pydantic import Field, field_validator

from megatron_jackpot.config.base import Method, Section


class Overlong(Section):
    buffer: int = Field(ge=1)
    """Tokens before rollout.max_new_tokens over which the punishment grows (DAPO's L_cache)."""
    penalty: float = Field(default=1.0, gt=0)
    """What is taken off the reward of a response of rollout.max_new_tokens."""


class Entropy(Section):
    bonus: float = Field(default=1e-3, gt=0, le=1)
    """Weight of the policy's mean entropy over its vocabulary, in nats, which is taken off its loss; where
    `target` steers it, from where on."""
    target: float | None = Field(default=None, gt=0)
    """Entropy in nats per token that `bonus` is steered to, from 1e-6 to 1; null keeps it."""


class ReferenceKL(Section):
    place: Literal["loss", "reward"] = "loss"
    """A term of the policy's loss, or taken off the rewards before the advantage."""
    estimator: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    """Of KL(policy || reference) from the sampled tokens: docs/objectives.md."""
    weight: float = Field(default=1e-3, ge=0)
    """Coefficient; where `target` steers it, from where on. 0 measures without training on it."""
    target: float | None = Field(default=None, gt=0)
    """KL in nats per token that `weight` is steered to, from 1e-6 to 100; null keeps it."""
    exact: bool = False
    """Measure the KL over the whole vocabulary too: another pass of the policy, whose last hidden states are
    kept."""


class Algorithm(Section):
    correction: Method = Method(name="jackpot")
    """From server samples to the policy's loss: docs/corrections.md; jackpot takes a `preset` too.

    This and every other method may be your own, named package.module:Class: examples/own_methods."""
    filters: tuple[Method, ...] = ()
    """What else removes tokens or responses, whatever the correction weighs: `mis`, `icepop`, `seq_mis`,
    `geo_rs`, `k_filter` with their bounds, `entropy` with its share. A token stays where all of them keep
    it: docs/corrections.md."""
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
    reward_parts: Literal["jointly", "singly"] = "jointly"
    """Several rewards: the advantage of their weighted sum, or the weighted sum of each one's advantage:
    docs/advantages.md."""
    overlong: Overlong | None = None
    """DAPO's soft overlong punishment, added to the reward before the advantage: docs/advantages.md."""
    mask_truncated: bool = False
    """Responses cut at the limit train neither model; their rewards still count in their group."""
    positive_nll: float = Field(default=0.0, ge=0)
    """Weight of the mean -log p of correct rollouts' tokens, added to the policy's loss (VAPO: 0.1)."""
    entropy: Entropy | None = None
    """Entropy bonus of the policy, over all of its tokens: docs/objectives.md."""
    reference_kl: ReferenceKL | None = None
    """KL to the frozen model of policy.reference: docs/objectives.md."""
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
    tokens: int | Literal["auto"] = 8192
    """Tokens per micro-batch, 16 or more; auto takes what fits the GPU and makes the predicted step shortest,
    and on a resume what the checkpoint was made with: docs/planning.md."""

    @property
    def size(self) -> int:
        """`tokens`, where it is a number by now."""
        assert self.tokens != "auto", "whoever packs is given a number: plan/microbatch.py"
        return self.tokens

    @field_validator("tokens", mode="before")
    @classmethod
    def _auto_or_enough(cls, value: object) -> object:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 16):
            raise ValueError(f"packing.tokens = {value!r}: must be a number >= 16, or auto. Set it to auto.")
        return value
