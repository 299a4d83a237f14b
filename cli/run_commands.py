"""`new`, `join`, `leave` and `forget`: taking part in a run, and shutting others out."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..errors import ExitCode, UsageError
from . import options as opt
from .output import note, print_json, print_json_line, say, state_folder

if TYPE_CHECKING:
    from ..daemon.options import DaemonOptions
    from ..run import RunSpec

_RUN: Final = "The run"
_NEW_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab new pets --data ./photos

p2pcollab new digits --data digits --share 1/3 --expect-samples 1437

p2pcollab new words --data ./recordings                    (WAV files in a folder for each word)

p2pcollab new cifar --data torchvision:cifar10 --download --model vgg11 --epochs 30 --detach
"""
_JOIN_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab join --code P2P-7KQ2-… --data ./pics

p2pcollab join --code - --data ./more --prefer cat,dog --budget 0.5 < code.txt

p2pcollab join                  (goes on with this state folder's run)
"""


_FORGET_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab forget old-laptop

p2pcollab forget 3f9c02a1 --json | jq -r .join_code
"""


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("new", rich_help_panel="Take part", epilog=_NEW_EXAMPLES)(new)
    app.command("join", rich_help_panel="Take part", epilog=_JOIN_EXAMPLES)(join)
    app.command("leave", rich_help_panel="Take part")(leave)
    app.command("forget", rich_help_panel="Take part", epilog=_FORGET_EXAMPLES)(forget)


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The run's name.")],
    data: opt.Data = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = False,
    share: opt.ShareOption = None,
    limit: opt.Limit = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="alexnet|vgg11|vgg16|kws|digits|auto",
            rich_help_panel=_RUN,
            help="Network family; `auto` goes by the data.",
        ),
    ] = "auto",
    epochs: Annotated[
        float | None,
        typer.Option(
            "--epochs",
            metavar="N",
            rich_help_panel=_RUN,
            show_default="what suits the model",
            help="How often each task sees all the data.",
        ),
    ] = None,
    expect_samples: Annotated[
        int | None,
        typer.Option(
            "--expect-samples",
            min=1,
            metavar="N",
            rich_help_panel=_RUN,
            show_default="what this device has",
            help="Training samples that all devices together will have.",
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="HxW",
            rich_help_panel=_RUN,
            show_default="from the data",
            help="Size that every image is brought to, for example 64x64.",
        ),
    ] = None,
    classes_per_task: Annotated[
        int | None,
        typer.Option(
            "--classes-per-task",
            min=1,
            metavar="N",
            rich_help_panel=_RUN,
            show_default="1; more above 20 classes",
            help="How many classes are trained as a unit.",
        ),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            "--groups",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            rich_help_panel=_RUN,
            show_default="classes in their order",
            help="Which classes are trained as a unit: one task a line, classes separated as in CSV.",
        ),
    ] = None,
    branches_per_class: Annotated[
        int,
        typer.Option(
            "--branches-per-class",
            min=1,
            max=8,
            metavar="N",
            rich_help_panel=_RUN,
            help="More survive more lost devices, and take as much more training; the accuracy gains little.",
        ),
    ] = 1,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=2**31 - 1, metavar="N", rich_help_panel=_RUN, show_default="random"
        ),
    ] = None,
    prefer: opt.Prefer = None,
    tasks: opt.Tasks = None,
    budget: opt.Budget = None,
    threads: opt.Threads = None,
    replicate: opt.Replicate = "quota",
    interface: opt.Interface = None,
    port: opt.Port = 0,
    peer: opt.Peer = None,
    nickname: opt.Nickname = None,
    detach: opt.Detach = False,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Create a run from the data of this device, print its join code, and take part in it."""
    if data is None:
        raise UsageError("--data is missing: the run's classes come from it", "give a folder, or `digits`")
    source = opt.data_source(data)
    assert source is not None
    from ..data import inspect
    from ..planning import PlanOptions, parse_image_size, plan_run, tasks_of
    from ..run import JoinCode

    part = _part(
        mode="new",
        state=state,
        data=source,
        data_root=data_root,
        download=download,
        share=share,
        limit=limit,
        prefer=prefer,
        tasks=tasks,
        budget=budget,
        threads=threads,
        replicate=replicate,
        interface=interface,
        port=port,
        peer=peer,
        nickname=nickname,
        detach=detach,
    )
    info = inspect(source, part.data_root, download=download)
    wishes = PlanOptions(
        family=None if model == "auto" else model,
        epochs=epochs,
        expected_samples=expect_samples or (min(limit, info.train_images) if limit else None),
        image_size=parse_image_size(image_size) if image_size else None,
        classes_per_task=classes_per_task,
        groups=opt.class_groups(groups, info.classes) if groups else None,
        branches_per_class=branches_per_class,
        # Two runs that are alike in all else must still be two runs: their id is the digest of the spec.
        seed=seed if seed is not None else secrets.randbelow(2**31),
    )
    spec = plan_run(name, info, wishes)
    tasks_of(spec, (*part.prefer, *part.tasks))
    code = JoinCode.create(secrets.token_bytes(16), spec.run_id)
    complete = part.model_copy(update={"spec": spec.encode().decode(), "secret_hex": code.secret.hex()})
    _take_part(complete, as_json, join_code=str(code), announcement=_announcement(spec, str(code)))


def join(
    code: opt.Code = None,
    data: opt.Data = None,
    data_root: opt.DataRoot = None,
    download: opt.Download = False,
    share: opt.ShareOption = None,
    limit: opt.Limit = None,
    prefer: opt.Prefer = None,
    tasks: opt.Tasks = None,
    budget: opt.Budget = None,
    threads: opt.Threads = None,
    replicate: opt.Replicate = "quota",
    interface: opt.Interface = None,
    port: opt.Port = 0,
    peer: opt.Peer = None,
    nickname: opt.Nickname = None,
    detach: opt.Detach = False,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Take part in a run: find its devices, train what is needed, keep the model alive.

    Without a join code, go on with the run that the state folder holds.

    Without data, train nothing, but keep and hand on parts of the model.
    """
    known = opt.join_code(code)
    part = _part(
        mode="join" if known else "resume",
        state=state,
        data=opt.data_source(data),
        data_root=data_root,
        download=download,
        share=share,
        limit=limit,
        prefer=prefer,
        tasks=tasks,
        budget=budget,
        threads=threads,
        replicate=replicate,
        interface=interface,
        port=port,
        peer=peer,
        nickname=nickname,
        detach=detach,
        code=known,
    )
    _take_part(part, as_json)


