"""What a daemon answers while it is on its way into a run."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path

import digits_runs as runs
import pytest

from p2pcollab.daemon.board import Board
from p2pcollab.daemon.node import Node
from p2pcollab.daemon.options import DaemonOptions
from p2pcollab.daemon.store import Store


def test_who_asks_for_the_model_while_the_board_starts_waits_and_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = runs.digits_spec("starting", epochs=1)
    options = DaemonOptions(
        mode="new",
        state=tmp_path,
        spec=spec.encode().decode(),
        secret_hex=secrets.token_hex(16),
        interface="127.0.0.1",
        threads=1,
    )
    start = Board.start

    async def live() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow_start(board: Board) -> None:
            begun.set()
            await go_on.wait()
            await start(board)

        monkeypatch.setattr(Board, "start", slow_start)
        node = Node(options, store, started=time.monotonic())
        life = asyncio.create_task(node.run(lambda _port: None))
        await asyncio.wait_for(begun.wait(), runs.DEADLINE_S)
        # The run is known, as `status` says by now.
        asked = asyncio.create_task(node.assemble())
        await asyncio.sleep(0)
        assert node.run_info()["id"] == spec.run_id and not asked.done()
        go_on.set()
        model = await asyncio.wait_for(asked, runs.DEADLINE_S)
        assert set(model.missing) == {task.id for task in spec.tasks}  # nobody has trained anything
        node.leave()
        await life

    store = Store.open(tmp_path)
    try:
        asyncio.run(live())
    finally:
        store.close()
