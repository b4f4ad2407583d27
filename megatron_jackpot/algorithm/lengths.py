"""What a response's length does to what is learned from it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SoftOverlong:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13), added to the reward: 0 up to limit - buffer
    tokens, from there falling evenly to -penalty at the limit."""

    limit: int
    """L_max, tokens: rollout.max_new_tokens."""
    buffer: int
    """L_cache, tokens before the limit over which it falls."""
    penalty: float = 1.0
    """What is taken off at the limit."""

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.limit:
            raise ValueError(
                f"buffer = {self.buffer}: must lie in [1, {self.limit}], rollout.max_new_tokens. Use a "
                "quarter of it."
            )
        if not self.penalty > 0:
            raise ValueError(f"penalty = {self.penalty}: must be > 0. Use 1.0.")

    def __call__(self, num_tokens: int) -> float:
        """The punishment, in [-penalty, 0], of a response of so many tokens."""
        over = num_tokens - (self.limit - self.buffer)
        return -self.penalty * min(max(over / self.buffer, 0.0), 1.0)
