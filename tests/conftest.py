"""What runs where: `full` tests only with --full, `gpu` tests only with a CUDA device."""

import pytest


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked full")
    if not pluginmanager.hasplugin("timeout"):
        # tests/unit runs with torch and pytest alone; the setting in pytest.ini must still be known.
        parser.addini("timeout", "time limit of a test in seconds; needs pytest-timeout")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [] if config.getoption("--full") else ["full"]
    if any(item.get_closest_marker("gpu") for item in items) and not _has_cuda():
        left_out.append("gpu")
    dropped = [item for item in items if any(item.get_closest_marker(mark) for mark in left_out)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
