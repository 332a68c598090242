"""Fixtures that all tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings
from jobs import Pool, close_checkpointers
from keepers import forget

settings.register_profile("holdfast", deadline=None, print_blob=True)  # timing never decides a test
settings.load_profile("holdfast")


@pytest.fixture(scope="session", autouse=True)
def _ram() -> Iterator[None]:
    """A RAM tier of the session's own, in which nothing may be left at the end; lost workers are not waited for."""
    root = tempfile.mkdtemp(prefix="holdfast-tests-", dir="/dev/shm")
    os.environ["CKPT_RAM_DIR"] = root
    os.environ["CKPT_KEEPER_GRACE_S"] = "0"
    yield
    close_checkpointers()
    forget()
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """What a test leaves open is closed after it."""
    yield
    close_checkpointers()


@pytest.fixture(scope="session")
def pool(_ram: None) -> Iterator[Pool]:
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
