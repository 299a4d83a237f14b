"""The command line: one line per error, documented exit codes, JSON and nothing else, light to start."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import status_samples as samples
from cli_output import one_error_line
from model_specs import model_spec
from stub_daemon import StubDaemon

from p2pcollab.cli.main import main
from p2pcollab.errors import P2PCollabError
from p2pcollab.run import JoinCode

CODE = str(JoinCode.create(bytes(16), model_spec().run_id))
DEADLINE_S = 20.0

pytestmark = pytest.mark.usefixtures("cli_environment")


# What is imported


def test_starting_imports_nothing_heavy() -> None:
    script = "import sys, p2pcollab.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    heavy = (
        "torch hivemind zeroconf fastapi uvicorn numpy PIL httpx sklearn cryptography p2pcollab.daemon.node"
    )
    assert not set(heavy.split()) & set(done.stdout.split())


def test_asking_the_daemon_imports_neither_torch_nor_hivemind(daemon: StubDaemon) -> None:
    script = (
        "import sys; from p2pcollab.cli.main import main; code = main(['status']);"
        " heavy = {'torch', 'hivemind', 'zeroconf', 'fastapi', 'numpy', 'cryptography'} & set(sys.modules);"
        " sys.stderr.write(repr(sorted(heavy))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert done.stderr == "[]"
    assert "pets" in done.stdout


# Help and usage


def test_help_lists_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in (
        "new join leave status watch peers code paths assemble evaluate predict demo".split()  # noqa: SIM905
    ):
        assert command in text
    assert "Exit codes" in text


def test_no_words_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["new", "join", "status", "assemble", "evaluate", "predict", "demo"])
def test_help_of_a_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples" in text and f"p2pcollab {command}" in text


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("p2pcollab ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "no such command 'frobnicate'"),
        (["join", "--bugdet", "1"], "--bugdet"),
        (["join", "--budget", "7"], "--budget"),
        (["join", "--budget", "much"], "--budget"),
        (["join", "--port", "99999"], "--port"),
        (["join", "--limit", "0"], "--limit"),
        (["join", "--threads", "0"], "--threads"),
        (["join", "--replicate", "some"], "--replicate is quota or all"),
        (["join", "--share", "7/5"], "part 7 of only 5"),
        (["join", "--code", "P2P-NONSENSE"], "join code"),
        (["join", "--code", CODE, "--data", "/no/such/folder"], "there is no folder"),
        (["join", "--code", CODE, "--data", "speech-commands:/no/such"], "there is no folder /no/such"),
        (["new", "words", "--data", "speech-commands:"], "there is no folder"),
        (["new"], "NAME"),
        (["new", "pets"], "--data is missing"),
        (["new", "pets", "--data", "digits", "--model", "resnet"], "no model 'resnet'"),
        (["new", "pets", "--data", "digits", "--image-size", "big"], "HxW"),
        (["new", "pets", "--data", "digits", "--epochs", "0"], "epochs"),
        (["new", "pets", "--data", "digits", "--prefer", "cat"], "its classes are 0, 1, 2"),
        (["new", "pets", "--data", "digits", "--prefer", '"cat'], "--prefer cannot be read"),
        (["new", "pets", "--data", "torchvision:imagenet"], "imagenet"),
        (["status", "--code", "x"], "join code"),
        (["assemble"], "--output"),
        (["assemble", "-o", "/"], "is a folder"),
        (["assemble", "-o", "/no/such/folder/m.safetensors"], "there is no folder"),
        (["evaluate", "--model", "/no/such/file", "--data", "digits"], "/no/such/file"),
        (["predict", "--model", "/no/such/file", "x.jpg"], "/no/such/file"),
        (["predict"], "FILE"),
        (["demo", "--devices", "3"], "--devices"),
        (["demo", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    line = one_error_line(capsys)
    assert line.startswith("error: ") and said in line


def test_a_usage_error_points_to_the_help_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", "--nonsense"]) == 2
    assert "`p2pcollab join --help`" in one_error_line(capsys)


# Errors


@pytest.mark.parametrize(
    "words", [["status"], ["peers"], ["watch"], ["leave"], ["assemble", "-o", "m.safetensors"]]
)
def test_without_a_daemon_the_exit_code_is_3_and_the_way_out_is_named(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 3
    assert "p2pcollab join" in one_error_line(capsys)


def test_errors_leave_standard_output_empty_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 3
    one_error_line(capsys)


def test_a_bug_of_ours_is_one_line_and_the_traceback_goes_to_a_file(
    daemon: StubDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("p2pcollab.cli.view_status.status_page", broken)
    assert main(["status"]) == 1
    line = one_error_line(capsys)
    assert line.startswith("internal error: ZeroDivisionError: a bug; please report it")
    (log,) = (tmp_path / "state").glob("cli-error-*.log")
    assert str(log) in line and "Traceback" in log.read_text()
    monkeypatch.setenv("P2PCOLLAB_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["status"])


def test_interrupt_is_exit_code_130(
    daemon: StubDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("p2pcollab.cli.view_status.status_page", interrupted)
    assert main(["status"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error_to_talk_about(daemon: StubDaemon) -> None:
    script = "import sys; from p2pcollab.cli.main import main; sys.exit(main(['status', '--json']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True, cwd="/"
    )
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_class_in_greek_does_not_end_the_program_on_an_ascii_terminal(daemon: StubDaemon) -> None:
    daemon.status["shards"][1]["label"] = "γάτα"
    script = "import sys; from p2pcollab.cli.main import main; sys.exit(main(['status']))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, cwd="/")
    assert done.returncode == 0 and b"pets" in done.stdout


# Showing


def test_status_json_is_the_daemons_status_and_nothing_else(
    daemon: StubDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == daemon.status
    assert captured.err == ""


def test_status_and_peers_show_pages(daemon: StubDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert "airplane" in capsys.readouterr().out
    assert main(["peers"]) == 0
    assert "jetson" in capsys.readouterr().out


def test_peers_json_is_a_list(daemon: StubDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == daemon.status["peers"]


def test_code_prints_the_join_code_and_nothing_else(
    daemon: StubDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["code"]) == 0
    assert capsys.readouterr().out == daemon.status["run"]["join_code"] + "\n"
    assert main(["code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"join_code": daemon.status["run"]["join_code"]}


def test_state_option_goes_before_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubDaemon(tmp_path / "other", samples.status()):
        assert main(["status"]) == 3
        capsys.readouterr()
        assert main(["status", "--state", str(tmp_path / "other")]) == 0


def test_paths_names_folder_log_and_sizes(
    daemon: StubDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "state" / "runs" / "0123" / "shards" / "ab"
    shards.mkdir(parents=True)
    (shards / "cd.safetensors").write_bytes(bytes(1000))
    assert main(["paths", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == str(tmp_path / "state")
    assert facts["daemon"] == os.getpid()
    assert facts["runs"] == [{"folder": str(shards.parent.parent), "shards": 1, "bytes": 1000}]
    assert main(["paths"]) == 0
    assert "1 shard, 1.00 kB" in capsys.readouterr().out


def test_paths_works_without_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paths", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["daemon"] is None


def test_watch_prints_events_once_and_ends_with_ctrl_c(
    daemon: StubDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.events = [{"id": 1, "time": time.time(), "kind": "lease", "text": "training cat"}]
    daemon.interrupt("/v1/events", 2)
    assert main(["watch"]) == 0
    out = capsys.readouterr().out
    assert out.count("training cat") == 1
    assert "run 40%" in out


def test_watch_json_is_one_status_per_line(daemon: StubDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.interrupt("/v1/events", 2)
    assert main(["watch", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(json.loads(line) == daemon.status for line in lines)


def test_watch_names_a_gap_in_the_events(daemon: StubDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    from p2pcollab.cli.foreground import _Feed
    from p2pcollab.daemon.api_client import EventPage

    pages = [
        EventPage(events=({"id": 4, "time": 1.0, "kind": "x", "text": "x"},), first_id=1),
        EventPage(events=({"id": 9, "time": 1.0, "kind": "x", "text": "x"},), first_id=8),
    ]

    class Client:
        def status(self) -> dict[str, Any]:
            return {}

        def events(self, after: int) -> EventPage:
            return pages.pop(0)

    feed = _Feed(Client(), since=0.0)  # type: ignore[arg-type]
    assert [event["kind"] for event in feed.poll()] == ["x"]
    assert [event["text"] for event in feed.poll()] == ["3 earlier events were not kept", "x"]


def test_watch_draws_on_a_terminal_and_ctrl_c_ends_it(daemon: StubDaemon) -> None:
    master, slave = pty.openpty()
    script = "import sys; from p2pcollab.cli.main import main; sys.exit(main(['watch']))"
    environment = {**os.environ, "COLUMNS": "80", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=slave, stderr=slave, env=environment, cwd="/"
    )
    os.close(slave)
    try:
        assert "this device trains" in _read_until(master, "this device trains")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        os.close(master)


# The demo


@pytest.fixture
def fake_demo(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`run_demo` without devices: shows two states and returns a result."""
    wishes: list[Any] = []

    def run_demo(options: Any, on_update: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        wishes.append(options)
        on_update(samples.demo_state())
        on_update({"phase": "central baseline", "elapsed_s": 50.0, "message": "", "devices": []})
        return samples.demo_result()

    monkeypatch.setattr("p2pcollab.daemon.demo.run_demo", run_demo)
    return wishes


def test_demo_shows_its_progress_and_what_it_measured(
    fake_demo: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    words = ["demo", "--devices", "6", "--partition", "shared", "--seed", "3", "--limit", "500"]
    assert main([*words, "--json", str(result), "--keep", str(tmp_path / "keep")]) == 0
    out = capsys.readouterr().out
    assert "pi was killed" in out and "central baseline" in out and "96.1%" in out
    assert json.loads(result.read_text()) == samples.demo_result()
    (options,) = fake_demo
    assert (options.devices, options.partition, options.seed, options.limit) == (6, "shared", 3, 500)
    assert options.state == tmp_path / "keep"


def test_demo_json_on_standard_output_is_json_and_nothing_else(
    fake_demo: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == samples.demo_result()
    assert "central baseline" in captured.err


@pytest.mark.parametrize(
    ("change", "code"),
    [({"missing": ["t1"]}, 5), ({"digests": ["a" * 64, "b" * 64]}, P2PCollabError.exit_code)],
)
def test_a_demo_that_fails_to_show_its_point_is_an_error(
    change: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("p2pcollab.daemon.demo.run_demo", lambda *_: samples.demo_result() | change)
    assert main(["demo"]) == code
    assert "error: " in capsys.readouterr().err


# Shutting out


def test_forget_names_who_knows_and_shows_the_new_join_code(
    daemon: StubDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.forgotten = {
        "device": "ab" * 16,
        "name": "old-laptop",
        "epoch": 1,
        "told": ["desk", "pi"],
        "not_told": ["jetson"],
        "join_code": CODE,
    }
    assert main(["forget", "old-laptop"]) == 0
    out = capsys.readouterr().out
    assert "old-laptop (device abababab) is shut out" in out
    assert "desk, pi" in out and "jetson" in out and CODE in out.split()
    assert main(["forget", "old-laptop", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == daemon.forgotten
    assert daemon.count("/v1/forget") == 2


def test_forget_needs_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forget", "old-laptop"]) == 3
    one_error_line(capsys)


def _read_until(descriptor: int, wanted: str) -> str:
    """What a terminal got, up to and with some text."""
    text, deadline = "", time.monotonic() + DEADLINE_S
    while wanted not in text and time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.5)[0]:
            text += os.read(descriptor, 65536).decode(errors="replace")
    return text
