"""Power cuts, rotten bytes, refusing disks: a state folder opens with all that it held, or says what is lost.

These try a part of the cases; `scripts/storage-faults` tries all.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import digits_runs as runs
import pytest
from recorded_disk import sqlite_library
from storage_life import RUN_ID, SECRET, SPEC
from storage_sweeps import Tally, flips, power_cuts, refusals

from p2pcollab.daemon.api_client import ApiClient
from p2pcollab.daemon.fleet import Fleet
from p2pcollab.daemon.store import Store
from p2pcollab.errors import StorageError

SEED = 20

recorded = pytest.mark.skipif(
    sqlite_library() is None, reason="this Python hides its SQLite, which cannot be recorded"
)
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root mounts a small disk"
)


def fine(tally: Tally) -> None:
    """No case went wrong, and the sweep was one."""
    assert not tally.problems, "\n".join(tally.problems[:5])
    assert tally.cases > 50


@recorded
def test_power_cut_at_any_operation_leaves_all_that_was_acknowledged() -> None:
    fine(power_cuts(SEED, 3, every=4, leaves=("nothing", "some", "some", "all")))


@recorded
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "killed"])
def test_flipped_byte_of_any_file_is_found_and_made_good_or_said(closed: bool) -> None:
    tally = flips(SEED, closed=closed, sample=12)
    fine(tally)
    assert tally.outcomes["refused clearly"] == 0, "one flipped byte must not stop a device"


@recorded
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_refusing_disk_is_told_once_and_loses_nothing(code: int) -> None:
    fine(refusals(SEED, 3, code, every=4))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no room on a disk; what to remove to make room again."""
    ballast = folder / "ballast"
    with pytest.raises(OSError, match="space"), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


@needs_root
def test_full_disk_stops_writing_but_neither_reading_nor_going_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "512k") as folder:
        store = Store.open(folder)
        run = store.create_run(SPEC, SECRET)
        digest = run.put_shard(b"stored")
        run.put_contribution("t0", "aa", b"stored")
        ballast = fill(folder)
        with pytest.raises(StorageError, match="disk is full") as shard_refused:
            run.put_shard(bytes(100_000))
        with pytest.raises(StorageError, match="disk is full") as index_refused:
            for number in range(100):
                run.put_contribution("t1", "aa", number.to_bytes(10_000, "big"))
        assert str(shard_refused.value) == str(index_refused.value), "a person should read one message"
        assert run.get_shard(digest) == b"stored"
        assert b"stored" in run.load_contributions()
        run.close()
        fill(folder)  # SQLite's log is gone
        again = store.open_run(RUN_ID)
        assert b"stored" in again.load_contributions()
        with pytest.raises(StorageError, match="disk is full"):
            again.set_meta({"options": {"data": "digits"}})
        again.close()
        ballast.unlink()
        again = store.open_run(RUN_ID)
        assert b"stored" in again.load_contributions()
        again.put_contribution("t1", "aa", b"goes on")
        assert b"goes on" in again.load_contributions()
        assert again.notices() == ()
        again.close()
        store.close()


@needs_root
def test_device_on_a_full_disk_says_so_once_keeps_what_it_trained_and_goes_on(tmp_path: Path) -> None:
    def full() -> list[str]:
        return [text for text in runs.status(one)["warnings"] if "disk is full" in text]

    with small_disk(tmp_path / "one", "8m") as folder, Fleet() as fleet:
        one = runs.add_digits(fleet, "one", tmp_path, "1/1")
        runs.create(one, runs.digits_spec("full", epochs=6))
        runs.eventually(lambda: runs.contributed(one), "a first contribution")
        ballast = fill(folder)
        before = runs.seen(one)
        runs.eventually(full, "the full disk to be noticed")
        runs.eventually(lambda: runs.status(one)["work"] is None, "the lease in progress to be trained")
        ballast.unlink()
        runs.complete(one)
        assert runs.lost(before, runs.seen(one)) == []
        assert not full()
        with ApiClient(one.state) as client:
            events = client.events().events
        told = [event for event in events if "disk is full" in event["text"]]
        assert len(told) == 1, told
        assert "lease-lost" not in [event["kind"] for event in events]
