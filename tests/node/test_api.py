"""The loopback API: the state is shown to who may see it, and to nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from p2pcollab import limits
from p2pcollab.daemon.api import ApiServer
from p2pcollab.daemon.api_client import ApiClient, find_daemon
from p2pcollab.daemon.events import Event, EventLog
from p2pcollab.daemon.model_file import ModelFile
from p2pcollab.errors import ExitCode, IncompleteError, NotRunningError, P2PCollabError, UsageError

T = TypeVar("T")

STATUS: dict[str, Any] = {
    "run": {"id": "ab", "name": "pets"},
    "progress": 0.5,
    "coverage": 1.0,
    "complete": False,
    "peers": [{"device": "x"}],
    "work": {"samples_per_s": 120.5},
    "counters": {"training_macs": 7, "peak_rss_bytes": 99},
    "shards": [
        {"shard": "t0", "label": 'cat "1"', "progress": 0.25, "generation": 3, "loss": None, "accuracy": 0.75}
    ],
}


class FakeNode:
    """The node as the API sees it."""

    def __init__(self) -> None:
        self.events = EventLog(clock=lambda: 1000.0)
        self.left = False
        self.failure: Exception | None = None

    def status(self) -> dict[str, Any]:
        if isinstance(self.failure, ZeroDivisionError):
            raise self.failure
        return STATUS

    def run_info(self) -> dict[str, Any]:
        return {"spec": {"name": "pets"}, "join_code": "P2P-SECRET"}

    def history(self, after: int) -> list[dict[str, Any]]:
        return [{"id": after + 1, "loss": 0.5}]

    def leave(self) -> None:
        self.left = True

    async def forget(self, device: str) -> dict[str, Any]:
        if device == "nobody":
            raise UsageError("no device of this run is called 'nobody'", "these are known: pi")
        return {"device": "ab" * 16, "name": device, "join_code": "P2P-NEW"}

    async def assemble(self) -> ModelFile:
        if self.failure:
            raise self.failure
        return ModelFile(data=bytes(range(256)) * 8192, missing=("t1", "t2"), coverage=0.8)


def serve(folder: Path, work: Callable[[], T], node: FakeNode | None = None) -> T:
    """Run `work` in a thread while the API is served."""

    async def main() -> T:
        server = ApiServer(node or FakeNode(), folder)
        await server.start()
        try:
            return await asyncio.to_thread(work)
        finally:
            await server.stop()

    return asyncio.run(main())


async def someone_waits(node: FakeNode) -> None:
    async def poll() -> None:
        while node.events.waiters == 0:  # noqa: ASYNC110 - the request comes from another thread
            await asyncio.sleep(0.001)

    await asyncio.wait_for(poll(), 10.0)


def ask(folder: Path, path: str = "/v1/status", method: str = "GET", **arguments: Any) -> httpx.Response:
    """A request that is not the client's own."""
    address = find_daemon(folder)
    url = f"http://127.0.0.1:{address.port}{path}"
    headers = {"Authorization": f"Bearer {address.token}"} | arguments.pop("headers", {})
    return httpx.request(method, url, headers=headers, trust_env=False, verify=False, **arguments)


def test_client_sees_what_the_node_says(tmp_path: Path) -> None:
    node = FakeNode()

    def work() -> None:
        with ApiClient(tmp_path) as client:
            assert client.status() == STATUS
            assert client.run_info()["join_code"] == "P2P-SECRET"
            assert client.history(after=4) == [{"id": 5, "loss": 0.5}]
            model = client.assemble()
            assert model.data == bytes(range(256)) * 8192
            assert model.missing == ("t1", "t2")
            assert model.coverage == 0.8
            client.leave()

    serve(tmp_path, work, node)
    assert node.left


def test_a_device_is_forgotten_by_name_and_an_unknown_one_is_the_callers_error(tmp_path: Path) -> None:
    def work() -> None:
        with ApiClient(tmp_path) as client:
            assert client.forget("pi") == {"device": "ab" * 16, "name": "pi", "join_code": "P2P-NEW"}
            with pytest.raises(UsageError, match="nobody"):
                client.forget("nobody")
        for body in ({}, {"device": ""}, {"device": "x" * 200}, {"device": 1}):
            assert ask(tmp_path, "/v1/forget", "POST", json=body).status_code == 422

    serve(tmp_path, work)


