"""Methods of the user's own, named by their path: they train like the package's, and what is wrong with one
is refused before a model is loaded."""

import asyncio
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_jackpot.algorithm.advantages import ADVANTAGES
from megatron_jackpot.algorithm.aggregation import AGGREGATIONS
from megatron_jackpot.algorithm.allocators import ALLOCATORS, DynamicSampling
from megatron_jackpot.algorithm.corrections import CORRECTIONS
from megatron_jackpot.algorithm.distill import DISTILL
from megatron_jackpot.algorithm.objectives import OBJECTIVES, AStarPO
from megatron_jackpot.algorithm.registry import Registry
from megatron_jackpot.algorithm.selectors import SELECTORS
from megatron_jackpot.config import load_config
from megatron_jackpot.data.packing import pack_row
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.train.methods import Methods
from megatron_jackpot.train.own_methods import random_scores, try_out
from tests.models import bad_methods
from tests.models.test_methods import config
from tests.parallel.layouts import Layout, run_layout
from tests.parallel.spawn import run_ranks
from tests.tiny import groups, write_models

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_methods"
REGISTRIES: dict[str, Registry] = {
    "algorithm.aggregation": AGGREGATIONS,
    "algorithm.correction": CORRECTIONS,
    "algorithm.objective": OBJECTIVES,
    "algorithm.advantage": ADVANTAGES,
    "algorithm.selector": SELECTORS,
    "rollout.allocator": ALLOCATORS,
    "actor.distill": DISTILL,
}
GOOD = """
from dataclasses import dataclass

import torch

from megatron_jackpot.algorithm.correction_base import CorrectionMethod, corrected
from megatron_jackpot.algorithm.diagnostics import mean_over
from megatron_jackpot.algorithm.objectives_base import Objective
from megatron_jackpot.algorithm.obrs import log_ratio
from megatron_jackpot.algorithm.tokens import sampled_logp


@dataclass(frozen=True, kw_only=True)
class Capped(CorrectionMethod):
    cap: float = 2.0

    @torch.no_grad()
    def __call__(self, scores, sum_over_batch):
        logp = sampled_logp(scores)
        weight = log_ratio(logp.policy, logp.server).exp().clamp(max=self.cap).float()
        mask = scores.batch.mask_MT
        metrics = {"mine/weight": mean_over(weight, mask)}
        return corrected(
            scores, keep=logp.valid, weight=weight, counted=mask, accept=logp.valid, metrics=metrics
        )


@dataclass(frozen=True, kw_only=True)
class Plain(Objective):
    def surrogate(self, t):
        return t.advantage_T * t.logp_T
"""


def _two_steps(
    rank: int, world: int, folder: str, modules: str, correction: str, objective: str
) -> dict | None:
    sys.path.insert(0, modules)
    layout = Layout(num_minibatches=2, correction=(("name", correction), ("cap", 1.5)), objective=objective)
    return run_layout(layout, Path(folder), steps=2)


def test_a_correction_and_an_objective_from_outside_train_like_the_same_two_from_inside(
    tmp_path: Path,
) -> None:
    folder = str(write_models(tmp_path / "models"))
    (tmp_path / "jackpot_test_good.py").write_text(GOOD)
    names = ("tis", "reinforce"), ("jackpot_test_good:Capped", "jackpot_test_good:Plain")
    ours, own = (run_ranks(_two_steps, 1, 120, folder, str(tmp_path), *pair)[0] for pair in names)
    for name, tensors in ours["weights"].items():
        assert all(torch.equal(own["weights"][name][n], tensor) for n, tensor in tensors.items())
    assert own["keep"] == ours["keep"] and len(own["history"]) == 2
    for step, want in zip(own["history"], ours["history"], strict=True):
        assert step["loss/policy"] == want["loss/policy"] and step["grad_norm/policy"] > 0
        assert 0 < step["mine/weight"] <= 1.5
    assert not any(":" in name for registry in REGISTRIES.values() for name in registry)


