"""`demo`: several real daemons on this machine train one model together."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ..errors import IncompleteError, P2PCollabError
from . import options as opt
from .output import console, note, print_json, say, show

_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab demo

p2pcollab demo --dataset cifar10 --data-root ./data --limit 10000 --epochs 6 --devices 5

p2pcollab demo --partition shared --seed 3 --json result.json --keep ./demo-state
"""
_LOG_EVERY_S: Final = 5.0


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command("demo", rich_help_panel="Try it", epilog=_EXAMPLES)(demo)


def demo(
    devices: Annotated[int, typer.Option("--devices", min=4, max=12, metavar="4..12")] = 5,
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset", metavar="digits|cifar10|…", help="`digits` needs nothing but this program."
        ),
    ] = "digits",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="alexnet|vgg11|vgg16|kws|digits",
            show_default="by the data",
            help="Network family.",
        ),
    ] = None,
    data_root: opt.DataRoot = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            "--epochs",
            metavar="N",
            show_default="what suits the model",
            help="How often each task sees all data.",
        ),
    ] = None,
    partition: Annotated[
        str,
        typer.Option(
            "--partition",
            metavar="iid|shared",
            help="`iid`: each device has its own part of the data; `shared`: each has all.",
        ),
    ] = "iid",
    limit: opt.Limit = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, metavar="N")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            show_default=False,
            help="Write what was measured; `-` for standard output.",
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="DIR",
            show_default=False,
            help="Keep the devices' state, logs and the model in this folder.",
        ),
    ] = None,
) -> None:
    """Train one model with several daemons on this machine. One joins late, one is killed, and it works."""
    from ..daemon.demo import DemoOptions, run_demo
    from ..files import write_atomic

    wishes = DemoOptions(
        dataset=dataset,
        data_root=opt.folder(data_root),
        model=model,
        devices=devices,
        epochs=epochs,
        partition=partition,
        limit=limit,
        seed=seed,
        state=opt.folder(keep),
    )
    to_stdout = json_file is not None and str(json_file) == "-"
    if json_file is not None and not to_stdout and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {json_file.absolute().parent}", param_hint="'--json'")
    screen = (
        _LiveDemo()
        if sys.stdout.isatty() and not to_stdout
        else _LoggedDemo(sys.stderr if to_stdout else None)
    )
    try:
        result = run_demo(wishes, screen.show)
    finally:
        screen.close()
    if to_stdout:
        print_json(result)
    else:
        from .view_demo import demo_summary

        show(demo_summary(result, width=console().width))
    if json_file is not None and not to_stdout:
        import json

        write_atomic(json_file.absolute(), json.dumps(result, indent=2).encode() + b"\n")
    _judge(result)


def _judge(result: Mapping[str, Any]) -> None:
    """A demo that did not do what it shows ends with an error."""
    if result["missing"]:
        raise IncompleteError(
            f"the assembled model lacks {len(result['missing'])} tasks", "see the devices' logs"
        )
    if len(set(result["digests"])) != 1:
        raise P2PCollabError(
            "two devices assembled different models", "please report it with the state (--keep)"
        )


class _LiveDemo:
    """The view on a terminal."""

    def __init__(self) -> None:
        from rich.live import Live

        self._console = console()
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def show(self, state: Mapping[str, Any]) -> None:
        from .view_demo import demo_view

        size = self._console.size
        self._live.update(demo_view(state, width=size.width, height=size.height - 1), refresh=True)

    def close(self) -> None:
        self._live.stop()


class _LoggedDemo:
    """A line when the phase or a device changes, and every few seconds."""

    def __init__(self, stream: Any = None) -> None:
        self._say = note if stream is sys.stderr else say
        self._last: tuple[object, ...] = ()
        self._due = 0.0

    def show(self, state: Mapping[str, Any]) -> None:
        from .view_demo import demo_line

        devices = state.get("devices") or ()
        key = (state.get("phase"), *((device["name"], device["state"], device["note"]) for device in devices))
        now = time.monotonic()
        if key != self._last or now >= self._due:
            self._say(demo_line(state))
            self._last, self._due = key, now + _LOG_EVERY_S

    def close(self) -> None:
        pass
