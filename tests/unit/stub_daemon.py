"""A stand-in for a daemon's API: a real HTTP server on a loopback port, with answers of the test's."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "t0ken"


class StubDaemon:
    """Serves `status`, `events` and a model; counts what it was asked. A context manager."""

    def __init__(self, folder: Path, status: dict[str, Any], pid: int | None = None) -> None:
        self.folder = folder
        self.status = status
        self.events: list[dict[str, Any]] = []
        self.model = b""
        #: What `forget` tells.
        self.forgotten: dict[str, Any] = {}
        self.headers: dict[str, str] = {"X-Coverage": "1.0", "X-Missing": ""}
        self.asked: list[str] = []
        #: Called with each request, before it is answered.
        self.on_request: Callable[[str], None] = lambda _path: None
        self._pid = pid if pid is not None else os.getpid()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> StubDaemon:
        self.folder.mkdir(parents=True, exist_ok=True)
        fields = {
            "port": self._server.server_address[1],
            "token": TOKEN,
            "pid": self._pid,
            "started": time.time() - 60.0,
        }
        (self.folder / "api.json").write_text(json.dumps(fields))
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def count(self, path: str) -> int:
        """How often a path was asked for."""
        return sum(asked.partition("?")[0] == path for asked in list(self.asked))

    def interrupt(self, path: str, times: int, on_leave: Callable[[], None] = lambda: None) -> None:
        """From now on: Ctrl-C to this process at the n-th request for a path, and a call for `leave`."""

        def on_request(asked: str) -> None:
            if asked.partition("?")[0] == path and self.count(path) == times:
                os.kill(os.getpid(), signal.SIGINT)
            if asked == "/v1/leave":
                on_leave()

        self.on_request = on_request

    def _answer(self, path: str) -> tuple[bytes, dict[str, str]]:
        bare = path.partition("?")[0]
        if bare == "/v1/assemble":
            return self.model, self.headers
        body: dict[str, Any] = {}
        if bare == "/v1/status":
            body = self.status
        elif bare == "/v1/forget":
            body = self.forgotten
        elif bare == "/v1/run":
            body = {"join_code": self.status["run"]["join_code"]}
        elif bare == "/v1/events":
            after = int(path.partition("after=")[2].partition("&")[0])
            body = {"events": [event for event in self.events if event["id"] > after], "first_id": 1}
        return json.dumps(body).encode(), {}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stub.asked.append(self.path)
                stub.on_request(self.path)
                authorised = self.headers["Authorization"] == f"Bearer {TOKEN}"
                body, headers = stub._answer(self.path) if authorised else (b"", {})
                self.send_response(200 if authorised else 401)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
