"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from jobs import Pool

settings.register_profile("holdfast", deadline=None, print_blob=True)  # timing never decides a test
settings.load_profile("holdfast")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four ranks, shared by all tests of the session; see `jobs.Pool`."""
    ranks = Pool(4)
    yield ranks
    ranks.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`prove` tests run only when asked for by `-m prove`."""
    if "prove" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="the full-size proof: run `make prove`")
    for item in items:
        if item.get_closest_marker("prove"):
            item.add_marker(skip)