def test_the_example_has_one_for_every_seam_and_their_settings_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    chosen = load_config(EXAMPLE / "run.yaml")
    made = Methods.from_config(chosen)
    curator = made.curator
    methods = (made.correction, made.objective, curator.advantage, curator.selector, made.actor.distill)
    assert {type(method).__module__ for method in methods} == {"own_methods"}
    assert (made.correction.floor, made.correction.cap, made.objective.negative) == (0.02, 2.0, 0.3)
    scores = random_scores()
    found = made.correction(scores, lambda sums: sums)
    p_MT, mask_MT = scores.policy_logp_MT.detach().exp(), scores.batch.mask_MT
    assert torch.equal(found.keep_MT, mask_MT & (p_MT >= 0.02)) and found.counted_MT.sum() == mask_MT.sum()
    weight_MT = (p_MT / scores.batch.server_logp_MT.exp()).clamp(max=2.0)
    torch.testing.assert_close(found.weight_MT[found.keep_MT], weight_MT[found.keep_MT])
    assert 0 < int(found.keep_MT.sum()) < int(mask_MT.sum())
    assert made.curator.advantage([1.0, 0.0, 0.0]).tolist() == [1.0, 0.0, 0.0]
    (group,) = made.curator(groups(range(1), samples=3), 0, lambda sums: sums, torch.device("cpu")).groups
    row = pack_row(group, 256, 8, first_segment=0)
    for index, rollout in enumerate(group):  # Rewards 0, 1, 0.
        length, own = len(rollout.tokens), row["segment_MT"] == index
        want = (index == 1) * 0.9 ** np.arange(length - 1, -1, -1)
        np.testing.assert_allclose(row["advantage_MT"][own][-length - 1 : -1], want, rtol=1e-6)
    with RewardPool(chosen.data.reward, 1, 10.0) as pool:
        label = {"answer": "12"}
        scored = [asyncio.run(pool(text, label)) for text in (" 12\n", "-1.5", "twelve")]
    assert scored == [(1.0, True), (0.1, False), (0.0, False)]


def test_every_method_of_the_package_does_what_is_asked_of_one_s_own() -> None:
    for where, registry in REGISTRIES.items():
        for name, method in registry.items():
            made = method(**({"length": 8} if name == "constant" else {}))
            if isinstance(made, AStarPO):
                made = made.with_values({0: 0.5, 1: 0.2, 2: 0.9}, torch.device("cpu"))
            try_out(made, name, where)
    # That it ends the run where live groups are missing is its decision, and no mistake.
    try_out(DynamicSampling(max_rounds=1, on_exhausted="fail"), "dynamic_sampling", "rollout.allocator")


