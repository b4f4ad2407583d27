"""What a choice of methods may not combine, and the advantages that it gives to groups."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_jackpot.config import Config, parse_config
from megatron_jackpot.train.assembly import check_leaders
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
        (
            {"actor_objective": {"name": "kl_cov"}},
            "actor.objective.name = 'kl_cov' asks for numbers",
        ),
        ({"actor_objective": {"name": "m2po"}}, "actor.objective.name = 'm2po' carries its own ratio"),
        ({"algorithm_correction": {"name": "jackpt"}}, "Did you mean 'jackpot'"),
        (
            {"algorithm_aggregation": {"name": "constant", "length": 64}},
            "'constant' knows no removed tokens.*denominator = 'accepted'.*Set .*denominator to 'all'",
        ),
        (
            {"algorithm_overlong": {"buffer": 65}},
            r"algorithm.overlong.buffer = 65: must lie in \[1, 64\], rollout.max_new_tokens",
        ),
        (
            {"algorithm_selector": {"name": "dynamic_pruning"}},
            "'dynamic_pruning' counts rollouts that are not scored.*denominator = 'accepted'.*to 'all'",
        ),
        (
            {"algorithm_selector": {"name": "pods", "keep": 1}},
            "algorithm.selector.keep = 1: must be >= 2",
        ),
        (
            {"algorithm_prompt_weight": "equal", "algorithm_aggregation": "prompt"},
            "'prompt' has done already. Set algorithm.prompt_weight to 'sample'",
        ),
        (
            {"rollout_allocator": {"name": "vip", "least": 9}},
            r"rollout.samples_per_prompt = 8: must lie in \[9, 32\], what rollout.allocator.name = .vip.",
        ),
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
            {"algorithm_correction": {"name": "jackpot", "z": "exact"}, "servers_quantization": "fp8"},
            "but servers compute with other numbers: servers.quantization = 'fp8'. "
            "Set servers.quantization=null, or z='topk'",
        ),
    ],
)
def test_methods_that_do_not_go_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Methods.from_config(config(**changes))


def test_an_allocator_that_would_have_to_ask_other_leaders_is_refused_with_more_than_one() -> None:
    chosen = config(rollout_allocator="dynamic_sampling")
    check_leaders(chosen, Methods.from_config(chosen), 1)
    with pytest.raises(ValueError, match="'dynamic_sampling' decides over all .*2 data-parallel leaders"):
        check_leaders(chosen, Methods.from_config(chosen), 2)
    for other in ("aero", "vip", "coba"):
        chosen = config(rollout_allocator=other)
        check_leaders(chosen, Methods.from_config(chosen), 4)


def test_methods_that_go_together_are_built() -> None:
    made = Methods.from_config(config(algorithm_objective={"name": "topr", "anchor": "old"}))
    assert made.objective.anchor == "old" and made.exact_lam is None
    exact = config(
        algorithm_correction={"name": "jackpot", "z": "exact", "target_acceptance": 0.8, "lam": 2.0},
    )
    made = Methods.from_config(exact)
    assert made.exact_lam == 2.0 and made.acceptance is not None
    assert Methods.from_config(config(actor_distill_target_kl=0.1)).actor.adaptive is not None


def test_a_long_response_is_punished_and_a_cut_one_trains_nothing_but_counts_in_its_group() -> None:
    length = dict(buffer=16, penalty=0.5)
    changes = dict(algorithm_overlong=length, algorithm_mask_truncated=True)
    made = Methods.from_config(config(algorithm_advantage={"name": "dr_grpo"}, **changes))
    (group,) = groups(range(1), samples=3)
    tokens = [np.ones(n, np.int32) for n in (48, 52, 64)]
    group = [
        replace(r, tokens=own, valid=np.ones(len(own), bool), reward=1.0, finish=finish)
        for r, own, finish in zip(group, tokens, ("stop", "stop", "length"), strict=True)
    ]
    # 64 - 16 tokens cost nothing, 4 more a quarter of 0.5, all 16 the whole.
    shaped = [1.0, 1.0 - 0.125, 0.5]
    mean = sum(shaped) / 3
    trained = made.curator([group], 0, lambda sums: sums, torch.device("cpu"))
    (after,) = trained.groups
    assert [r.advantage for r in after] == pytest.approx([x - mean for x in shaped], rel=1e-6)
    assert [bool(r.valid.all()) for r in after] == [True, True, False] and not after[2].valid.any()
    assert [r.reward for r in after] == [1.0] * 3
    total, count = trained.sums["reward/overlong"]
    assert (total, count) == (pytest.approx(-0.625), 3)
    plain = Methods.from_config(config())
    untouched = plain.curator([group], 0, lambda sums: sums, torch.device("cpu"))
    (after,) = untouched.groups
    assert untouched.sums == {} and untouched.pruned == [[]]
    assert all(r.valid.all() and r.advantage == 0 and r.loss_weight == 1 for r in after)


def test_filters_are_a_list_and_may_be_ones_own() -> None:
    own = "megatron_jackpot.algorithm.importance:TokenIS"  # As another package's class would be named.
    made = Methods.from_config(config(algorithm_filters=[{"name": "k_filter", "high": 0.5}, {"name": own}]))
    assert [name for name, _ in made.filters] == ["k_filter", "TokenIS"] and made.filters[0][1].high == 0.5
    assert Methods.from_config(config()).filters == []
    with pytest.raises(ValueError, match=r"algorithm.filters\[0\].name = 'jackpot' is unknown"):
        Methods.from_config(config(algorithm_filters=[{"name": "jackpot"}]))


def test_advantages_are_those_of_each_whole_group_in_its_order() -> None:
    made = Methods.from_config(config(algorithm_advantage={"name": "dr_grpo"}))
    asked = []

    def alone(sums: torch.Tensor) -> torch.Tensor:
        asked.append(sums)
        return sums

    before = groups(range(3), samples=3)
    after = made.curator(before, 0, alone, torch.device("cpu")).groups
    assert [[r.key for r in group] for group in after] == [[r.key for r in group] for group in before]
    # Rewards 0, 1, 0 of which the mean is 1 / 3.
    want = [-1 / 3, 2 / 3, -1 / 3]
    assert [r.advantage for group in after for r in group] == pytest.approx(want * 3) and not asked
    made = Methods.from_config(config(algorithm_advantage={"name": "reinforce++"}))
    (first, second, third), *_ = made.curator(before, 0, alone, torch.device("cpu")).groups
    spread = (2 / 9) ** 0.5
    assert [r.advantage for r in (first, second, third)] == pytest.approx(
        [a / spread for a in want], rel=1e-5
    )
    assert len(asked) == 1 and made.curator([], 0, alone, torch.device("cpu")).groups == []
