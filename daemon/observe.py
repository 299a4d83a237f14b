"""Looking at a run from a device that does not take part: with the join code, for a moment.

An observer finds the run's devices, reads the board, exchanges ledgers with them and fetches shards, like any
device, but announces nothing, holds nothing for others and leaves no trace but the calls.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from ..errors import NoPeersError, P2PCollabError
from .error_fields import first_within
from .node import Node
from .options import DaemonOptions
from .store import Store

_FIND_S: Final = 15.0

Result = TypeVar("Result")


def observe(options: DaemonOptions) -> dict[str, Any]:
    """The status of the run as an observer sees it; `device` and `work` are the observer's own.

    Raises:
        NoPeersError: no device of the run was found.
        NotAuthorisedError: those that were found refuse the join code.
    """

    async def look(node: Node) -> dict[str, Any]:
        return node.status()

    return asyncio.run(_visit(options, look))


def harvest(options: DaemonOptions) -> tuple[bytes, tuple[str, ...], float]:
    """The global model, put together here from what the run's devices have: bytes, missing tasks, coverage.

    Raises:
        NoPeersError: no device of the run was found.
        NotAuthorisedError: those that were found refuse the join code.
    """

    async def collect(node: Node) -> tuple[bytes, tuple[str, ...], float]:
        model = await node.assemble()
        return model.data, model.missing, model.coverage

    return asyncio.run(_visit(options, collect))


async def _visit(options: DaemonOptions, work: Callable[[Node], Awaitable[Result]]) -> Result:
    # The log is a daemon's. This is the program of whoever looks, and standard output is for its answer.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    # A folder of its own: the device's daemon may run at the same time, in another run.
    with tempfile.TemporaryDirectory(prefix="p2pcollab-observer-") as folder:
        store = Store.open(Path(folder))
        try:
            node = Node(
                options.model_copy(update={"state": Path(folder)}),
                store,
                started=time.monotonic(),
                visitor=True,
            )
            return await node.visit(work, within_s=_FIND_S)
        except Exception as error:
            reason = first_within(error, P2PCollabError)
            if reason is not None:
                raise reason from error
            if first_within(error, TimeoutError) is None:
                raise
            raise NoPeersError(
                f"no device of this run was found on {node.interface.name} ({node.interface.address}) in "
                f"{_FIND_S:.0f} s",
                "is one running, on the same network? Otherwise name an interface with --interface or an "
                "address with --peer",
            ) from error
        finally:
            store.close()
