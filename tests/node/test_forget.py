"""A device is shut out of a run that trains: `p2pcollab forget`, with real processes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import digits_runs as runs
import pytest

from p2pcollab.daemon.api_client import ApiClient
from p2pcollab.daemon.fleet import Fleet, LocalDevice
from p2pcollab.errors import ExitCode, NotRunningError, UsageError


def ended(device: LocalDevice) -> dict[str, Any]:
    """How a daemon ended, by its last line."""
    assert device.launched is not None and device.launched.process.stdout is not None
    try:
        code = device.launched.process.wait(runs.DEADLINE_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{device.name} goes on")
    lines = device.launched.process.stdout.read().splitlines()
    return {**json.loads(lines[-1]), "code": code}


def stored_authors(device: LocalDevice) -> set[str]:
    """Who has a contribution in the ledger on a device's disk."""
    (path,) = device.state.glob("runs/*/ledger.sqlite")
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return {row[0] for row in connection.execute("SELECT device FROM contributions")}
    finally:
        connection.close()


def code_of(device: LocalDevice) -> str:
    return str((device.status() or {"run": {"join_code": ""}})["run"]["join_code"])


def peers_of(device: LocalDevice) -> set[str]:
    status = device.status()
    return (
        {peer["name"] for peer in status["peers"] if peer["state"] not in ("gone", "left")}
        if status
        else set()
    )


def trained(device: LocalDevice) -> int:
    return sum(row["samples"] for row in runs.status(device)["shards"])


def test_a_forgotten_device_is_out_the_others_go_on_and_one_that_was_away_follows(tmp_path: Path) -> None:
    with Fleet() as fleet:
        alice = runs.add_digits(fleet, "alice", tmp_path, "1/3")
        bob = runs.add_digits(fleet, "bob", tmp_path, "2/3")
        mallory = runs.add_digits(fleet, "mallory", tmp_path, "3/3")
        dave = fleet.add("dave", tmp_path / "dave")  # without data: it keeps and hands on
        old_code = runs.create(alice, runs.digits_spec("forget", epochs=4000))
        for device in (bob, mallory, dave):
            device.start(mode="join", code=old_code)
        runs.eventually(
            lambda: all(len(peers_of(device)) == 3 for device in fleet.devices), "four devices to meet"
        )
        runs.eventually(lambda: runs.contributed(mallory), "mallory to contribute")
        intruder = runs.device_id(mallory)
        runs.eventually(lambda: intruder in stored_authors(alice), "alice to hear of it")
        dave.leave()

        with ApiClient(alice.state) as client:
            for unknown in ("nobody", "alice"):
                with pytest.raises(UsageError):
                    client.forget(unknown)
            done = client.forget("mallory")
        new_code = done["join_code"]
        assert (done["device"], done["epoch"]) == (intruder, 1)
        assert new_code != old_code
        assert sorted(done["told"] + done["not_told"]) == ["bob", "dave"]
        assert "dave" in done["not_told"], "it is away"

        # Mallory hears that it is out, from a notice that is signed, and ends.
        end = ended(mallory)
        assert end["code"] == ExitCode.NOT_AUTHORISED, end
        assert "shut out of the run by alice" in end["what"]

        # The two that are left go on, with each other only, and drop nothing of their own.
        runs.eventually(lambda: code_of(bob) == new_code, "bob to go over")
        at = {device.name: trained(device) for device in (alice, bob)}
        runs.eventually(lambda: all(trained(d) > at[d.name] for d in (alice, bob)), "both to train on")
        runs.eventually(lambda: peers_of(alice) == {"bob"}, "alice to see bob alone")
        runs.eventually(lambda: peers_of(bob) == {"alice"}, "bob to see alice alone")
        for device in (alice, bob):
            rows = runs.status(device)["shards"]
            assert "mallory" not in {author for row in rows for author in row["authors"]}

        # Mallory tries again, and so does somebody whom it has given the old code.
        mallory.start(mode="resume", code=None)
        friend = fleet.add("friend", tmp_path / "friend").start(mode="join", code=old_code)
        before = stored_authors(mallory)
        assert ended(mallory)["code"] == ExitCode.NOT_AUTHORISED
        assert stored_authors(mallory) == before
        refused = ended(friend)
        assert refused["code"] == ExitCode.NOT_AUTHORISED, refused
        assert "the join code is another one now" in refused["what"]

        # Dave was away: whoever it meets first tells it. It remembers, and so does who was told before.
        dave.start(mode="resume", code=None)
        bob.leave()
        bob.start(mode="resume", code=None)
        runs.eventually(lambda: code_of(dave) == new_code, "dave to follow")
        runs.eventually(lambda: peers_of(alice) == {"bob", "dave"}, "alice to see bob and dave")
        assert code_of(bob) == new_code
        assert list(dave.state.glob("runs/*/rotation"))
        assert {"mallory", "friend"}.isdisjoint(peers_of(alice) | peers_of(bob) | peers_of(dave))


def test_without_a_daemon_nobody_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError), ApiClient(tmp_path) as client:
        client.forget("mallory")
