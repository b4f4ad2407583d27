"""Parallel equals serial: one fixed batch on every layout, against tp = pp = dp = 1."""

import functools
import math
from pathlib import Path

import pytest
import torch

from tests.parallel.layouts import Layout, run_layout
from tests.parallel.spawn import run_ranks

NUMBERS = (
    "loss/policy",
    "loss/actor",
    "loss/distill",
    "grad_norm/policy",
    "grad_norm/actor",
)
ONE_MODELS = ("loss/policy", "grad_norm/policy")
"""Of a run without an actor."""
OWN = (
    *("jackpot/kappa", "jackpot/eta", "jackpot/z", "is/batch_norm"),
    *("loss/entropy", "policy/entropy", "policy/entropy_bonus"),
    *("loss/reference_kl", "policy/reference_weight", "reward/reference_kl"),
    *("kl/policy_reference", "kl/policy_reference_unweighted", "kl/policy_reference_exact"),
)
"""Of some methods: what is looked at where the serial run has it."""
TOLERANCE = 1e-5

WORLD_2 = (
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(dp=2),
    Layout(dp=2, overlap=True),
    Layout(dp=2, packing=False),
    Layout(pp=2, vpp=2, packing=False),
)
WORLD_4 = (Layout(tp=2, pp=2), Layout(tp=2, pp=2, sp=True), Layout(pp=2, dp=2, vpp=2))
WORLD_8 = dict(all=Layout(tp=2, pp=2, dp=2, sp=True, vpp=2, overlap=True), plain=Layout(tp=2, pp=2, dp=2))


def _run_all(rank: int, world: int, layouts: tuple[Layout, ...], folder: str, steps: int, out: str) -> None:
    results = [run_layout(layout, Path(folder), steps) for layout in layouts]
    if rank == 0:
        torch.save(results, out)


def run(layouts: tuple[Layout, ...], folder: Path, steps: int = 1, timeout_s: float = 240) -> list[dict]:
    """Every layout in one launch of as many ranks as they all need."""
    (world,) = {layout.world for layout in layouts}
    out = folder / f"results-{abs(hash((layouts, steps)))}.pt"
    run_ranks(_run_all, world, timeout_s, layouts, str(folder), steps, str(out))
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def serial(folder: Path):
    @functools.cache
    def get(layout: Layout, steps: int = 1) -> dict:
        return run((layout,), folder, steps)[0]

    return get


def check_equal(got: dict, want: dict, what: object, tolerance: float = TOLERANCE) -> None:
    assert got["keep"] == want["keep"], f"{what}: keep masks differ"
    own = [name for name in OWN if name in want["metrics"]]
    for name in [*(NUMBERS if "actor" in want["weights"] else ONE_MODELS), *own]:
        a, b = got["metrics"][name], want["metrics"][name]
        assert math.isclose(a, b, rel_tol=tolerance), f"{what}: {name} is {a}, serial {b}"
    for model, tensors in want["weights"].items():
        assert tensors.keys() == got["weights"][model].keys()
        # AdamW's first step is lr * sign(gradient): where a gradient is rounding noise, one step of 1e-3 may
        # turn.
        changed = {n: (got["weights"][model][n] - t).abs() > 1e-5 for n, t in tensors.items()}
        turned = sum(int(c.sum()) for c in changed.values()) / sum(c.numel() for c in changed.values())
        assert turned < 1e-3, f"{what}: {turned:.2%} of the {model}'s weights differ after the update"
        whole = [n for n, c in changed.items() if c.float().mean() > 0.05]
        assert not whole, f"{what}: {model} {whole} differ after the update"


def test_the_batch_is_not_trivial(serial) -> None:
    result = serial(Layout())
    assert 0.05 < sum(result["keep"].values()) / len(result["keep"]) < 0.95
    assert result["metrics"]["grad_norm/policy"] > 1e-3
    assert result["metrics"]["grad_norm/actor"] > 1e-3
    assert result["metrics"]["jackpot/kappa"] != 1.0


def test_two_ranks_equal_one_rank(folder: Path, serial) -> None:
    for layout, result in zip(WORLD_2, run(WORLD_2, folder), strict=True):
        check_equal(result, serial(Layout()), layout)


