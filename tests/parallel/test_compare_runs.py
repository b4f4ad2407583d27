"""tools/compare_runs.py: what it records repeats bit for bit, and it finds a single bit that differs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "compare_runs.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("compare_runs", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def records(tool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("records")
    for name in ("a", "b"):
        tool.record(folder / name, layouts=[(1, 1, 1)], methods=["jackpot"])
    return folder / "a", folder / "b"


def test_a_record_repeats_bit_for_bit_and_is_not_trivial(tool, records: tuple[Path, Path]) -> None:
    a, b = records
    assert tool.compare(a, b) == []
    with np.load(a / "tp1-pp1-dp1-jackpot-current.npz") as arrays:
        mask = arrays["keep/mask"]
        assert 0.05 < mask.mean() < 0.95
        assert arrays["step1/loss/policy"] != arrays["step0/loss/policy"]
        assert arrays["step1/jackpot/kappa"] != 1.0 and arrays["step1/grad_norm/policy"] > 0


def test_one_bit_of_one_weight_one_mask_and_a_missing_case_are_found(
    tool, records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = records
    for path in b.glob("*.npz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "tp1-pp1-dp1-jackpot-old"
    arrays = dict(np.load(b / f"{name}.npz"))
    weight = arrays["weights/actor/model.norm.weight"]
    weight.view(np.uint32)[3] ^= 1
    arrays["keep/mask"][5] ^= True
    np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "tp1-pp1-dp1-jackpot-current.npz").unlink()
    assert tool.main(["compare", str(a), str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"{name}: weights/actor/model.norm.weight differs by" in printed
    assert f"{name}: keep/mask differs in 1 of" in printed
    assert "tp1-pp1-dp1-jackpot-current: only in one of the two" in printed
    assert len(printed.splitlines()) == 3


def test_an_empty_record_is_no_agreement(tool, tmp_path: Path) -> None:
    assert tool.main(["compare", str(tmp_path), str(tmp_path)]) == 2
