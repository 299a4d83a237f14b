"""Sealed calls: every unary call on a p2pd, the DHT's own included, proves the run secret.

The request and the response carry a proof that is bound to the method and to both peer ids, and neither a
handler nor a stranger ever sees a byte of the other. (hivemind's authoriser would see neither sender nor
receiver, so a stranger who is called by one device could hand the call on to another.)
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID

from .. import limits
from ..authentication import NONCE_BYTES, Authenticator
from ..errors import NotAuthorisedError, P2PCollabError, PeerError, RunError
from ..wire import ErrorReply
from .calls import PREFIX, Counters, RefusalError

#: Asks for nothing but the proof: requests are sealed against change, not against being read, so no other
#: request leaves for a peer that has not answered or made one.
PROVE: Final = PREFIX + "prove"
#: Asks for news of the run secret. Open to all members, whose peer id proves who they are: it is what a
#: device asks that has missed a rotation, and cannot make any other request.
_RENEW: Final = PREFIX + "renew"
#: The same, between devices that share the run secret.
ROTATION: Final = PREFIX + "rotation"
#: What a refusal starts with on the wire: hivemind sends the `repr` of a handler's exception.
_REFUSED: Final = "p2pcollab refuses: "

#: Why those are refused who know a run secret of before.
_OLD_CODE: Final = "a device was shut out of the run since, and the join code is another one now"
#: Cancelled calls that hivemind has kept are cleared away from this many on.
_HANDLER_TASKS_MAX: Final = 256

_log = logging.getLogger(__name__)

SealedHandler = Callable[[str, bytes], Awaitable[bytes]]


class RenewalPort(Protocol):
    """Who keeps the run secret up to date."""

    def is_forgotten(self, peer: str) -> bool:
        """Whether a device is shut out, whatever it knows."""

    def may_ask(self, peer: str) -> bool:
        """Whether a device may ask for news of the run secret, although it cannot prove that it knows it."""

    async def answer(self, peer: str, body: bytes, *, proved: bool) -> bytes:
        """Take a device's notice, and give our own if it is another one."""

    async def renew(self, peer: str) -> bool:
        """Compare notices with a device that refuses us, or is refused; whether it is worth another try."""


class _Refused(Exception):
    """Answers a stranger: hivemind sends the `repr`, and nothing else."""

    def __repr__(self) -> str:
        return _REFUSED + str(self)


