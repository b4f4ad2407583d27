"""What a choice of methods may not combine, and the advantages that it gives to groups."""

import pytest
import torch

from megatron_jackpot.config import Config, parse_config
from megatron_jackpot.train.methods import Methods
from tests.tiny import groups


def config(**changes: dict) -> Config:
    tree = dict(
        run=dict(folder="run"),
        policy=dict(hf="p"),
        actor=dict(hf="a"),
        data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=64),
        rollout=dict(max_new_tokens=64),
    )
    for key, value in changes.items():
        section, name = key.split("_", 1)
        tree.setdefault(section, {})[name] = value
    return parse_config(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm_objective": {"name": "bapo"}},
            "'bapo' carries its own ratio.*'jackpot' would correct twice",
        ),
        ({"algorithm_objective": {"name": "topr"}}, "Use correction none, or objective anchor old"),
        ({"actor_objective": {"name": "m2po"}}, "actor.objective.name = 'm2po' carries its own ratio"),
        ({"algorithm_correction": {"name": "jackpt"}}, "Did you mean 'jackpot'"),
        ({"actor_distill": {"name": "k3"}}, "actor.distill.name = 'k3' is unknown"),
        (
            {
                "algorithm_correction": {"name": "jackpot", "z": "exact"},
                "algorithm_target": "current",
                "algorithm_num_minibatches": 2,
            },
            "z = 'exact' is scored once per step",
        ),
        (
            {"algorithm_correction": {"name": "jackpot", "z": "exact"}, "rollout_ahead": 1},
            "rollout.ahead = 1 trains on tokens of older ones. Use z='topk'",
        ),
    ],
)
def test_methods_that_do_not_go_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Methods.from_config(config(**changes))


def test_methods_that_go_together_are_built() -> None:
    made = Methods.from_config(config(algorithm_objective={"name": "topr", "anchor": "old"}))
    assert made.objective.anchor == "old" and made.exact_lam is None
    exact = config(
        algorithm_correction={"name": "jackpot", "z": "exact", "target_acceptance": 0.8, "lam": 2.0}
    )
    made = Methods.from_config(exact)
    assert made.exact_lam == 2.0 and made.acceptance is not None
    assert Methods.from_config(config(actor_distill_target_kl=0.1)).actor.adaptive is not None


def test_advantages_are_those_of_each_whole_group_in_its_order() -> None:
    made = Methods.from_config(config(algorithm_advantage={"name": "dr_grpo"}))
    asked = []

    def alone(sums: torch.Tensor) -> torch.Tensor:
        asked.append(sums)
        return sums

    before = groups(range(3), samples=3)
    after = made.with_advantages(before, alone, torch.device("cpu"))
    assert [[r.key for r in group] for group in after] == [[r.key for r in group] for group in before]
    # Rewards 0, 1, 0 of which the mean is 1 / 3.
    want = [-1 / 3, 2 / 3, -1 / 3]
    assert [r.advantage for group in after for r in group] == pytest.approx(want * 3) and not asked
    made = Methods.from_config(config(algorithm_advantage={"name": "reinforce++"}))
    (first, second, third), *_ = made.with_advantages(before, alone, torch.device("cpu"))
    spread = (2 / 9) ** 0.5
    assert [r.advantage for r in (first, second, third)] == pytest.approx(
        [a / spread for a in want], rel=1e-5
    )
    assert len(asked) == 1 and made.with_advantages([], alone, torch.device("cpu")) == []
