"""What a device does not believe is told, kept over restarts, and proved to the others."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from p2pcollab.coordinator import Advert, Coordinator, CoordinatorSettings
from p2pcollab.daemon.events import EventLog
from p2pcollab.daemon.fetching import Fetcher
from p2pcollab.daemon.gossip import Gossip
from p2pcollab.daemon.intake import Intake
from p2pcollab.daemon.peer_ids import PeerIds
from p2pcollab.daemon.renewal import Renewal
from p2pcollab.daemon.session import Counters, Session
from p2pcollab.daemon.status import refused
from p2pcollab.daemon.store import RunStore, Store
from p2pcollab.holdings import Want
from p2pcollab.keys import Identity, RunKeys
from p2pcollab.ledger import Contribution
from p2pcollab.models import default_model
from p2pcollab.plans import Trial
from p2pcollab.run import InputSpec, RunSpec, Schedule, ShardId, TaskSpec
from p2pcollab.trust import GROSS_MAX, Verdict
from p2pcollab.wire import decode_contribution, encode_contribution, sign_contribution

SPEC = RunSpec(
    name="pets",
    classes=("cat", "dog"),
    tasks=(TaskSpec(id="t0", classes=(0,)), TaskSpec(id="t1", classes=(1,))),
    model=default_model("digits"),
    input=InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), augment="none"),
    schedule=Schedule(budget_samples=1000, lease_samples=100, batch_size=10, peak_lr=0.1),
    seed=7,
)
T0 = ShardId("t0")
ME, ALICE, EVE = (Identity.from_bytes(bytes([number]) * 32) for number in range(1, 4))


class Device:
    """A device's ledger, store and gossip, without a network."""

    def __init__(self, folder: Path) -> None:
        self.store = Store.open(folder)
        self.run: RunStore = self.store.create_run(SPEC.encode(), bytes(16))
        self.now = 0.0
        self.closed = False
        nothing = Advert(speed=1.0, class_counts=(0, 0), works=False)
        self.session = Session(
            spec=SPEC,
            run_id=SPEC.run_id,
            identity=ME,
            keys=RunKeys.derive(bytes(16)),
            store=self.run,
            coordinator=Coordinator(SPEC, ME.device, nothing, CoordinatorSettings(), random.Random(0)),
            transport=cast(Any, SimpleNamespace(follow=lambda _rotation, _retired: None)),
            trainer=cast(Any, None),
            events=EventLog(lambda: 0.0),
            counters=Counters(),
            clock=lambda: self.now,
        )
        board = SimpleNamespace(newest=list)
        renewal = Renewal(self.session, cast(Any, board), self.run.rotation, on_secret=lambda _secret: None)
        self.intake = Intake(self.session, renewal)
        peer_ids = PeerIds(self.session, cast(Any, board))
        self.gossip = Gossip(self.session, cast(Any, board), renewal, self.intake, peer_ids)
        self.fetcher = Fetcher(self.session, self.intake, peer_ids)
        self.intake.restore_proofs(self.run.meta().get("proofs"))
        self.intake.restore(self.run.load_contributions())

    def take(self, *contributions: Contribution) -> None:
        self.intake.take([encode_contribution(one) for one in contributions], ALICE.device)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        asyncio.run(self.gossip.observe(fresh=False))

    @property
    def believed(self) -> set[str]:
        return {entry.device for entry in self.session.coordinator.believed.of_shard(T0)}

    @property
    def reasons(self) -> list[str]:
        return [event.fields["reason"] for event in self.session.events.after(0) if event.kind == "refused"]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.run.close()
            self.store.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    one = Device(tmp_path / "state")
    yield one
    one.close()


def contribution(identity: Identity, generation: int = 1, **changes: Any) -> Contribution:
    wanted: dict[str, Any] = {
        "run_id": SPEC.run_id,
        "shard": T0,
        "generation": generation,
        "seen": {identity.device: 100 * generation},
        "lease_samples": 100,
        "stem_digest": "initial",
        "tensors_digest": f"{generation:02d}" * 32,
        "tensors_bytes": 1000,
        "loss": 0.5,
        "accuracy": 0.75,
    }
    return sign_contribution(identity, **(wanted | changes))


