"""What a choice of methods may not combine."""

import pytest

from megatron_jackpot.config import Config, parse_config
from megatron_jackpot.train.methods import Methods


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
    assert Methods.from_config(config(actor_distill_target_kl=0.1)).adaptive is not None
