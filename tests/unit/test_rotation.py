"""Rotation of the run secret: who gets the new one, who does not, and that everybody ends with the same."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.errors import P2PCollabError, PeerError, RunError, StorageError, UsageError
from p2pcollab.keys import Identity
from p2pcollab.rotation import (
    Notice,
    RotationState,
    Verdict,
    adopt,
    decode_state,
    encode_state,
    forget,
    judge,
    left_out,
    x25519_public_key,
)
from p2pcollab.run import DeviceId, RunId

RUN = RunId("5e" * 32)
FIRST = bytes(range(16))
DEVICES = tuple(Identity.from_bytes(hashlib.sha256(bytes([n])).digest()) for n in range(6))
ALICE, BOB, CAROL, DAVE, EVE, MALLORY = DEVICES[:6]


def fresh(devices: Iterable[Identity] = DEVICES) -> RotationState:
    return RotationState(run_id=RUN, secret=FIRST).with_members(device.public_key for device in devices)


def rotate(
    state: RotationState, author: Identity, *targets: Identity, rng: random.Random | None = None
) -> tuple[Notice, RotationState]:
    rng = rng or random.Random(repr((state.epoch, author.device, targets)))
    secret = rng.randbytes(16)
    notice = forget(
        state, author, [target.device for target in targets], secret=secret, ephemeral_seed=rng.randbytes(32)
    )
    # As it travels.
    notice = Notice.decode(notice.encode(), RUN)
    return notice, adopt(state, notice, secret)


def hear(
    state: RotationState, notice: Notice, own: Identity, relay: DeviceId | None
) -> tuple[Verdict, RotationState]:
    verdict, secret = judge(state, notice, own, relay)
    return verdict, adopt(state, notice, secret) if verdict is Verdict.ADOPT else state


def test_everybody_but_the_forgotten_one_gets_the_same_new_secret() -> None:
    notice, mine = rotate(fresh(), ALICE, MALLORY)
    assert mine.secret != FIRST
    assert mine.retired == (FIRST,)
    for device in DEVICES:
        verdict, state = hear(fresh(), notice, device, ALICE.device)
        if device is MALLORY:
            assert verdict is Verdict.SHUT_OUT
            assert state.secret == FIRST
        else:
            assert verdict is Verdict.ADOPT
            assert (state.secret, state.epoch, state.forgotten) == (mine.secret, 1, {MALLORY.device})
            assert not state.is_member(MALLORY.device)
            assert state.is_member(EVE.device)


def test_the_forgotten_device_finds_no_box_it_can_open_even_if_it_tries_everybodys() -> None:
    notice, mine = rotate(fresh(), ALICE, MALLORY)
    assert notice.open(MALLORY) is None
    assert MALLORY.public_key not in notice.encode()
    assert mine.secret not in notice.encode()
    for key, box in notice.boxes:
        stolen = notice.model_copy(
            update={
                "boxes": tuple(
                    sorted([(MALLORY.public_key, box), *((k, b) for k, b in notice.boxes if k != key)])
                )
            }
        )
        with pytest.raises(PeerError):
            stolen.open(MALLORY)


def test_a_notice_cannot_be_made_in_anothers_name_or_changed() -> None:
    notice, _ = rotate(fresh(), ALICE, MALLORY)
    rng = random.Random(1)
    forged = notice.model_copy(update={"signature": MALLORY.sign(notice.payload())})
    with pytest.raises(PeerError):
        Notice.decode(forged.encode(), RUN)
    data = notice.encode()
    for _ in range(300):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        with pytest.raises(PeerError):
            Notice.decode(bytes(changed), RUN)
    with pytest.raises(PeerError):
        Notice.decode(data, RunId("ab" * 32))


@pytest.mark.parametrize(
    "changes",
    [
        {"boxes": ()},
        {"forgotten": ()},
        {"forgotten": (ALICE.device,)},
        {"forgotten": (BOB.device, MALLORY.device)},
        {"epoch": 0},
        {"epoch": limits.COUNT_MAX + 1},
    ],
)
def test_a_signed_notice_that_contradicts_itself_is_refused(changes: dict[str, object]) -> None:
    notice, _ = rotate(fresh(), ALICE, MALLORY)
    unsigned = notice.model_copy(update=changes)
    signed = unsigned.model_copy(update={"signature": ALICE.sign(unsigned.payload())})
    with pytest.raises(PeerError):
        Notice.decode(signed.encode(), RUN)


def test_whom_a_device_has_forgotten_it_never_believes_again_however_high_the_epoch() -> None:
    """Mallory, shut out, answers with notices of its own; an innocent device that was away hands them on."""
    notice, _ = rotate(fresh(), ALICE, MALLORY)
    _, bob = hear(fresh(), notice, BOB, ALICE.device)
    revenge, state = rotate(fresh(), MALLORY, ALICE)
    for _ in range(5):
        assert hear(bob, revenge, BOB, CAROL.device) == (Verdict.IGNORE, bob)
        assert hear(bob, revenge, BOB, None) == (Verdict.IGNORE, bob)
        revenge, state = rotate(state, MALLORY, EVE)
    # Nor does it take others' notices from its hands.
    later, _ = rotate(bob, BOB, EVE)
    _, carol = hear(fresh(), notice, CAROL, ALICE.device)
    assert hear(carol, later, CAROL, MALLORY.device) == (Verdict.IGNORE, carol)


def test_a_strangers_notice_is_ignored_and_a_newcomers_is_believed_from_a_members_hands() -> None:
    newcomer = Identity.from_bytes(b"n" * 32)
    notice, _ = rotate(fresh((*DEVICES, newcomer)), newcomer, MALLORY)
    assert hear(fresh(), notice, BOB, newcomer.device)[0] is Verdict.IGNORE
    assert hear(fresh(), notice, BOB, CAROL.device)[0] is Verdict.ADOPT


def test_a_device_that_missed_many_rotations_follows_the_last_one() -> None:
    state = fresh()
    for target in (MALLORY, EVE, DAVE):
        notice, state = rotate(state, ALICE, target)
    verdict, carol = hear(fresh(), notice, CAROL, BOB.device)
    assert verdict is Verdict.ADOPT
    assert (carol.epoch, carol.secret) == (3, state.secret)
    assert carol.forgotten == {MALLORY.device, EVE.device, DAVE.device}
    assert hear(carol, notice, CAROL, BOB.device) == (Verdict.IGNORE, carol)


def test_an_epoch_far_ahead_is_ignored_so_that_there_is_always_a_next_one() -> None:
    state = fresh()
    notice, _ = rotate(state, ALICE, MALLORY)
    far = notice.model_copy(update={"epoch": limits.EPOCHS_AHEAD_MAX + 1})
    far = far.model_copy(update={"signature": ALICE.sign(far.payload())})
    assert hear(state, Notice.decode(far.encode(), RUN), BOB, ALICE.device)[0] is Verdict.IGNORE


def test_who_joins_with_the_new_code_takes_the_notice_that_has_no_box_for_it() -> None:
    notice, mine = rotate(fresh(), ALICE, MALLORY)
    newcomer = Identity.from_bytes(b"n" * 32)
    joined = RotationState(run_id=RUN, secret=mine.secret).with_members([newcomer.public_key])
    verdict, state = hear(joined, notice, newcomer, None)
    assert verdict is Verdict.ADOPT
    assert state.secret == mine.secret
    assert state.forgotten == {MALLORY.device}
    assert state.retired == ()
    # With another secret it is no better off than a stranger.
    guessed = RotationState(run_id=RUN, secret=bytes(16)).with_members([newcomer.public_key])
    assert hear(guessed, notice, newcomer, None) == (Verdict.IGNORE, guessed)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_simultaneous_notices_converge_in_any_order_and_shut_out_all_that_were_meant(
    data: st.DataObject,
) -> None:
    """A network in which every pair meets at last, in an order that hypothesis chooses."""
    authors = data.draw(st.lists(st.sampled_from((ALICE, BOB, CAROL)), min_size=1, max_size=3, unique=True))
    targets = {
        author.device: data.draw(st.sampled_from((DAVE, EVE, MALLORY)), label="target") for author in authors
    }
    rng = random.Random(data.draw(st.integers(0, 2**32), label="seed"))
    states = {device.device: fresh() for device in DEVICES}
    for author in authors:
        _, states[author.device] = rotate(states[author.device], author, targets[author.device], rng=rng)
    honest = [device for device in DEVICES if device not in targets.values()]

    def settle(own: Identity, notice: Notice | None, relay: DeviceId) -> None:
        if notice is None:
            return
        before = states[own.device]
        _, after = hear(before, notice, own, relay)
        states[own.device] = after
        again = left_out(before, after, own)
        if again:
            secret = rng.randbytes(16)
            made = forget(after, own, again, secret=secret, ephemeral_seed=rng.randbytes(32))
            states[own.device] = adopt(after, made, secret)

    pairs = list(itertools.permutations(honest, 2))
    for _ in range(5):
        for first, second in data.draw(st.permutations(pairs), label="meetings")[: len(pairs)]:
            settle(second, states[first.device].notice, first.device)
    ends = {(states[d.device].epoch, states[d.device].secret, states[d.device].forgotten) for d in honest}
    assert len(ends) == 1
    assert {target.device for target in targets.values()} == states[ALICE.device].forgotten


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=50, deadline=None)
def test_the_key_to_seal_to_is_that_of_the_devices_own_scalar(seed: bytes) -> None:
    scalar = X25519PrivateKey.from_private_bytes(hashlib.sha512(seed).digest()[:32])
    expected = scalar.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert x25519_public_key(Identity.from_bytes(seed).public_key) == expected


@pytest.mark.parametrize("y", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 1])
def test_keys_that_no_device_has_are_not_sealed_to(y: int) -> None:
    key = y.to_bytes(32, "little")
    with pytest.raises(ValueError, match="device"):
        x25519_public_key(key)
    notice, _ = rotate(fresh().with_members([key]), ALICE, MALLORY)
    assert key not in dict(notice.boxes)


def test_a_device_cannot_forget_itself_nor_a_run_more_devices_than_a_notice_holds() -> None:
    with pytest.raises(UsageError):
        rotate(fresh(), ALICE, ALICE)
    many = [DeviceId(f"{n:032x}") for n in range(limits.FORGOTTEN_MAX + 1)]
    with pytest.raises(RunError):
        forget(fresh(), ALICE, many, secret=bytes(16), ephemeral_seed=bytes(32))


def test_the_largest_notice_fits() -> None:
    state = fresh()
    members = [Identity.from_bytes(hashlib.sha256(b"%d" % n).digest()) for n in range(limits.DEVICES_MAX)]
    state = state.with_members(member.public_key for member in members)
    assert len(state.members) == limits.DEVICES_MAX
    many = [DeviceId(f"{n:032x}") for n in range(limits.FORGOTTEN_MAX)]
    notice = forget(state, ALICE, many, secret=bytes(16), ephemeral_seed=b"e" * 32)
    assert len(notice.encode()) <= limits.NOTICE_BYTES_MAX
    assert Notice.decode(notice.encode(), RUN) == notice


def test_the_state_survives_as_a_file_and_a_damaged_one_is_told_from_it() -> None:
    notice, state = rotate(fresh(), ALICE, MALLORY)
    kept = encode_state(state)
    again = decode_state(kept, RUN)
    assert (again.secret, again.notice, again.retired) == (state.secret, notice, (FIRST,))
    assert again.is_member(BOB.device)
    assert not again.is_member(MALLORY.device)
    for bad in (kept[:-1], b"", kept.replace(state.secret, bytes(16))):
        with pytest.raises(StorageError):
            decode_state(bad, RUN)
    typed = state.with_secret(b"t" * 16)
    assert decode_state(encode_state(typed), RUN).retired == (state.secret, FIRST)


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_notice_or_a_peers_fault(data: bytes) -> None:
    with pytest.raises(P2PCollabError) as caught:
        Notice.decode(data, RUN)
    assert isinstance(caught.value, PeerError)


def test_retired_secrets_and_members_are_bounded() -> None:
    state = fresh()
    for _ in range(2 * limits.RETIRED_SECRETS_MAX):
        _, state = rotate(state, ALICE, MALLORY)
    assert len(state.retired) == limits.RETIRED_SECRETS_MAX
    crowd = (hashlib.sha256(b"crowd%d" % n).digest() for n in range(2 * limits.DEVICES_MAX))
    assert len(state.with_members(crowd).members) == limits.DEVICES_MAX