def test_address_file_is_private_and_goes_with_the_server(tmp_path: Path) -> None:
    def work() -> None:
        assert (tmp_path / "api.json").stat().st_mode & 0o777 == 0o600
        assert find_daemon(tmp_path).pid == os.getpid()

    serve(tmp_path, work)
    with pytest.raises(NotRunningError, match="no daemon runs") as caught:
        find_daemon(tmp_path)
    assert caught.value.exit_code == ExitCode.NOT_RUNNING


def test_stranger_without_the_token_learns_nothing(tmp_path: Path) -> None:
    def work() -> None:
        token = find_daemon(tmp_path).token
        for header in ("", "Bearer", "Bearer wrong", f"Basic {token}", f"Bearer {token}x"):
            for path in ("/v1/status", "/v1/run", "/metrics", "/nothing"):
                reply = ask(tmp_path, path, headers={"Authorization": header})
                assert reply.status_code == 401, (header, path)
                assert "pets" not in reply.text

    serve(tmp_path, work)


def test_dns_rebinding_is_refused_even_with_the_token(tmp_path: Path) -> None:
    def work() -> None:
        port = find_daemon(tmp_path).port
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1"):
            assert ask(tmp_path, headers={"Host": host}).status_code == 421, host
        assert ask(tmp_path, headers={"Host": f"localhost:{port}"}).status_code == 200

    serve(tmp_path, work)


def test_server_is_bound_to_the_loopback_address_only(tmp_path: Path) -> None:
    def work() -> None:
        port = find_daemon(tmp_path).port
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=2):
            pass

    serve(tmp_path, work)


def test_large_or_endless_body_is_refused_before_it_is_read(tmp_path: Path) -> None:
    def work() -> None:
        large = bytes(limits.API_BODY_BYTES_MAX + 1)
        assert ask(tmp_path, "/v1/leave", "POST", content=large).status_code == 413
        assert ask(tmp_path, "/v1/leave", "POST", content=iter([b"x"])).status_code == 411

    node = FakeNode()
    serve(tmp_path, work, node)
    assert not node.left


def test_node_errors_arrive_as_what_they_are(tmp_path: Path) -> None:
    node = FakeNode()
    node.failure = IncompleteError("the stem is missing", "wait for a peer")

    def work() -> None:
        with ApiClient(tmp_path) as client, pytest.raises(IncompleteError) as caught:
            client.assemble()
        assert (caught.value.what, caught.value.fix) == ("the stem is missing", "wait for a peer")

    serve(tmp_path, work, node)


def test_bug_in_the_node_shows_no_traceback_and_ends_nothing(tmp_path: Path) -> None:
    node = FakeNode()
    node.failure = ZeroDivisionError("secret detail")

    def work() -> None:
        reply = ask(tmp_path)
        assert reply.status_code == 500
        assert "secret detail" not in reply.text
        node.failure = None
        with ApiClient(tmp_path) as client:
            assert client.status() == STATUS

    serve(tmp_path, work, node)


def test_long_poll_returns_when_something_happens(tmp_path: Path) -> None:
    node = FakeNode()

    async def main() -> None:
        server = ApiServer(node, tmp_path)
        await server.start()
        with ApiClient(tmp_path) as client:
            poll = asyncio.create_task(asyncio.to_thread(client.events, 0, 20.0))
            await someone_waits(node)
            node.events.add("lease", "took t0", shards=["t0"])
            page = await asyncio.wait_for(poll, 10.0)
        assert page.events == (
            {"id": 1, "time": 1000.0, "kind": "lease", "text": "took t0", "shards": ["t0"]},
        )
        await server.stop()

    asyncio.run(main())


def test_server_that_stops_does_not_wait_for_long_polls(tmp_path: Path) -> None:
    node = FakeNode()

    async def main() -> None:
        server = ApiServer(node, tmp_path)
        await server.start()
        client = ApiClient(tmp_path)
        poll = asyncio.create_task(asyncio.to_thread(client.events, 0, 30.0))
        await someone_waits(node)
        await asyncio.wait_for(server.stop(), 10.0)
        assert (await poll).events == ()

    asyncio.run(main())


