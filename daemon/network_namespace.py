"""Asking a daemon that runs in a network namespace of its own, where its loopback interface is not ours."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000


def call_in_network_of(pid: int, function: Callable[[], T]) -> T:
    """What a function returns in a thread that is on the network of a process; see `call_in_network`."""
    return call_in_network(Path(f"/proc/{pid}/ns/net"), function)


def call_in_network(handle: Path, function: Callable[[], T]) -> T:
    """What a function returns in a thread that is in a network namespace. Linux, and root.

    A thread of its own, because it stays there: the caller's sockets are not to follow.

    Args:
        handle: the namespace's file, below /proc or /run/netns.

    Raises:
        OSError: it is gone, or this process may not enter it; what the function raises.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def enter_and_call() -> None:
        try:
            with handle.open("rb") as namespace:
                _enter(namespace.fileno())
            results.append(function())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter_and_call)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _enter(descriptor: int) -> None:
    # os.setns came with Python 3.12.
    if sys.platform != "linux":
        raise OSError("only Linux has network namespaces")
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
