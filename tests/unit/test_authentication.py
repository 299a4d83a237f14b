"""Who does not know the run secret is not served, and who does is served once for each message."""

from __future__ import annotations

import pytest
from hostile_bytes import mutated, quick, refused
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.authentication import NONCE_BYTES, Authenticator, ReplayGuard, mac, verify_mac
from p2pcollab.errors import NotAuthorisedError, PeerError
from p2pcollab.keys import Identity, RunKeys

ALICE, BOB, EVE = (Identity.from_bytes(bytes([number]) * 32) for number in (1, 2, 3))
KEYS = RunKeys.derive(b"the run's secret")
STRANGER = RunKeys.derive(b"another secret!!")
NOW = 1_800_000_000.0


@quick
@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_macs_of_different_parts_differ_however_they_join(first: list[bytes], second: list[bytes]) -> None:
    assert (mac(KEYS, b"domain", *first) == mac(KEYS, b"domain", *second)) == (first == second)


def test_a_mac_depends_on_key_domain_and_boundaries() -> None:
    tag = mac(KEYS, b"domain", b"ab", b"c")
    assert verify_mac(KEYS, tag, b"domain", b"ab", b"c")
    assert not verify_mac(KEYS, tag, b"domain", b"a", b"bc")
    assert not verify_mac(KEYS, tag, b"domain", b"abc")
    assert not verify_mac(KEYS, tag, b"domaina", b"b", b"c")
    assert not verify_mac(STRANGER, tag, b"domain", b"ab", b"c")
    assert not verify_mac(KEYS, b"", b"domain", b"ab", b"c")


def pair() -> tuple[Authenticator, Authenticator]:
    """Alice's and Bob's ends."""
    return Authenticator(KEYS, ALICE.peer_id), Authenticator(KEYS, BOB.peer_id)


def nonce(number: int = 0) -> bytes:
    return number.to_bytes(NONCE_BYTES, "big")


@quick
@given(st.binary(max_size=100), st.binary(max_size=100), st.binary(min_size=16, max_size=16))
def test_request_and_response_round_trip(question: bytes, answer: bytes, fresh: bytes) -> None:
    alice, bob = pair()
    request = alice.seal_request("exchange", question, BOB.peer_id, NOW, fresh)
    body, received = bob.open_request("exchange", request, ALICE.peer_id, NOW + 5)
    assert (body, received) == (question, fresh)
    response = bob.seal_response("exchange", answer, ALICE.peer_id, received)
    assert alice.open_response("exchange", response, BOB.peer_id, fresh) == answer


def test_a_stranger_without_the_secret_is_not_served() -> None:
    _, bob = pair()
    stranger = Authenticator(STRANGER, ALICE.peer_id)
    request = stranger.seal_request("exchange", b"?", BOB.peer_id, NOW, nonce())
    refused(NotAuthorisedError, lambda: bob.open_request("exchange", request, ALICE.peer_id, NOW))


def test_a_request_serves_no_other_method_sender_or_receiver() -> None:
    alice, bob = pair()
    eve = Authenticator(KEYS, EVE.peer_id)
    request = alice.seal_request("exchange", b"?", BOB.peer_id, NOW, nonce())
    refused(NotAuthorisedError, lambda: bob.open_request("push", request, ALICE.peer_id, NOW))
    refused(NotAuthorisedError, lambda: bob.open_request("exchange", request, EVE.peer_id, NOW))
    refused(NotAuthorisedError, lambda: eve.open_request("exchange", request, ALICE.peer_id, NOW))
    assert bob.open_request("exchange", request, ALICE.peer_id, NOW) == (b"?", nonce())


def test_a_request_is_served_once() -> None:
    alice, bob = pair()
    request = alice.seal_request("push", b"!", BOB.peer_id, NOW, nonce())
    bob.open_request("push", request, ALICE.peer_id, NOW)
    for later in (0.0, 1.0, limits.CLOCK_SKEW_S_MAX, limits.CLOCK_SKEW_S_MAX + 1, 1e6, -1.0):
        refused(
            NotAuthorisedError,
            lambda later=later: bob.open_request("push", request, ALICE.peer_id, NOW + later),
        )


@pytest.mark.parametrize("direction", [-1, 1])
def test_clocks_may_differ_by_the_window_and_no_more(direction: int) -> None:
    alice, bob = pair()
    near, far = (
        alice.seal_request("push", b"!", BOB.peer_id, NOW + direction * skew, nonce(number))
        for number, skew in enumerate((limits.CLOCK_SKEW_S_MAX, limits.CLOCK_SKEW_S_MAX + 1))
    )
    bob.open_request("push", near, ALICE.peer_id, NOW)
    with pytest.raises(NotAuthorisedError, match="clock"):
        bob.open_request("push", far, ALICE.peer_id, NOW)


