"""`service install`, `uninstall` and `status`: the daemon as a service of this system."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from . import options as opt
from .output import note, print_json, say, state_folder

if TYPE_CHECKING:
    from ..daemon.service_files import Service

Name = Annotated[
    str, typer.Option("--name", metavar="NAME", help="Name of the service, where a machine has several.")
]

_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab join --code P2P-7KQ2-… --data ./pics --detach && p2pcollab leave    (once: the run and its options)

p2pcollab service install

p2pcollab service install --print > ~/.config/systemd/user/p2pcollab.service
"""


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    group = typer.Typer(help="Have this system start the daemon, and start it again when it fails or hangs.")
    group.command("install", epilog=_EXAMPLES)(install)
    group.command("uninstall")(uninstall)
    group.command("status")(status)
    app.add_typer(group, name="service", rich_help_panel="Take part")


def install(
    name: Name = "p2pcollab",
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the unit or property list, and write nothing.")
    ] = False,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Start the daemon now and whenever this user's session begins: a systemd user unit, or a launchd agent.

    It goes on with the run of the state folder, with the options that were given when it was joined.
    """
    from ..daemon import service as services

    wanted, manager = _service(name, state), services.manager_here()
    if print_only:
        contents = manager.contents(wanted).decode()
        if as_json:
            print_json({"file": str(manager.file_of(wanted)), "contents": contents})
        else:
            say(contents.rstrip("\n"))
            note(f"its place is {manager.file_of(wanted)}")
            note(
                f"the daemon reads its options from {wanted.options_file}: {wanted.options.decode().strip()}"
            )
        return
    path = services.install(wanted, manager)
    if as_json:
        print_json(services.status(wanted, manager))
        return
    say(f"installed and started: {path}")
    if manager.name == "systemd":
        note("to have it run while nobody is logged in: loginctl enable-linger")


def uninstall(name: Name = "p2pcollab", state: opt.State = None, as_json: opt.Json = False) -> None:
    """Stop the service and forget it. The run stays in the state folder."""
    from ..daemon import service as services

    wanted, manager = _service(name, state), services.manager_here()
    path = services.uninstall(wanted, manager)
    if as_json:
        print_json(services.status(wanted, manager))
    else:
        say(f"stopped and removed: {path}")


def status(name: Name = "p2pcollab", state: opt.State = None, as_json: opt.Json = False) -> None:
    """Whether the service is installed and runs."""
    from ..daemon import service as services

    facts = services.status(_service(name, state), services.manager_here())
    if as_json:
        print_json(facts)
        return
    if not facts["installed"]:
        say(f"not installed: there is no {facts['file']}")
    else:
        say(f"{'runs' if facts['active'] else 'does not run'}: {facts['file']} ({facts['manager']})")


def _service(name: str, state: Path | None) -> Service:
    from ..daemon.service_files import Service

    return Service(name=name, python=Path(sys.executable).absolute(), state=state_folder(state).absolute())
