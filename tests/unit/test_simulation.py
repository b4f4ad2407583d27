"""tools/simulate_obrs.py against the numbers of the Jackpot paper's Figure 2 and the laws of OBRS."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "simulate_obrs.py"
PAPER = {  # eps: acceptance, KL before, KL after, and the acceptance under Gaussian logit noise of equal KL
    0.043: (0.981, 0.0020, 0.00013, None),
    0.100: (0.956, 0.0090, 0.00074, 0.946),
    0.175: (0.922, 0.0238, 0.0024, 0.914),
}


def load_tool():
    spec = importlib.util.spec_from_file_location("simulate_obrs", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


simulate = load_tool()


@pytest.fixture(scope="module")
def figure2():
    return simulate.Figure2(seed=0)


@pytest.fixture(scope="module")
def estimator_rows():
    return {(row["estimator"], row["gap"]): row for row in simulate.estimator_table(seed=0)}


@pytest.mark.parametrize("seed, num", [(0, 60), (1, 60), (2, 60), (3, 30)])
def test_the_table_is_the_papers_figure_2(seed, num):
    rows = simulate.figure2_table(simulate.Figure2(seed, num=num))
    assert [row["eps"] for row in rows] == list(PAPER)
    for row in rows:
        acceptance, before, after, _ = PAPER[row["eps"]]
        assert row["acceptance"] == pytest.approx(acceptance, rel=0.01)
        assert row["KL before"] == pytest.approx(before, rel=0.10)
        assert row["KL after"] == pytest.approx(after, rel=0.10)


def test_the_acceptance_at_lam_1_is_one_minus_half_the_l1_distance(figure2):
    server_NV = figure2.dirichlet_server(0.175)
    distance = (figure2.target_NV - server_NV.exp()).abs().sum(-1).mean() / 2
    assert figure2.effect(server_NV)["acceptance"] == pytest.approx(1 - distance.item(), rel=1e-12)


def test_gaussian_noise_has_the_same_kl_before_and_loses_less_of_it(figure2):
    """Small noise s: log q/p is N(0, s^2), of which rejection removes one side.

    KL before = s^2 / 2, after = Var(max(0, s N(0, 1))) / 2 = (1/2 - 1/(2 pi)) s^2 / 2: a factor of 2.93.
    """
    mixture, gaussian = simulate.figure2_table(figure2), simulate.gaussian_table(figure2)
    for ours, other in zip(gaussian, mixture, strict=True):
        assert ours["KL before"] == pytest.approx(other["KL before"], rel=1e-6)
        assert ours["falls by"] < other["falls by"] / 3
        if expected := PAPER[other["eps"]][3]:
            assert ours["acceptance"] == pytest.approx(expected, rel=0.01)
    assert gaussian[0]["falls by"] == pytest.approx(1 / (0.5 - 0.5 / math.pi), rel=0.03)


def test_the_seed_decides_everything():
    first, again, other = (
        [
            simulate.figure2_table(simulate.Figure2(seed, num=5, vocab=100)),
            simulate.topk_tables(seed, num=4, vocab=500),
            simulate.estimator_table(seed, num=5),
        ]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))


def test_candidates_are_the_union_of_both_lists_without_duplicates():
    generator = torch.Generator().manual_seed(0)
    target_NV, server_NV = simulate.normal(2, 6, 40, generator=generator).log_softmax(-1)
    ids_NK, target_NK, server_NK = simulate.candidates(target_NV, server_NV, 7)
    for row in range(6):
        known = target_NK[row] > -math.inf
        union = set(target_NV[row].topk(7).indices.tolist()) | set(server_NV[row].topk(7).indices.tolist())
        assert sorted(ids_NK[row][known].tolist()) == sorted(union)
        assert torch.equal(server_NK[row][known], server_NV[row][ids_NK[row][known]])
        assert torch.equal(known, server_NK[row] > -math.inf)


def test_top_k_only_loses_mass_and_less_with_k():
    bias_rows, error_rows = simulate.topk_tables(seed=0, num=8, vocab=2000)
    for row in bias_rows:
        shares = [row[f"k={k}"] for k in simulate.TOP_K]
        assert shares == sorted(shares) and 0 < shares[0] and shares[-1] < 1
    peaked, flat = ([row["k=20"] for row in bias_rows if row["rows"] == kind] for kind in ("peaked", "flat"))
    assert min(peaked) > max(flat)
    assert all(row["tail"] < row["none"] for row in error_rows)


@pytest.mark.parametrize("gap", ["near", "far"])
def test_estimators_without_caps_are_unbiased_only_with_weight_and_mask(estimator_rows, gap):
    for name in ("TIS", "Jackpot, Bernoulli", "Jackpot, expected"):
        assert estimator_rows[name, gap]["bias"] < 1e-12
    for name in ("no correction", "mask without weight", "weight without mask"):
        assert estimator_rows[name, gap]["bias"] > 0.01


@pytest.mark.parametrize("gap", ["near", "far"])
@pytest.mark.parametrize("suffix", ["", ", caps"])
def test_expected_jackpot_has_the_bias_of_bernoulli_and_a_smaller_std(estimator_rows, gap, suffix):
    drawn, expected = (estimator_rows[f"Jackpot, {mask}", gap] for mask in ("Bernoulli", "expected"))
    assert expected[f"bias{suffix}"] == pytest.approx(drawn[f"bias{suffix}"], rel=1e-9, abs=1e-12)
    assert expected[f"std{suffix}"] < 0.97 * drawn[f"std{suffix}"]


@pytest.mark.parametrize("gap", ["near", "far"])
def test_expected_jackpot_without_caps_is_importance_sampling(estimator_rows, gap):
    expected, sampling = (estimator_rows[name, gap] for name in ("Jackpot, expected", "TIS"))
    assert expected["std"] == pytest.approx(sampling["std"], rel=1e-12)


def test_markdown_rows_have_the_columns_of_their_header():
    text = simulate.markdown("Title", [{"name": "a", "error": 0.012345}, {"name": "b", "error": 1e-17}])
    assert text.splitlines() == [
        "### Title",
        "",
        "| name | error |",
        "| --- | --- |",
        "| a | 0.0123 |",
        "| b | 0 |",
    ]


def test_the_tool_loads_without_matplotlib_and_rich():
    blocked = "import sys, runpy; sys.modules['matplotlib'] = sys.modules['rich'] = None; "
    subprocess.run([sys.executable, "-c", f"{blocked}runpy.run_path({str(TOOL)!r})"], check=True)
