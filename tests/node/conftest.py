"""A state folder and a run in it, for the tests of the store and of its index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from store_examples import SECRET, SPEC

from p2pcollab.daemon.store import RunStore, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "state")
    yield opened
    opened.close()


@pytest.fixture
def run(store: Store) -> Iterator[RunStore]:
    opened = store.create_run(SPEC, SECRET)
    yield opened
    opened.close()
