"""What a pipeline asks of where rollouts come from."""

from collections.abc import Coroutine, Mapping, Sequence
from typing import Protocol

from megatron_jackpot.records import Prompt, Rollout
from megatron_jackpot.rollout.collect import NOTHING_BEGUN, Keep, Losses, More, Sums
from megatron_jackpot.rollout.loop_thread import LoopThread
from megatron_jackpot.run.interrupt import Stop, never


class Source(Protocol):
    """Where rollouts come from, on a DP leader: coroutines for its thread. `collect` is told `more` and
    `begun` where prompts get different numbers alone, and is asked `aside` where the main thread waits for
    it: before what other steps ask for."""

    thread: LoopThread

    def collect(
        self,
        epoch: int,
        prompts: Sequence[Prompt],
        *,
        samples: int | None = None,
        stop: Stop = never,
        keep: Keep = lambda group: None,
        more: More | None = None,
        begun: Mapping[int, list[Rollout]] = NOTHING_BEGUN,
        losses: Losses | None = None,
        aside: bool = False,
    ) -> Coroutine[object, None, tuple[list[list[Rollout]], Sums]]: ...

    def hold(self) -> Coroutine[object, None, None]: ...

    def quiet(self) -> Coroutine[object, None, None]: ...

    def use(self, version: int, attempt: str) -> Coroutine[object, None, None]: ...

    def abort(self) -> Coroutine[object, None, None]: ...

    def close(self) -> None: ...
