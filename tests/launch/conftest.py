"""What the tests of starts share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all of them: each verdict on methods that it lacks costs an import of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JACKPOT_HOME", str(tmp_path_factory.mktemp("home")))
        yield
