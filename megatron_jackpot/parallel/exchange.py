"""What data-parallel leaders tell each other in the midst of rollouts: words under keys of the ranks' store.

A collective cannot carry it: rounds of two steps in flight end in another order on each leader. A key names
the attempt, the step, the round and the leader, so that no order matters, and nothing that was said before
the run went back to a checkpoint is heard after it.
"""

import asyncio
from collections.abc import Callable, Container

import torch.distributed as dist

LOOK_S = 0.05
"""How often a leader looks whether another one has said its word."""

Batch = tuple[int, int]
"""(attempt, step)."""


class LeaderEnded(Exception):
    """Another leader ended its rollouts of a step; the text says which, and why."""


class Exchange:
    """One leader's part. It never waits within the store, whose client would be locked meanwhile."""

    def __init__(self, store: dist.Store, dp: int, dp_rank: int) -> None:
        """`store` is a client of the rollouts' own (`Mesh.own_store`)."""
        self.store, self.dp, self.dp_rank = store, dp, dp_rank
        self._said: dict[Batch, dict[str, str]] = {}
        """This leader's words that stand in the store, by key."""

    async def words(self, batch: Batch, round: int, mine: str, waits: Callable[[int], None]) -> list[str]:
        """Every leader's word on a round, in the leaders' order. What was said first stays said: asked once
        more, it gives the same.

        `waits` is told, every LOOK_S, which leader has not said its word; it ends the wait by raising. Raises
        LeaderEnded.
        """
        self._say(batch, f"{round}/{self.dp_rank}", mine)
        words = []
        for leader in range(self.dp):
            key = _key(batch, f"{round}/{leader}")
            while not self.store.check([key]):
                if self.store.check([_key(batch, "ended")]):
                    raise LeaderEnded(self.store.get(_key(batch, "ended")).decode())
                waits(leader)
                await asyncio.sleep(LOOK_S)
            words.append(self.store.get(key).decode())
        return words

    def end(self, batch: Batch, why: str) -> None:
        """This leader will say no more on a step: whoever waits for it need not."""
        self._say(batch, "ended", f"DP leader {self.dp_rank} ended its rollouts of step {batch[1]}: {why}")

    def forget(self, alive: Container[Batch]) -> None:
        """Delete this leader's words on all batches but these. No leader may still wait for one."""
        for batch in [*self._said]:
            if batch not in alive:
                for key in self._said.pop(batch):
                    self.store.delete_key(key)

    def _say(self, batch: Batch, what: str, word: str) -> None:
        key, said = _key(batch, what), self._said.setdefault(batch, {})
        if key not in said:
            said[key] = word
            self.store.set(key, word)


def _key(batch: Batch, what: str) -> str:
    attempt, step = batch
    return f"jackpot/exchange/{attempt}/{step}/{what}"
