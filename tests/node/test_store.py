"""The state folder keeps what it says it keeps, through crashes, full disks and bytes that rot."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from store_examples import RUN_ID, SECRET, SPEC

from p2pcollab import files
from p2pcollab.daemon.store import RunStore, Store
from p2pcollab.errors import StorageError, UsageError
from p2pcollab.keys import Identity
from p2pcollab.rotation import RotationState, adopt, forget
from p2pcollab.run import RunId


def flipped(data: bytes, position: int) -> bytes:
    """The data with one bit of one byte flipped."""
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


def damage(path: Path) -> None:
    """Flip a bit of a file, and of its second copy."""
    for one in (path, path.with_name(path.name + ".copy")):
        one.write_bytes(flipped(one.read_bytes(), 3))


def in_another_process(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    )


def read_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 30.0)
    assert ready, "the process said nothing for 30 s"
    return process.stdout.readline()


def test_identity_is_created_once_and_readable_by_its_owner_only(store: Store) -> None:
    seed = store.identity_seed()
    assert len(seed) == 32
    assert store.identity_seed() == seed
    (store.folder / "identity.key").chmod(0o644)
    store.identity_seed()
    assert (store.folder / "identity.key").stat().st_mode & 0o777 == 0o600
    assert store.folder.stat().st_mode & 0o777 == 0o700


def test_damaged_identity_is_made_good_from_its_copy(store: Store, run: RunStore) -> None:
    seed = store.identity_seed()
    for name in ("identity.key", "identity.key.copy"):
        path = store.folder / name
        whole = path.read_bytes()
        path.write_bytes(flipped(whole, 5))
        assert store.identity_seed() == seed
        assert path.read_bytes() == whole
        (notice,) = run.notices()
        assert str(path) in notice


def test_identity_damaged_in_both_copies_is_refused_not_replaced(store: Store) -> None:
    store.identity_seed()
    for name in ("identity.key", "identity.key.copy"):
        path = store.folder / name
        path.write_bytes(flipped(path.read_bytes(), 5))
    with pytest.raises(StorageError, match="damaged") as caught:
        store.identity_seed()
    assert "copy" in caught.value.fix
    # Whoever takes that advice becomes a new device, whatever the second copy holds.
    (store.folder / "identity.key").unlink()
    assert len(store.identity_seed()) == 32


def test_files_of_version_0_1_0_are_read_and_written_anew(tmp_path: Path) -> None:
    seed = bytes(range(32))
    folder = tmp_path / "runs" / RUN_ID[:16]
    folder.mkdir(parents=True)
    for path, content in (
        (tmp_path / "identity.key", seed),
        (tmp_path / "current", RUN_ID.encode() + b"\n"),
        (folder / "spec.json", SPEC),
        (folder / "secret", SECRET),
    ):
        path.write_bytes(content)
    store = Store.open(tmp_path)
    for _ in range(2):
        assert store.identity_seed() == seed
        assert store.current == RUN_ID
        assert store.runs() == (RUN_ID,)
        run = store.open_run(RUN_ID)
        assert (run.spec, run.secret) == (SPEC, SECRET)
        assert run.notices() == ()
        run.close()
        (tmp_path / "identity.key").write_bytes(flipped((tmp_path / "identity.key").read_bytes(), 0))
        assert store.identity_seed() == seed
        store._notices.clear()
    store.close()


def test_second_daemon_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    holder = in_another_process(
        """
        import sys, pathlib
        from p2pcollab.daemon.store import Store
        store = Store.open(pathlib.Path(sys.argv[1]))
        print("open", flush=True)
        sys.stdin.read()
        """,
        str(tmp_path),
    )
    try:
        assert read_line(holder) == b"open\n"
        with pytest.raises(StorageError, match=f"process {holder.pid}") as caught:
            Store.open(tmp_path)
        assert "leave" in caught.value.fix
    finally:
        holder.kill()
        holder.communicate()
    Store.open(tmp_path).close()


def test_lock_ends_with_its_holder_even_if_a_process_it_started_lives_on(tmp_path: Path) -> None:
    holder = in_another_process(
        """
        import sys, pathlib, subprocess
        from p2pcollab.daemon.store import Store
        store = Store.open(pathlib.Path(sys.argv[1]))
        child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
        print(child.pid, flush=True)
        sys.stdin.read()
        """,
        str(tmp_path),
    )
    child = int(read_line(holder))
    holder.kill()
    holder.communicate()
    try:
        Store.open(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_run_is_found_again(store: Store, run: RunStore) -> None:
    assert store.runs() == (RUN_ID,)
    assert store.current is None
    store.current = RUN_ID
    assert store.current == RUN_ID
    again = store.open_run(RUN_ID)
    assert (again.spec, again.secret) == (SPEC, SECRET)
    again.close()
    assert (run.folder / "secret").stat().st_mode & 0o777 == 0o600
    store.current = None
    assert store.current is None


def test_unknown_run_is_the_callers_mistake_and_a_damaged_one_the_disks(store: Store, run: RunStore) -> None:
    with pytest.raises(UsageError, match="knows no run"):
        store.open_run(RunId("0" * 64))
    damage(run.folder / "spec.json")
    with pytest.raises(StorageError, match="damaged") as caught:
        store.open_run(RUN_ID)
    assert "join code" in caught.value.fix


def test_joining_again_makes_a_damaged_run_good_and_loses_nothing_of_it(store: Store, run: RunStore) -> None:
    digest = run.put_shard(b"trained before")
    run.put_contribution("t0", "aa", b"made before")
    run.close()
    for name in ("spec.json", "secret"):
        damage(run.folder / name)
    assert store.runs() == ()
    again = store.create_run(SPEC, SECRET)
    assert (again.spec, again.secret) == (SPEC, SECRET)
    assert again.load_contributions() == (b"made before",)
    assert again.get_shard(digest) == b"trained before"
    again.close()
    damage(run.folder / "secret")
    with pytest.raises(StorageError, match="secret"):
        store.open_run(RUN_ID)
    again = store.open_run(RUN_ID, SECRET)
    assert again.secret == SECRET
    again.close()


def test_lost_word_on_the_current_run_is_an_error_not_another_run(store: Store, run: RunStore) -> None:
    store.current = RUN_ID
    path = store.folder / "current"
    path.write_bytes(flipped(path.read_bytes(), 3))
    assert store.current == RUN_ID
    damage(path)
    with pytest.raises(StorageError, match="damaged") as caught:
        _ = store.current
    assert "join code" in caught.value.fix
    store.current = RUN_ID
    assert store.current == RUN_ID


def test_leftovers_of_a_killed_daemon_are_removed(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    run = store.create_run(SPEC, SECRET)
    run.close()
    store.close()
    leftovers = [folder / ".something.12ab.tmp" for folder in (tmp_path, run.folder, run.folder / "headers")]
    for path in leftovers:
        path.write_bytes(b"half")
    Store.open(tmp_path).close()
    assert not any(path.exists() for path in leftovers)


def test_newest_contribution_replaces_the_one_before_it(store: Store, run: RunStore) -> None:
    run.put_contribution("t0", "aa", b"first")
    run.put_contributions([("t0", "aa", b"second"), ("stem", "bb", b"third")])
    assert run.load_contributions() == (b"third", b"second")
    run.close()
    again = store.open_run(RUN_ID)
    assert again.load_contributions() == (b"third", b"second")
    again.close()


def test_shard_comes_back_bit_for_bit(store: Store, run: RunStore) -> None:
    data = random.Random(1).randbytes(100_000)
    digest = run.put_shard(data)
    assert digest == hashlib.sha256(data).hexdigest()
    assert run.put_shard(data) == digest
    again = store.open_run(RUN_ID)
    assert again.digests() == {digest}
    assert again.get_shard(digest) == data
    assert again.get_shard("0" * 64) is None
    again.close()


def test_rotten_shard_is_set_aside_and_missing(store: Store, run: RunStore) -> None:
    digest = run.put_shard(b"good bytes")
    path = run.folder / "shards" / digest[:2] / f"{digest}.safetensors"
    path.write_bytes(b"Good bytes")
    assert run.get_shard(digest) is None
    assert not run.has(digest)
    assert path.with_suffix(".corrupt").read_bytes() == b"Good bytes"
    assert run.put_shard(b"good bytes") == digest
    assert run.get_shard(digest) == b"good bytes"


def test_shard_on_a_bad_sector_is_told_and_missing(run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = run.put_shard(b"good bytes")

    def refuse(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as failing:
        failing.setattr(Path, "read_bytes", refuse)
        with pytest.raises(StorageError, match="disk reports an error"):
            run.get_shard(digest)
    assert not run.has(digest)
    assert run.put_shard(b"good bytes") == digest
    assert run.get_shard(digest) == b"good bytes"


def test_garbage_collection_removes_what_it_is_told_to(run: RunStore) -> None:
    keep, drop = run.put_shard(b"keep"), run.put_shard(b"drop it")
    garbage = run.digests() - {keep}
    written_since = run.put_shard(b"what a contribution is about to name")
    assert run.collect_garbage(garbage) == len(b"drop it")
    assert run.digests() == {keep, written_since}
    assert run.get_shard(keep) == b"keep"
    assert run.get_shard(drop) is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failed_fsync_is_fatal_to_that_write_and_to_nothing_else(
    run: RunStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    held = run.put_shard(b"held")
    with monkeypatch.context() as failing:

        def refuse(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        failing.setattr(files.os, "fsync", refuse)
        with pytest.raises(StorageError) as caught:
            run.put_shard(b"lost")
        assert caught.value.fix
    assert run.digests() == {held}
    assert not [path for path in run.folder.glob("shards/??/*") if held not in path.name]
    assert run.get_shard(run.put_shard(b"lost")) == b"lost"


def test_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(StorageError, match="disk reports an error"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_meta_survives_the_process(store: Store, run: RunStore) -> None:
    run.set_meta({"beat": 3, "addresses": ["a", "b"], "budget": 0.5})
    run.set_meta({"beat": 4}, durable=False)
    again = store.open_run(RUN_ID)
    assert again.meta() == {"beat": 4, "addresses": ["a", "b"], "budget": 0.5}
    again.close()


def test_threads_share_a_store(run: RunStore) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(20):
                data = f"{number} {step}".encode()
                digest = run.put_shard(data)
                run.put_contribution(f"t{number}", "aa", digest.encode())
                assert run.get_shard(digest) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(run.digests()) == 80
    assert len(run.load_contributions()) == 4


WRITER = """
import hashlib, pathlib, random, sys
from p2pcollab.daemon.store import Store
store = Store.open(pathlib.Path(sys.argv[1]))
run = store.create_run(sys.argv[2].encode(), bytes(16))
rng = random.Random(int(sys.argv[3]))
print("ready", flush=True)
for number in range(10**9):
    digest = run.put_shard(rng.randbytes(rng.randrange(1, 60_000)))
    shard = f"t{rng.randrange(5)}"
    run.put_contribution(shard, "aa", f"{shard} {digest}".encode())
    run.add_event(number, 0.0, "lease", "text", {})
    print(shard, digest, flush=True)
