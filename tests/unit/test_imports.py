"""The direction of imports, read from the source, so that it also holds for files added later."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = "megatron_jackpot"
ROOT = Path(__file__).resolve().parents[2]

HTTP = {"aiohttp", "httpx", "requests", "urllib3"}
OURS = {"algorithm", "parallel", "models", "rollout", "rewards", "data", "sync", "config", "trainer", "cli"}

ALLOWED = {
    # Pure math: torch, the standard library and itself.
    "algorithm": {"torch", f"{PACKAGE}.algorithm"},
    "parallel": {"torch", "triton", f"{PACKAGE}.parallel", f"{PACKAGE}.algorithm"},
    "config": {
        "pydantic",
        f"{PACKAGE}.algorithm.registry",
        f"{PACKAGE}.yaml_tree",
        f"{PACKAGE}.config_base",
        f"{PACKAGE}.config_cluster",
        f"{PACKAGE}.config_models",
        f"{PACKAGE}.config_run",
    },
    "config_base": {"pydantic"},
    "config_cluster": {"pydantic", f"{PACKAGE}.config_base"},
    "config_models": {"pydantic", f"{PACKAGE}.config_base"},
    "config_run": {"pydantic", f"{PACKAGE}.config_base"},
    "layout": {f"{PACKAGE}.config"},
    "guard": {f"{PACKAGE}.config_run"},
    "interrupt": {f"{PACKAGE}.config_run"},
    "yaml_tree": {"yaml"},
    "batch": {"numpy", "torch"},
}
"""Layer -> everything it may import beside the standard library."""


def ours(*names: str) -> set[str]:
    return {f"{PACKAGE}.{name}" for name in names}


FORBIDDEN = {
    "algorithm": {"torch.distributed"},
    "models": {"sglang", *HTTP, *ours("rollout", "rewards", "data", "sync", "trainer", "cli")},
    "rollout": {"megatron", *ours("models", "sync", "trainer", "cli")},
    "rewards": {"megatron", "sglang", *ours("models", "rollout", "sync", "trainer", "cli")},
    "data": {"megatron", "sglang", *ours("models", "rollout", "sync", "trainer", "cli")},
    "sync": {"sglang", *ours("trainer", "cli")},
    "packing": {"megatron", "sglang", *HTTP, *ours("models", "rollout", "sync", "trainer", "cli")},
    "trainer": {"sglang", *HTTP, *ours("cli")},
    "checkpoint": {"sglang", *HTTP, *ours("trainer", "cli")},
    "metrics": {"megatron", "sglang", *HTTP, *ours("models", "rollout", "sync", "trainer", "cli")},
    "logger": {"megatron", "sglang", *HTTP, *ours("models", "rollout", "sync", "trainer", "cli")},
    "__init__": {"torch", "megatron", "sglang", "transformers", PACKAGE},
}
"""Layer -> what it must not import."""


def imported(path: Path, package: str) -> set[str]:
    """Dotted names a file imports anywhere in it, functions included; `package` resolves relative imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def offences(path: Path, layer: str, package: str) -> list[str]:
    found = []
    for name in sorted(imported(path, package)):
        if within(name, FORBIDDEN.get(layer, set())):
            found.append(f"{layer} must not import {name}")
        elif layer in ALLOWED and name.split(".")[0] not in sys.stdlib_module_names:
            # `from megatron_jackpot import x` also yields the bare package; x is judged on its own.
            if name != PACKAGE and not within(name, ALLOWED[layer]):
                found.append(f"{layer} may not import {name}")
    return found


def files() -> list[tuple[Path, str, str]]:
    """(path, layer, package) of every file; the layer is a folder or a module right below the top."""
    rows = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        rows.append((path, parts[1], ".".join(parts[:-1])))
    return rows


def test_every_file_imports_in_the_direction_of_the_design():
    rows = files()
    assert {"algorithm", "parallel", "config"} <= {layer for _, layer, _ in rows}
    wrong = {str(path.relative_to(ROOT)): offences(path, layer, package) for path, layer, package in rows}
    assert {path: found for path, found in wrong.items() if found} == {}


def test_reading_the_configuration_loads_no_torch():
    for path in (
        f"{PACKAGE}/__init__.py",
        f"{PACKAGE}/algorithm/__init__.py",
        f"{PACKAGE}/algorithm/registry.py",
    ):
        foreign = {name.split(".")[0] for name in imported(ROOT / path, PACKAGE)} - sys.stdlib_module_names
        assert not foreign, path


def test_triton_is_imported_by_the_kernels_and_their_launchers_alone():
    wants = {
        str(path.relative_to(ROOT)) for path, _, package in files() if "triton" in imported(path, package)
    }
    assert wants == {f"{PACKAGE}/parallel/vocab_kernels.py", f"{PACKAGE}/parallel/vocab_triton.py"}
    for path, _, package in files():
        kernels = f"{PACKAGE}.parallel.vocab_triton" in imported(path, package)
        assert not kernels or path.name == "dispatch.py", path


def test_no_part_imports_what_puts_the_parts_together():
    for path, layer, package in files():
        if (ROOT / PACKAGE / layer).is_dir():
            upward = [
                name for name in imported(path, package) if within(name, ours("trainer", "assembly", "cli"))
            ]
            assert not upward, path


def test_unit_tests_need_torch_numpy_and_pytest_alone():
    light = {
        "torch",
        "numpy",
        "pytest",
        "tests",
        *ours(*sorted(OURS - {"config", "models", "sync", "trainer", "cli"})),
    }
    for path in sorted((ROOT / "tests" / "unit").glob("test_*.py")):
        for name in imported(path, "tests.unit"):
            known = name.split(".")[0] in sys.stdlib_module_names or name == PACKAGE
            assert known or within(name, light | ours("batch")), f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("layer", "source", "found"),
    [
        ("algorithm", "import torch\nimport math", []),
        ("algorithm", "from megatron_jackpot.algorithm.obrs import kappa", []),
        ("algorithm", "from .obrs import kappa", []),
        ("algorithm", "from megatron_jackpot.parallel import vocab", ["megatron_jackpot.parallel"] * 2),
        ("algorithm", "from .. import config", ["megatron_jackpot.config"]),
        ("algorithm", "from torch import distributed", ["torch.distributed"]),
        ("algorithm", "def f():\n    import numpy", ["numpy"]),
        ("config", "import torch", ["torch"]),
        (
            "models",
            "from megatron_jackpot.rollout.engine import Engine",
            ["megatron_jackpot.rollout.engine"] * 2,
        ),
        ("rollout", "from megatron_jackpot import models", ["megatron_jackpot.models"]),
        ("rollout", "import megatron.core", ["megatron.core"]),
        ("rollout", "import megatron_jackpot.batch", []),
        ("parallel", "import megatron.core", ["megatron.core"]),
    ],
)
def test_the_rule_finds_what_it_should(tmp_path, layer, source, found):
    path = tmp_path / "module.py"
    path.write_text(source)
    names = [line.split(" import ")[1] for line in offences(path, layer, f"{PACKAGE}.{layer}")]
    assert len(names) == len(found)
    assert all(name.startswith(want) for name, want in zip(names, found, strict=True))
