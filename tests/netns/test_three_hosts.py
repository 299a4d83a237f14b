"""Three hosts in namespaces: two are cut off from the third for 30 s while training goes on, then healed."""

from __future__ import annotations

import secrets
import threading
import time
from pathlib import Path

import pytest
from lab import Lab, why_not

from p2pcollab.daemon.fleet import Fleet, LocalDevice, wait_until
from p2pcollab.data import inspect
from p2pcollab.planning import PlanOptions, plan_run

CUT_S = 30.0
HEAL_WITHIN_S = 10.0
#: Long enough that training outlasts the cut, on a fast machine too.
EPOCHS = 4000

Seen = dict[tuple[str, str], int]

pytestmark = pytest.mark.netns


@pytest.fixture
def lab() -> object:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Lab(3) as lab:
        yield lab


def seen(device: LocalDevice) -> Seen:
    status = device.status()
    assert status is not None, f"{device.name} does not answer"
    return {
        (row["shard"], author): samples
        for row in status["shards"]
        for author, samples in row["samples_by"].items()
    }


def join(*ledgers: Seen) -> Seen:
    return {key: max(ledger.get(key, 0) for ledger in ledgers) for key in set().union(*ledgers)}


def holds(ledger: Seen, everything: Seen) -> bool:
    return all(ledger.get(key, 0) >= samples for key, samples in everything.items())


def peers(device: LocalDevice) -> int:
    status = device.status()
    return sum(peer["state"] != "left" for peer in status["peers"]) if status else 0


def trained(device: LocalDevice) -> int:
    return sum(seen(device).values())


def test_ledgers_are_equal_soon_after_a_partition_heals_and_nothing_is_lost(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = inspect("digits", None)
    spec = plan_run("netns", info, PlanOptions(epochs=EPOCHS, expected_samples=info.train_images, seed=1))
    with Fleet() as fleet:
        for number, host in enumerate(lab.hosts, start=1):
            device = fleet.add(
                host.namespace,
                tmp_path / str(number),
                prefix=host.prefix,
                interface=host.address,
                data="digits",
                share=f"{number}/3",
                threads=1,
            )
            del device
        first, second, third = fleet.devices
        first.start(mode="new", spec=spec.encode().decode(), secret_hex=secrets.token_hex(16))
        status = first.status()
        assert status is not None
        for device in (second, third):
            device.start(mode="join", code=status["run"]["join_code"])
        wait_until(
            lambda: all(peers(device) == 2 and trained(device) for device in fleet.devices),
            timeout_s=60,
            what="three hosts to see each other and train",
        )

        at_cut = {device.name: trained(device) for device in fleet.devices}
        lab.cut(lab.hosts[2])
        # The length of the cut is what is tested, not a wait for something to have happened.
        threading.Event().wait(CUT_S)
        before_heal = [seen(device) for device in fleet.devices]
        for device in fleet.devices:
            assert trained(device) > at_cut[device.name], f"{device.name} stopped training while cut off"
        third_alone = {key: n for key, n in before_heal[2].items() if before_heal[0].get(key, 0) < n}
        assert third_alone, "the cut did not separate the hosts"

        lab.heal(lab.hosts[2])
        healed = time.monotonic()
        everything = join(*before_heal)
        wait_until(
            lambda: all(holds(seen(device), everything) for device in fleet.devices),
            timeout_s=60,
            what="every ledger to hold all that either side made",
        )
        seconds = time.monotonic() - healed
        with capsys.disabled():
            print(f"\nall ledgers equal on everything made before healing after {seconds:.1f} s")
        assert seconds <= HEAL_WITHIN_S
