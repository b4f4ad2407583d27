"""Distillation of the policy (teacher, detached) into the actor (live) on the rollout tokens.

Shapes: T tokens. A method returns the per-token loss, to be minimised.
"""

from dataclasses import dataclass

from torch import Tensor

from megatron_jackpot.algorithm.obrs import LOG_RATIO_LIMIT, log_ratio


@dataclass(frozen=True, kw_only=True)
class K3Sample:
    """e^d - d - 1, d = log p_policy - log p_actor at the sampled token (P Eq. 8; the public verl fork).

    On samples of the actor the value estimates KL(actor || policy), and the gradient (1 - e^d) grad log
    p_actor that of KL(policy || actor). Both limits end the gradient where they are reached.
    """

    limit: float = 10.0
    """Largest loss of one token."""

    def __post_init__(self) -> None:
        if not 0 < self.limit <= LOG_RATIO_LIMIT:
            raise ValueError(f"limit = {self.limit}: must lie in (0, {LOG_RATIO_LIMIT}]. Use 10.")

    def __call__(self, actor_logp_T: Tensor, policy_logp_T: Tensor) -> Tensor:
        """Loss [T]; gradient flows into actor_logp_T only."""
        d_T = log_ratio(policy_logp_T.detach(), actor_logp_T)
        return (d_T.expm1() - d_T).clamp(-self.limit, self.limit)


DISTILL = {"k3_sample": K3Sample}