CORRECTION, OBJECTIVE, ADVANTAGE, ACTOR, TEACHER = (
    "algorithm.correction",
    "algorithm.objective",
    "algorithm.advantage",
    "actor.objective",
    "actor.distill",
)
REFUSED = [
    (
        CORRECTION,
        "jackpot_test_none:X",
        {},
        r"No module named 'jackpot_test_none'. Put its folder on PYTHONPATH",
    ),
    (CORRECTION, "bad:", {}, "must be package.module:Name, with one colon"),
    (CORRECTION, "bad:A:B", {}, "must be package.module:Name, with one colon"),
    (CORRECTION, "bad.Live", {}, "is unknown. Own methods are package.module:Class"),
    (CORRECTION, "bad:Life", {}, "module tests.models.bad_methods has no 'Life'. Did you mean 'Live'"),
    (CORRECTION, "jackpot_test_torn:X", {}, "(?s)cannot be imported.*SyntaxError"),
    (CORRECTION, "jackpot_test_needy:X", {}, "(?s)cannot be imported.*No module named 'no_such_package'"),
    (CORRECTION, "bad:function", {}, "must be a class derived from .*CorrectionMethod. Derive it"),
    (CORRECTION, "bad:CorrectionMethod", {}, "must be a class derived from .*CorrectionMethod"),
    (CORRECTION, "bad:Elsewhere", {}, "must be a class derived from .*CorrectionMethod"),
    (OBJECTIVE, "bad:Live", {}, "must be a class derived from .*objectives_base.Objective"),
    (CORRECTION, "bad:Loose", {}, r"must be a frozen dataclass. Write @dataclass\(frozen=True"),
    (ADVANTAGE, "bad:Thawed", {}, "must be a frozen dataclass"),
    (CORRECTION, "bad:Listed", {}, r"field caps is of type list\[float\], must be what YAML holds"),
    (CORRECTION, "bad:Unreadable", {}, "(?s)its annotations cannot be read.*NoSuchType"),
    (CORRECTION, "bad:Ruled", {"cap": 4}, r"^algorithm.correction.cap = 4.0: must be prime. Use 2"),
    (CORRECTION, "bad:Stumbling", {}, "(?s)cannot be made from its settings.*ZeroDivisionError"),
    (CORRECTION, "bad:Needy", {}, "algorithm.correction.high is missing: .*Set it beside the name"),
    (CORRECTION, "bad:Flat", {"capp": 2}, "Unknown setting 'algorithm.correction.capp' .*mean 'cap'"),
    (CORRECTION, "bad:Flat", {"cap": "big"}, "correction.cap = 'big': must be of type float"),
    (CORRECTION, "bad:Unwritten", {}, "(?s)fails on random scores.*NotImplementedError"),
    (CORRECTION, "bad:Live", {}, r"weight_MT carries gradient, .* Put @torch.no_grad\(\) on __call__"),
    (CORRECTION, "bad:Greedy", {}, "keeps tokens outside batch.mask_MT"),
    (CORRECTION, "bad:Wide", {}, r"weight_MT is torch.float64 .* must be a tensor torch.float32"),
    (CORRECTION, "bad:Flat", {}, r"keep_MT is torch.bool \[128\], must be .* \[2, 64\]"),
    (CORRECTION, "bad:Infinite", {}, "weight_MT holds NaN or infinity, must be finite"),
    (CORRECTION, "bad:Owing", {}, "its counted_MT is negative somewhere"),
    (CORRECTION, "bad:Single", {}, r"metric 'mine' must be a pair \(sum, count\)"),
    (CORRECTION, "bad:Pair", {}, "must return a Correction, got tuple"),
    (CORRECTION, "bad:Gambling", {}, "another result when it is called again.*counter_uniform"),
    (CORRECTION, "bad:Steered", {}, "with target_acceptance it must have a field lam"),
    (OBJECTIVE, "bad:Detached", {}, "has no gradient into t.logp_T: it would train nothing"),
    (OBJECTIVE, "bad:Everywhere", {}, "its surrogate is not 0 outside t.valid_T"),
    (OBJECTIVE, "bad:Summed", {}, r"surrogate is torch.float32 \[\], must be .* \[64\]"),
    (OBJECTIVE, "bad:Steep", {}, "has a gradient into t.logp_T that is not finite"),
    (OBJECTIVE, "bad:Lost", {}, "prepare must return an Objective, got NoneType"),
    (ACTOR, "bad:Counted", {}, r"removed is torch.int64 \[\], must be a tensor torch.bool \[64\]"),
    (ADVANTAGE, "bad:Doubled", {}, r"advantages of rewards .* torch.float32 \[10\], must be .* \[5\]"),
    (ADVANTAGE, "bad:Lonely", {}, r"advantages of rewards .* holds NaN or infinity"),
    (ADVANTAGE, "bad:Reduced", {}, r"over_batch is torch.float64 \[\], must be .* \[9\]"),
    (ADVANTAGE, "bad:Shortened", {}, r"a result of per_token is torch.float32 \[\d+\], must be"),
    (ADVANTAGE, "bad:Sparse", {}, "per_token returns 0 tensors, must be 9. One for each rollout"),
    ("algorithm.aggregation", "bad:Indebted", {}, "count = -.*: must be >= 0, this rank's part of N"),
    ("rollout.allocator", "bad:Undecided", {}, r"live = None of rewards \[.*: must be a bool. Return one"),
    ("rollout.allocator", "bad:Fractional", {}, "fetch = 18.0 where 0 of 6 groups are live: must be an int"),
    (TEACHER, "bad:Teaching", {}, "sends gradient into the policy's log-probs.*Detach them"),
    (TEACHER, "bad:Frozen", {}, "has no gradient into the actor's log-probs"),
    (TEACHER, "bad:Silent", {}, "calls t.kl, needs = 'sampled'. Declare needs = 'logits'"),
    (TEACHER, "bad:Greedier", {}, "(?s)needs = 'everything': must be one of 'sampled', 'candidates'"),
    (TEACHER, "bad:Padded", {}, "its loss holds NaN or infinity"),
]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jackpot_test_torn.py").write_text("def broken(:\n")
    (tmp_path / "jackpot_test_needy.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("where", "name", "settings", "message"), REFUSED, ids=[f"{row[0]} {row[1]}" for row in REFUSED]
)
def test_what_is_wrong_with_a_method_is_named_with_its_field_and_the_remedy(
    modules: None, where: str, name: str, settings: Mapping[str, object], message: str
) -> None:
    name = re.sub("^bad", bad_methods.__name__, name)
    changes = {where.replace(".", "_"): {"name": name, **settings}}
    with pytest.raises(ValueError, match=message) as caught:
        Methods.from_config(config(**changes))
    assert str(caught.value).removeprefix("Unknown setting '").startswith(f"{where}.")


def test_every_class_of_the_bad_ones_is_refused_for_something() -> None:
    named = {name.partition(":")[2] for _, name, _, _ in REFUSED}
    classes = {name for name, value in vars(bad_methods).items() if isinstance(value, type)}
    written = {name for name in classes if getattr(bad_methods, name).__module__ == bad_methods.__name__}
    assert written - {"Changed"} <= named