def test_reader_can_tell_that_it_missed_events(tmp_path: Path) -> None:
    node = FakeNode()
    node.events = EventLog(clock=lambda: 0.0, capacity=3)
    for number in range(5):
        node.events.add("n", str(number))

    def work() -> None:
        with ApiClient(tmp_path) as client:
            page = client.events(after=1)
            assert [event["id"] for event in page.events] == [3, 4, 5]
            assert page.missed(after=1) == 1
            assert page.missed(after=2) == 0
            assert client.events(after=5).events == ()

    serve(tmp_path, work, node)


def test_event_ids_go_on_after_a_restart() -> None:
    stored: list[Event] = []
    log = EventLog(clock=lambda: 0.0, sink=stored.append)
    log.add("a", "one")
    log.add("b", "two")
    again = EventLog(clock=lambda: 0.0, earlier=stored)
    assert again.add("c", "three").id == 3
    assert [event.text for event in again.after(1)] == ["two", "three"]


def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def work() -> str:
        with ApiClient(tmp_path) as client:
            return client.metrics_text()

    samples = {
        (sample.name, sample.labels.get("label")): sample.value
        for family in text_string_to_metric_families(serve(tmp_path, work))
        for sample in family.samples
    }
    assert samples["p2pcollab_progress", None] == 0.5
    assert samples["p2pcollab_training_macs_total", None] == 7
    assert samples["p2pcollab_shard_accuracy", 'cat "1"'] == 0.75
    assert ("p2pcollab_shard_loss", 'cat "1"') not in samples


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", '{"port": "x"}', '{"port": 1, "token": "t", "pid": null, "started": 0}']
)
def test_damaged_address_file_means_not_running(tmp_path: Path, text: str) -> None:
    (tmp_path / "api.json").write_text(text)
    with pytest.raises(NotRunningError):
        ApiClient(tmp_path)


def test_address_file_of_a_killed_daemon_means_not_running(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    (tmp_path / "api.json").write_text(
        json.dumps({"port": 1, "token": "t", "pid": process.pid, "started": 0.0})
    )
    with pytest.raises(NotRunningError):
        ApiClient(tmp_path)


def test_port_that_now_belongs_to_nobody_or_to_another_program_means_not_running(tmp_path: Path) -> None:
    def work() -> None:
        fields = json.loads((tmp_path / "api.json").read_text())
        other = tmp_path / "other"
        other.mkdir()
        (other / "api.json").write_text(json.dumps({**fields, "token": "of an earlier daemon"}))
        with pytest.raises(NotRunningError, match="another program"):
            ApiClient(other).status()

    serve(tmp_path, work)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (tmp_path / "api.json").write_text(
        json.dumps({"port": port, "token": "t", "pid": os.getpid(), "started": 0})
    )
    with pytest.raises(NotRunningError, match="does not answer"):
        ApiClient(tmp_path).status()


def test_daemon_that_hangs_is_told_from_one_that_does_not_run(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        fields = {"port": port, "token": "t", "pid": os.getpid(), "started": 0}
        (tmp_path / "api.json").write_text(json.dumps(fields))
        with pytest.raises(P2PCollabError, match="did not answer within") as caught:
            ApiClient(tmp_path, timeout_s=0.2).status()
    assert not isinstance(caught.value, NotRunningError)


def test_token_is_not_sent_to_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")

    def work() -> dict[str, Any]:
        with ApiClient(tmp_path) as client:
            return client.status()

    assert serve(tmp_path, work) == STATUS


def test_signals_stay_with_the_daemon(tmp_path: Path) -> None:
    async def main() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminated.set)
        server = ApiServer(FakeNode(), tmp_path)
        await server.start()
        await asyncio.to_thread(lambda: ApiClient(tmp_path).status())
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(terminated.wait(), 10.0)
        await asyncio.to_thread(lambda: ApiClient(tmp_path).status())
        await server.stop()

    terminated = asyncio.Event()
    asyncio.run(main())


def test_client_imports_neither_server_nor_torch() -> None:
    code = (
        "import p2pcollab.daemon.api_client, sys;"
        "print([name for name in ('fastapi', 'uvicorn', 'torch', 'hivemind') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout == "[]\n"
