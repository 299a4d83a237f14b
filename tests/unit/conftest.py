"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import status_samples as samples
from stub_daemon import StubDaemon


@pytest.fixture
def cli_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A state folder of the test's own, and nothing of the user's environment."""
    monkeypatch.setenv("P2PCOLLAB_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("P2PCOLLAB_CODE", "P2PCOLLAB_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    """A daemon in the default state folder, in the middle of a run."""
    with StubDaemon(tmp_path / "state", samples.status()) as stub:
        yield stub
