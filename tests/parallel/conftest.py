"""The models that the tests of layouts share."""

from pathlib import Path

import pytest

from tests.tiny import write_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny policy and its actor, to write into."""
    return write_models(tmp_path_factory.mktemp("models"))
