"""The loopback HTTP API: a person on the terminal, a script and a web page see the same state.

Only processes of this machine reach it (bound to 127.0.0.1), only those that can read `api.json` in the state
folder may use it (bearer token), and a web page that made a browser resolve its own name to 127.0.0.1 is
turned away by its Host header (DNS rebinding).

Importing this module imports FastAPI, which takes 0.3 s: the daemon does it when its network is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import uvicorn
from fastapi import Body, FastAPI, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import limits
from ..errors import P2PCollabError
from ..files import write_atomic
from .error_fields import error_to_fields
from .events import EventLog
from .model_file import ModelFile
from .prometheus import StatusCollector

_STOP_WITHIN_S: Final = 3


class NodePort(Protocol):
    """What the API asks of the node. Called in the event loop."""

    @property
    def events(self) -> EventLog:
        """The event log."""

    def status(self) -> dict[str, Any]:
        """The state of the device, its run and its peers, as JSON values."""

    def run_info(self) -> dict[str, Any]:
        """The run spec, its id and the join code."""

    def history(self, after: int) -> list[dict[str, Any]]:
        """Points of the metrics history with a greater id, oldest first."""

    def leave(self) -> None:
        """Begin to leave: finish what must be finished, then stop. Returns at once."""

    async def forget(self, device: str) -> dict[str, Any]:
        """Shut a device out of the run, and say who knows of it and what the join code is now.

        Raises:
            P2PCollabError: there is no such device, or the new secret could not be stored.
        """

    async def assemble(self) -> ModelFile:
        """The global model from what this device has.

        Raises:
            P2PCollabError: there is nothing to assemble, or the trainer could not.
        """


def create_app(node: NodePort, token: str) -> FastAPI:
    """The routes. All need the bearer token."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    registry = CollectorRegistry()
    registry.register(StatusCollector(node.status))

    @app.exception_handler(P2PCollabError)
    async def refuse(_request: Request, error: P2PCollabError) -> JSONResponse:
        return JSONResponse({"error": error_to_fields(error)}, status_code=409)

    @app.get("/v1/status")
    async def status() -> JSONResponse:
        return JSONResponse(node.status())

    @app.get("/v1/run")
    async def run() -> JSONResponse:
        return JSONResponse(node.run_info())

    @app.get("/v1/events")
    async def events(
        after: int = Query(default=0, ge=0),
        wait: float = Query(default=0.0, ge=0.0, le=limits.API_WAIT_S_MAX),
    ) -> JSONResponse:
        if node.events.waiters >= limits.API_WAITERS_MAX:
            wait = 0.0
        news = await node.events.wait(after, wait)
        return JSONResponse({"events": [event.to_json() for event in news], "first_id": node.events.first_id})

    @app.get("/v1/history")
    async def history(after: int = Query(default=0, ge=0)) -> JSONResponse:
        return JSONResponse({"points": node.history(after)})

    @app.post("/v1/leave")
    async def leave() -> JSONResponse:
        node.leave()
        return JSONResponse({"leaving": True}, status_code=202)

    @app.post("/v1/forget")
    async def forget(device: str = Body(embed=True, min_length=1, max_length=128)) -> JSONResponse:
        return JSONResponse(await node.forget(device))

    @app.post("/v1/assemble")
    async def assemble() -> Response:
        model = await node.assemble()
        headers = {"X-Missing": ",".join(model.missing), "X-Coverage": repr(model.coverage)}
        return Response(model.data, media_type="application/octet-stream", headers=headers)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(
            generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    app.add_middleware(Gate, token=token)
    return app


class Gate:
    """Turns away whoever is not a local program with the token, before any route sees the request."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._authorization = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http":
            return
        refusal = self._refusal(dict(scope["headers"]), scope["server"])
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            status, text = refusal
            await PlainTextResponse(text, status_code=status)(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes], server: tuple[str, int | None]) -> tuple[int, str] | None:
        hosts = [f"{name}:{server[1]}".encode() for name in ("127.0.0.1", "localhost")]
        if headers.get(b"host", b"") not in hosts:
            return 421, "this API answers to 127.0.0.1 only"
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._authorization):
            return 401, "the bearer token in api.json is needed"
        if b"transfer-encoding" in headers:
            return 411, "a body needs a length"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limits.API_BODY_BYTES_MAX:
            return 413, "the body is too long"
        return None


class ApiServer:
    """Serves the API in the running event loop, and tells where in `api.json`."""

    def __init__(self, node: NodePort, folder: Path) -> None:
        self._events = node.events
        self._token = secrets.token_urlsafe(32)
        self._file = folder / "api.json"
        config = uvicorn.Config(
            create_app(node, self._token),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP_WITHIN_S,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen on a free port of 127.0.0.1 and write `api.json`; the port.

        Raises:
            StorageError: `api.json` was not written.
        """
        # With the protocol named, or asyncio leaves Nagle's algorithm on and each answer takes 40 ms more.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="api")
        where = {"port": port, "token": self._token, "pid": os.getpid(), "started": time.time()}
        write_atomic(self._file, json.dumps(where).encode(), mode=0o600)
        return port

    async def stop(self) -> None:
        """Send long polls home, finish what else is being answered, for a moment, and listen no more."""
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)
        if self._task is None:
            return
        self._events.close()
        self._server.should_exit = True
        await asyncio.wait([self._task], timeout=_STOP_WITHIN_S + 2)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class _Server(uvicorn.Server):
    """uvicorn that leaves the process's signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
