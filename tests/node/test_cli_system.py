"""The `p2pcollab` command as a person runs it, with real daemons: its output, its exit codes, its manners."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits_runs as runs
import psutil
import pytest

from p2pcollab.daemon.api_client import ApiClient
from p2pcollab.errors import ExitCode, P2PCollabError
from p2pcollab.run import JoinCode, RunSpec

COMMAND = str(Path(sys.executable).with_name("p2pcollab"))
LOOPBACK = ("--interface", "127.0.0.1")
SMALL = ("--data", "digits", "--threads", "1", *LOOPBACK)


def begin(*words: str, state: Path) -> subprocess.Popen[str]:
    """Run the command with a state folder of its own, as from a shell."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("P2PCOLLAB_")}
    return subprocess.Popen(
        [COMMAND, *words],
        env={**environment, "P2PCOLLAB_STATE": str(state)},
        cwd=state.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


def end(process: subprocess.Popen[str]) -> Done:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=runs.DEADLINE_S)
    return Done(code=process.returncode, out=out, err=err)


def command(*words: str, state: Path) -> Done:
    """Run a command to its end."""
    return end(begin(*words, state=state))


def complaint(done: Done) -> str:
    """The one line that a command that failed has said on standard error."""
    lines = [line for line in done.err.splitlines() if line != "starting …"]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.out
    return lines[0]


def daemon_status(state: Path) -> dict[str, Any]:
    """The status of the daemon of a state folder; empty while none answers."""
    with suppress(P2PCollabError), ApiClient(state) as client:
        return client.status()
    return {}


def processes_of(state: Path) -> list[psutil.Process]:
    """The daemon of a state folder with its trainer and p2pd, once all run."""
    found: list[psutil.Process] = []

    def whole() -> bool:
        with suppress(P2PCollabError, psutil.NoSuchProcess), ApiClient(state) as client:
            daemon = psutil.Process(client.address.pid)
            found[:] = [daemon, *daemon.children(recursive=True)]
        return len(found) >= 3

    runs.eventually(whole, f"the daemon on {state.name} with its trainer and p2pd")
    return found


def end_daemon(state: Path) -> None:
    """End what a failed test has left."""
    with suppress(P2PCollabError, psutil.NoSuchProcess), ApiClient(state) as client:
        daemon = psutil.Process(client.address.pid)
        for process in (*daemon.children(recursive=True), daemon):
            process.kill()


