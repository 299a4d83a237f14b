"""Identities, run keys and board records: for the run's devices only, and only where they were put."""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hostile_bytes import BOMBS, mutated, mutated_map, only_raises, pack, quick, refused, values
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.errors import PeerError, RunError, StorageError, UsageError
from p2pcollab.keys import Identity, RunKeys, device_id, device_of_peer, peer_id, public_key_of_peer
from p2pcollab.records import BOARD_DEVICES, DeviceRecord, open_record, seal_record
from p2pcollab.run import DeviceId, RunId

RUN, OTHER_RUN = RunId("ab" * 32), RunId("cd" * 32)
ALICE, EVE = Identity.from_bytes(bytes(range(32))), Identity.from_bytes(bytes(32))
KEYS = RunKeys.derive(b"the run's secret")


def record(identity: Identity = ALICE, **changes: Any) -> DeviceRecord:
    """A plausible record."""
    wanted: dict[str, Any] = {
        "run_id": RUN,
        "device": identity.device,
        "name": "küchen-pi",
        "beat": 17,
        "state": "training",
        "speed": 2.5e9,
        "budget": 0.5,
        "class_counts": (10, 0, 300),
        "prefer": ("t1",),
        "leases": ("t0", "t1"),
        "lease_sequence": 4,
        "progress": (("stem", 2, 512), ("t0", 1, 128)),
        "addresses": ("/ip4/192.168.1.7/tcp/31337/p2p/" + identity.peer_id,),
        "versions": "p2pcollab 0.1.0",
    }
    return DeviceRecord(**(wanted | changes))


SEALED = seal_record(KEYS, ALICE, record())


def sealed_by_an_insider(payload: bytes, *, signer: Identity = ALICE, key: bytes | None = None) -> bytes:
    """Any payload at all, sealed as documented for Alice's subkey: the format's second implementation."""
    nonce = os.urandom(12)
    content = (key or signer.public_key) + signer.sign(b"p2pcollab/record/1" + payload) + payload
    bound_to = b"p2pcollab/record/1" + pack([RUN, BOARD_DEVICES, ALICE.device])
    return nonce + ChaCha20Poly1305(KEYS.seal_key).encrypt(nonce, content, bound_to)


# Identities and keys


def test_peer_id_is_the_one_that_libp2p_gives_the_key() -> None:
    # Read off a p2pd that was started with this identity file.
    assert ALICE.peer_id == "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB"
    assert ALICE.libp2p_private_key == b"\x08\x01\x12\x40" + ALICE.seed + ALICE.public_key


@quick
@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_tells_the_device(public_key: bytes) -> None:
    assert public_key_of_peer(peer_id(public_key)) == public_key
    assert device_of_peer(peer_id(public_key)) == device_id(public_key)
    assert device_id(public_key) == hashlib.sha256(public_key).hexdigest()[:32]


@quick
@given(
    st.text(max_size=70)
    | st.text("123456789ABCxyz", max_size=70)
    | mutated(ALICE.peer_id.encode()).map(lambda raw: raw.decode("latin-1"))
)
def test_any_text_as_peer_id_raises_only_peer_error(text: str) -> None:
    only_raises(PeerError, lambda: public_key_of_peer(text))


def test_a_peer_id_of_absurd_length_is_refused() -> None:
    refused(PeerError, lambda: public_key_of_peer("z" * 1_000_000))


def test_an_identity_comes_back_from_its_seed() -> None:
    created = Identity.create()
    assert Identity.from_bytes(created.seed) == created
    assert Identity.create() != created
    with pytest.raises(StorageError):
        Identity.from_bytes(created.seed[:-1])


def test_secrets_do_not_appear_in_reprs() -> None:
    text = repr(ALICE) + repr(KEYS)
    for secret in (ALICE.seed, KEYS.board_key, KEYS.seal_key, KEYS.auth_key):
        assert repr(secret) not in text
        assert secret.hex() not in text


def test_each_purpose_and_each_run_has_keys_of_its_own() -> None:
    others = RunKeys.derive(b"another secret!!")
    keys = {getattr(one, name) for one in (KEYS, others) for name in ("board_key", "seal_key", "auth_key")}
    assert len(keys) == 6
    assert RunKeys.derive(b"the run's secret") == KEYS
    assert KEYS.board_name("devices") != others.board_name("devices")
    assert KEYS.board_name("devices") != KEYS.board_name("device")
    with pytest.raises(UsageError):
        RunKeys.derive(b"short")


# Records


@quick
@given(
    name=st.sampled_from(["pi", "küchen-pi", "書斎", "x" * 64]),
    beat=st.integers(0, limits.COUNT_MAX),
    state=st.sampled_from(["training", "idle", "complete", "leaving", "left", "observer"]),
    speed=st.floats(0, 1e21),
    budget=st.floats(0, 1),
    class_counts=st.lists(st.integers(0, limits.COUNT_MAX), max_size=20).map(tuple),
    tasks=st.none() | st.just(()) | st.just(("t1", "t2")),
)
def test_record_round_trip(**changes: Any) -> None:
    sent = record(**changes)
    assert open_record(KEYS, seal_record(KEYS, ALICE, sent), RUN, ALICE.device) == sent


