"""The order of prompts: one seeded permutation per epoch, shared among the data-parallel leaders."""

import hashlib
from typing import Any

from megatron_jackpot.records import Prompt


class PromptLoader:
    """`next()` -> (epoch, this leader's prompts of the step).

    A step takes the next `per_step` prompts of the epoch's order; leader r has every dp_size-th of them, from
    the r-th on. So the union over leaders does not depend on dp_size, nor does that of each mini-batch where
    dp_size divides it. The rest of an epoch that does not fill a step is left out of that epoch.
    """

    def __init__(self, prompts: list[Prompt], per_step: int, dp_rank: int, dp_size: int, seed: int):
        """Raises ValueError when a step cannot be filled or a leader would get no prompt."""
        if per_step > len(prompts):
            raise ValueError(
                f"rollout.prompts_per_step = {per_step} is larger than the {len(prompts)} usable prompts. "
                "Lower it or add data."
            )
        if per_step < dp_size:
            raise ValueError(
                f"rollout.prompts_per_step = {per_step} leaves some of the {dp_size} data-parallel ranks "
                "without a prompt. Raise it."
            )
        self.prompts, self.per_step, self.dp_rank, self.dp_size, self.seed = (
            prompts,
            per_step,
            dp_rank,
            dp_size,
            seed,
        )
        self.fingerprint = prompts_fingerprint(prompts)
        self._start_epoch(0)

    def next(self) -> tuple[int, list[Prompt]]:
        if self._position + self.per_step > len(self.prompts):
            self._start_epoch(self._epoch + 1)
        step = self._order[self._position : self._position + self.per_step]
        self._position += self.per_step
        return self._epoch, [self.prompts[i] for i in step[self.dp_rank :: self.dp_size]]

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank; it may be loaded with another dp_size."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError when the prompts or the seed are others."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "The checkpoint was made with other prompts than data.* gives now. Restore the data."
            )
        if state["seed"] != self.seed:
            raise ValueError(
                f"run.seed = {self.seed} differs from the checkpoint's {state['seed']}. Set it back."
            )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = epoch_order([prompt.id for prompt in self.prompts], self.seed, epoch)


def epoch_order(ids: list[int], seed: int, epoch: int) -> list[int]:
    """Indices into `ids`, sorted by a hash of (seed, epoch, id): the same on every machine and version."""

    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{ids[index]}".encode(), digest_size=16).digest()

    return sorted(range(len(ids)), key=key)


def prompts_fingerprint(prompts: list[Prompt]) -> str:
    """sha256 over ids, tokens and labels: equal on all ranks, or they would train on different problems."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.tokens, prompt.label)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