EXACT_Z = dict(correction=(("name", "jackpot"), ("z", "exact")))
EXACT = dict(**EXACT_Z, distill="forward_full", reference_kl=(("estimator", "k2"), ("weight", 0.1)))
REVERSE = dict(
    correction=(("name", "jackpot"), ("preset", "recommended")),
    distill="reverse_full",
    aggregation="sequence",
    reference_kl=(("estimator", "unbiased"), ("weight", 0.1), ("target", 0.5), ("exact", True)),
    filters=("seq_mis", "icepop", "entropy"),
    entropy_bonus=0.1,
)
CANDIDATES = dict(
    correction=(("name", "seq_tis"), ("batch_normalize", True)),
    distill="forward_topk",
    aggregation="prompt",
    selector="tests.parallel.layouts:Uneven",
    entropy_bonus=0.1,
)
"""The packer spreads a prompt's responses over data-parallel ranks, whose leaders pruned some."""
OWN = dict(
    correction=(("name", "jackpot"), ("z_correction", "tail")),
    distill="forward_topk",
    top_k=0,
    reference_kl=(("place", "reward"), ("estimator", "k1"), ("weight", 0.02)),
)
"""Servers return no top-k: the actor is scored first, and read again from its last hidden states."""


def methods_of(layout: Layout) -> Layout:
    """The same methods on one rank."""
    names = (
        "correction",
        "distill",
        "aggregation",
        "filters",
        "selector",
        "entropy_bonus",
        "reference_kl",
        "top_k",
    )
    return Layout(**{name: getattr(layout, name) for name in names})


def test_methods_over_the_whole_vocabulary_do_not_depend_on_the_layout(folder: Path, serial) -> None:
    """Exact Z and full KL recompute the policy's logits from its last hidden states, sharded and packed
    anyhow."""
    layouts = (
        Layout(tp=2, sp=True, **EXACT),
        Layout(pp=2, vpp=2, **EXACT),
        Layout(dp=2, packing=False, **EXACT),
        Layout(tp=2, **REVERSE),
        Layout(dp=2, **CANDIDATES),
        Layout(tp=2, sp=True, **OWN),
        Layout(pp=2, vpp=2, **OWN),
        Layout(dp=2, **OWN),
    )
    for layout, result in zip(layouts, run(layouts, folder), strict=True):
        check_equal(result, serial(methods_of(layout)), layout)


def test_logits_that_exist_train_as_those_that_are_made_in_blocks(folder: Path, serial) -> None:
    """The policy's embedding is untied, the actor's tied: on one stage and over two."""
    check_equal(serial(Layout(fused=False)), serial(Layout()), "one rank")
    check_equal(serial(Layout(fused=False, **EXACT)), serial(Layout(**EXACT)), "whole vocabulary")
    layouts = (
        Layout(tp=2, fused=False),
        Layout(tp=2, sp=True, fused=False, **CANDIDATES),
        Layout(pp=2, fused=False, **REVERSE),
        Layout(pp=2, vpp=2, overlap=True, fused=False),
    )
    for layout, result in zip(layouts, run(layouts, folder), strict=True):
        check_equal(result, serial(methods_of(layout)), layout)


def test_a_run_of_one_model_does_not_depend_on_the_layout(folder: Path, serial) -> None:
    layouts = (Layout(tp=2, one_model=True), Layout(pp=2, one_model=True, **EXACT_Z))
    for layout, result in zip(layouts, run(layouts, folder), strict=True):
        want = serial(Layout(one_model=True, correction=layout.correction))
        assert want["weights"].keys() == {"policy"} and not [n for n in want["metrics"] if "actor" in n]
        check_equal(result, want, layout)


def test_packing_off_equals_packing_on(serial) -> None:
    check_equal(serial(Layout(packing=False)), serial(Layout()), "packing off")


def test_four_ranks_equal_one_rank(folder: Path, serial) -> None:
    for layout, result in zip(WORLD_4, run(WORLD_4, folder), strict=True):
        check_equal(result, serial(Layout()), layout)


@pytest.mark.parametrize("name", ["all", pytest.param("plain", marks=pytest.mark.full)])
def test_eight_ranks_equal_one_rank(folder: Path, serial, name: str) -> None:
    """With everything that may be switched on; without it, four ranks hold it for each pair of axes."""
    (result,) = run((WORLD_8[name],), folder, timeout_s=400)
    check_equal(result, serial(Layout()), WORLD_8[name])


def test_minibatches_are_the_same_on_two_data_parallel_ranks(folder: Path, serial) -> None:
    """Eight of one prompt each too, of which one rank holds none before they are balanced."""
    for target, number in (("old", 2), ("current", 2), ("old", 8)):
        cut = dict(num_minibatches=number, target=target)
        two, one = Layout(dp=2, **cut), Layout(**cut)
        # The second mini-batch sees weights after an AdamW step, which turns rounding of tiny gradients into
        # 1e-5.
        check_equal(run((two,), folder)[0], serial(one), target, tolerance=1e-4)
