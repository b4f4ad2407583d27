"""Allocators by their name in the configuration: docs/allocation.md has formulas, sources, what each biases.

p is a prompt's pass rate, the actor's; n its rollouts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_jackpot.algorithm.allocators_base import Allocator, Fixed, Memory, greedy
from megatron_jackpot.algorithm.registry import Registry

MIDDLE = (0.05, 0.99)
"""Pass rates of prompts that coba's reference counts as neither hopeless nor solved."""
LARGEST_VARIANCE = 0.1667
"""Of pass rates, at which its tau is largest."""


@dataclass(frozen=True, kw_only=True)
class Rescue(Allocator):
    """A prompt of which nothing was correct gets `extra` more at a time, up to `most`, until something is
    (arXiv 2602.14338)."""

    extra: int = 2
    """Rollouts of each further round."""
    most: int = 16
    """Rollouts of one prompt, all rounds together."""

    def __post_init__(self) -> None:
        if self.extra < 1:
            raise ValueError(f"extra = {self.extra}: must be >= 1. Use 2.")
        if self.most < 1:
            raise ValueError(f"most = {self.most}: must be >= 1. Use 16.")

    def more(self, correct: Sequence[bool]) -> int:
        return 0 if any(correct) else max(0, min(self.extra, self.most - len(correct)))


@dataclass(frozen=True, kw_only=True)
class DynamicSampling(Allocator):
    """Other prompts in the place of those whose group is equal, until a step has as many live ones as
    `rollout.prompts_per_step` (DAPO, arXiv 2503.14476)."""

    over_sample: float = 3.0
    """Prompts that a further round asks for, per group that is missing; at most prompts_per_step."""
    max_rounds: int = 10
    """Rounds of one step, the first included."""
    on_exhausted: Literal["fill", "fail", "smaller"] = "fill"
    """After them: equal groups fill the step, the run ends, or the step is smaller."""
    metric: Literal["reward", "correct"] = "correct"
    """What must differ within a group."""

    def __post_init__(self) -> None:
        if not 1 <= self.over_sample < math.inf:
            raise ValueError(f"over_sample = {self.over_sample}: must be >= 1 and finite. Use 3.")
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds = {self.max_rounds}: must be >= 1. Use 10.")

    def live(self, rewards: Sequence[float], correct: Sequence[bool]) -> bool:
        values = rewards if self.metric == "reward" else correct
        return max(values) - min(values) > 1e-6

    def fetch(self, wanted: int, live: int, rounds: int) -> int:
        if live >= wanted:
            return 0
        if rounds < self.max_rounds:
            return min(wanted, math.ceil(self.over_sample * (wanted - live)))
        if self.on_exhausted == "fail":
            raise RuntimeError(
                f"{live} of {wanted} groups differ in {self.metric} after rollout.allocator.max_rounds = "
                f"{self.max_rounds}. Set on_exhausted to 'fill' or 'smaller', or take other problems."
            )
        return 0

    def commit(self, live: Sequence[bool], wanted: int) -> list[int]:
        kept = [i for i, lives in enumerate(live) if lives][:wanted]
        dead = [i for i, lives in enumerate(live) if not lives]
        return sorted(kept + dead[: wanted - len(kept)]) if self.on_exhausted == "fill" else kept


@dataclass(frozen=True, kw_only=True)
class Bounded(Allocator):
    """What shares out samples_per_prompt x prompts rollouts by what was seen of each prompt before."""

    least: int = 4
    """Rollouts that every prompt gets."""
    most: int = 32
    """Rollouts that no prompt exceeds."""

    def __post_init__(self) -> None:
        if self.least < 2:
            raise ValueError(f"least = {self.least}: must be >= 2, one rollout has no advantage. Use 4.")
        if self.most < self.least:
            raise ValueError(f"most = {self.most}: must be >= least = {self.least}. Use 32.")

    def bounds(self, samples: int) -> tuple[int, int]:
        return self.least, self.most