def test_a_record_of_a_large_run_fits_the_board() -> None:
    tasks = tuple(f"t{number}" for number in range(100))
    large = record(
        class_counts=(500,) * 1000,
        leases=tasks,
        progress=tuple((task, 100, 50_000) for task in ("stem", *tasks)),
        addresses=("/ip6/fe80::1/tcp/31337/p2p/" + ALICE.peer_id,) * limits.ADDRESSES_MAX,
    )
    assert len(seal_record(KEYS, ALICE, large)) <= limits.RECORD_BYTES_MAX


def test_a_record_that_the_board_would_lose_is_not_sealed() -> None:
    tasks = tuple(f"t{number}" for number in range(128))
    large = record(class_counts=(limits.COUNT_MAX,) * 1000, tasks=tasks, prefer=tasks, leases=tasks)
    with pytest.raises(RunError):
        seal_record(KEYS, ALICE, large)


def test_equal_records_are_sealed_differently() -> None:
    assert seal_record(KEYS, ALICE, record()) != SEALED


def test_who_does_not_know_the_secret_reads_nothing() -> None:
    refused(PeerError, lambda: open_record(RunKeys.derive(b"another secret!!"), SEALED, RUN, ALICE.device))
    for open_text in (b"training", "küchen-pi".encode(), ALICE.device.encode(), ALICE.public_key, b"192.168"):
        assert open_text not in SEALED


def test_a_record_cannot_be_moved_to_another_subkey_or_run() -> None:
    refused(PeerError, lambda: open_record(KEYS, SEALED, RUN, EVE.device))
    refused(PeerError, lambda: open_record(KEYS, SEALED, OTHER_RUN, ALICE.device))
    assert open_record(KEYS, SEALED, RUN, ALICE.device) == record()


def test_an_insider_cannot_write_in_another_devices_name() -> None:
    payload = pack(record().model_dump())
    assert open_record(KEYS, sealed_by_an_insider(payload), RUN, ALICE.device) == record()
    for forged in (
        sealed_by_an_insider(payload, signer=EVE),
        sealed_by_an_insider(payload, signer=EVE, key=ALICE.public_key),
        sealed_by_an_insider(payload, signer=EVE, key=bytes(32)),
    ):
        refused(PeerError, lambda forged=forged: open_record(KEYS, forged, RUN, ALICE.device))


def test_a_device_cannot_sign_one_place_and_seal_for_another() -> None:
    for changes in ({"device": EVE.device}, {"run_id": OTHER_RUN}):
        payload = pack(record().model_dump() | changes)
        refused(
            PeerError,
            lambda payload=payload: open_record(KEYS, sealed_by_an_insider(payload), RUN, ALICE.device),
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"name": ""},
        {"name": "x" * 65},
        {"name": "pi\x1b[2J"},
        {"name": "pi\n"},
        {"name": "pi\x9b2J"},
        {"name": "pi\u202egnp"},
        {"state": "root"},
        {"beat": -1},
        {"beat": limits.COUNT_MAX + 1},
        {"beat": 1.0},
        {"beat": True},
        {"speed": math.inf},
        {"speed": math.nan},
        {"speed": -1.0},
        {"budget": 1.5},
        {"class_counts": [-1]},
        {"class_counts": [0] * 1001},
        {"leases": ["t0"] * 130},
        {"leases": ["../t0"]},
        {"progress": [["t0", 1]]},
        {"addresses": ["http://example.org"]},
        {"addresses": ["/ip4/10.0.0.1/tcp/1 \n"]},
        {"addresses": ["/x"] * (limits.ADDRESSES_MAX + 1)},
        {"versions": "\x1b"},
        {"surprise": 1},
    ],
)
def test_an_insiders_malformed_record_is_refused(changes: dict[str, Any]) -> None:
    data = sealed_by_an_insider(pack(record().model_dump() | changes))
    refused(PeerError, lambda: open_record(KEYS, data, RUN, ALICE.device))


@quick
@given(mutated(SEALED))
def test_no_mutation_of_a_sealed_record_opens(data: bytes) -> None:
    refused(PeerError, lambda: open_record(KEYS, data, RUN, ALICE.device))


@quick
@given(st.binary(max_size=400) | st.sampled_from(BOMBS))
def test_any_bytes_on_the_board_raise_only_peer_error(data: bytes) -> None:
    refused(PeerError, lambda: open_record(KEYS, data, RUN, ALICE.device))


@quick
@given(st.text(max_size=40), st.text(max_size=70))
def test_any_subkey_and_run_id_raise_only_peer_error(subkey: str, run_id: str) -> None:
    refused(PeerError, lambda: open_record(KEYS, SEALED, RunId(run_id), DeviceId(subkey)))


@quick
@given(
    mutated(pack(record().model_dump()))
    | mutated_map(record().model_dump()).map(pack)
    | values.map(pack)
    | st.sampled_from([bomb for bomb in BOMBS if len(bomb) < limits.RECORD_BYTES_MAX])
)
def test_any_payload_of_an_insider_raises_only_peer_error(payload: bytes) -> None:
    only_raises(PeerError, lambda: open_record(KEYS, sealed_by_an_insider(payload), RUN, ALICE.device))
