"""What of finished groups trains: which advantages, which weights, what N counts, on any split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.advantages import Advantage
from megatron_jackpot.records import Rollout
from megatron_jackpot.train.curator import Trained
from megatron_jackpot.train.methods import Methods
from tests.models.test_methods import config
from tests.tiny import groups
from tests.unit.flat import identity, on_ranks


@dataclass(frozen=True, kw_only=True)
class Numbered(Advantage):
    """10 where correct, plus the number of the sample on each token."""

    def of_group(self, reward_N: torch.Tensor) -> torch.Tensor:
        return 10 * (reward_N >= 1).double()

    def per_token(self, advantage_N: torch.Tensor, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        both = zip(advantage_N.tolist(), rollouts, strict=True)
        return [torch.full((len(r.tokens),), value + r.sample) for value, r in both]


ALL = {"name": "tis", "denominator": "all"}


def rewarded(*rewards: list[float]) -> list[list[Rollout]]:
    """A group for each list, whose rollouts have these rewards; 1 is correct."""
    made = []
    for prompt, own in enumerate(rewards):
        (group,) = groups(range(prompt, prompt + 1), samples=len(own))
        made.append([replace(r, reward=x, correct=x >= 1) for r, x in zip(group, own, strict=True)])
    return made


def curate(made: list[list[Rollout]], sum_over_batch=identity, step: int = 0, **changes) -> Trained:
    methods = Methods.from_config(config(algorithm_correction=ALL, **changes))
    return methods.curator(made, step, sum_over_batch, torch.device("cpu"))


def test_all_rollouts_train_with_weight_1_where_nobody_selects() -> None:
    made = rewarded([1.0, 0.0, 0.0], [0.0, 0.0])
    trained = curate(made)
    assert [[r.key for r in g] for g in trained.groups] == [[r.key for r in g] for g in made]
    assert {r.loss_weight for g in trained.groups for r in g} == {1.0}
    assert trained.pruned == [[], []] and trained.sums == {}


@pytest.mark.parametrize(
    ("stats", "want"), [("full", [5 / 6, -1 / 6]), ("selected", [1 / 2, -1 / 2])], ids=lambda x: str(x)
)
def test_statistics_are_those_of_all_rollouts_or_of_the_selected(stats: str, want: list[float]) -> None:
    selector = {"name": "pods", "keep": 2, "stats": stats}
    trained = curate(
        rewarded([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 4),
        algorithm_selector=selector,
        algorithm_advantage={"name": "dr_grpo"},
    )
    group, dead = trained.groups
    assert sorted((r.advantage for r in group), reverse=True) == pytest.approx(want, rel=1e-6)
    assert dead == [] and trained.sums["select/dead_groups"] == (1, 2)
    assert trained.sums["select/rollouts"] == (2, 10) and trained.pruned == [[], []]


@pytest.mark.parametrize("advantage", [{"name": "reinforce++"}, {"name": "grpo", "std": "batch"}])
def test_a_selector_s_own_advantage_is_final(advantage: dict) -> None:
    trained = curate(
        rewarded([0.0] * 8, [1.0, 0.0, 1.0]), algorithm_selector="aero", algorithm_advantage=advantage
    )
    dead, live = trained.groups
    assert [r.advantage for r in dead] == pytest.approx([-1 / 3] * 4, rel=1e-6)
    assert len(live) == 3 and live[0].advantage > 0 > live[1].advantage


@pytest.mark.parametrize("selector", [{"name": "nonzero_std"}, {"name": "pods", "keep": 2}])
def test_a_group_of_which_nothing_is_selected_has_no_advantages_of_single_rewards(selector: dict) -> None:
    live, dead = rewarded([1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0])
    made = [[replace(r, parts={"answer": r.reward, "length": 9.0}) for r in group] for group in (dead, live)]
    named = {
        name: {"reward": "exact", "weight": weight} for name, weight in (("answer", 1.0), ("length", 0.0))
    }
    rewards = dict(data_rewards=named, data_reward="exact")
    singly, jointly = (
        curate(made, algorithm_reward_parts=how, algorithm_selector=selector, **rewards)
        for how in ("singly", "jointly")
    )
    assert len(singly.groups[1]) > 0
    for one, other in zip(singly.groups, jointly.groups, strict=True):
        assert [r.advantage for r in one] == pytest.approx([r.advantage for r in other])


def test_pruned_rollouts_are_counted_once_and_keep_no_token_where_they_were_cut() -> None:
    (group,) = rewarded([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    group = [replace(r, finish="length" if r.sample % 2 else "stop") for r in group]
    trained = curate(
        [group], algorithm_selector={"name": "dynamic_pruning", "rate": 0.9}, algorithm_mask_truncated=True
    )
    (kept,), (left,) = trained.groups, trained.pruned
    assert sorted([*(r.sample for r in kept), *(r.sample for r in left)]) == list(range(8)) and left
    assert all(bool(r.valid.any()) == (r.finish == "stop") for r in [*kept, *left])
    assert kept[0].sample == 0 and kept[0].loss_weight == 1.0
    assert all(r.loss_weight == pytest.approx(10.0) for r in kept[1:])


def test_every_prompt_weighs_the_same_on_any_split_where_that_is_asked_for() -> None:
    made = rewarded([1.0, 0.0, 0.0, 0.0], [1.0, 0.0], [0.0] * 6, [1.0] * 3 + [0.0] * 5)
    changes = dict(
        algorithm_selector="nonzero_std",
        algorithm_prompt_weight="equal",
        algorithm_advantage={"name": "reinforce++"},
    )
    whole = curate(made, **changes)
    sums = [sum(r.loss_weight for r in group) for group in whole.groups]
    assert sums == pytest.approx([14 / 3, 14 / 3, 0.0, 14 / 3])
    assert sum(sums) == pytest.approx(14)  # As many as there are: the mean weight is 1.
    split = on_ranks([made[:1], made[1:3], made[3:], []], lambda mine, add: curate(mine, add, **changes))
    parts = [r for part in split for group in part.groups for r in group]
    for got, want in zip(parts, (r for group in whole.groups for r in group), strict=True):
        assert got.key == want.key and got.loss_weight == pytest.approx(want.loss_weight, rel=1e-12)
        assert got.advantage == pytest.approx(want.advantage, rel=1e-6)


def test_draws_are_of_the_step_and_the_rollout_alone() -> None:
    made = rewarded(*[[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * 12)
    selector = {"name": "dynamic_pruning", "rate": 0.5}

    def kept(trained: Trained) -> set[tuple[int, int, int]]:
        return {r.key for group in trained.groups for r in group}

    whole = kept(curate(made, algorithm_selector=selector))
    parts = [kept(curate(part, algorithm_selector=selector)) for part in (made[5:][::-1], made[:5])]
    assert parts[0] | parts[1] == whole
    later = kept(curate(made, step=1, algorithm_selector=selector))
    assert later != whole and 12 < len(whole) < 72


def test_token_advantages_follow_their_rollouts_through_a_selection() -> None:
    made = rewarded([0.0, 1.0, 0.0, 0.0])
    selector = {"name": "pods", "keep": 2, "stats": "full"}
    path = "tests.models.test_curator:Numbered"
    (group,) = curate(made, algorithm_selector=selector, algorithm_advantage={"name": path}).groups
    for rollout in group:
        want = np.full(len(rollout.tokens), rollout.sample + 10 * (rollout.sample == 1), np.float32)
        np.testing.assert_array_equal(rollout.advantage, want)
