"""What a run moves from step to step, as one rank sees it: what a checkpoint holds."""

from dataclasses import dataclass, field

from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.rollout.finished_groups import Groups
from megatron_jackpot.train.guard import Guard
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.reference import Reference

REFERENCE = "reference"
"""Its folder in a checkpoint."""


@dataclass(kw_only=True)
class TrainState:
    """The models with their optimizers, the methods with their controllers, and where the run stands."""

    mesh: Mesh
    policy: MegatronModel
    actor: MegatronModel | None
    """None where servers hold the policy."""
    reference: Reference | None = None
    """What the policy is held near; a checkpoint holds its hash, or its weights where it is refreshed."""
    methods: Methods
    guard: Guard
    loader: PromptLoader | None = None
    """The order of prompts; None where no rollouts are asked for."""
    num_steps: int = 0
    """Finished steps; also the version of the weights that servers hold."""
    num_probes: int = 0
    packing_tokens: int | None = None
    """Tokens per micro-batch, for a resume with `packing.tokens: auto`; None where nobody packs."""
    measured: dict[str, float] = field(default_factory=dict)
    """What run.keep_best compares checkpoints by, after `num_steps` steps; on the main rank, {} elsewhere."""
    finished_groups: Groups = field(default_factory=dict)
    """Groups of steps that are not trained yet, on the DP leader that asked for them."""

    @property
    def models(self) -> dict[str, MegatronModel]:
        return {"policy": self.policy, **({} if self.actor is None else {"actor": self.actor})}

    @property
    def saved(self) -> dict[str, MegatronModel]:
        """Those whose weights are a checkpoint's."""
        if self.reference is None or self.reference.refresh_every is None:
            return self.models
        return {**self.models, REFERENCE: self.reference.model}

    def finish_step(self) -> None:
        """Count a step; every rank calls it."""
        self.num_steps += 1
        if self.reference is not None:
            self.reference.after(self.num_steps, self.policy)

    @property
    def served(self) -> MegatronModel:
        """The model that servers hold and whose weights are pushed to them."""
        return self.policy if self.actor is None else self.actor
