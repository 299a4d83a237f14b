"""The index of a run on the disk: damage that is made good, an older version, a full disk, its history."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from pathlib import Path

import pytest
from store_examples import RUN_ID

from p2pcollab import limits
from p2pcollab.daemon.store import RunStore, Store
from p2pcollab.errors import StorageError

INDEX_0_1_0 = """
CREATE TABLE IF NOT EXISTS contributions (
    shard TEXT NOT NULL, device TEXT NOT NULL, encoded BLOB NOT NULL, PRIMARY KEY (shard, device)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL, fields TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS metrics (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, series TEXT NOT NULL, fields TEXT NOT NULL
);
"""


@pytest.mark.parametrize("damage", ["zeroed header", "garbage in the middle", "not a database"])
def test_corrupt_index_is_set_aside_and_rebuilt(store: Store, run: RunStore, damage: str) -> None:
    for number in range(200):
        run.put_contribution(f"t{number}", "aa", bytes(200) + str(number).encode())
    run.set_meta({"beat": 7})
    shard = run.put_shard(b"bytes")
    before = run.load_contributions()
    run.close()
    path = run.folder / "ledger.sqlite"
    data = bytearray(path.read_bytes())
    match damage:
        case "zeroed header":
            data[:100] = bytes(100)
        case "garbage in the middle":
            data[8192:16384] = random.Random(2).randbytes(8192)
        case _:
            data = bytearray(b"these are not the bytes" * 999)
    path.write_bytes(data)
    again = store.open_run(RUN_ID)
    (notice,) = again.notices()
    assert "corrupt" in notice
    assert again.notices() == ()
    assert again.load_contributions() == before
    assert again.get_shard(shard) == b"bytes"
    again.put_contribution("t0", "aa", b"goes on")
    assert b"goes on" in again.load_contributions()
    again.close()
    assert path.with_suffix(".corrupt").exists()


def test_index_that_becomes_corrupt_while_open_is_replaced(run: RunStore) -> None:
    for number in range(500):
        run.put_contribution(f"t{number}", "aa", random.Random(number).randbytes(500))
    before = run.load_contributions()
    run._index._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path = run.folder / "ledger.sqlite"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(3).randbytes(path.stat().st_size - 4096))
    run._index._connection.execute("PRAGMA shrink_memory")
    run.put_contribution("t0", "aa", b"after")
    assert run.notices()
    assert len(run.load_contributions()) == len(before)
    assert b"after" in run.load_contributions()


def rewrite_rows(path: Path, statement: str) -> None:
    """Change rows as a disk would: without their sums."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def test_rows_that_rot_are_made_good_from_their_copies(store: Store, run: RunStore) -> None:
    run.put_contributions([("t0", "aa", b"first"), ("t1", "aa", b"second")])
    run.set_meta({"options": {"data": "digits"}, "port": 4001})
    run.add_event(1, 1.0, "lease", "happened", {})
    run.add_metric(1.0, "t0", {"loss": 0.5})
    run.close()
    path = run.folder / "ledger.sqlite"
    for statement in (
        "UPDATE contributions SET encoded = x'00' WHERE shard = 't0'",
        "UPDATE contributions SET device = 'bb' WHERE shard = 't1'",
        """UPDATE meta SET value = '{"data": "digitz"}' WHERE key = 'options'""",
        "UPDATE meta SET value = '{' WHERE key = 'port'",
        "UPDATE events SET text = 'did not happen'",
        "UPDATE events SET text = CAST(x'ff' AS TEXT)",
        "UPDATE metrics SET fields = '{}'",
        "UPDATE contributions SET sequence = 'x'",
    ):
        rewrite_rows(path, statement)
        again = store.open_run(RUN_ID)
        assert again.load_contributions() == (b"first", b"second"), statement
        assert again.meta() == {"options": {"data": "digits"}, "port": 4001}, statement
        assert again.events() == [(1, 1.0, "lease", "happened", {})], statement
        assert again.metrics() == [(1, 1.0, "t0", {"loss": 0.5})], statement
        (notice,) = again.notices()
        assert "damaged" in notice and "restored" in notice
        again.close()


def test_history_that_rots_unread_is_made_good_before_the_index_is_copied(
    store: Store, run: RunStore
) -> None:
    run.add_metric(1.0, "t0", {"loss": 0.5})
    run.close()
    rewrite_rows(run.folder / "ledger.sqlite", "UPDATE metrics SET fields = '{}'")
    for _ in range(2):
        store.open_run(RUN_ID).close()
    (run.folder / "ledger.sqlite").write_bytes(b"nothing of the kind")
    again = store.open_run(RUN_ID)
    assert again.metrics() == [(1, 1.0, "t0", {"loss": 0.5})]
    again.close()


def test_what_nothing_else_holds_is_left_out_and_said(store: Store, run: RunStore) -> None:
    run.add_event(1, 1.0, "lease", "first", {})
    run.add_event(2, 2.0, "lease", "second", {})
    run.close()
    (run.folder / "ledger.previous").unlink()
    rewrite_rows(run.folder / "ledger.sqlite", "UPDATE events SET kind = 'peace' WHERE id = 1")
    again = store.open_run(RUN_ID)
    assert [event[0] for event in again.events()] == [2]
    (notice,) = again.notices()
    assert notice.startswith("1 events") and "0 were restored" in notice
    again.close()


def test_newer_contribution_in_the_copies_wins_over_the_previous_index(store: Store, run: RunStore) -> None:
    run.put_contribution("t0", "aa", b"older")
    run.close()
    again = store.open_run(RUN_ID)
    again.put_contribution("t0", "aa", b"newer")
    again._index._connection.close()
    (run.folder / "ledger.sqlite").write_bytes(b"nothing of the kind")
    last = store.open_run(RUN_ID)
    assert last.load_contributions() == (b"newer",)
    last.put_contribution("t0", "aa", b"newest")
    last.close()
    reopened = store.open_run(RUN_ID)
    assert reopened.load_contributions() == (b"newest",)
    reopened.close()


def test_index_of_version_0_1_0_is_taken_over(store: Store, run: RunStore) -> None:
    run.close()
    path = run.folder / "ledger.sqlite"
    path.unlink()
    (run.folder / "ledger.previous").unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(INDEX_0_1_0)
        connection.execute("INSERT INTO contributions VALUES ('t0', 'aa', x'6669727374')")
        connection.execute("INSERT INTO meta VALUES ('port', '4001')")
        connection.execute("INSERT INTO events VALUES (7, 1, 'lease', 'text', '{}')")
        connection.execute("INSERT INTO metrics VALUES (3, 2.5, 't0', '{\"loss\": 0.5}')")
    for _ in range(2):
        again = store.open_run(RUN_ID)
        assert again.load_contributions() == (b"first",)
        assert again.meta() == {"port": 4001}
        assert again.events() == [(7, 1.0, "lease", "text", {})]
        assert again.metrics() == [(3, 2.5, "t0", {"loss": 0.5})]
        assert again.notices() == ()
        again.close()


def test_full_disk_under_the_index_is_told_in_words(run: RunStore) -> None:
    run.put_contribution("t0", "aa", b"kept")
    pages = run._index._connection.execute("PRAGMA page_count").fetchone()[0]
    run._index._connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match="disk is full") as caught:
        run.put_contribution("t1", "aa", bytes(100_000))
    assert "nothing was lost" in caught.value.fix
    assert run.load_contributions() == (b"kept",)


def test_history_is_bounded(run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EVENTS_MAX", 50)
    monkeypatch.setattr(limits, "METRICS_MAX", 50)
    for id in range(1, 301):
        run.add_event(id, float(id), "lease", "text", {"shard": "t0"})
        run.add_metric(float(id), "t0", {"loss": 0.5})
    assert 50 <= len(run.events(1000)) <= 50 + 64
    assert run.events(2) == [
        (299, 299.0, "lease", "text", {"shard": "t0"}),
        (300, 300.0, "lease", "text", {"shard": "t0"}),
    ]
    assert 50 <= len(run.metrics()) <= 50 + 64
    assert run.metrics(after=299) == [(300, 300.0, "t0", {"loss": 0.5})]
