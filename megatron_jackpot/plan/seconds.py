"""What a plan takes, from rates that somebody measured or assumes."""

from dataclasses import dataclass

from megatron_jackpot.plan.formulas import ModelPlan, Plan


@dataclass(frozen=True)
class Assumptions:
    """What no configuration tells."""

    mean_tokens: float | None = None
    """Prompt and response of a sequence on average; None is the longest allowed."""
    acceptance: float = 0.75
    """Share of tokens that rejection keeps."""
    tflops: float = 400.0
    """Achieved per GPU, 1e12/s."""
    tp_gbs: float = 300.0
    """Achieved by a GPU towards its tensor-parallel peers, 1e9 bytes/s."""


def alone_seconds(plan: Plan, model: ModelPlan, assumed: Assumptions) -> float:
    """F / (P R): no pipeline, no tensor-parallel traffic."""
    return model.flops / plan.gpus / (assumed.tflops * 1e12)


def work_seconds(plan: Plan, model: ModelPlan, assumed: Assumptions) -> float:
    """F / (P R) + tensor-parallel bytes / bandwidth, nothing overlapped."""
    return alone_seconds(plan, model, assumed) + model.tp_bytes / (assumed.tp_gbs * 1e9)


def shared_seconds(plan: Plan, model: ModelPlan, assumed: Assumptions) -> float:
    """The same / (1 - bubble)."""
    return work_seconds(plan, model, assumed) / (1 - plan.bubble)


def total_seconds(plan: Plan, assumed: Assumptions) -> float:
    """Scoring and updates of a step."""
    return sum(shared_seconds(plan, m, assumed) for m in plan.models)
