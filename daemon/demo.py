"""The demo: several real daemons on this machine train one model, one joins late, one is killed half way.

What it measures is written by `run_demo` as one dictionary; its keys are the documented ones of
`p2pcollab demo --json`.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import P2PCollabError, RunError, UsageError
from ..run import JoinCode, RunSpec
from .fleet import Fleet, LocalDevice
from .launcher import LOG_NAME

DEVICES_MIN: Final = 4
#: More daemons than this on one machine measure the machine, not the method.
DEVICES_MAX: Final = 12
_UPDATE_S: Final = 0.25
_LATE_JOIN_AT: Final = 0.15
_KILL_AT: Final = 0.5
_NAMES: Final = ("desktop", "laptop", "jetson", "pi", "tablet")
#: Share of one core that each device may use, in turn: the devices of a household differ.
_CORE_SHARES: Final = (1.0, 0.75, 0.5, 0.35)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the demo runs."""

    dataset: str = "digits"
    data_root: Path | None = None
    model: str | None = None
    devices: int = 5
    epochs: float | None = None
    partition: str = "iid"
    limit: int | None = None
    seed: int = 0
    interface: str = "127.0.0.1"
    #: The late joiner, the killed device: the demo's two events. Off for plain measurements.
    events: bool = True
    #: Where the devices keep their state; a temporary folder when not given.
    state: Path | None = None
    #: Ends a run that does not finish.
    timeout_s: float = 3600.0


@dataclass(slots=True)
class _Demo:
    """The state that the live view is shown."""

    fleet: Fleet
    started: float
    on_update: Callable[[dict[str, Any]], None]
    phase: str = "starting"
    message: str = ""
    notes: dict[str, str] = field(default_factory=dict)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)

    def update(self) -> None:
        """Ask every device how it is, and show it."""
        for name, status in self.fleet.statuses().items():
            if status is not None:
                self.last[name] = status
        self.on_update(
            {
                "phase": self.phase,
                "elapsed_s": time.monotonic() - self.started,
                "message": self.message,
                "devices": [
                    {
                        "name": device.name,
                        "state": self._state(device),
                        "status": self.last.get(device.name),
                        "note": self.notes.get(device.name, ""),
                    }
                    for device in self.fleet.devices
                ],
            }
        )

    def _state(self, device: LocalDevice) -> str:
        if device.running:
            return "running"
        return "waiting" if device.launched is None else "killed"

    def progress(self) -> float:
        """The furthest progress of the run that any living device knows of."""
        return max(
            (self.last[d.name]["progress"] for d in self.fleet.devices if d.running and d.name in self.last),
            default=0.0,
        )

    def until(self, condition: Callable[[], bool], what: str, deadline: float) -> None:
        """Show the state until a condition holds."""
        while True:
            self.update()
            if condition():
                return
            for device in self.fleet.devices:
                if self._state(device) == "killed" and device.name not in self.notes:
                    raise RunError(
                        f"{device.name} has ended", f"its log is {device.state / LOG_NAME}: use --keep"
                    )
            if time.monotonic() > deadline:
                raise RunError(
                    f"the demo waited in vain for {what}", "the devices' logs say more: use --keep"
                )
            time.sleep(_UPDATE_S)