def test_claims_that_nobody_has_signed_are_shown_with_device_and_reason(device: Device) -> None:
    honest = contribution(ALICE)
    greedy = contribution(EVE, 2, seen={ALICE.device: 400, EVE.device: 100})
    device.take(honest, greedy)
    assert device.believed == {ALICE.device}
    assert device.reasons == []
    device.wait(100.0)
    (row,) = refused(device.session)
    assert row["device"] == EVE.device
    assert (row["shard"], row["label"]) == ("t0", "cat")
    assert "400 samples" in row["reason"] and "signed 100" in row["reason"]
    assert device.session.counters.refused == 1
    assert device.believed == {ALICE.device}


def test_a_device_that_tells_two_stories_is_shown_reported_to_others_and_remembered(
    device: Device, tmp_path: Path
) -> None:
    one, other = contribution(EVE), contribution(EVE, tensors_digest="ab" * 32)
    device.take(contribution(ALICE), one)
    assert device.believed == {ALICE.device, EVE.device}
    device.take(other)
    assert device.believed == {ALICE.device}
    assert device.session.coordinator.distrusts(EVE.device)
    # Whoever is told gets both, and needs nothing else to be convinced.
    assert [set(news) for news in device.intake.news.waiting] == [{one, other}]
    device.take(contribution(EVE, 2))
    assert device.believed == {ALICE.device}
    assert len(device.reasons) == 2
    assert all("same count" in reason or "two contributions" in reason for reason in device.reasons)
    device.close()
    again = Device(tmp_path / "state")
    assert again.session.coordinator.distrusts(EVE.device)
    assert again.believed == {ALICE.device}
    assert again.reasons == []
    again.close()


@pytest.mark.parametrize("newer", [False, True])
def test_two_stories_that_come_in_one_message_are_passed_on(device: Device, newer: bool) -> None:
    if newer:
        device.take(contribution(EVE, 3))
    device.take(contribution(EVE), contribution(EVE, tensors_digest="ab" * 32))
    assert device.session.coordinator.distrusts(EVE.device)
    assert len(device.intake.news.waiting) == 1


def test_an_accusation_is_told_without_waiting_for_a_lease(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = contribution(ME)
    # Of two leases, on two states of the stem.
    digests = {shard: hashlib.sha256(shard.encode()).hexdigest() for shard in SPEC.shards[1:]}
    lies = [
        contribution(EVE, shard=shard, stem_digest=digest, tensors_digest=digest)
        for shard, digest in digests.items()
    ]
    device.intake.enter([own])
    device.take(*lies)

    async def download(_want: Want) -> bytes:
        return b"lies"

    async def check(trials: list[Trial], _read: object) -> SimpleNamespace:
        found = [Verdict(reason="not finite", gross=True, malformed=True) for _ in trials]
        return SimpleNamespace(macs=0, found=found)

    monkeypatch.setattr(device.fetcher, "_download", download)
    monkeypatch.setattr(device.session, "trainer", SimpleNamespace(check=check))
    assert len(lies) == GROSS_MAX
    for lie in lies:
        want = Want(digest=lie.tensors_digest, size=4, shard=lie.shard, holders=(EVE.device,), needed=True)
        assert not asyncio.run(device.fetcher.fetch_one(want))
    now = device.session.coordinator.ledger.get(T0, ME.device)
    assert now is not None and now.distrusts == (EVE.device,)
    assert replace(now, distrusts=(), signature=own.signature) == own
    assert decode_contribution(encode_contribution(now), SPEC.run_id) == now
    assert encode_contribution(now) in device.run.load_contributions()


def test_damaged_proofs_accuse_nobody(device: Device) -> None:
    one, other = contribution(EVE), contribution(EVE, 2)
    pair = [encode_contribution(entry).hex() for entry in (one, other)]
    for kept in (None, 7, [7], [["zz", "zz"]], [pair], [[pair[0]]], [[pair[0], pair[0][:-2] + "00"]]):
        device.intake.restore_proofs(kept)
    assert not device.session.coordinator.distrusts(EVE.device)
