"""`status`, `watch`, `peers`, `code` and `paths`: what is going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import typer

from ..errors import NotRunningError
from . import options as opt
from .output import console, note, print_json, say, show, state_folder

_PANEL: Final = "See what is going on"
_STATUS_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab status

p2pcollab status --json | jq .progress

p2pcollab status --code P2P-7KQ2-…      (without a daemon)
"""


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("status", rich_help_panel=_PANEL, epilog=_STATUS_EXAMPLES)(status)
    app.command("watch", rich_help_panel=_PANEL)(watch)
    app.command("peers", rich_help_panel=_PANEL)(peers)
    app.command("code", rich_help_panel=_PANEL)(code)
    app.command("paths", rich_help_panel=_PANEL)(paths)


def status(
    code: opt.Code = None,
    interface: opt.Interface = None,
    peer: opt.Peer = None,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """The run, this device and its peers, once. With a join code this works without a daemon too."""
    facts = _facts(state, code, interface, peer)
    if as_json:
        print_json(facts)
        return
    from .view_status import status_page

    show(status_page(facts, width=console().width))


def watch(state: opt.State = None, as_json: opt.Json = False) -> None:
    """The same, live, until Ctrl-C. Plain lines where no terminal is; with --json one status a second."""
    from ..daemon.api_client import ApiClient
    from .foreground import choose_screen
    from .foreground import watch as follow

    with ApiClient(state_folder(state)) as client:
        follow(client, choose_screen(as_json))


def peers(
    code: opt.Code = None,
    interface: opt.Interface = None,
    peer: opt.Peer = None,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """The other devices of the run: what they do, how fast they are, when they were last heard."""
    facts = _facts(state, code, interface, peer)
    if as_json:
        print_json(list(facts.get("peers") or ()))
        return
    from .view_status import peers_page

    show(peers_page(facts, width=console().width))


def _facts(
    state: Path | None, code: str | None, interface: str | None, peers: list[str] | None
) -> dict[str, Any]:
    """The status that this device's daemon, or with a join code an observer, knows."""
    from ..daemon.api_client import ApiClient
    from .observing import daemon_or_code, observer_options

    folder = state_folder(state)
    join_code = daemon_or_code(folder, code)
    if join_code is None:
        with ApiClient(folder) as client:
            return client.status()
    from ..daemon.observe import observe

    note("no daemon runs here: asking the run's devices …")
    return observe(observer_options(folder, join_code, interface, peers))


def code(state: opt.State = None, as_json: opt.Json = False) -> None:
    """The join code of this device's run: `p2pcollab code | ssh pi p2pcollab join --code - --detach`."""
    from ..daemon.api_client import ApiClient

    with ApiClient(state_folder(state)) as client:
        join_code = str(client.run_info()["join_code"])
    if as_json:
        print_json({"join_code": join_code})
    else:
        say(join_code)


def paths(state: opt.State = None, as_json: opt.Json = False) -> None:
    """Where this device keeps what: state folder, log, runs, and how large they are."""
    facts = _paths(state_folder(state))
    if as_json:
        print_json(facts)
        return
    from . import format as fmt

    daemon = f"process {facts['daemon']}" if facts["daemon"] else "none runs"
    for label, text in (
        ("state folder", facts["state"]),
        ("daemon", daemon),
        ("daemon's log", facts["log"]),
        ("daemon's API", facts["api"]),
        ("identity", facts["identity"]),
    ):
        say(f"{label:<14}{text}")
    for run in facts["runs"]:
        say(f"{'run':<14}{run['folder']}  {fmt.plural(run['shards'], 'shard')}, {fmt.size(run['bytes'])}")


def _paths(folder: Path) -> dict[str, Any]:
    from ..daemon.api_client import find_daemon
    from ..daemon.launcher import LOG_NAME

    try:
        daemon = find_daemon(folder).pid
    except NotRunningError:
        daemon = None
    runs = sorted(path for path in folder.glob("runs/*") if path.is_dir())
    return {
        "state": str(folder),
        "daemon": daemon,
        "log": str(folder / LOG_NAME),
        "api": str(folder / "api.json"),
        "identity": str(folder / "identity.key"),
        "runs": [_run_sizes(run) for run in runs],
    }


def _run_sizes(run: Path) -> dict[str, Any]:
    sizes = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    shards = [path for path in sizes if path.suffix == ".safetensors"]
    return {"folder": str(run), "shards": len(shards), "bytes": sum(sizes.values())}