def run_demo(options: DemoOptions, on_update: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run it; blocks. `on_update` is called about four times a second with what to show.

    Raises:
        UsageError: options that cannot be.
        P2PCollabError: a device did not start, or the run did not finish.
    """
    if not DEVICES_MIN <= options.devices <= DEVICES_MAX:
        raise UsageError(f"--devices must be from {DEVICES_MIN} to {DEVICES_MAX}, not {options.devices}")
    started = time.monotonic()
    deadline = started + options.timeout_s
    spec, source = _plan(options)
    code = JoinCode.create(secrets.token_bytes(16), spec.run_id)
    with _folder(options.state) as folder, Fleet() as fleet:
        demo = _Demo(fleet=fleet, started=started, on_update=on_update)
        killed, takeover = _train(options, spec, source, code, folder, demo, deadline)
        survivors = [device for device in fleet.devices if device is not killed]
        demo.phase, demo.message = "assembling", "from two different devices"
        demo.update()
        # The last device to join and the one that created the run: the two that have least in common.
        assemblers = [survivors[-1], survivors[0]]
        models = [device.assemble() for device in assemblers]
        demo.update()
        (folder / "assembled.safetensors").write_bytes(models[0].data)
        demo.phase, demo.message = "leaving", ""
        demo.update()
        last = dict(demo.last)
    trained_s = time.monotonic() - started
    demo.phase, demo.message = "central baseline", "a dense network on all the data, in this process"
    central = _central(options, spec, source, models[0].data, demo)
    return {
        "assembled_accuracy": central["assembled_accuracy"],
        "central_accuracy": central["central_accuracy"],
        "digests": [hashlib.sha256(model.data).hexdigest() for model in models],
        "assembled_on": [device.name for device in assemblers],
        "coverage": models[0].coverage,
        "missing": list(models[0].missing),
        "devices": [_device_row(device, last.get(device.name), killed) for device in fleet.devices],
        "central_training_macs": central["training_macs"],
        "central_seconds": central["seconds"],
        "takeover": takeover,
        "seconds_to_first_training_step": _first_step(last),
        "collaboration_s": trained_s,
        "wall_s": time.monotonic() - started,
        "seed": options.seed,
        "options": {
            "dataset": options.dataset,
            "model": spec.model.family,
            "devices": options.devices,
            "epochs": spec.schedule.budget_samples / source["samples"],
            "partition": options.partition,
            "train_images": source["samples"],
        },
        "spec": spec.model_dump(mode="json"),
    }


def _plan(options: DemoOptions) -> tuple[RunSpec, dict[str, Any]]:
    """The run spec, and what the devices are told about their data."""
    from ..data import inspect
    from ..planning import PlanOptions, plan_run

    if options.partition not in ("iid", "shared"):
        raise UsageError(f"--partition is iid or shared, not {options.partition!r}")
    name = "digits" if options.dataset == "digits" else options.dataset
    source = name if name == "digits" or "/" in name or ":" in name else f"torchvision:{name}"
    info = inspect(source, options.data_root)
    samples = min(options.limit or info.train_images, info.train_images)
    spec = plan_run(
        f"demo-{options.dataset.rsplit('/', 1)[-1]}",
        info,
        PlanOptions(family=options.model, epochs=options.epochs, expected_samples=samples, seed=options.seed),
    )
    return spec, {"data": source, "data_root": options.data_root, "limit": options.limit, "samples": samples}


def _train(
    options: DemoOptions,
    spec: RunSpec,
    source: dict[str, Any],
    code: JoinCode,
    folder: Path,
    demo: _Demo,
    deadline: float,
) -> tuple[LocalDevice | None, dict[str, Any] | None]:
    """From the first device to the complete run; the killed device and who took over."""
    shared = {
        "data": source["data"],
        "data_root": str(source["data_root"]) if source["data_root"] else None,
        "limit": source["limit"],
        "interface": options.interface,
        "threads": 1,
    }
    cores = os.cpu_count() or 1
    preferred = spec.classes[: max(1, len(spec.classes) // 5)]
    for index in range(options.devices):
        name = _NAMES[index] if index < len(_NAMES) else f"device-{index + 1}"
        demo.fleet.add(
            name,
            folder / name,
            **shared,
            budget=max(0.01, _CORE_SHARES[index % len(_CORE_SHARES)] / cores),
            share=f"{index + 1}/{options.devices}" if options.partition == "iid" else None,
            prefer=list(preferred) if index == 1 else [],
        )
    devices = demo.fleet.devices
    late = devices[-1] if options.events else None
    first = {"mode": "new", "spec": spec.encode().decode(), "secret_hex": code.secret.hex()}
    demo.phase, demo.message = "starting", "each device finds the others by zeroconf"
    demo.update()
    devices[0].start(**first)
    for device in devices[1:]:
        if device is not late:
            device.start(mode="join", code=str(code))
    demo.phase = "training"
    victim, takeover = None, None
    if late is not None:
        victim = devices[2]
        demo.until(lambda: demo.progress() >= _LATE_JOIN_AT, "the run to begin", deadline)
        takeover = _disturb(demo, late, victim, code, spec, deadline)
    demo.until(lambda: _all_complete(demo), "the run to be complete", deadline)
    if takeover is not None:
        takeover["finished_by"] = _finishers(demo, takeover)
    return victim, takeover


def _disturb(
    demo: _Demo, late: LocalDevice, victim: LocalDevice, code: JoinCode, spec: RunSpec, deadline: float
) -> dict[str, Any]:
    """Have one device join late, and kill another half way; what that one was at."""
    demo.notes[late.name] = "joined late"
    # Beside the rest: a short run can be over before a daemon has started, and waits for none.
    with ThreadPoolExecutor(max_workers=1) as beside:
        joining = beside.submit(late.start, mode="join", code=str(code))
        demo.until(lambda: _may_kill(demo, victim), "half of the run", deadline)
        takeover = _kill(victim, demo, spec)
        joining.result()
    return takeover


def _may_kill(demo: _Demo, victim: LocalDevice) -> bool:
    """Whether the run is half done, and the device is at work.

    Raises:
        RunError: the run was over before that was seen.
    """
    status = demo.last.get(victim.name)
    if demo.progress() >= _KILL_AT and status is not None and bool(status["work"]):
        return True
    if demo.progress() >= 1.0:
        raise RunError(
            f"the run was over before {victim.name} could be killed in it", "train for more --epochs"
        )
    return False


def _kill(victim: LocalDevice, demo: _Demo, spec: RunSpec) -> dict[str, Any]:
    """SIGKILL the device's daemon while it holds a lease."""
    work = demo.last[victim.name]["work"]
    demo.notes[victim.name] = "killed (SIGKILL)"
    victim.kill()
    labels = [spec.label(shard) for shard in work["shards"]]
    at_kill = {row["shard"]: row["samples_by"] for row in demo.last[victim.name]["shards"]}
    demo.message = f"{victim.name} was killed while it trained {', '.join(labels)}"
    return {
        "device": victim.name,
        "shards": list(work["shards"]),
        "labels": labels,
        "samples_at_kill": {shard: at_kill[shard] for shard in work["shards"]},
    }


def _all_complete(demo: _Demo) -> bool:
    """Complete is what every living device says, not what one has heard."""
    living = [device for device in demo.fleet.devices if device.running]
    if not living or not all(demo.last.get(d.name, {}).get("complete") for d in living):
        return False
    # The last contributions are on their way when the first device knows that the run is complete.
    return len({demo.last[d.name]["ledger"]["digest"] for d in living}) == 1


def _finishers(demo: _Demo, takeover: dict[str, Any]) -> dict[str, list[str]]:
    """Which other devices have trained each of the killed device's tasks since, to its end."""
    living = [device for device in demo.fleet.devices if device.running]
    names = {demo.last[device.name]["device"]["id"]: device.name for device in living}
    rows = {row["shard"]: row for row in demo.last[living[0].name]["shards"]}
    finishers = {}
    for shard, before in takeover["samples_at_kill"].items():
        now = rows[shard]["samples_by"]
        finishers[rows[shard]["label"]] = sorted(
            name for device, name in names.items() if now.get(device, 0) > before.get(device, 0)
        )
    return finishers


def _central(
    options: DemoOptions, spec: RunSpec, source: dict[str, Any], model: bytes, demo: _Demo
) -> dict[str, Any]:
    """Train the dense network of the same family on the same data for the same samples; test both."""
    from ..assembly import load_model
    from ..central import train_dense
    from ..data import load
    from ..data.batches import batches, eval_batches
    from ..lease import autocast_for
    from ..training import accuracy

    data = load(source["data"], spec, source["data_root"], limit=source["limit"])
    budget = spec.schedule.budget_samples

    def show(done: int, _losses: object) -> bool:
        demo.message = f"a dense {spec.model.family} on all the data: {done / budget:.0%}"
        demo.on_update(
            {
                "phase": demo.phase,
                "elapsed_s": time.monotonic() - demo.started,
                "message": demo.message,
                "devices": [],
            }
        )
        return True

    start = time.monotonic()
    train = batches(data.train, spec, seed=options.seed, samples=budget)
    central = train_dense(spec, train, on_step=show)
    seconds = time.monotonic() - start
    assembled = load_model(model).model
    autocast = autocast_for("cpu", spec)
    return {
        "central_accuracy": accuracy(central.model, eval_batches(data.test, spec), autocast=autocast),
        "assembled_accuracy": accuracy(assembled, eval_batches(data.test, spec), autocast=autocast),
        "training_macs": central.macs,
        "seconds": seconds,
    }


def _device_row(
    device: LocalDevice, status: dict[str, Any] | None, killed: LocalDevice | None
) -> dict[str, Any]:
    """One device's part, from the last thing that it said."""
    if status is None:
        raise P2PCollabError(f"{device.name} never answered", "its log says more: use --keep")
    counters = status["counters"]
    me = status["device"]["id"]
    samples = {
        row["label"]: row["samples_by"].get(me, 0) for row in status["shards"] if row["samples_by"].get(me)
    }
    return {
        "name": device.name,
        "device": me,
        "budget": device.options["budget"],
        "killed": device is killed,
        "tasks": sorted(samples),
        "samples_by_task": samples,
        "samples": sum(samples.values()),
        "training_macs": counters["training_macs"],
        "bytes_sent": counters["bytes_sent"],
        "bytes_received": counters["bytes_received"],
        "peak_rss_bytes": counters["peak_rss_bytes"],
        "seconds_to_first_training_step": status["timings"].get("seconds_to_first_training_step"),
    }


def _first_step(last: dict[str, dict[str, Any]]) -> float | None:
    """Median over the devices, from the start of each daemon."""
    seconds = [status["timings"].get("seconds_to_first_training_step") for status in last.values()]
    known = [value for value in seconds if value is not None]
    return statistics.median(known) if known else None


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="p2pcollab-demo-") as path:
        yield Path(path)
