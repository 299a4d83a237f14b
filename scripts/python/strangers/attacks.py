"""The stranger: a host on the LAN with all of this program and of hivemind, and without the run secret.

Reads a line of JSON that says whom to attack, then one line for each attack, `{"attack": NAME, "tries": N}`,
and answers each with a line of what came of it. A try is *answered* when the device gives anything but a
refusal: nothing of what is asked for here is given to strangers.

Where an attack is about something overheard, the stranger is lent what nobody on the LAN can overhear,
because links are encrypted: requests, records and names made with the run secret and the keys of real
devices. So what is tried is whether they would be of any use.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.proto import dht_pb2

from p2pcollab.daemon import streams
from p2pcollab.daemon.calls import PREFIX
from p2pcollab.keys import Identity, RunKeys
from p2pcollab.presence import record_expiry
from p2pcollab.records import seal_record
from p2pcollab.wire import (
    Push,
    decode_contribution,
    encode_contribution,
)

from .stranger import ANSWERED, DHT, OURS, REFUSED, SILENT, TRY_S, Stranger

_AT_ONCE: Final = 16


class Attacker(Stranger):
    """A stranger with its attacks: each method says what try number `n` is."""

    async def no_code(self, n: int) -> str:
        """Sound requests of every kind, without any proof."""
        victim = self.victim(n)
        return await self.call(victim, *self.sound_request(victim, n))

    async def wrong_code(self, n: int) -> str:
        """The same with a proof, each time under another secret."""
        victim = self.victim(n)
        name, body = self.sound_request(victim, n)
        return await self.call(victim, name, self.guessed(name, body, victim))

    async def replayed_call(self, n: int) -> str:
        """Requests that a device has made: the very bytes of its connection, or the request lent in clear."""
        victim = self.victim(n)
        if n % 4 == 0 and self.wire:
            return await self.replay_connection(victim, self.wire[n // 4 % len(self.wire)])
        # The prove call has no body to spoil: an answer to it would mean that the stranger is believed.
        name, body = self.sound_request(victim, n)
        request = self.sealed(self.keys, name, body, self.other(n).peer, victim)
        first = await self.call(victim, name, request)
        return first if first != REFUSED else await self.call(victim, name, request)

    async def replayed_record(self, n: int) -> str:
        """Records that a device has sealed and signed itself, lent: pushed, or stored where they belong."""
        victim, other = self.victim(n), self.other(n)
        record = self.record(other.identity, beat=round(time.time() * 1000) - 30_000 + n)
        sealed = seal_record(self.keys, other.identity, record)
        return await self.hand_in(victim, n, other.identity.device, sealed, record_expiry(record.beat))

    async def forged_record(self, n: int) -> str:
        """Records for another device's subkey, or for a device of its own, under a guessed or a lent seal."""
        victim, other = self.victim(n), self.other(n)
        own = Identity.create() if n % 2 else self.identity
        keys = self.keys if n % 3 else RunKeys.derive(secrets.token_bytes(16))
        record = self.record(own)
        device = own.device if n % 5 == 0 else other.identity.device
        return await self.hand_in(
            victim, n, device, seal_record(keys, own, record), record_expiry(record.beat)
        )

    async def forged_contribution(self, n: int) -> str:
        """Contributions of its own, in another device's name, and altered ones of real devices."""
        victim = self.victim(n)
        shard = self.random.choice(self.spec.shards)
        other = self.other(n).identity
        own = self.contribution(self.identity, shard)
        if n % 4 == 0:
            entry = own
        elif n % 4 == 1:
            named = decode_contribution(own, self.run_id)
            entry = encode_contribution(
                dataclasses.replace(named, device=other.device, public_key=other.public_key)
            )
        elif n % 4 == 2:
            entry = self.contribution(other, shard)  # lent: really signed by that device
        else:
            genuine = bytearray(self.random.choice(self.contributions))
            genuine[self.random.randrange(len(genuine))] ^= 1 << self.random.randrange(8)
            entry = bytes(genuine)
        name, body = PREFIX + "push", Push(entries=(entry,)).encode()
        request = [
            body,
            self.guessed(name, body, victim),
            self.sealed(self.keys, name, body, other.peer_id, victim),
        ][n // 4 % 3]
        return await self.call(victim, name, request)

    async def another_devices_id(self, n: int) -> str:
        """Requests in another device's name, with its own proof, lent: only the link is the stranger's."""
        victim, other = self.victim(n), self.other(n)
        name, body = self.sound_request(other, n)
        return await self.call(victim, name, self.sealed(self.keys, name, body, other.peer, victim))

    async def blinded_keys(self, n: int) -> str:
        """DHT reads and writes under the board's true blinded key, lent as if it had been seen."""
        victim, other = self.victim(n), self.other(n)
        expires = time.time() + 250
        if n % 2:
            body = dht_pb2.FindRequest(
                keys=[self.board_key],
                peer=dht_pb2.NodeInfo(node_id=DHTID.generate(self.identity.peer_id).to_bytes()),
            ).SerializeToString()
            name = "DHTProtocol.rpc_find"
        else:
            value = secrets.token_bytes(self.random.choice((16, 400, 8000)))
            subkey = self.random.choice((other.identity.device, None, self.identity.device))
            body, name = self.store_request(self.board_key, subkey, value, expires), "DHTProtocol.rpc_store"
        return await self.call(victim, name, body if n % 4 < 2 else self.guessed(name, body, victim))

    async def board_flood(self, n: int) -> str:
        """Large values under ever new keys, that are to stay for years."""
        victim = self.victim(n)
        value = self.random.randbytes(self.random.choice((1_000, 60_000, 400_000)))
        body = self.store_request(secrets.token_bytes(20), f"{n}", value, time.time() + 1e9)
        name = "DHTProtocol.rpc_store"
        return await self.call(victim, name, body if n % 2 else self.guessed(name, body, victim))

    async def stream_flood(self, n: int) -> str:
        """Streams that ask for tensors which are there, push junk or hang, and calls that are given up."""
        victim = self.victim(n)
        remote = PeerID.from_base58(victim.peer)
        if n % 5 == 4:
            # What is left of it has to be cleared away.
            return await self.give_up(victim, PREFIX + "push", self.random.randbytes(100_000))
        method = (streams.METHOD, streams.METHOD, PREFIX + "fetch", "/ipfs/ping/9.9.9")[n % 4]
        try:
            _, reader, writer = await asyncio.wait_for(self.p2p._client.stream_open(remote, (method,)), TRY_S)
        except (P2PDaemonError, OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            return REFUSED
        with contextlib.closing(writer):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                if n % 7:  # the others say nothing at all
                    writer.write(bytes.fromhex(self._digest()) + bytes(8))
                    writer.write(self.random.randbytes(self.random.choice((0, 1 << 10, 1 << 18))))
                    await asyncio.wait_for(writer.drain(), TRY_S)
            try:
                data = await asyncio.wait_for(reader.read(1 << 20), 0.5)
            except (OSError, asyncio.TimeoutError):
                return SILENT
        # A call's stream brings its refusal.
        return ANSWERED if data and method == streams.METHOD else REFUSED

    async def false_announcements(self, n: int) -> str:
        """mDNS answers that give false addresses, of devices that exist and of ones that do not."""
        for _ in range(2):
            self._announce(n)
            n += 1_000_003
        await asyncio.sleep(0)
        return REFUSED

    async def lying_lengths(self, n: int) -> str:
        """Lengths that are not there, too long or too short: on raw TCP, on streams, in whole messages."""
        victim = self.victim(n)
        match n % 4:
            case 0:
                name = self.random.choice((*OURS, *DHT))
                size = self.random.choice((0, 1, 31, 55, 56, 524_288 + 57, 1 << 20, 3 << 20))
                return await self.call(victim, name, self.random.randbytes(size))
            case 1:
                # hivemind reads a length in base 128 before a call's bytes.
                name = self.random.choice((*OURS, *DHT, streams.METHOD))
                return await self.say_on_stream(victim, name, _varint(1 << self.random.randrange(10, 64)))
            case 2:
                head = (self.random.getrandbits(32)).to_bytes(4, "big")
                return await self.say_on_stream(victim, streams.METHOD, head * 8 + b"\xff" * 8)
            case _:
                # libp2p's own greeting, with a length that lies.
                greeting = _varint(1 << self.random.randrange(7, 63)) + b"/multistream/1.0.0\n"
                return await self.replay_connection(victim, greeting)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


ATTACKS: Final[dict[str, Callable[[Attacker, int], Awaitable[str]]]] = {
    "no-join-code": Attacker.no_code,
    "wrong-join-code": Attacker.wrong_code,
    "replayed-call": Attacker.replayed_call,
    "replayed-record": Attacker.replayed_record,
    "forged-record": Attacker.forged_record,
    "forged-contribution": Attacker.forged_contribution,
    "another-devices-id": Attacker.another_devices_id,
    "blinded-keys": Attacker.blinded_keys,
    "board-flood": Attacker.board_flood,
    "stream-flood": Attacker.stream_flood,
    "false-announcements": Attacker.false_announcements,
    "lying-lengths": Attacker.lying_lengths,
}


async def attack(stranger: Attacker, name: str, first: int, tries: int) -> dict[str, Any]:
    """Some tries of an attack, a few at a time."""
    outcomes: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    numbers = iter(range(first, first + tries))

    async def worker() -> None:
        for n in numbers:
            try:
                outcome = await ATTACKS[name](stranger, n)
                stranger.check_alive()
                outcomes[outcome] += 1
            except Exception as error:
                errors[f"{type(error).__name__}: {error}"[:200]] += 1
                outcomes["failed"] += 1

    start = time.monotonic()
    heard = Counter(stranger.heard)
    await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
    for victim in stranger.victims:
        with contextlib.suppress(P2PDaemonError, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(stranger.link(victim), TRY_S)
    return {
        "outcomes": dict(outcomes),
        "errors": dict(errors),
        "heard": dict(stranger.heard - heard),
        "seconds": round(time.monotonic() - start, 1),
    }


async def main() -> None:
    """Attack as told, until standard input ends."""
    stranger = Attacker(json.loads(sys.stdin.readline()))
    await stranger.start()
    _say({"port": stranger.port, "device": stranger.identity.device})
    try:
        # Not in the loop: it answers whom false announcements have lured here.
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            if order["attack"] == "insider":
                _say(await stranger.insider())
            else:
                _say(await attack(stranger, order["attack"], order["first"], order["tries"]))
    finally:
        await stranger.p2p.shutdown()


def _say(fields: dict[str, Any]) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