@dataclass(frozen=True, kw_only=True)
class VIP(Bounded):
    """Rollouts where the gradient's variance falls most: least sum over prompts of a (n - 1) / n^2 or of
    a / (n - 1), a = p (1 - p) (arXiv 2602.01601)."""

    num_visits: ClassVar[int] = 4

    variance: Literal["dr_grpo", "rloo"] = "rloo"
    """Of the mean over a prompt's rollouts with the advantage of that name."""
    predictor: Literal["last", "beta"] = "last"
    """p of a prompt: (c + 1) / (n + 2) of its last visit, or of all remembered ones, older ones decayed."""
    decay: float = 0.5
    """beta: what a visit counts for each later one; the actor has moved since."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance == "dr_grpo" and self.least < 3:
            raise ValueError(
                f"least = {self.least}: must be >= 3 with variance = 'dr_grpo', which grows from 1 to 2 "
                "rollouts. Use 4."
            )
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay = {self.decay}: must lie in (0, 1]. Use 0.5.")

    def plan(self, ids: Sequence[int], samples: int, memory: Memory) -> list[int]:
        rates = [self.rate(memory.visits.get(number, ())) for number in ids]

        def gain(i: int, n: int) -> float:
            form = self.variance
            return gradient_variance(rates[i], n, form) - gradient_variance(rates[i], n + 1, form)

        return greedy(len(ids), self.least, self.most, samples * len(ids), gain)

    def rate(self, visits: Sequence[tuple[int, int]]) -> float:
        """p of a prompt with these visits; 1/2 where there are none."""
        kept = visits[-1:] if self.predictor == "last" else visits
        weights = [self.decay ** (len(kept) - 1 - age) for age in range(len(kept))]
        correct = sum(w * c for w, (c, _) in zip(weights, kept, strict=True))
        return (correct + 1) / (sum(w * n for w, (_, n) in zip(weights, kept, strict=True)) + 2)


@dataclass(frozen=True, kw_only=True)
class CoBA(Bounded):
    """Rollouts by value (1 - exp(-n p (1 - p) / tau)) Beta(p; alpha, kappa - alpha) (arXiv 2602.03048).

    Where most fails, prompts of a high pass rate come first, hard ones as the actor gets better.
    """

    num_visits: ClassVar[int] = 3

    variant: Literal["paper", "reference"] = "paper"
    """Everything by value, or as in the published code: a part by value to prompts that neither fail nor
    succeed always, the rest to those that fail."""
    least: int = 2
    """Rollouts that every prompt gets."""
    most: int = 128
    """Rollouts that no prompt exceeds."""
    kappa: float = 11.0
    """alpha + beta of the density that says which pass rates are worth it."""
    tau: float = 3.0
    """How slowly a prompt is exhausted: at n = tau / (p (1 - p)) by 63%."""
    tau_most: float = 12.0
    """reference: tau where pass rates differ most; it grows with their variance."""
    alpha_least: float = 1.0
    """alpha where nothing fails."""
    alpha_most: float = 10.0
    """Largest alpha."""
    steepness: float = 9.0
    """What alpha rises by from no failure to failure alone, before its bounds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha_least <= self.alpha_most < self.kappa < math.inf:
            raise ValueError(
                f"alpha_least = {self.alpha_least}, alpha_most = {self.alpha_most}: must be 0 < least <= "
                f"most < kappa = {self.kappa}, finite. Leave them out."
            )
        if not 0 < self.tau < math.inf:
            raise ValueError(f"tau = {self.tau}: must be > 0 and finite. Use 3.")
        if not self.tau <= self.tau_most < math.inf:
            raise ValueError(f"tau_most = {self.tau_most}: must be >= tau = {self.tau}, finite. Use 12.")
        if not 0 <= self.steepness < math.inf:
            raise ValueError(f"steepness = {self.steepness}: must be >= 0 and finite. Use 9.")

    def plan(self, ids: Sequence[int], samples: int, memory: Memory) -> list[int]:
        alpha = self.alpha(memory.rates)
        seen = [memory.visits.get(number, ()) for number in ids]
        rates = [sum(c for c, _ in own) / sum(n for _, n in own) if own else 0.5 for own in seen]
        if self.variant == "reference" and any(seen):
            return self.share_by_bands(rates, samples * len(ids), alpha)
        return self.share(rates, samples * len(ids), alpha)

    def share(self, rates: Sequence[float], budget: int, alpha: float, tau: float | None = None) -> list[int]:
        """Rollouts of prompts with these pass rates, of the largest sum of values."""
        inside = [min(max(p, 0.01), 0.99) for p in rates]
        worth = [beta_density(p, alpha, self.kappa - alpha) for p in inside]

        def gain(i: int, n: int) -> float:
            falls = math.exp(-inside[i] * (1 - inside[i]) / (tau or self.tau))
            return worth[i] * falls**n * (1 - falls)

        return greedy(len(rates), self.least, self.most, budget, gain)

    def share_by_bands(self, rates: Sequence[float], budget: int, alpha: float) -> list[int]:
        """As the published code does (Within-yao/CoBA-RL, budget_allocators.py): of what is above `least`, a
        part by value to the prompts within MIDDLE, what is left to those below, then within, then above."""
        numbers = [self.least] * len(rates)
        low, high = MIDDLE
        middle = [i for i, p in enumerate(rates) if low <= p <= high]
        left = budget - sum(numbers)
        if middle:
            share = len(middle) / len(rates)
            part = int(left * (0.8 if share > 0.5 else 0.6 + 0.4 * share))
            own = [rates[i] for i in middle]
            most = min(len(middle) * self.least + part, len(middle) * self.most)
            for i, n in zip(middle, self.share(own, most, alpha, self._spread_tau(own)), strict=True):
                numbers[i] = n
        below = [i for i, p in enumerate(rates) if p < low]
        above = [i for i, p in enumerate(rates) if p > high]
        for band in (below, middle, above):
            self._give(band, rates, budget - sum(numbers), numbers)
        while left := budget - sum(numbers):
            # Where prompts are at `most` that code leaves some of the budget.
            self._give_evenly(range(len(rates)), left, numbers)
        return numbers

    def _spread_tau(self, rates: Sequence[float]) -> float:
        inside = [min(max(p, 0.01), 0.99) for p in rates]
        mean = sum(inside) / len(inside)
        variance = sum((p - mean) ** 2 for p in inside) / len(inside)
        return self.tau + (self.tau_most - self.tau) * min(variance / LARGEST_VARIANCE, 1.0)

    def _give(self, band: Sequence[int], rates: Sequence[float], left: int, numbers: list[int]) -> None:
        """Share out `left` among a band's prompts, as far as `most` allows: in turn each gets its 1 - p over
        the band's sum of what is left then, and what remains goes evenly."""
        weights = {i: 1 - min(max(rates[i], 1e-6), 1 - 1e-6) for i in band if numbers[i] < self.most}
        total = sum(weights.values())
        for i, weight in weights.items():
            more = min(int(left * weight / total), self.most - numbers[i])
            numbers[i] += more
            left -= more
        self._give_evenly(band, left, numbers)

    def _give_evenly(self, band: Sequence[int], left: int, numbers: list[int]) -> None:
        """Once; the first get what does not divide."""
        free = [i for i in band if numbers[i] < self.most]
        for place, i in enumerate(free):
            each, extra = divmod(left, len(free))
            numbers[i] += min(each + (place < extra), self.most - numbers[i])

    def alpha(self, rates: Sequence[float]) -> float:
        """Of the mean pass rates of the last steps; large where most fails."""
        if not rates:
            return max(min(self.kappa - 2, self.alpha_most), self.alpha_least)
        failure = 1 - sum(rates) / len(rates)
        felt = failure if failure > 0.5 else 1 / (1 + math.exp(-10 * (failure - 0.5)))
        return min(max(self.alpha_least + self.steepness * felt, self.alpha_least), self.alpha_most)


ALLOCATORS = Registry(
    Allocator,
    {"fixed": Fixed, "dynamic_sampling": DynamicSampling, "aero": Rescue, "vip": VIP, "coba": CoBA},
)


def gradient_variance(p: float, n: int, form: Literal["dr_grpo", "rloo"]) -> float:
    """Variance of (1/n) sum A_i g_i in units of 4 sigma^2, rewards +-1 with pass rate p and independent
    directions g_i of variance sigma^2 (arXiv 2602.01601): p (1 - p) (n - 1) / n^2, or p (1 - p) / (n - 1)."""
    scale = p * (1 - p)
    return scale * (n - 1) / n**2 if form == "dr_grpo" else scale / (n - 1)


def beta_density(p: float, alpha: float, beta: float) -> float:
    log_norm = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    return math.exp((alpha - 1) * math.log(p) + (beta - 1) * math.log1p(-p) - log_norm)
