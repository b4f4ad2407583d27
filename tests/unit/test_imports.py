"""The direction of imports, read from the source, so that it also holds for files added later."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "megatron_jackpot"
ROOT = Path(__file__).resolve().parents[2]

HTTP = {"aiohttp", "httpx", "requests", "urllib3"}
ENGINES = {"megatron", "transformer_engine", "sglang"}

OURS: dict[str, set[str]] = {
    "records": set(),
    "home": set(),
    "algorithm": {"records"},
    "config": {"algorithm.registry"},
    "parallel": {"algorithm", "records"},
    "rewards": {"records", "home", "algorithm.registry"},
    "run": {"config"},
    "servers": {"config"},
    "data": {"records", "config", "parallel", "algorithm.registry"},
    "models": {"records", "config", "parallel", "run.provenance"},
    "monitor": {"records", "config", "run"},
    "rollout": {
        *{"records", "algorithm.allocators_base", "config", "parallel", "rewards", "run", "servers", "data"},
    },
    "sync": {"config", "parallel", "run", "models", "servers"},
    "plan": {"config", "parallel.block_sizes", "data.bins"},
    "train": {
        "records",
        "algorithm",
        "config",
        "parallel",
        "rewards",
        "run",
        "servers",
        "data",
        "models",
        "monitor",
        "plan",
        "rollout",
        "sync",
    },
    "launch": {
        *{"records", "home", "config", "run", "servers", "plan"},
        *{"data.prompts", "data.problems", "data.tokenizer", "data.value_table"},
        *{"rewards.pool", "rewards.label_cache", "rewards.parts", "rewards.remote"},
    },
    "cli": {"config", "run", "launch", "plan", "monitor", "train"},
    "__init__": set(),
}
"""Layer, a folder or a module right below the top -> what of ours it may import beside itself."""

FOREIGN: dict[str, set[str]] = {
    "records": {"torch", "numpy"},
    "home": set(),
    "algorithm": {"torch"},
    "config": {"pydantic", "pydantic_core", "yaml"},
    "parallel": {"torch", "triton"},
    "run": {"yaml"},
    "servers": {"aiohttp", "numpy", "pydantic_core"},
    "plan": {"rich"},
    "launch": {"psutil", "yaml"},
    "cli": set(),
    "__init__": set(),
}
"""Layer -> the only packages of others it may import."""

FORBIDDEN: dict[str, set[str]] = {
    "algorithm": {"torch.distributed"},
    "rewards": {"torch", *ENGINES, *HTTP},
    "data": {*ENGINES, *HTTP},
    "models": {"sglang", *HTTP},
    "monitor": {*ENGINES, *HTTP},
    "rollout": {*ENGINES, *HTTP},
    "sync": {"sglang", *HTTP},
    "train": {"sglang", *HTTP},
}
"""Layer -> what of others it must not import."""

EXCEPTIONS = {
    # torchrun itself: a child's entry, which nobody imports.
    "launch/agent.py": {"torch"},
    # Entered by the servers' own interpreter, before anything of SGLang; their folder is on its path.
    "servers/cpu_server/sitecustomize.py": {"torchvision_operators"},
    "servers/cpu_server/torchvision_operators.py": {"torch"},
    "servers/cpu_server/batched_attention.py": {"torch", "sglang"},
}
"""File -> what it may import all the same."""


@functools.cache
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
    allowed = {f"{PACKAGE}.{name}" for name in {layer, *OURS[layer]}}
    folders = package.split(".")[1:]
    spared = EXCEPTIONS.get("/".join([*folders, path.name]), set())
    found = []
    for name in sorted(imported(path, package)):
        top = name.split(".")[0]
        if top == PACKAGE:
            # `from megatron_jackpot import x` also yields the bare package; x is judged on its own.
            bad = name != PACKAGE and not within(name, allowed) and name != f"{PACKAGE}.__version__"
        elif top in sys.stdlib_module_names or within(name, spared):
            continue
        else:
            bad = (layer in FOREIGN and top not in FOREIGN[layer]) or within(
                name, FORBIDDEN.get(layer, set())
            )
        if bad:
            found.append(f"{layer} must not import {name}")
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


def test_what_light_layers_import_of_heavy_ones_needs_the_standard_library_alone():
    for path in (
        f"{PACKAGE}/__init__.py",
        f"{PACKAGE}/algorithm/__init__.py",
        f"{PACKAGE}/algorithm/registry.py",
        f"{PACKAGE}/parallel/__init__.py",
        f"{PACKAGE}/parallel/block_sizes.py",
        f"{PACKAGE}/data/__init__.py",
        f"{PACKAGE}/data/bins.py",
    ):
        foreign = {name.split(".")[0] for name in imported(ROOT / path, PACKAGE)} - sys.stdlib_module_names
        assert not foreign, path


def test_triton_is_imported_by_the_kernels_and_their_launchers_alone():
    wants = {
        str(path.relative_to(ROOT)) for path, _, package in files() if "triton" in imported(path, package)
    }
    names = ("vocab_kernels", "vocab_kernels_pair", "vocab_triton")
    assert wants == {f"{PACKAGE}/parallel/{name}.py" for name in names}
    for path, _, package in files():
        kernels = f"{PACKAGE}.parallel.vocab_triton" in imported(path, package)
        assert not kernels or path.name == "dispatch.py", path


def test_training_and_launching_never_import_each_other():
    assert "launch" not in OURS["train"] and "train" not in OURS["launch"]
    users = {layer for layer, allowed in OURS.items() if {"train", "launch"} & allowed}
    assert users == {"cli"}


def test_unit_tests_need_torch_numpy_and_pytest_alone():
    light = {
        "torch",
        "numpy",
        "pytest",
        "tests",
        *(f"{PACKAGE}.{name}" for name in ("records", "algorithm", "parallel", "rollout", "rewards", "data")),
    }
    for path in sorted((ROOT / "tests" / "unit").glob("test_*.py")):
        for name in imported(path, "tests.unit"):
            known = name.split(".")[0] in sys.stdlib_module_names or name == PACKAGE
            assert known or within(name, light), f"{path.name} imports {name}"


def test_the_top_level_is_small_and_every_entry_has_its_wall():
    listed = subprocess.run(
        ["git", "ls-files", PACKAGE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    entries = {line.split("/")[1].removesuffix(".py") for line in listed.stdout.splitlines()}
    assert entries == set(OURS) and len(entries) <= 18


@pytest.mark.parametrize(
    ("layer", "source", "found"),
    [
        ("algorithm", "import torch\nimport math", []),
        ("algorithm", "from megatron_jackpot.algorithm.obrs import kappa", []),
        ("algorithm", "from .obrs import kappa", []),
        ("algorithm", "from megatron_jackpot.parallel import vocab", ["megatron_jackpot.parallel"] * 2),
        ("train", "from megatron_jackpot.launch import local", ["megatron_jackpot.launch"] * 2),
        ("launch", "import megatron_jackpot.train.run", ["megatron_jackpot.train.run"]),
        ("launch", "def f():\n    import torch", ["torch"]),
        ("servers", "import megatron_jackpot.sync.retry", ["megatron_jackpot.sync.retry"]),
        ("servers", "from megatron_jackpot.records import Prompt", ["megatron_jackpot.records"] * 2),
        ("servers", "import transformers", ["transformers"]),
        ("plan", "from megatron_jackpot.parallel.block_sizes import READ_ELEMENTS", []),
        ("plan", "import megatron_jackpot.parallel.linear", ["megatron_jackpot.parallel.linear"]),
        ("cli", "def f():\n    import torch", ["torch"]),
        ("models", "from megatron_jackpot.data import packing", ["megatron_jackpot.data"] * 2),
        ("algorithm", "from .. import config", ["megatron_jackpot.config"]),
        ("algorithm", "from torch import distributed", ["torch.distributed"]),
        ("algorithm", "def f():\n    import numpy", ["numpy"]),
        ("config", "import torch", ["torch"]),
        (
            "models",
            "from megatron_jackpot.servers.protocol import Engine",
            ["megatron_jackpot.servers.protocol"] * 2,
        ),
        ("rollout", "from megatron_jackpot import models", ["megatron_jackpot.models"]),
        ("rollout", "import megatron.core", ["megatron.core"]),
        ("rollout", "import megatron_jackpot.records", []),
        ("parallel", "import megatron.core", ["megatron.core"]),
    ],
)
def test_the_rule_finds_what_it_should(tmp_path, layer, source, found):
    path = tmp_path / "module.py"
    path.write_text(source)
    names = [line.split(" import ")[1] for line in offences(path, layer, f"{PACKAGE}.{layer}")]
    assert len(names) == len(found)
    assert all(name.startswith(want) for name, want in zip(names, found, strict=True))
