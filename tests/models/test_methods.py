"""What a choice of methods may not combine, and the advantages that it gives to groups."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.reward_parts import RewardParts
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
            "'bapo' accounts for the server's law.*'jackpot' would correct twice",
        ),
        ({"algorithm_objective": {"name": "topr"}}, "Use correction none, or objective anchor old"),
        (
            {"actor_objective": {"name": "kl_cov"}},
            "actor.objective.name = 'kl_cov' asks for numbers",
        ),
        (
            {"actor_objective": {"name": "dppo_kl", "anchor": "old", "approximation": "topk"}},
            "'dppo_kl' looks at the candidates, .* Use approximation binary",
        ),
        (
            {
                "algorithm_objective": {"name": "dppo_tv", "anchor": "old", "approximation": "topk"},
                "algorithm_target": "current",
                "algorithm_num_minibatches": 2,
            },
            "compares with the policy at the start of the step.* Set algorithm.target to 'old'",
        ),
        (
            {"actor_objective": {"name": "m2po"}},
            "actor.objective.name = 'm2po' accounts for the server's law",
        ),
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
        (
            {"rollout_allocator": "dynamic_sampling", "rollout_samples_per_prompt": 1},
            "samples_per_prompt = 1: must be >= 2 .* a group of one is never live. Use 8",
        ),
        (
            {"rollout_allocator": {"name": "aero", "most": 8}},
            "allocator.most = 8: must be > samples_per_prompt = 8, or no prompt ever gets more. Raise it",
        ),
        (
            {"policy_reference": {}},
            "is scored in every step, .* nothing would use it. Set algorithm.reference_kl.weight=1e-3",
        ),
        ({"algorithm_objective": "dmpo"}, "'dmpo' compares with a frozen model, .* Set policy.reference={}"),
        (
            {"algorithm_objective": "dmpo", "policy_reference": {}},
            "advantage.name = 'grpo' is in other units .* 'dmpo' fits. Use advantage reward, or dr_grpo",
        ),
        (
            {
                "algorithm_objective": "dmpo",
                "policy_reference": {},
                "algorithm_advantage": "reward",
                "algorithm_selector": "pods",
            },
            "selector.name = 'pods' takes rollouts out of their groups",
        ),
        (
            {"algorithm_objective": {"name": "a_star_po", "values": "v"}, "algorithm_advantage": "dr_grpo"},
            "advantage.name = 'dr_grpo' is in other units .* 'a_star_po' fits. Use advantage reward",
        ),
        (
            {
                "algorithm_objective": {"name": "a_star_po", "values": "v"},
                "algorithm_advantage": "reward",
                "algorithm_overlong": {"buffer": 8},
            },
            "algorithm.overlong changes the rewards, which algorithm.objective.values is made of",
        ),
        (
            {
                "algorithm_objective": {"name": "a_star_po", "values": "v"},
                "policy_reference": {"refresh_every": 5},
            },
            "'a_star_po' has values of one reference, but policy.reference.refresh_every = 5 changes it",
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


def test_methods_that_go_together_are_built() -> None:
    made = Methods.from_config(config(algorithm_objective={"name": "topr", "anchor": "old"}))
    assert made.objective.anchor == "old" and made.exact_lam is None
    exact = config(
        algorithm_correction={"name": "jackpot", "z": "exact", "target_acceptance": 0.8, "lam": 2.0},
    )
    made = Methods.from_config(exact)
    assert made.exact_lam == 2.0 and made.acceptance is not None
    assert Methods.from_config(config(actor_distill_target_kl=0.1)).actor.adaptive is not None


def test_what_was_steered_before_a_checkpoint_goes_on_after_it() -> None:
    changes = dict(
        algorithm_entropy={"bonus": 0.01, "target": 1.0},
        algorithm_reference_kl={"weight": 0.02, "target": 0.1},
        policy_reference={},
    )
    made = Methods.from_config(config(**changes))
    assert (made.terms.entropy_bonus, made.terms.kl_weight) == (0.01, 0.02)
    states = {name: {"weight": 0.5, "integral": -1.0} for name in ("entropy", "reference_kl")}
    assert states.keys() == made.controllers().keys()
    made.load_controllers(states)
    assert (made.terms.entropy_bonus, made.terms.kl_weight) == (0.5, 0.5)
    with pytest.raises(ValueError, match="reference_kl.weight: weight = 0.0: must lie in .1e-06, 100.0"):
        Methods.from_config(config(**{**changes, "algorithm_reference_kl": {"weight": 0, "target": 0.1}}))


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


def parted(parts: list[dict[str, float]], weights: dict[str, float]) -> list:
    """A group whose rewards are the weighted sums of these parts."""
    (group,) = groups(range(1), samples=len(parts))
    sums = [sum(weights[name] * value for name, value in own.items()) for own in parts]
    return [replace(r, parts=own, reward=s) for r, own, s in zip(group, parts, sums, strict=True)]


@pytest.mark.parametrize("how", ["jointly", "singly"])
def test_several_rewards_are_normalised_by_their_sum_or_each_by_itself(how: str) -> None:
    """A reward of a large scale drowns the other in the sum; singly both have a standard deviation of 1."""
    weights = {"answer": 1.0, "length": 0.5}
    rewards = {name: {"reward": "exact", "weight": weight} for name, weight in weights.items()}
    changes = dict(algorithm_reward_parts=how, algorithm_advantage={"name": "grpo", "eps": 1e-12})
    made = Methods.from_config(config(data_rewards=rewards, data_reward="exact", **changes))
    parts = [{"answer": a, "length": n} for a, n in ((1.0, 100.0), (0.0, 40.0), (1.0, 10.0), (0.0, 70.0))]
    group = parted(parts, weights)
    (after,) = made.curator([group], 0, lambda sums: sums, torch.device("cpu")).groups

    def normalised(values: list[float]) -> np.ndarray:
        return (np.array(values) - np.mean(values)) / np.std(values, ddof=1)

    each = {name: normalised([own[name] for own in parts]) for name in weights}
    wanted = {
        "jointly": normalised([r.reward for r in group]),
        "singly": each["answer"] + 0.5 * each["length"],
    }
    assert [r.advantage for r in after] == pytest.approx(list(wanted[how]), rel=1e-6)
    assert np.abs(wanted["jointly"] - wanted["singly"]).max() > 0.3
    more = [group, parted([{"length": 2.0}], weights)]
    assert RewardParts(weights=weights).sums([rollout for own in more for rollout in own]) == {
        "reward/part/answer": (2.0, 4),
        "reward/part/length": (222.0, 5),
    }


def test_what_rewards_only_measure_changes_no_advantage_and_has_means_of_its_own() -> None:
    weights = {"answer": 1.0, "length": 0.5}
    rewards = {name: {"reward": "exact", "weight": weight} for name, weight in weights.items()}
    values = [{"answer": float(i % 2), "length": float(i)} for i in range(4)]
    plain = parted(values, weights)
    # Before the first reward, which what is added belongs to.
    measured = [replace(r, parts={"answer/format": 9.0 * i, **r.parts}) for i, r in enumerate(plain)]
    added = {r.key: -0.1 * i for i, r in enumerate(plain)}
    made = Methods.from_config(config(data_rewards=rewards, algorithm_reward_parts="singly"))
    both = [
        made.curator([group], 0, lambda sums: sums, torch.device("cpu"), added) for group in (plain, measured)
    ]
    assert [r.advantage for r in both[0].groups[0]] == [r.advantage for r in both[1].groups[0]]
    assert both[1].sums["reward/part/answer/format"] == (54.0, 4)
    assert RewardParts().sums([replace(plain[0], parts={"format": 0.5}), plain[1]]) == {
        "reward/part/format": (0.5, 1),
        "reward/part/answer": (1.0, 1),
        "reward/part/length": (1.0, 1),
    }


def test_what_is_added_to_the_rewards_belongs_to_the_first_part_where_each_is_normalised_by_itself() -> None:
    weights = {"answer": 2.0, "length": 0.5}
    rewards = {name: {"reward": "exact", "weight": weight} for name, weight in weights.items()}
    group = parted([{"answer": float(i % 2), "length": float(i)} for i in range(4)], weights)
    added = {r.key: -0.1 * i for i, r in enumerate(group)}
    found = []
    for how in ("jointly", "singly"):
        # Without a standard deviation both are the same sum of differences.
        changes = dict(algorithm_reward_parts=how, algorithm_advantage={"name": "dr_grpo"})
        made = Methods.from_config(config(data_rewards=rewards, **changes))
        (after,) = made.curator([group], 0, lambda sums: sums, torch.device("cpu"), added).groups
        found.append([r.advantage for r in after])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    shaped = np.array([r.reward - 0.1 * i for i, r in enumerate(group)])
    assert found[0] == pytest.approx(list(shaped - shaped.mean()), rel=1e-6)


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
