"""Errors that cross a process boundary: as what happened and what to do, never as a traceback."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from ..errors import (
    DataError,
    IncompatibleError,
    IncompleteError,
    NoPeersError,
    NotAuthorisedError,
    NotRunningError,
    P2PCollabError,
    PeerError,
    RunError,
    StorageError,
    UsageError,
)

_KINDS: Final[dict[str, type[P2PCollabError]]] = {
    kind.__name__: kind
    for kind in (
        DataError,
        IncompatibleError,
        IncompleteError,
        NoPeersError,
        NotAuthorisedError,
        NotRunningError,
        PeerError,
        RunError,
        StorageError,
        UsageError,
    )
}


Error = TypeVar("Error", bound=BaseException)


def first_within(error: BaseException, kind: type[Error]) -> Error | None:
    """The first error of a kind: this one, or one in the group that it is. Task groups raise groups."""
    queue = [error]
    while queue:
        candidate = queue.pop(0)
        if isinstance(candidate, kind):
            return candidate
        queue += getattr(candidate, "exceptions", ())
    return None


def error_to_fields(error: P2PCollabError) -> dict[str, str]:
    """What of an error crosses the boundary."""
    return {"kind": type(error).__name__, "what": error.what, "fix": error.fix}


def error_from_fields(fields: dict[str, Any]) -> P2PCollabError:
    """The error on this side; of the base class if its kind is not one that a user may see."""
    kind = _KINDS.get(str(fields.get("kind")), P2PCollabError)
    return kind(str(fields.get("what", "unknown error")), str(fields.get("fix", "")))