# A run of one device, detached, that is complete.


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """A complete run, and the device that keeps it."""

    state: Path
    started: dict[str, Any]
    spec: RunSpec
    model: Path

    @property
    def code(self) -> str:
        return str(self.started["join_code"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    state = tmp_path_factory.mktemp("home") / "state"
    try:
        done = command("new", "home", *SMALL, "--epochs", "3", "--detach", "--json", state=state)
        assert done.code == ExitCode.OK, done.err
        runs.eventually(lambda: daemon_status(state).get("complete"), "the run to be complete")
        model = state.parent / "home.safetensors"
        assert command("assemble", "-o", str(model), state=state).code == ExitCode.OK
        with ApiClient(state) as client:
            spec = RunSpec.model_validate_json(json.dumps(client.run_info()["spec"]))
        yield Home(state=state, started=json.loads(done.out), spec=spec, model=model)
    finally:
        end_daemon(state)


def test_new_detached_returns_and_says_how_others_join(home: Home) -> None:
    assert psutil.Process(home.started["pid"]).is_running()
    done = command("code", state=home.state)
    assert (done.code, done.out, done.err) == (ExitCode.OK, home.code + "\n", "")


def test_status_json_is_one_document_and_nothing_else(home: Home) -> None:
    done = command("status", "--json", state=home.state)
    assert (done.code, done.err) == (ExitCode.OK, "")
    status = json.loads(done.out)
    assert status["complete"] and status["coverage"] == 1.0
    assert status["run"]["join_code"] == home.code


def test_what_a_visitor_is_told_is_one_document_too(home: Home, tmp_path: Path) -> None:
    done = command("peers", "--json", "--code", home.code, *LOOPBACK, state=tmp_path / "nobody")
    assert done.code == ExitCode.OK, done.err
    assert [peer["state"] for peer in json.loads(done.out)] == ["complete"]
    assert done.err == "no daemon runs here: asking the run's devices …\n"
    assert not (tmp_path / "nobody").exists()


def test_a_visitor_assembles_the_same_file(home: Home, tmp_path: Path) -> None:
    target = tmp_path / "visited.safetensors"
    words = ("assemble", "-o", str(target), "--code", home.code, "--json", *LOOPBACK)
    done = command(*words, state=tmp_path / "nobody")
    assert done.code == ExitCode.OK, done.err
    assert json.loads(done.out)["missing"] == []
    assert target.read_bytes() == home.model.read_bytes()


def test_the_model_is_evaluated_and_names_the_digit_on_an_image(home: Home, tmp_path: Path) -> None:
    done = command("evaluate", "--model", str(home.model), "--data", "digits", "--json", state=home.state)
    assert done.code == ExitCode.OK, done.err
    result = json.loads(done.out)
    assert result["accuracy"] > 0.8 and result["missing"] == []

    images = runs.write_digits(tmp_path / "images", home.spec, classes=home.spec.classes, part="test", most=3)
    paths = [str(path) for path in sorted(images.glob("*/*.png"))]
    done = command("predict", "--model", str(home.model), "--top", "1", "--json", *paths, state=home.state)
    assert done.code == ExitCode.OK, done.err
    predictions = json.loads(done.out)["predictions"]
    right = [one["classes"][0]["class"] == Path(one["image"]).parent.name for one in predictions]
    assert len(right) == 30 and sum(right) > 20


def test_a_detached_device_leaves_when_it_is_told_to_and_leaves_nothing_behind(
    home: Home, tmp_path: Path
) -> None:
    state = tmp_path / "guest"
    try:
        done = command("join", "--code", home.code, *LOOPBACK, "--name", "guest", "--detach", state=state)
        assert done.code == ExitCode.OK, done.err
        processes = processes_of(state)
        runs.eventually(lambda: daemon_status(state).get("complete"), "the guest to know the run")
        done = command("peers", state=home.state)
        assert done.code == ExitCode.OK and "guest" in done.out

        done = command("leave", state=state)
        assert (done.code, done.out) == (ExitCode.OK, "left the run\n")
        assert runs.all_gone(processes)
        done = command("leave", state=state)
        assert done.code == ExitCode.NOT_RUNNING and "no daemon runs" in complaint(done)
        done = command("status", "--json", state=state)
        assert (done.code, done.out) == (ExitCode.NOT_RUNNING, "")
    finally:
        end_daemon(state)


# The foreground


def test_ctrl_c_publishes_what_was_trained_and_leaves_no_process_behind(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    # Longer than any machine trains in the time that this takes.
    creator = begin("new", "long", *SMALL, "--epochs", "4000", "--share", "1/2", "--json", state=first)
    try:
        assert creator.stdout is not None
        code = json.loads(creator.stdout.readline())["join_code"]
        joiner = begin("join", "--code", code, *SMALL, "--share", "2/2", state=second)
        processes = processes_of(second)
        runs.eventually(
            lambda: (daemon_status(second).get("work") or {}).get("samples_done"), "the joiner to train"
        )
        status = daemon_status(second)
        own, work = status["device"]["id"], status["work"] or {"shards": []}

        joiner.send_signal(signal.SIGINT)
        done = end(joiner)
        assert done.code == ExitCode.OK, done.err
        assert "Ctrl-C again to force" in done.out and "left the run" in done.out
        assert "Traceback" not in done.out + done.err
        assert runs.all_gone(processes)
        status = daemon_status(first)
        samples = {row["shard"]: row["samples_by"].get(own, 0) for row in status["shards"]}
        assert all(samples[shard] > 0 for shard in work["shards"]) and any(samples.values())
        assert [peer["state"] for peer in status["peers"]] == ["left"]

        processes = processes_of(first)
        creator.send_signal(signal.SIGTERM)
        done = end(creator)
        assert done.code == ExitCode.OK and "Traceback" not in done.err
        assert runs.all_gone(processes)
    finally:
        for state in (first, second):
            end_daemon(state)


# Bad input: one clear line, the documented exit code


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a person may get wrong."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "empty").mkdir()
    for name in ("0", "1"):
        (folder / "corrupt" / name).mkdir(parents=True)
        for number in range(4):
            (folder / "corrupt" / name / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    spec = runs.digits_spec("inputs", epochs=1)
    runs.write_digits(folder / "others", spec, classes=("0", "1"), part="test", most=6)
    for name, other in (("0", "unicorn"), ("1", "dragon")):
        (folder / "others" / name).rename(folder / "others" / other)
    (folder / "corrupt.safetensors").write_bytes(secrets.token_bytes(2000))
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["join", "--bugdet", "0.5"], "no such option: --bugdet"),
        (["join", "--code", "P2P-AAAA"], "join code"),
        (["status", "--code", "hello"], "a join code starts with P2P-"),
        (["new", "x", "--data", "corrupt"], "no image in the folder"),
        (["new", "x", "--data", "empty"], "no class folders"),
        (["new", "x", "--data", "nowhere"], "there is no folder nowhere"),
        (["new", "x", "--data", "digits", "--tasks", "unicorn"], "the run has no class 'unicorn'"),
        (["new", "x", "--data", "digits", "--interface", "wlan77"], "no interface or IPv4 address 'wlan77'"),
        (["evaluate", "--model", "corrupt.safetensors", "--data", "digits"], "corrupt.safetensors"),
        (["predict", "--model", "corrupt.safetensors", "others/unicorn"], "corrupt.safetensors"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(words: Sequence[str], said: str, inputs: Path) -> None:
    done = command(*words, state=inputs / "state")
    assert done.code == ExitCode.USAGE
    assert said in complaint(done)


@pytest.mark.parametrize("detach", [[], ["--detach"]])
def test_a_port_in_use_is_refused_before_the_daemon_runs(detach: list[str], inputs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        words = ("new", "x", *SMALL, "--port", str(port), *detach)
        done = command(*words, state=inputs / f"port{len(detach)}")
    assert done.code == ExitCode.USAGE
    assert f"127.0.0.1:{port} cannot be listened on" in complaint(done)


def test_a_state_folder_in_use_is_refused_and_its_daemon_is_named(home: Home) -> None:
    done = command("join", "--detach", state=home.state)
    assert done.code == ExitCode.ERROR
    assert f"process {home.started['pid']}" in complaint(done)


#: What goes wrong only once the run is known, or is looked for in vain: words, exit code, what is said.
REFUSALS = {
    "corrupt images": (["join", "--data", "corrupt"], ExitCode.USAGE, "can be read"),
    "an empty folder": (["join", "--data", "empty"], ExitCode.USAGE, "no class folders"),
    "classes of another run": (["join", "--data", "others"], ExitCode.USAGE, "'dragon'"),
    "an unknown class": (["join", "--data", "digits", "--tasks", "unicorn"], ExitCode.USAGE, "'unicorn'"),
    "a wrong secret": (["join", "--data", "digits"], ExitCode.NOT_AUTHORISED, "check the join code"),
    "a run of nobody": (["status"], ExitCode.NO_PEERS, "no device of this run was found"),
}


@pytest.fixture(scope="module")
def refusals(home: Home, inputs: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them at once: each is mostly waiting."""
    other = JoinCode.create(secrets.token_bytes(16), runs.digits_spec("nobody", epochs=1).run_id)
    codes = {
        "a wrong secret": runs.with_secret(home.code, secrets.token_bytes(16)),
        "a run of nobody": str(other),
    }
    begun = {
        name: begin(
            *words,
            *LOOPBACK,
            "--code",
            codes.get(name, home.code),
            state=inputs / f"state of {name}",
        )
        for name, (words, _, _) in REFUSALS.items()
    }
    yield begun
    for name, process in begun.items():
        end_daemon(inputs / f"state of {name}")
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_the_run_is_one_clear_line(
    name: str, refusals: dict[str, subprocess.Popen[str]]
) -> None:
    _, code, said = REFUSALS[name]
    done = end(refusals[name])
    assert done.code == code, done.err
    if name == "a run of nobody":
        # What it does meanwhile is a remark of its own.
        done = Done(code=done.code, out=done.out, err=done.err.partition("\n")[2])
    assert said in complaint(done)
