"""The families of problems, by the name that a plan's `task` has."""

from benchmarks.study_parts.tasks.sorting import SORTING
from benchmarks.study_parts.tasks.sums import SUMS

FAMILIES = {"sums": SUMS, "sorting": SORTING}