def leave(state: opt.State = None, as_json: opt.Json = False) -> None:
    """Make this device's daemon finish its step, say good-bye and stop. What it has made stays in the run."""
    from ..daemon.api_client import ApiClient

    with ApiClient(state_folder(state)) as client:
        client.leave()
        pid = client.address.pid
    gone = _wait_for_end(pid, within_s=30.0)
    if as_json:
        print_json({"pid": pid, "stopped": gone})
    else:
        say("left the run" if gone else f"the daemon (process {pid}) was asked to leave and is still busy")
    if not gone:
        raise typer.Exit(ExitCode.ERROR)


def forget(
    device: Annotated[
        str,
        typer.Argument(
            metavar="DEVICE", help="Its name, or the beginning of its id: see `p2pcollab peers --json`."
        ),
    ],
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Shut a device out of the run for good, and give the run a new join code.

    All other devices go on with a new run secret: those that are here at once, the others when they come
    back. What others have built on the device's work stays in the model; its newest contributions are
    dropped.
    """
    from ..daemon.api_client import ApiClient

    with ApiClient(state_folder(state)) as client:
        done = client.forget(device)
    if as_json:
        print_json(done)
        return
    say(f"{done['name']} (device {done['device'][:8]}) is shut out of the run")
    if done["told"]:
        say(f"went over to the new secret: {', '.join(done['told'])}")
    if done["not_told"]:
        say(f"will, when they are back: {', '.join(done['not_told'])}")
    say(f"\nNew join code (the old one is of no use any more):\n\n    {done['join_code']}\n")


def _part(
    *,
    mode: str,
    state: Path | None,
    share: str | None,
    data_root: Path | None,
    prefer: list[str] | None,
    tasks: list[str] | None,
    replicate: str,
    peer: list[str] | None,
    detach: bool,
    **same_name: Any,
) -> DaemonOptions:
    """How this device takes part, checked as far as that goes without the run's description."""
    if replicate not in ("quota", "all"):
        raise UsageError(f"--replicate is quota or all, not {replicate!r}")
    if share is not None:
        from ..data.partition import Share

        Share.parse(share)
    from ..daemon.options import DaemonOptions

    fields = {
        "mode": mode,
        "state": str(state_folder(state)),
        "share": share,
        "data_root": None if data_root is None else str(opt.folder(data_root)),
        "prefer": opt.class_names("--prefer", prefer),
        "tasks": opt.class_names("--tasks", tasks),
        "replicate_all": replicate == "all",
        "peers": tuple(peer or ()),
        "attached": not detach,
        **same_name,
    }
    return DaemonOptions.parse(json.dumps(fields).encode())


def _announcement(spec: RunSpec, code: str) -> str:
    """What the person who makes a run must know: what it is, and how others join."""
    from . import format as fmt

    return (
        f"Run {spec.name!r}: {fmt.plural(len(spec.classes), 'class', 'classes')} in "
        f"{fmt.plural(len(spec.tasks), 'task')} · {spec.model.family} on {_examples(spec)} · "
        f"{fmt.count(spec.schedule.budget_samples)} samples per task\n\n"
        f"Join code (who has it can read and change the run):\n\n    {code}\n\n"
        f"On the next device:\n\n    p2pcollab join --code {code} --data FOLDER\n"
    )


def _examples(spec: RunSpec) -> str:
    """What the run's examples are brought to."""
    audio = spec.input.audio
    if audio is None:
        return f"{spec.input.height}x{spec.input.width} images"
    return f"clips of {audio.clip_ms / 1000:g} s"


def _take_part(
    part: DaemonOptions, as_json: bool, join_code: str | None = None, announcement: str = ""
) -> None:
    """Start the daemon; stay with it unless it is detached."""
    from ..daemon.api_client import ApiClient
    from ..daemon.launcher import launch
    from .foreground import attend, await_prepared, choose_screen

    if not as_json:
        note("starting …")
    launched = launch(part.model_dump(mode="json"))
    if announcement and not as_json:
        say(announcement)
    started = {"pid": launched.pid, "port": launched.port, "state": str(part.state), "join_code": join_code}
    if not part.attached:
        with ApiClient(part.state) as client:
            await_prepared(launched, client)
        if as_json:
            print_json(started)
        else:
            say(f"the daemon runs (process {launched.pid}): see `p2pcollab watch`, or `p2pcollab leave`")
        return
    if as_json:
        print_json_line(started)
    with ApiClient(part.state) as client:
        attend(launched, client, choose_screen(as_json))
    if not as_json:
        say("left the run; `p2pcollab join` goes on with it")


def _wait_for_end(pid: int, within_s: float) -> bool:
    """Whether a process has ended in time; one that waits for its parent to notice has."""
    import time

    import psutil

    deadline = time.monotonic() + within_s
    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    except psutil.NoSuchProcess:
        pass
    return True
