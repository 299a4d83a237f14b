"""Commands that start a daemon or end it: new, join, leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import status_samples as samples
from model_specs import model_spec
from stub_daemon import StubDaemon

from p2pcollab.cli.main import main
from p2pcollab.daemon.options import DaemonOptions
from p2pcollab.run import JoinCode, RunSpec

CODE = str(JoinCode.create(bytes(16), model_spec().run_id))
DEADLINE_S = 20.0

pytestmark = pytest.mark.usefixtures("cli_environment")


class Launches:
    """Takes the launcher's place: notes the options, and gives a child process that the test scripts."""

    def __init__(self, stub: StubDaemon, script: str) -> None:
        self.options: list[DaemonOptions] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._stub = stub
        self._script = script

    def __call__(self, options: dict[str, Any]) -> Any:
        from p2pcollab.daemon.launcher import Launched

        self.options.append(DaemonOptions.parse(json.dumps(options).encode()))
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        return Launched(process=self.process, pid=self.process.pid, port=1)

    def leave(self) -> None:
        """Has the obedient child end."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.close()


#: A daemon that leaves when its standard input ends, one that does not listen, one that finds its data bad.
OBEDIENT = "import sys; sys.stdin.read()"
DEAF = "import threading; threading.Event().wait()"
FAILING = (
    'print(\'{"ok": false, "kind": "DataError", "what": "no images", "fix": "add some"}\');'
    "raise SystemExit(2)"
)


@pytest.fixture
def launches(daemon: StubDaemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Launches]]:
    made: list[Launches] = []

    def install(script: str) -> Launches:
        made.append(Launches(daemon, script))
        monkeypatch.setattr("p2pcollab.daemon.launcher.launch", made[-1])
        return made[-1]

    yield install
    for one in made:
        if one.process is not None:
            one.process.kill()
            one.process.wait()
            for pipe in (one.process.stdin, one.process.stdout):
                assert pipe is not None
                pipe.close()


def test_first_ctrl_c_asks_the_daemon_to_leave_and_waits_for_it(
    daemon: StubDaemon, launches: Callable[[str], Launches], capsys: pytest.CaptureFixture[str]
) -> None:
    launched = launches(OBEDIENT)
    daemon.interrupt("/v1/status", 1, on_leave=launched.leave)
    assert main(["join", "--code", CODE]) == 0
    assert daemon.count("/v1/leave") == 1
    captured = capsys.readouterr()
    assert "Ctrl-C again to force" in captured.out and "left the run" in captured.out


def test_second_ctrl_c_kills_the_daemons_processes(
    daemon: StubDaemon, launches: Callable[[str], Launches], capsys: pytest.CaptureFixture[str]
) -> None:
    launched = launches(DEAF)

    def twice(path: str) -> None:
        if path in ("/v1/status", "/v1/leave") and daemon.count(path) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    daemon.on_request = twice
    assert main(["join", "--code", CODE]) == 130
    assert launched.process is not None and launched.process.returncode == -signal.SIGKILL


def test_a_daemon_that_ends_with_an_error_gives_its_reason_and_exit_code(
    launches: Callable[[str], Launches], capsys: pytest.CaptureFixture[str]
) -> None:
    launches(FAILING)
    assert main(["join", "--code", CODE]) == 2
    assert "error: no images; add some" in capsys.readouterr().err


def test_a_detached_daemon_that_finds_its_input_wanting_says_so_here(
    daemon: StubDaemon, launches: Callable[[str], Launches], capsys: pytest.CaptureFixture[str]
) -> None:
    launches(FAILING)
    daemon.status["phase"] = "loading"
    assert main(["join", "--code", CODE, "--detach"]) == 2
    assert "error: no images; add some" in capsys.readouterr().err


def test_a_daemon_that_is_killed_is_reported(
    daemon: StubDaemon, launches: Callable[[str], Launches], capsys: pytest.CaptureFixture[str]
) -> None:
    launches("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert main(["join", "--code", CODE]) == 3
    assert "was killed (signal 9)" in capsys.readouterr().err


def test_new_makes_a_run_and_prints_the_command_for_the_next_device(
    launches: Callable[[str], Launches], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    launched = launches(OBEDIENT)
    words = ["new", "digits", "--data", "digits", "--share", "1/3", "--limit", "900", "--prefer", "3,4"]
    assert main([*words, "--budget", "0.5", "--name", "desk", "--detach"]) == 0
    (options,) = launched.options
    assert options.spec is not None and options.secret_hex is not None
    spec = RunSpec.decode(options.spec.encode())
    code = str(JoinCode.create(bytes.fromhex(options.secret_hex), spec.run_id))
    assert f"    p2pcollab join --code {code} --data FOLDER\n" in capsys.readouterr().out
    assert (options.mode, options.prefer, options.budget) == ("new", ("3", "4"), 0.5)
    assert (options.nickname, options.share, options.attached) == ("desk", "1/3", False)
    assert options.state == tmp_path / "state"
    assert len(spec.tasks) == 10 and spec.model.family == "digits"
    assert spec.schedule.budget_samples % 900 == 0


def test_two_equal_news_make_two_runs(launches: Callable[[str], Launches]) -> None:
    launched = launches(OBEDIENT)
    for _ in range(2):
        assert main(["new", "digits", "--data", "digits", "--detach"]) == 0
    assert launched.options[0].spec != launched.options[1].spec
    assert launched.options[0].secret_hex != launched.options[1].secret_hex


def test_detached_json_holds_what_a_script_needs(
    launches: Callable[[str], Launches], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    launches(OBEDIENT)
    assert main(["new", "digits", "--data", "digits", "--detach", "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert set(facts) == {"pid", "port", "state", "join_code"}
    assert JoinCode.parse(facts["join_code"])
    assert captured.err == ""


def test_join_code_comes_from_option_standard_input_or_environment(
    launches: Callable[[str], Launches], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launches(OBEDIENT)
    assert main(["join", "--code", CODE.lower(), "--detach"]) == 0
    read, write = os.pipe()
    os.write(write, f"{CODE}\n".encode())
    os.close(write)
    with os.fdopen(read) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert main(["join", "--code", "-", "--detach"]) == 0
    monkeypatch.setenv("P2PCOLLAB_CODE", CODE)
    assert main(["join", "--detach"]) == 0
    assert [(options.mode, options.code) for options in launched.options] == [("join", CODE)] * 3


def test_classes_of_an_option_are_separated_as_in_csv(launches: Callable[[str], Launches]) -> None:
    launched = launches(OBEDIENT)
    words = ["join", "--code", CODE, "--detach", "--prefer", 'cat, "salt, pepper",cat', "--prefer", "dog,"]
    assert main(words) == 0
    assert [options.prefer for options in launched.options] == [("cat", "salt, pepper", "dog")]


def test_join_without_a_code_resumes(launches: Callable[[str], Launches]) -> None:
    launched = launches(OBEDIENT)
    assert main(["join", "--detach", "--replicate", "all", "--peer", "a:1", "--peer", "b:2"]) == 0
    (options,) = launched.options
    assert (options.mode, options.code, options.replicate_all) == ("resume", None, True)
    assert options.peers == ("a:1", "b:2")


def test_paths_given_to_the_daemon_are_absolute(
    daemon: StubDaemon, launches: Callable[[str], Launches], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launches(OBEDIENT)
    shutil.copytree(daemon.folder, tmp_path / "s")  # where its API is
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (
        main(["join", "--code", CODE, "--data", "pics", "--data-root", "sets", "--state", "s", "--detach"])
        == 0
    )
    (options,) = launched.options
    assert options.data == str(tmp_path / "pics")
    assert (options.data_root, options.state) == (tmp_path / "sets", tmp_path / "s")


def test_leave_waits_until_the_daemon_has_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", OBEDIENT], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        with StubDaemon(tmp_path / "state", samples.status(), pid=child.pid) as stub:
            stub.on_request = lambda path: child.stdin.close() if path == "/v1/leave" else None  # type: ignore[union-attr]
            assert main(["leave"]) == 0
        assert "left the run" in capsys.readouterr().out
        assert child.wait(DEADLINE_S) == 0
