"""Methods that the check of own methods must refuse, each for one thing: test_own_methods.py."""

from dataclasses import dataclass, field, replace

import torch

from megatron_jackpot.algorithm.advantages import GRPO, Advantage
from megatron_jackpot.algorithm.aggregation import TokenMean
from megatron_jackpot.algorithm.allocators import DynamicSampling
from megatron_jackpot.algorithm.correction_base import CorrectionMethod, corrected
from megatron_jackpot.algorithm.distill import Distillation
from megatron_jackpot.algorithm.importance import TokenIS
from megatron_jackpot.algorithm.objectives import Reinforce
from megatron_jackpot.algorithm.objectives_base import Objective

frozen = dataclass(frozen=True, kw_only=True)


def function(scores):
    pass


class Loose(CorrectionMethod):
    pass


@dataclass
class Thawed(Advantage):
    pass


@frozen
class Elsewhere:
    cap: float = 2.0


@frozen
class Listed(TokenIS):
    caps: list[float] = field(default_factory=list)


@frozen
class Unreadable(TokenIS):
    high: "NoSuchType" = 1.0  # noqa: F821


@frozen
class Ruled(TokenIS):
    def __post_init__(self):
        raise ValueError(f"cap = {self.cap}: must be prime. Use 2.")


@frozen
class Stumbling(TokenIS):
    def __post_init__(self):
        self.cap / 0


@frozen
class Needy(TokenIS):
    high: float


@frozen
class Unwritten(CorrectionMethod):
    pass


@frozen
class Live(CorrectionMethod):
    def __call__(self, scores, sum_over_batch):
        weight, mask = (scores.policy_logp_MT - scores.batch.server_logp_MT).exp(), scores.batch.mask_MT
        return corrected(scores, keep=mask, weight=weight, counted=mask, accept=mask, metrics={})


@frozen
class Changed(TokenIS):
    @torch.no_grad()
    def __call__(self, scores, sum_over_batch):
        return self.changed(super().__call__(scores, sum_over_batch))


@frozen
class Greedy(Changed):
    def changed(self, found):
        return replace(found, keep_MT=torch.ones_like(found.keep_MT))


@frozen
class Wide(Changed):
    def changed(self, found):
        return replace(found, weight_MT=found.weight_MT.double())


@frozen
class Flat(Changed):
    def changed(self, found):
        return replace(found, keep_MT=found.keep_MT.flatten())


@frozen
class Infinite(Changed):
    def changed(self, found):
        return replace(found, weight_MT=found.weight_MT / 0)


@frozen
class Owing(Changed):
    def changed(self, found):
        return replace(found, counted_MT=-found.counted_MT)


@frozen
class Single(Changed):
    def changed(self, found):
        return replace(found, metrics={"mine": found.counted_MT.sum()})


@frozen
class Pair(Changed):
    def changed(self, found):
        return found.keep_MT, found.weight_MT


@frozen
class Gambling(Changed):
    def changed(self, found):
        return replace(found, keep_MT=found.keep_MT & (torch.rand(found.keep_MT.shape) < 0.5))


@frozen
class Steered(TokenIS):
    target_acceptance: float | None = 0.9


@frozen
class Detached(Objective):
    def surrogate(self, t):
        return t.advantage_T * t.logp_T.detach()


@frozen
class Everywhere(Objective):
    def surrogate(self, t):
        return t.logp_T + 1


@frozen
class Summed(Objective):
    def surrogate(self, t):
        return (t.advantage_T * t.logp_T).sum()


@frozen
class Steep(Objective):
    def surrogate(self, t):
        return t.advantage_T * (t.logp_T - t.logp_T.detach()).abs().sqrt()


@frozen
class Lost(Reinforce):
    def prepare(self, scores, sum_over_batch, number_alike):
        pass


@frozen
class Counted(Reinforce):
    def removed(self, t):
        return t.valid_T.sum()


@frozen
class Doubled(Advantage):
    def of_group(self, reward_N):
        return torch.cat([reward_N, reward_N])


@frozen
class Lonely(Advantage):
    def __call__(self, reward_N):
        reward_N = torch.tensor(reward_N)
        return (reward_N - reward_N.mean()) / reward_N.std()


@frozen
class Reduced(GRPO):
    def over_batch(self, advantage_N, reward_N, sum_over_batch):
        return sum_over_batch(advantage_N.sum())


@frozen
class Indebted(TokenMean):
    def shares(self, batch, counted_MT, sum_over_batch, number_alike):
        return None, -counted_MT.sum()


@frozen
class Shortened(GRPO):
    def per_token(self, advantage_N, rollouts):
        return [
            one * torch.ones(len(rollout.tokens) - 1)
            for one, rollout in zip(advantage_N, rollouts, strict=True)
        ]


@frozen
class Sparse(GRPO):
    def per_token(self, advantage_N, rollouts):
        return []


@frozen
class Undecided(DynamicSampling):
    def live(self, rewards, correct):
        if max(rewards) > min(rewards):
            return True


@frozen
class Fractional(DynamicSampling):
    def fetch(self, wanted, live, rounds):
        return self.over_sample * max(0, wanted - live)


@frozen
class Teaching(Distillation):
    def __call__(self, t):
        return (t.actor_logp_T - t.policy_logp_T).square()


@frozen
class Frozen(Distillation):
    def __call__(self, t):
        return (t.actor_logp_T - t.policy_logp_T).square().detach()


@frozen
class Silent(Distillation):
    def __call__(self, t):
        return t.kl("forward")


@frozen
class Greedier(Distillation):
    needs = "everything"

    def __call__(self, t):
        return t.kl("forward")


@frozen
class Padded(Distillation):
    needs = "candidates"

    def __call__(self, t):
        return (t.actor_logp_TK - t.policy_logp_TK.detach()).sum(-1)
