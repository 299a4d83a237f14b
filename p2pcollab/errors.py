"""Errors say whose fault it is, what happened, and what to do about it.

Each class carries the exit code that the command line ends with, so that a script can tell the cases apart.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the `p2pcollab` command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_RUNNING = 3
    NO_PEERS = 4
    INCOMPLETE = 5
    INCOMPATIBLE = 6
    NOT_AUTHORISED = 7
    INTERRUPTED = 130


class P2PCollabError(Exception):
    """Base of all errors that a user may see: one line, and what to do.

    Args:
        what: what happened, one sentence without a final full stop.
        fix: what the reader can do about it; empty where nothing can be said.
    """

    exit_code: ExitCode = ExitCode.ERROR

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}" if self.fix else self.what


class UsageError(P2PCollabError):
    """The caller asked for something that cannot be: a wrong flag, an unknown task."""

    exit_code = ExitCode.USAGE


class DataError(UsageError):
    """The user's data cannot be used as they are."""


class PeerError(P2PCollabError):
    """A peer sent something that breaks the protocol. The only error that parsing peers' bytes raises."""


class NotAuthorisedError(P2PCollabError):
    """The join code is wrong, or a peer cannot prove that it knows the run secret."""

    exit_code = ExitCode.NOT_AUTHORISED


class IncompatibleError(P2PCollabError):
    """A peer or a file is of another version of the protocol or format."""

    exit_code = ExitCode.INCOMPATIBLE


class StorageError(P2PCollabError):
    """The disk refused, or what it returned is not what was written."""


class RunError(P2PCollabError):
    """The run cannot go on as it is described."""


class NotRunningError(P2PCollabError):
    """No daemon answers on this device."""

    exit_code = ExitCode.NOT_RUNNING


class NoPeersError(P2PCollabError):
    """No device of the run was found."""

    exit_code = ExitCode.NO_PEERS


class IncompleteError(P2PCollabError):
    """The global model lacks tasks."""

    exit_code = ExitCode.INCOMPLETE
