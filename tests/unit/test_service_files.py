"""The files that make a system start the daemon say what they should, whatever the paths are."""

from __future__ import annotations

import configparser
import json
import plistlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pcollab.cli.main import main
from p2pcollab.daemon.options import DaemonOptions
from p2pcollab.daemon.service import Launchd, Systemd, install, manager_here, status, uninstall
from p2pcollab.daemon.service_files import Service, launchd_plist, systemd_unit
from p2pcollab.errors import ExitCode, P2PCollabError, UsageError


def service(state: str = "/home/me/.local/state/p2pcollab", **changes: Any) -> Service:
    fields = {"name": "p2pcollab", "python": Path("/opt/venv/bin/python"), "state": Path(state), **changes}
    return Service(**fields)


def sections(unit: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit)
    return parser


def test_unit_waits_for_ready_restarts_and_has_a_watchdog() -> None:
    unit = sections(systemd_unit(service()))
    assert unit["Service"]["Type"] == "notify"
    assert int(unit["Service"]["WatchdogSec"]) > 0
    assert unit["Service"]["Restart"] == "on-failure"
    assert shlex.split(unit["Service"]["ExecStart"]) == ["/opt/venv/bin/python", "-m", "p2pcollab.daemon"]
    assert unit["Service"]["StandardInput"] == f"file:{service().options_file}"
    assert unit["Install"]["WantedBy"] == "default.target"


def test_unit_does_not_repeat_what_a_restart_does_not_mend() -> None:
    codes = sections(systemd_unit(service()))["Service"]["RestartPreventExitStatus"].split()
    assert {int(code) for code in codes} == {
        ExitCode.USAGE,
        ExitCode.INCOMPATIBLE,
        ExitCode.NOT_AUTHORISED,
    }


def test_daemon_understands_its_options_and_they_hold_no_secret() -> None:
    options = DaemonOptions.parse(service().options)
    assert (options.mode, options.state, options.attached) == ("resume", service().state, False)
    assert options.code is None and options.secret_hex is None


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(
    ("programs", "states"),
    [("plain", "plain"), ("with space", "with space"), ("100 % $HOME", "100 % $HOME 'quoted' \"twice\"")],
)
def test_systemd_accepts_the_unit_whatever_the_paths_are(tmp_path: Path, programs: str, states: str) -> None:
    state, python = tmp_path / states, tmp_path / programs / "python"
    for folder in {state, python.parent}:
        folder.mkdir()
    python.symlink_to(sys.executable)
    path = tmp_path / "p2pcollab.service"
    path.write_text(systemd_unit(service(str(state), python=python)))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert not [line for line in done.stderr.splitlines() if "p2pcollab.service" in line], done.stderr


def test_property_list_says_the_same_and_makes_the_daemon_watch_itself() -> None:
    agent = plistlib.loads(launchd_plist(service()))
    assert agent["Label"] == "org.p2pcollab.p2pcollab"
    assert agent["ProgramArguments"] == ["/opt/venv/bin/python", "-m", "p2pcollab.daemon"]
    assert agent["StandardInPath"] == str(service().options_file)
    assert agent["KeepAlive"] == {"SuccessfulExit": False} and agent["RunAtLoad"] is True
    assert int(agent["EnvironmentVariables"]["P2PCOLLAB_WATCHDOG_S"]) > 0


@pytest.mark.parametrize("name", ["", "a b", "../x", "x.service", "-x", "ä"])
def test_name_that_is_no_unit_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        service(name=name)


def test_program_that_systemd_would_not_start_is_refused() -> None:
    with pytest.raises(UsageError, match="plain path"):
        service(python=Path("/opt/it's mine/python"))


def test_path_with_a_line_break_cannot_add_lines_to_the_unit() -> None:
    with pytest.raises(UsageError):
        service("/home/me\nExecStartPre=/bin/evil")


def test_files_are_where_each_manager_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert Systemd().file_of(service()) == tmp_path / "systemd" / "user" / "p2pcollab.service"
    assert Launchd().file_of(service()).parts[-3:] == (
        "Library",
        "LaunchAgents",
        "org.p2pcollab.p2pcollab.plist",
    )


def test_print_shows_the_file_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    state = tmp_path / "state"
    assert main(["service", "install", "--print", "--state", str(state)]) == ExitCode.OK
    shown = capsys.readouterr()
    if sys.platform != "darwin":
        assert sections(shown.out)["Service"]["WorkingDirectory"] == str(state)
    assert str(manager_here().file_of(service())) in shown.err
    assert list(tmp_path.iterdir()) == []


def test_without_a_run_to_go_on_with_nothing_is_installed(tmp_path: Path) -> None:
    wanted = service(str(tmp_path))
    with pytest.raises(UsageError, match="holds no run yet"):
        install(wanted, manager_here())
    assert list(tmp_path.iterdir()) == []


def test_where_no_manager_answers_one_line_says_so_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # No programs, so none that manages services; on every system.
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    state = tmp_path / "state"
    (state / "runs" / "x").mkdir(parents=True)
    (state / "runs" / "x" / "spec.json").write_text("{}")
    assert main(["service", "install", "--state", str(state)]) == ExitCode.ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "on this system" in error and "--print" in error
    assert [path.name for path in state.iterdir()] == ["runs"]
    assert not (tmp_path / "config").exists()
    assert main(["service", "status", "--json", "--state", str(state)]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["installed"] is False
    assert main(["service", "uninstall", "--state", str(state)]) == ExitCode.USAGE


class _Recording(Systemd):
    """A systemd that takes every order."""

    def __init__(self) -> None:
        self.orders: list[str] = []

    def check(self) -> None:
        pass

    def _order(self, *words: str) -> None:
        self.orders.append(" ".join(words))


def test_install_writes_both_files_and_uninstall_removes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    state = tmp_path / "state"
    (state / "runs" / "x").mkdir(parents=True)
    (state / "runs" / "x" / "spec.json").write_text("{}")
    wanted, systemd = service(str(state)), _Recording()
    path = install(wanted, systemd)
    assert path.read_text() == systemd_unit(wanted)
    assert wanted.options_file.stat().st_mode & 0o077 == 0
    assert systemd.orders == ["daemon-reload", "enable --now p2pcollab.service"]
    assert status(wanted, systemd)["installed"]
    uninstall(wanted, systemd)
    assert not path.exists() and not wanted.options_file.exists()
    assert systemd.orders[2:] == ["disable --now p2pcollab.service"]
    assert (state / "runs" / "x" / "spec.json").exists()
    with pytest.raises(P2PCollabError, match="is installed"):
        uninstall(wanted, systemd)