"""


def test_process_killed_at_any_moment_loses_at_most_the_lease_in_progress(tmp_path: Path) -> None:
    seed = 11
    rng = random.Random(seed)
    before: dict[str, str] = {}
    for attempt in range(6):
        process = in_another_process(WRITER, str(tmp_path), SPEC.decode(), str(seed + attempt))
        assert read_line(process) == b"ready\n"
        lines = [read_line(process) for _ in range(rng.randrange(1, 40))]
        process.kill()
        lines += process.communicate()[0].splitlines(keepends=True)
        reported = before | dict(line.decode().split() for line in lines if line.endswith(b"\n"))

        store = Store.open(tmp_path)
        run = store.open_run(RUN_ID)
        stored = dict(entry.decode().split() for entry in run.load_contributions())
        assert run.notices() == (), f"seed {seed}, attempt {attempt}: the index is corrupt"
        for digest in stored.values():
            assert run.get_shard(digest) is not None, f"seed {seed}, attempt {attempt}: no shard {digest}"
        # One more may have been committed than was reported, never one less.
        assert len(stored.items() - reported.items()) <= 1, f"seed {seed}, attempt {attempt}"
        assert stored.keys() >= reported.keys(), f"seed {seed}, attempt {attempt}"
        assert not list(run.folder.glob("shards/??/.*.tmp"))
        run.close()
        store.close()
        before = stored


def _rotated() -> RotationState:
    """The run after a device was shut out."""
    own, other = Identity.from_bytes(b"1" * 32), Identity.from_bytes(b"2" * 32)
    before = RotationState(run_id=RUN_ID, secret=SECRET).with_members([own.public_key, other.public_key])
    notice = forget(before, own, [other.device], secret=b"the next secret!", ephemeral_seed=b"e" * 32)
    return adopt(before, notice, b"the next secret!")


def test_a_new_run_secret_outlives_restarts_and_the_damage_of_one_copy(store: Store, run: RunStore) -> None:
    state = _rotated()
    run.keep_rotation(state)
    run.close()
    path = run.folder / "rotation"
    assert path.stat().st_mode & 0o777 == 0o600
    for damaged in (None, path, path.with_name("rotation.copy")):
        if damaged is not None:
            damaged.write_bytes(flipped(damaged.read_bytes(), 3))
        again = store.open_run(RUN_ID)
        assert (again.secret, again.rotation.notice) == (state.secret, state.notice)
        assert again.rotation.retired == (SECRET,)
        again.close()


def test_a_run_secret_that_is_damaged_in_both_copies_is_refused_until_the_code_is_given(
    store: Store, run: RunStore
) -> None:
    run.keep_rotation(_rotated())
    run.close()
    damage(run.folder / "rotation")
    with pytest.raises(StorageError, match="join the run again with its join code"):
        store.open_run(RUN_ID)
    again = store.open_run(RUN_ID, b"the next secret!")
    # The first one; the code that was given takes its place as soon as a device of the run accepts it.
    assert again.secret == SECRET
    again.try_secret(b"the next secret!")
    assert again.secret == b"the next secret!"
    again.close()
    with pytest.raises(StorageError):
        store.open_run(RUN_ID)
