"""Addresses of peers: what is accepted, and what the address book remembers under a flood."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.daemon.addresses import AddressBook, PeerAddress
from p2pcollab.errors import PeerError, UsageError
from p2pcollab.keys import Identity

PEER = Identity.from_bytes(bytes(32)).peer_id
OTHER = Identity.from_bytes(bytes([1] * 32)).peer_id


def _at(host: str = "192.168.7.9", port: int = 4001, peer: str = PEER) -> PeerAddress:
    return PeerAddress.checked(peer, host, port)


@given(st.ip_addresses(v=4), st.integers(1, 65535))
def test_an_address_that_is_accepted_reads_back_the_same(host: object, port: int) -> None:
    try:
        address = PeerAddress.checked(PEER, str(host), port)
    except PeerError:
        return
    assert PeerAddress.parse(str(address)) == address
    assert PeerAddress.parse_option(f"{host}:{port}/{PEER}") == address
    assert PeerAddress.parse_option(str(address)) == address


@given(st.text(max_size=200))
def test_text_is_an_address_or_a_peer_error(text: str) -> None:
    with pytest.raises(PeerError):
        PeerAddress.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "192.168.7.9",
        "192.168.7.9:4001",
        f"192.168.7.9:0/{PEER}",
        f"192.168.7.999:4001/{PEER}",
        f"0.0.0.0:4001/{PEER}",
        f"224.0.0.1:4001/{PEER}",
        f"192.168.7.9:4001/{PEER[:-1]}",
        f"/ip4/192.168.7.9/udp/4001/p2p/{PEER}",
        f"/ip4/192.168.7.9/tcp/4001/p2p/{PEER}/p2p-circuit",
    ],
)
def test_what_a_person_mistypes_is_explained(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT/PEER-ID"):
        PeerAddress.parse_option(text)


def test_the_address_that_worked_comes_first() -> None:
    book = AddressBook([_at("192.168.7.9"), _at("192.168.7.10")])
    assert book.of(PEER) == (_at("192.168.7.10"), _at("192.168.7.9"))
    book.succeeded(_at("192.168.7.9"))
    assert book.of(PEER) == (_at("192.168.7.9"), _at("192.168.7.10"))


def test_announcements_do_not_push_out_what_worked() -> None:
    book = AddressBook([_at()])
    book.succeeded(_at())
    for port in range(1, 100):
        book.learn(_at(port=port))
    assert book.of(PEER)[0] == _at()
    assert len(book.of(PEER)) <= 4
    for number in range(2 * limits.ADDRESS_BOOK_PEERS_MAX):
        seed = number.to_bytes(32, "big")
        book.learn(_at(peer=Identity.from_bytes(seed).peer_id))
    assert len(book.all()) <= limits.ADDRESS_BOOK_PEERS_MAX + 4
    assert book.all()[0] == _at()


def test_who_does_not_answer_is_tried_less_often_and_at_once_when_something_new_is_known() -> None:
    book = AddressBook([_at()])
    tries, now = [], 0.0
    while now < 200:
        if PEER in book.due(now):
            tries.append(now)
            book.failed(PEER, now)
        now += 1.0
    pauses = [second - first for first, second in itertools.pairwise(tries)]
    assert pauses == sorted(pauses)
    assert pauses[0] == 5
    assert pauses[-1] == 20
    assert not book.learn(_at())
    assert book.due(now - 1) == ()
    assert book.learn(_at(port=4002))
    assert book.due(now - 1) == (PEER,)


def test_what_is_stored_is_what_was_known() -> None:
    book = AddressBook([_at(), _at(peer=OTHER)])
    book.succeeded(_at(peer=OTHER))
    assert book.all() == (_at(peer=OTHER), _at())
    assert set(AddressBook(book.all()).all()) == set(book.all())