class SealedP2P(P2P):  # type: ignore[misc]  # hivemind has no types
    """A p2pd whose unary calls all prove the run secret, in both directions.

    Overrides the two methods through which hivemind 1.1.12 passes every unary call.
    """

    authenticator: Authenticator
    counters: Counters
    clock: Callable[[], float]
    #: Peers that have proved that they know the run secret.
    proved: set[str]
    #: None until the run is known.
    renewal: RenewalPort | None
    #: What only knows earlier run secrets: to tell those who still use one.
    retired: tuple[Authenticator, ...]

    async def begin(
        self, authenticator: Authenticator, counters: Counters, clock: Callable[[], float]
    ) -> None:
        """Have everything sealed from now on. (`create` is hivemind's, and takes no arguments of ours.)"""
        self.authenticator, self.counters, self.clock = authenticator, counters, clock
        self.proved = set()
        self.renewal, self.retired = None, ()
        await self.add_sealed_handler(PROVE, _prove)
        await self.add_sealed_handler(ROTATION, self._answer_rotation)
        await self._client.add_unary_handler(_RENEW, self._serve_renew)

    def rekey(self, authenticator: Authenticator, retired: tuple[Authenticator, ...]) -> None:
        """Prove another run secret from now on, and have everybody prove it anew."""
        self.authenticator, self.retired = authenticator, retired
        self.proved.clear()

    async def add_sealed_handler(self, name: str, handler: SealedHandler) -> None:
        """Answer `name` with what `handler(peer, body)` returns."""

        async def serve(request: bytes, remote: PeerID) -> bytes:
            peer = remote.to_base58()
            self.counters.received(name, len(request))
            if len(self._client.control._handler_tasks) > _HANDLER_TASKS_MAX:
                self._forget_cancelled_tasks()
            # The answer is proved like the request, even if the run secret changes in between.
            authenticator = self.authenticator
            try:
                if self.renewal is not None and self.renewal.is_forgotten(peer):
                    raise NotAuthorisedError("this device was shut out of the run")
                body, nonce = authenticator.open_request(name, request, peer, self.clock())
            except (PeerError, NotAuthorisedError) as error:
                self.counters.refused += 1
                raise _Refused(self._reason(error, name, request, peer)) from None
            self._trust(peer)
            try:
                response = await handler(peer, body)
            except asyncio.CancelledError:
                self._forget_cancelled_tasks()
                raise
            if len(response) > limits.UNARY_BYTES_MAX:
                raise _Refused(f"the answer has {len(response)} bytes")
            sealed = authenticator.seal_response(name, response, peer, nonce)
            self.counters.sent(name, len(sealed))
            return sealed

        await self._client.add_unary_handler(name, serve)

    async def call_sealed(self, remote: PeerID, name: str, body: bytes) -> bytes:
        """The body of the response to a request with this body, which leaves only for a peer of the run.

        Raises:
            NotAuthorisedError: one of the two does not know the other's run secret, or clocks are far apart.
            P2PDaemonError: no answer came.
        """
        if len(body) > limits.UNARY_BYTES_MAX:
            raise RunError(f"a request has {len(body)} bytes, more than {limits.UNARY_BYTES_MAX}")
        peer = remote.to_base58()
        try:
            return await self._call_once(remote, peer, name, body)
        except NotAuthorisedError:
            # One of the two may have missed that the run secret was changed.
            self.proved.discard(peer)
            if self.renewal is None or not await self.renewal.renew(peer):
                raise
        return await self._call_once(remote, peer, name, body)

    async def _call_once(self, remote: PeerID, peer: str, name: str, body: bytes) -> bytes:
        authenticator = self.authenticator
        if peer not in self.proved and name != PROVE:
            await self._call_once(remote, peer, PROVE, b"")
        nonce = secrets.token_bytes(NONCE_BYTES)
        request = authenticator.seal_request(name, body, peer, self.clock(), nonce)
        response = await self._call(remote, name, request)
        opened = authenticator.open_response(name, response, peer, nonce)
        if authenticator is self.authenticator:
            self._trust(peer)
        return opened

    async def _call(self, remote: PeerID, name: str, request: bytes) -> bytes:
        self.counters.sent(name, len(request))
        try:
            response: bytes = await self._client.call_unary_handler(remote, name, request)
        except P2PHandlerError as error:
            raise _from_handler_error(remote.to_base58(), str(error)) from error
        self.counters.received(name, len(response))
        return response

    # The run secret's rotation

    async def call_renew(self, remote: PeerID, notice: bytes) -> bytes:
        """What a member answers to our notice: its own if it is another one. Neither holds anything secret.

        Raises:
            NotAuthorisedError: this device is no member to it.
            P2PDaemonError: no answer came.
            PeerError: the answer is too long.
        """
        response = await self._call(remote, _RENEW, notice)
        if len(response) > limits.NOTICE_BYTES_MAX:
            raise PeerError(f"a notice of {len(response)} bytes is longer than any")
        return response

    async def _serve_renew(self, request: bytes, remote: PeerID) -> bytes:
        peer = remote.to_base58()
        self.counters.received(_RENEW, len(request))
        if self.renewal is None or not self.renewal.may_ask(peer) or len(request) > limits.NOTICE_BYTES_MAX:
            self.counters.refused += 1
            raise _Refused("this device is no member of the run")
        response = await self.renewal.answer(peer, request, proved=False)
        self.counters.sent(_RENEW, len(response))
        return response

    async def _answer_rotation(self, peer: str, body: bytes) -> bytes:
        if self.renewal is None:
            raise RefusalError("not-ready", "this device only just starts")
        return await self.renewal.answer(peer, body, proved=True)

    def _reason(self, error: P2PCollabError, name: str, request: bytes, peer: str) -> str:
        """What a caller who is refused is told: who knows an earlier secret has made no typing error."""
        if any(earlier.made_by(name, request, peer) for earlier in self.retired):
            return _OLD_CODE
        return error.what

    def _trust(self, peer: str) -> None:
        # Bounded: who knows the secret can invent devices.
        if len(self.proved) >= 4 * limits.DEVICES_MAX:
            self.proved.clear()
        self.proved.add(peer)

    async def _add_protobuf_unary_handler(
        self, handle_name: str, handler: Any, input_protobuf_type: Any, balanced: bool = False
    ) -> None:
        assert not balanced, "one daemon answers"

        async def serve(peer: str, body: bytes) -> bytes:
            context = P2PContext(handle_name, self.peer_id, PeerID.from_base58(peer))
            response = await handler(input_protobuf_type.FromString(body), context)
            serialized: bytes = response.SerializeToString()
            return serialized

        await self.add_sealed_handler(handle_name, serve)

    async def _call_unary_protobuf_handler(
        self, peer_id: PeerID, handle_name: str, input: Any, output_protobuf_type: Any
    ) -> Any:
        response = await self.call_sealed(peer_id, handle_name, input.SerializeToString())
        return output_protobuf_type.FromString(response)

    def _forget_cancelled_tasks(self) -> None:
        # hivemind forgets a call's task when it ends, but not when the caller gave up.
        tasks = self._client.control._handler_tasks
        for call in [call for call, task in tasks.items() if task.done()]:
            del tasks[call]

    async def ended(self) -> None:
        """Return when this p2pd can no longer be used, and fail the calls that wait for it.

        Besides its death that is the end of one of hivemind's reading and writing tasks: an answer that comes
        in the moment in which its call is cancelled ends the reader, and all calls would wait for ever.
        """
        control = self._client.control
        child = asyncio.ensure_future(self._child.wait())
        try:
            ended, _ = await asyncio.wait(
                {child, control._read_task, control._write_task, self._reader_task},
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            child.cancel()
        for task in ended:
            if not task.cancelled() and task.exception() is not None:
                _log.warning("a task of hivemind's p2pd client failed: %r", task.exception())
        for call in control._pending_calls.values():
            if not call.done():
                call.set_exception(P2PDaemonError("p2pd ended"))


async def _prove(_peer: str, _body: bytes) -> bytes:
    return b""


def _from_handler_error(peer: str, text: str) -> Exception:
    if _REFUSED in text:
        reason = ErrorReply.create("refused", text.split(_REFUSED, 1)[1]).text
        return NotAuthorisedError(
            f"{short_peer(peer)} refuses our join code: {reason}",
            "get the new one with `p2pcollab code` on a device that is in the run"
            if reason == _OLD_CODE
            else "check the join code, and the clocks of both devices",
        )
    failed: Exception = P2PDaemonError(ErrorReply.create("failed", text).text)
    return failed


def short_peer(peer: str) -> str:
    """A peer id for people: its end, because all begin alike."""
    return f"peer …{peer[-6:]}"
