"""A device that loses its network notices it, and one whose address changes goes on at the new one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, why_not

from p2pcollab.daemon.fleet import Fleet, LocalDevice, wait_until
from p2pcollab.data import inspect
from p2pcollab.planning import PlanOptions, plan_run

pytestmark = pytest.mark.netns

DEADLINE_S = 120.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Lab(2) as lab:
        yield lab


def kinds(device: LocalDevice) -> list[str]:
    return [event["kind"] for event in device.ask(lambda client: client.events().events)]


def status(device: LocalDevice) -> dict[str, Any]:
    return device.status() or {"peers": [], "device": {"host": None}, "warnings": []}


def address_of(peer: str, viewer: LocalDevice) -> str | None:
    """Where a device sees another that is alive."""
    rows = [row for row in status(viewer)["peers"] if row["name"] == peer and row["state"] != "gone"]
    return rows[0]["address"].split(":")[0] if rows else None


def until(condition: Any, what: str) -> None:
    wait_until(lambda: bool(condition()), timeout_s=DEADLINE_S, what=what)


def test_device_notices_that_it_is_cut_off_and_follows_its_address(lab: Lab, tmp_path: Path) -> None:
    info = inspect("digits", None)
    spec = plan_run("moves", info, PlanOptions(epochs=1, expected_samples=info.train_images, seed=1))
    stays, moves = lab.hosts
    with Fleet() as fleet:
        # Without data: it is the network that is tried here, and training would only slow it down.
        first = fleet.add("stays", tmp_path / "1", prefix=stays.prefix, interface="eth0")
        second = fleet.add("moves", tmp_path / "2", prefix=moves.prefix, interface=None)
        first.start(mode="new", spec=spec.encode().decode(), secret_hex=secrets.token_hex(16))
        code = first.ask(lambda client: client.run_info()["join_code"])
        second.start(mode="join", code=code)
        until(lambda: address_of("moves", first) == moves.address, "the devices to meet")
        until(lambda: address_of("stays", second) == stays.address, "both of them to know")

        lab.cut(moves)
        until(lambda: "isolated" in kinds(second), "the cut to be noticed")
        assert [text for text in status(second)["warnings"] if "no other device" in text]
        lab.heal(moves)
        until(lambda: "rejoined" in kinds(second), "the device to be back")
        assert not [text for text in status(second)["warnings"] if "no other device" in text]

        pid = second.processes()["daemon"].pid
        lab.readdress(moves, "10.77.0.42")
        until(lambda: status(second)["device"]["host"] == "10.77.0.42", "the new address to be taken")
        until(lambda: address_of("moves", first) == "10.77.0.42", "the other to see it there")

        lab.plug_in(moves, "10.77.0.43", "eth1")
        lab.unplug(moves)
        until(lambda: address_of("moves", first) == "10.77.0.43", "the other to see it at a new interface")
        assert second.processes()["daemon"].pid == pid
        assert kinds(second).count("moved") == 2
        assert "p2pd-died" not in kinds(second)
