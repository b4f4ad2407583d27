"""Whose vocabulary some logits are over, how it is split over ranks, and what a rank's slice holds of it."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Columns:
    """The true vocabulary in this rank's slice: its first `width` columns, ids from `first` on."""

    first: int
    width: int

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(column, owned): the column is valid to gather from even where the id is not owned."""
        column = ids - self.first
        owned = (column >= 0) & (column < self.width)
        return column.clamp(0, max(self.width - 1, 0)), owned


@dataclass(frozen=True)
class VocabSpec:
    """What every vocab-parallel function must know beside the logits; the same on every rank of the group.

    Raises ValueError for a size or a temperature that no softmax can have.
    """

    size: int
    """The true vocabulary: ids 0 .. size - 1. Columns beyond are padding and belong to no softmax."""
    group: ProcessGroup | None
    """The ranks that hold one equal slice each, in order of rank; None is one rank with all of it."""
    temperature: float = 1.0
    """Logits are divided by it: the sampling temperature."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(
                f"VocabSpec.size = {self.size}: must be >= 1. Pass the vocab_size of the model's config.json."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"VocabSpec.temperature = {self.temperature}: must be a finite number > 0. Use the sampling "
                "temperature."
            )

    def columns(self, per_rank: int) -> Columns:
        """What this rank's slice of `per_rank` columns holds of the true vocabulary.

        Raises ValueError where the slices of all ranks together are smaller than the vocabulary.
        """
        rank, num_ranks = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        if self.size > per_rank * num_ranks:
            raise ValueError(
                f"VocabSpec.size = {self.size}: must be at most {per_rank * num_ranks}, the columns of "
                f"{num_ranks} logit slices of {per_rank}. Pass the vocab_size of the model's config.json."
            )
        first = rank * per_rank
        return Columns(first, min(max(self.size - first, 0), per_rank))
