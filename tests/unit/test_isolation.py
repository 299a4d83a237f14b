"""When a device is isolated, and where it looks for others then."""

from __future__ import annotations

from p2pcollab.daemon.interfaces import Interface
from p2pcollab.daemon.network_watch import another_interface, moved_address
from p2pcollab.isolation import ISOLATED_AFTER_S, Change, Isolation
from p2pcollab.run import DeviceId

A, B = DeviceId("aa" * 16), DeviceId("bb" * 16)
NOBODY: frozenset[DeviceId] = frozenset()
LATER = ISOLATED_AFTER_S + 1


def after(*observations: tuple[set[DeviceId], set[DeviceId], float]) -> list[Change | None]:
    isolation = Isolation()
    return [isolation.observe(live, left, now) for live, left, now in observations]


def test_device_that_was_never_with_others_is_not_isolated() -> None:
    assert after((set(), set(), 0), (set(), set(), 1000)) == [None, None]


def test_device_whose_company_falls_silent_is_isolated_after_a_while_and_says_so_once() -> None:
    assert after(
        ({A, B}, set(), 0), (set(), set(), 5), (set(), set(), 5 + ISOLATED_AFTER_S), (set(), set(), 99)
    ) == [None, None, Change.ISOLATED, None]


def test_one_device_is_company_enough() -> None:
    assert after(({A, B}, set(), 0), ({B}, set(), LATER), ({B}, set(), 2 * LATER)) == [None, None, None]


def test_company_that_has_left_is_not_looked_for() -> None:
    assert after(({A, B}, set(), 0), (set(), {A, B}, 1), (set(), {A, B}, LATER + 1)) == [None, None, None]


def test_company_of_which_one_has_left_and_one_is_silent_is_looked_for() -> None:
    assert after(({A, B}, set(), 0), (set(), {A}, 1), (set(), {A}, LATER + 1))[-1] is Change.ISOLATED


def test_rejoined_is_said_once_and_isolation_starts_anew() -> None:
    changes = after(
        ({A}, set(), 0),
        (set(), set(), 1),
        (set(), set(), 1 + LATER),
        ({B}, set(), 50),
        ({B}, set(), 51),
        (set(), set(), 52),
        (set(), set(), 52 + ISOLATED_AFTER_S / 2),
        (set(), set(), 52 + LATER),
    )
    assert changes == [None, None, Change.ISOLATED, Change.REJOINED, None, None, None, Change.ISOLATED]


def test_short_silence_counts_from_its_own_beginning() -> None:
    assert after(({A}, set(), 0), (set(), set(), 1), ({A}, set(), 5), (set(), set(), LATER))[-1] is None


CABLE = Interface(name="eth0", address="192.168.1.5", prefix_bits=24)
RENEWED = Interface(name="eth0", address="192.168.1.77", prefix_bits=24)
WIRELESS = Interface(name="wlan0", address="192.168.7.5", prefix_bits=24)
DOCKER = Interface(name="docker0", address="172.17.0.1", prefix_bits=16)
LOOPBACK = Interface(name="lo", address="127.0.0.1", prefix_bits=8)


def test_device_stays_as_long_as_its_address_is_there() -> None:
    assert moved_address(WIRELESS, None, [CABLE, WIRELESS, LOOPBACK]) is None


def test_new_address_of_an_interface_is_followed() -> None:
    assert moved_address(CABLE, None, [RENEWED, LOOPBACK]) == RENEWED
    assert moved_address(CABLE, "eth0", [WIRELESS, RENEWED]) == RENEWED


def test_other_interface_is_taken_when_the_first_is_gone_unless_a_person_named_it() -> None:
    assert moved_address(CABLE, None, [WIRELESS, DOCKER, LOOPBACK]) == WIRELESS
    assert moved_address(CABLE, "eth0", [WIRELESS, DOCKER, LOOPBACK]) is None
    assert moved_address(CABLE, "192.168.1.5", [RENEWED, LOOPBACK]) is None


def test_without_any_network_the_device_waits_where_it_is() -> None:
    assert moved_address(CABLE, None, [LOOPBACK]) is None


def test_isolated_device_tries_every_other_real_interface_once() -> None:
    available = [CABLE, WIRELESS, DOCKER, LOOPBACK]
    assert another_interface(CABLE, None, available, ()) == WIRELESS
    assert another_interface(WIRELESS, None, available, {CABLE}) is None
    assert another_interface(CABLE, "eth0", available, ()) is None
    assert another_interface(CABLE, None, [CABLE, DOCKER, LOOPBACK], ()) is None
