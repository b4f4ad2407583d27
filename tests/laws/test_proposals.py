"""tools/proposals.py: the table in docs/corrections.md, and what it shows."""

import re
from pathlib import Path

import pytest

from tools import proposals

PAGE = Path(__file__).parents[2] / "docs" / "corrections.md"


@pytest.fixture(scope="module")
def found() -> dict[float, dict[str, proposals.Errors]]:
    asked = proposals.options([])
    made = {noise: proposals.rows(noise, asked) for noise in proposals.NOISE}
    return {
        noise: {name: proposals.errors(z, r, asked.lam) for name, z in proposals.overlaps(r, asked).items()}
        for noise, r in made.items()
    }


def test_the_table_in_the_documents_is_what_the_tool_prints() -> None:
    written = re.findall(r"^\| 0[\d.]* \| (?:trainer|server).*\|$", PAGE.read_text(), re.MULTILINE)
    assert written == proposals.table(proposals.options([]))[2:]


def test_without_noise_only_the_cut_at_k_matters(found: dict) -> None:
    cut = {name: e for name, e in found[0.0].items() if "whole" not in name}
    shorter = cut.pop("server's top-k, 0 at the policy's own")
    for errors in cut.values():
        assert errors == pytest.approx(cut["server's top-k"], rel=1e-9)
    assert cut["server's top-k"].error < shorter.error < 1.15 * cut["server's top-k"].error
    exact = found[0.0]["trainer's whole vocabulary"]
    assert exact == pytest.approx((0, 0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("noise", proposals.NOISE[1:])
def test_z_is_a_function_of_the_prefix_unless_it_is_scaled_by_the_sampled_token(
    found: dict, noise: float
) -> None:
    for name, errors in found[noise].items():
        assert (errors.spread > noise / 10) == ("scaled" in name)
        assert errors.spread > noise / 10 or errors.spread < 1e-12
