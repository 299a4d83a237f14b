"""A short scenario with real daemons in network namespaces; scripts/netns-lab plays the long ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from lab import Lab, remove_leftovers, why_not
from play import play
from scenario import load

pytestmark = pytest.mark.netns

SCENARIOS = Path(__file__).with_name("scenarios")


@pytest.fixture(autouse=True)
def needs_namespaces() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


def own_namespaces() -> list[str]:
    """Those of labs in this process: others' come and go."""
    return [name for name in namespaces() if name.startswith(f"p2pc-{os.getpid()}-")]


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith("p2pc-")]


def test_ledgers_are_equal_after_a_partition_heals_and_nothing_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with capsys.disabled():
        result = play(load(SCENARIOS / "short-cut.toml"))
    assert result.problems == []
    assert result.entries_seen > 0
    assert result.entries_lost == []
    assert result.digests_equal
    assert len(result.devices) == 3
    assert own_namespaces() == []


def test_what_a_killed_lab_has_left_is_removed_by_the_next_one() -> None:
    # Process ids end below 2**22.
    subprocess.run(["ip", "netns", "add", "p2pc-4194304-h1"], check=True)
    remove_leftovers()
    assert not [name for name in namespaces() if "4194304" in name]


def test_lab_that_is_interrupted_leaves_nothing() -> None:
    with pytest.raises(KeyboardInterrupt), Lab(2):
        assert len(own_namespaces()) == 3
        raise KeyboardInterrupt
    assert own_namespaces() == []