def test_a_response_answers_only_its_own_request() -> None:
    alice, bob = pair()
    response = bob.seal_response("exchange", b"yes", ALICE.peer_id, nonce(1))
    refused(NotAuthorisedError, lambda: alice.open_response("exchange", response, BOB.peer_id, nonce(2)))
    refused(NotAuthorisedError, lambda: alice.open_response("fetch", response, BOB.peer_id, nonce(1)))
    refused(NotAuthorisedError, lambda: alice.open_response("exchange", response, EVE.peer_id, nonce(1)))
    refused(NotAuthorisedError, lambda: bob.open_response("exchange", response, BOB.peer_id, nonce(1)))
    assert alice.open_response("exchange", response, BOB.peer_id, nonce(1)) == b"yes"


def test_a_request_cannot_be_reflected_as_a_request_or_response() -> None:
    alice, _ = pair()
    request = alice.seal_request("exchange", b"?", BOB.peer_id, NOW, nonce())
    refused(NotAuthorisedError, lambda: alice.open_request("exchange", request, BOB.peer_id, NOW))
    refused(NotAuthorisedError, lambda: alice.open_response("exchange", request, BOB.peer_id, nonce()))


@quick
@given(data=st.data())
def test_any_bytes_as_authenticated_message_are_refused(data: st.DataObject) -> None:
    alice, bob = pair()
    request = alice.seal_request("exchange", b"?", BOB.peer_id, NOW, nonce())
    response = bob.seal_response("exchange", b"yes", ALICE.peer_id, nonce())
    allowed = (PeerError, NotAuthorisedError)
    bad_request = data.draw(st.binary(max_size=100) | mutated(request))
    bad_response = data.draw(st.binary(max_size=100) | mutated(response))
    refused(allowed, lambda: bob.open_request("exchange", bad_request, ALICE.peer_id, NOW))
    refused(allowed, lambda: alice.open_response("exchange", bad_response, BOB.peer_id, nonce()))


@pytest.mark.parametrize("size", [0, 1, 31, 55, limits.UNARY_BYTES_MAX + 57])
def test_messages_of_impossible_length_are_refused_before_the_mac_is_computed(size: int) -> None:
    alice, bob = pair()
    refused(PeerError, lambda: bob.open_request("push", bytes(size), ALICE.peer_id, NOW))
    if not 32 <= size <= limits.UNARY_BYTES_MAX + 32:
        refused(PeerError, lambda: alice.open_response("push", bytes(size), BOB.peer_id, nonce()))


def test_a_flood_lets_no_replay_through_and_locks_no_other_device_out() -> None:
    guard = ReplayGuard(nonces_max=50)
    now_ms = round(NOW * 1000)
    guard.admit("alice", nonce(), now_ms, NOW)
    guard.admit("eve", nonce(), now_ms, NOW)
    for number in range(1, 200):
        guard.admit("eve", nonce(number), now_ms + number, NOW)
    for number in range(200):
        refused(
            NotAuthorisedError,
            lambda number=number: guard.admit("eve", nonce(number), now_ms + number, NOW),
        )
    refused(NotAuthorisedError, lambda: guard.admit("alice", nonce(), now_ms, NOW))
    guard.admit("alice", nonce(1), now_ms - 1000, NOW)


def test_a_hundred_requests_may_overtake_each_other() -> None:
    guard = ReplayGuard()
    now_ms = round(NOW * 1000)
    for number in range(10_000):
        guard.admit("alice", nonce(number), now_ms + (number ^ 0x7F), NOW)


def test_invented_senders_are_bounded_and_make_room_when_they_fall_silent() -> None:
    guard = ReplayGuard(senders_max=3)
    for sender in ("one", "two", "three"):
        guard.admit(sender, nonce(), round(NOW * 1000), NOW)
    refused(NotAuthorisedError, lambda: guard.admit("four", nonce(), round(NOW * 1000), NOW))
    guard.admit("three", nonce(1), round(NOW * 1000) + 1000, NOW)
    later = NOW + limits.CLOCK_SKEW_S_MAX + 0.5
    guard.admit("four", nonce(), round(later * 1000), later)
    # Our clock is set back: what the forgotten senders sent is still no news.
    refused(NotAuthorisedError, lambda: guard.admit("one", nonce(), round(NOW * 1000), NOW))


@quick
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]), st.integers(0, 5), st.integers(0, 2_000), st.integers(0, 2_000)
        ),
        min_size=1,
        max_size=60,
    )
)
def test_no_replay_passes_whatever_the_clocks_do(steps: list[tuple[str, int, int, int]]) -> None:
    guard = ReplayGuard(senders_max=2, nonces_max=3, window_s=0.5)
    admitted: set[tuple[str, bytes, int]] = set()
    for sender, number, time_ms, now_ms in steps:
        attempt = (sender, nonce(number), time_ms)
        try:
            guard.admit(*attempt, now_ms / 1000)
        except NotAuthorisedError:
            continue
        assert attempt not in admitted
        admitted.add(attempt)
