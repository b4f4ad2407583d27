"""The order of prompts: one seeded permutation per epoch, shared among the data-parallel leaders."""

import hashlib
import heapq
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from megatron_jackpot.records import Prompt

DIGEST_CHARS = 12
"""Of a prompt's digest in hexadecimal: a checkpoint holds one for each prompt."""


class PromptLoader:
    """`next()` -> (epoch, this leader's prompts of a step).

    Steps may be given out ahead of training: what is saved is the place of the first that `taken` has not
    passed.

    A step takes the next `per_step` prompts of the epoch's order; leader r has every dp_size-th of them, from
    the r-th on. So the union over leaders does not depend on dp_size, nor does that of each mini-batch where
    dp_size divides it. The rest of an epoch that does not fill a step is left out of that epoch.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        per_step: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        may_change: Collection[int] = (),
    ):
        """Raises ValueError when a step cannot be filled or a leader would get no prompt.

        `may_change` are ids of prompts that were trained on and may be others on resume.
        """
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
        self.digests = "".join(prompt_digest(prompt) for prompt in prompts)
        """DIGEST_CHARS for each prompt."""
        self.ids = [prompt.id for prompt in prompts]
        self.may_change = frozenset(may_change)
        self.given: list[int] = []
        """Ids of the step that was given out last, over all leaders, in its order."""
        self._ahead: deque[tuple[int, int]] = deque()
        """(epoch, position) before each step that was given out and is not taken."""
        self.num_begun = 0
        """Of the next steps, how many had been given out when the state that was loaded was taken."""
        self._start_epoch(0)

    def next(self) -> tuple[int, list[Prompt]]:
        self._ahead.append((self._epoch, self._position))
        self.num_begun = max(0, self.num_begun - 1)
        if self._position + self.per_step > len(self.prompts):
            self._start_epoch(self._epoch + 1)
        step = self._order[self._position : self._position + self.per_step]
        self._position += self.per_step
        self.given = [self.ids[i] for i in step]
        return self._epoch, [self.prompts[i] for i in step[self.dp_rank :: self.dp_size]]

    def further(self, step: int, round: int, number: int, without: Collection[int]) -> list[Prompt]:
        """Prompts beside those of a step, in an order of their own, of (seed, step, round): no place moves.

        `without` are ids that are asked for already. Fewer where there are no more. It reads what never
        changes, so that another thread may call it.
        """
        free = (i for i, name in enumerate(self.ids) if name not in without)
        key = epoch_key(self.ids, self.seed, f"{step}/further/{round}")
        return [self.prompts[i] for i in heapq.nsmallest(number, free, key=key)]

    def taken(self) -> None:
        """The oldest step that was given out is trained on now, and not to be given out again."""
        self._ahead.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Of the first step that is not taken. The same on every rank; it may be loaded with another
        dp_size."""
        epoch, position = self._ahead[0] if self._ahead else (self._epoch, self._position)
        return {
            "epoch": epoch,
            "position": position,
            "begun": len(self._ahead),
            "seed": self.seed,
            "ids": self.ids,
            "digests": self.digests,
        }

    def load_state_dict(self, state: dict[str, Any]) -> set[int]:
        """Continue where `state` was taken; the ids of prompts that have changed since.

        Rows that were not trained on may have changed, come or gone; others only where `may_change` names
        them. Raises ValueError when the seed or the order so far is another, naming rows.
        """
        if state["seed"] != self.seed:
            raise ValueError(
                f"run.seed = {self.seed} differs from the checkpoint's {state['seed']}. Set it back."
            )
        epoch, position = state["epoch"], state["position"]
        then = dict(zip(state["ids"], split_digests(state["digests"]), strict=True))
        now = dict(zip(self.ids, split_digests(self.digests), strict=True))
        ids = list(then)
        passed = [ids[i] for i in epoch_order(ids, self.seed, epoch)[:position]]
        self._start_epoch(epoch)
        if passed != [self.prompts[i].id for i in self._order[:position]]:
            gone, come = sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys())
            raise ValueError(
                f"The checkpoint was made with other prompts than data.* gives now: gone {gone[:5]}, new "
                f"{come[:5]} (line - 1), which moves the {position} that this epoch has passed. Restore the "
                "data; a row is mended in its line."
            )
        trained = passed if epoch == 0 else ids
        differ = {id for id in ids if now.get(id) != then[id]}
        changed = sorted(differ.intersection(trained) - self.may_change)
        if changed:
            few = changed[:5]
            raise ValueError(
                "The checkpoint was made with other prompts than data.* gives now: of those it was trained "
                f"on, {len(changed)} differ, rows {few} (line - 1) first. Restore the data, or, if that is "
                f"meant, set data.changed_rows={changed[:100]}."
            )
        self._position = position
        self._ahead.clear()
        self.num_begun = state.get("begun", 0)
        return differ

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = epoch_order(self.ids, self.seed, epoch)


def epoch_order(ids: list[int], seed: int, epoch: int | str) -> list[int]:
    """Indices into `ids`, sorted by `epoch_key`."""
    return sorted(range(len(ids)), key=epoch_key(ids, seed, epoch))


def epoch_key(ids: list[int], seed: int, epoch: int | str) -> Callable[[int], bytes]:
    """Of an index into `ids`: a hash of (seed, epoch, id), the same on every machine and version. `epoch` is
    any name of an order."""
    return lambda i: hashlib.blake2b(f"{seed}/{epoch}/{ids[i]}".encode(), digest_size=16).digest()


def prompt_digest(prompt: Prompt) -> str:
    """Of id, tokens and label: by these a resumed run knows the rows it was trained on."""
    content = repr((prompt.id, prompt.tokens, prompt.label)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=DIGEST_CHARS // 2).hexdigest()


def split_digests(digests: str) -> list[str]:
    return [digests[i : i + DIGEST_CHARS] for i in range(0, len(digests), DIGEST_CHARS)]
