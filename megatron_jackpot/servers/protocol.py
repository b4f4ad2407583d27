"""What a rollout engine is asked for and what it answers: records, protocol, errors.

Shapes: R response tokens of one completion, K top-k entries per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

JsonObject = dict[str, Any]
"""As a server sends it: what is in it is checked where it is read."""


class ServerError(RuntimeError):
    """A server did not do what was asked; the message names the server, the call and the cause."""


class BadReply(ServerError):
    """A reply that breaks the protocol; the message names field, value and rule."""


class StaleWeights(RuntimeError):
    """A server without the weights that were pushed last: it must be given them before it samples."""


class Label(NamedTuple):
    """What servers say their weights are. A version comes again where a run goes back or is started again, a
    label does not. Example: str(Label(7, "3f2a91c0")) == "7@3f2a91c0"."""

    version: int
    attempt: str = ""
    """Of the run, which pushed them; "" where nobody says."""

    def __str__(self) -> str:
        return f"{self.version}@{self.attempt}" if self.attempt else str(self.version)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. Example: Sampling(temperature=1.0, max_new_tokens=64, top_k_logp=20)."""

    temperature: float
    max_new_tokens: int
    top_k_logp: int
    """k of the returned top-k, 0 for none; sampling itself is never truncated."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response, beside the model's own end-of-text ids."""
    ignore_eos: bool = False
    """Keep sampling to max_new_tokens whatever is drawn: for benchmarks and tests."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"temperature = {self.temperature}: must be > 0: a greedy rollout has no proposal."
            )
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be >= 1.")
        if self.top_k_logp < 0:
            raise ValueError(f"top_k_logp = {self.top_k_logp}: must be >= 0.")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One response of a server, checked. Fields are those of records.Rollout."""

    tokens: np.ndarray
    """[R] int32, including the stop token when one was hit."""
    server_logp: np.ndarray
    """[R] float32, after temperature; 0 where not valid."""
    topk_ids: np.ndarray
    """[R, K] int32, best first; -1 is padding. K = 0 where none were asked for."""
    topk_logp: np.ndarray
    """[R, K] float32; -inf where the id is -1."""
    valid: np.ndarray
    """[R] bool, False where the server's sampled log-prob was not finite."""
    weight_version: np.ndarray
    """[R] int32."""
    finish: str
    """"stop", "length" or "abort"."""
    num_dropped_topk: int = 0
    """Top-k entries that were NaN and became padding."""


class Engine(Protocol):
    """Anything that completes prompts: the SGLang client, or a recorded source in tests."""

    async def generate_group(
        self,
        prompt_tokens: Sequence[int],
        n: int,
        sampling: Sampling,
        *,
        retried: Callable[[], None] = lambda: None,
        aside: bool = False,
    ) -> list[Completion]: ...

    async def answers(
        self,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        *,
        n: int = 1,
        temperature: float = 0.0,
    ) -> list[np.ndarray]: ...
