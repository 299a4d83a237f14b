"""Whole devices on 127.0.0.1 that train the bundled digits together: what the system tests do and ask."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from p2pcollab.assembly import load_model
from p2pcollab.daemon.api_client import ApiClient
from p2pcollab.daemon.fleet import Fleet, LocalDevice, settled, wait_until
from p2pcollab.data import eval_batches, inspect, load
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import STEM, JoinCode, RunSpec, ShardId
from p2pcollab.training import accuracy

#: For what takes a second or ten here: machines that run tests for many people are slow at times.
DEADLINE_S = 90.0

Seen = dict[tuple[str, str], int]


def digits_spec(name: str, epochs: float) -> RunSpec:
    """A run on the digits, ten classes in ten tasks; never the same twice: others may test here too."""
    return plan_run(
        f"{name}-{secrets.token_hex(4)}", inspect("digits", None), PlanOptions(epochs=epochs, seed=1)
    )


def create(device: LocalDevice, spec: RunSpec) -> str:
    """Start a device that creates a run; the join code."""
    code = JoinCode.create(secrets.token_bytes(16), spec.run_id)
    device.start(mode="new", spec=spec.encode().decode(), secret_hex=code.secret.hex())
    return str(code)


def add_digits(fleet: Fleet, name: str, folder: Path, share: str, **options: Any) -> LocalDevice:
    """A device that has a part of the digits, and one thread to train on."""
    return fleet.add(name, folder / name, **{"data": "digits", "share": share, "threads": 1, **options})


def with_secret(code: str, secret: bytes) -> str:
    """The join code of the same run with another secret."""
    return str(JoinCode(secret=secret, run_prefix=JoinCode.parse(code).run_prefix))


def status(device: LocalDevice) -> dict[str, Any]:
    """The status of a device that must be able to give one."""
    answer = device.status()
    assert answer is not None, f"{device.name} does not answer"
    return answer


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition is true; a failure says what was waited for."""
    wait_until(lambda: bool(condition()), timeout_s=DEADLINE_S, what=what)


def complete(*devices: LocalDevice) -> None:
    """Wait until the run is complete on all these devices, and they hold the same ledger."""
    # The last contributions are on their way when the first device knows that the run is complete.
    eventually(lambda: settled(devices), f"the run to be complete on {', '.join(d.name for d in devices)}")


def training(device: LocalDevice) -> None:
    """Wait until a device is in the middle of a lease."""
    eventually(
        lambda: ((device.status() or {}).get("work") or {}).get("samples_done"), f"{device.name} to train"
    )


def contributed(device: LocalDevice) -> bool:
    """Whether a device has made a contribution."""
    return bool((device.status() or {"counters": {}})["counters"].get("contributions"))


def freeze_in_a_lease(device: LocalDevice) -> list[str]:
    """Stop a device's trainer in the middle of a lease, so that the lease lasts; its shards."""
    trainer = parts(device)["trainer"]

    def frozen() -> bool:
        trainer.suspend()
        # Twice: what the trainer wrote before it stopped is on its way to the daemon.
        works = [status(device)["work"] for _ in range(2)]
        if all(work and work["samples_done"] < work["samples_total"] for work in works):
            return True
        trainer.resume()
        return False

    eventually(frozen, f"{device.name} to stop in a lease")
    return list(status(device)["work"]["shards"])


def known(device: LocalDevice) -> bool:
    """Whether a device knows the run that it is in."""
    return bool((device.status() or {"run": {"id": None}})["run"]["id"])


def seen(device: LocalDevice) -> Seen:
    """Samples by (shard, device), as a device's ledger has them."""
    return {
        (row["shard"], author): samples
        for row in status(device)["shards"]
        for author, samples in row["samples_by"].items()
    }


def lost(before: Seen, after: Seen) -> list[tuple[str, str]]:
    """What `after` lacks of `before`."""
    return [key for key, samples in before.items() if after.get(key, 0) < samples]


def peer_states(viewer: LocalDevice) -> list[str]:
    """How a device sees the others."""
    return [row["state"] for row in (viewer.status() or {}).get("peers", [])]


def peer_state(viewer: LocalDevice, device_id: str) -> str | None:
    """How a device sees another one; None: not at all."""
    rows = (viewer.status() or {}).get("peers", [])
    return next((row["state"] for row in rows if row["device"] == device_id), None)


def device_id(device: LocalDevice) -> str:
    """A device's id."""
    return str(status(device)["device"]["id"])


def trained_by(device: LocalDevice) -> set[str]:
    """Tasks, without the stem, that a device has trained, as its ledger says."""
    own = device_id(device)
    return {shard for shard, author in seen(device) if author == own and shard != STEM}


def leases_of(device: LocalDevice) -> list[list[str]]:
    """The shards of each lease that a device has trained since it was started, oldest first."""
    with ApiClient(device.state) as client:
        return [event["shards"] for event in client.events().events if event["kind"] == "lease"]


def all_gone(processes: Iterable[psutil.Process]) -> bool:
    """Whether these processes have ended; one that waits for its parent to notice has."""
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def digits_accuracy(model: bytes) -> float:
    """A model's accuracy on the digits' test images, which no device trains on."""
    loaded = load_model(model)
    test = load("digits", loaded.spec, None).test
    return accuracy(loaded.model, eval_batches(test, loaded.spec))


def missing_shards(model: bytes) -> set[ShardId]:
    """Tasks that a model lacks."""
    return set(load_model(model).missing)


def write_digits(folder: Path, spec: RunSpec, *, classes: Iterable[str], part: str, most: int) -> Path:
    """Class folders with images of the digits' `train` or `test` part, at most so many of each class."""
    data = load("digits", spec, None)
    examples = {"train": data.train, "test": data.test}[part]
    for name in classes:
        (folder / name).mkdir(parents=True)
        chosen = np.flatnonzero(examples.labels == spec.classes.index(name))[:most]
        for number, index in enumerate(chosen):
            Image.fromarray(examples.images[index, 0]).save(folder / name / f"{number:03}.png")
    return folder


def parts(device: LocalDevice) -> Mapping[str, psutil.Process]:
    """The daemon, the trainer and p2pd of a device, once all of them run."""
    eventually(
        lambda: {"daemon", "trainer", "p2pd"} <= device.processes().keys(), f"{device.name} to be whole"
    )
    return device.processes()
