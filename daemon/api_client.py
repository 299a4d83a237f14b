"""What the command line uses to ask the daemon of this machine. Imports no server."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, cast

import httpx

from .. import limits
from ..errors import NotRunningError, P2PCollabError
from .error_fields import error_from_fields
from .model_file import ModelFile

_START_IT: Final = "start it with `p2pcollab new` or `p2pcollab join`"
#: Assembly waits for the trainer's step in progress, reads all shards and merges them.
_ASSEMBLE_WITHIN_S: Final = 600.0
#: A device that has just died is waited for.
_FORGET_WITHIN_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiAddress:
    """What `api.json` says."""

    port: int
    token: str
    pid: int
    #: When the daemon started, in seconds since the epoch.
    started: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EventPage:
    """Events after the last one that was seen."""

    events: tuple[dict[str, Any], ...]
    #: Oldest id that the daemon still has.
    first_id: int

    def missed(self, after: int) -> int:
        """How many events between `after` and the first one here are no longer to be had."""
        return max(0, self.first_id - after - 1)


def find_daemon(folder: Path) -> ApiAddress:
    """Where the daemon of a state folder listens.

    Raises:
        NotRunningError: none runs.
    """
    try:
        fields = json.loads((folder / "api.json").read_bytes())
        address = ApiAddress(
            port=int(fields["port"]),
            token=str(fields["token"]),
            pid=int(fields["pid"]),
            started=float(fields["started"]),
        )
        os.kill(address.pid, 0)
    except PermissionError as error:
        raise NotRunningError(
            f"the daemon on {folder} belongs to another user", "use --state for a folder of your own"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise NotRunningError(f"no daemon runs on {folder}", _START_IT) from error
    return address


class ApiClient:
    """A connection to the daemon of a state folder; a context manager.

    Every method raises `NotRunningError` if the daemon has gone, and the error that the daemon reports.
    """

    def __init__(self, folder: Path, timeout_s: float = 10.0) -> None:
        """
        Raises:
            NotRunningError: no daemon runs on the folder.
        """
        self.address = address = find_daemon(folder)
        self._timeout_s = timeout_s
        # A proxy from the environment must not see the token, nor the requests. And no certificates are read,
        # which takes longer than the requests: nothing here is TLS.
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{address.port}",
            headers={"Authorization": f"Bearer {address.token}"},
            timeout=timeout_s,
            trust_env=False,
            verify=False,  # noqa: S501
        )

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def status(self) -> dict[str, Any]:
        """The state of the device, its run and its peers."""
        return cast("dict[str, Any]", self._ask("GET", "/v1/status").json())

    def run_info(self) -> dict[str, Any]:
        """The run spec, its id and the join code."""
        return cast("dict[str, Any]", self._ask("GET", "/v1/run").json())

    def events(self, after: int = 0, wait_s: float = 0.0) -> EventPage:
        """The events with a greater id; if there are none, wait up to `wait_s` seconds for one."""
        wait_s = min(wait_s, limits.API_WAIT_S_MAX)
        page = self._ask(
            "GET", f"/v1/events?after={after}&wait={wait_s}", timeout_s=self._timeout_s + wait_s
        ).json()
        return EventPage(events=tuple(page["events"]), first_id=page["first_id"])

    def history(self, after: int = 0) -> list[dict[str, Any]]:
        """Points of the metrics history with a greater id, oldest first."""
        points = self._ask("GET", f"/v1/history?after={after}").json()["points"]
        return cast("list[dict[str, Any]]", points)

    def leave(self) -> None:
        """Ask the daemon to leave the run and stop. It has not stopped yet when this returns."""
        self._ask("POST", "/v1/leave")

    def forget(self, device: str) -> dict[str, Any]:
        """Have a device shut out of the run: who knows of it, and the new join code."""
        reply = self._ask("POST", "/v1/forget", timeout_s=_FORGET_WITHIN_S, body={"device": device})
        return cast("dict[str, Any]", reply.json())

    def assemble(self) -> ModelFile:
        """The global model from what the daemon has."""
        reply = self._ask("POST", "/v1/assemble", timeout_s=_ASSEMBLE_WITHIN_S)
        missing = reply.headers.get("X-Missing", "")
        return ModelFile(
            data=reply.content,
            missing=tuple(missing.split(",")) if missing else (),
            coverage=float(reply.headers.get("X-Coverage", "0")),
        )

    def metrics_text(self) -> str:
        """The metrics in Prometheus's text format."""
        return self._ask("GET", "/metrics").text

    def _ask(
        self, method: str, path: str, timeout_s: float | None = None, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        timeout_s = timeout_s or self._timeout_s
        try:
            reply = self._http.request(method, path, timeout=timeout_s, json=body)
        except httpx.TimeoutException as error:
            raise P2PCollabError(
                f"the daemon (process {self.address.pid}) did not answer within {timeout_s:.0f} s",
                "stop it with `p2pcollab leave` and start it again",
            ) from error
        except httpx.HTTPError as error:
            raise NotRunningError(
                f"the daemon (process {self.address.pid}) does not answer on port {self.address.port}",
                _START_IT,
            ) from error
        if reply.status_code == httpx.codes.UNAUTHORIZED:
            raise NotRunningError(f"another program answers on port {self.address.port}", _START_IT)
        if reply.status_code == httpx.codes.CONFLICT:
            raise error_from_fields(reply.json()["error"])
        if reply.is_error:
            raise P2PCollabError(
                f"the daemon answered {method} {path} with HTTP status {reply.status_code}",
                "the daemon's log says more",
            )
        return reply
