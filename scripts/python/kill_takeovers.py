"""SIGKILL of whole daemons that hold a lease, one after the other; see scripts/kill-many.

A takeover lasts from the SIGKILL to the moment at which another device begins to train a shard that the
dead one was training, by the events of both on this machine's one clock. It is measured for each shard of
the lease; the killed device is started again only then. A restarted device must have every entry of its
ledger that it had before it was killed; what it may lose is the lease in progress.

The victim's trainer is stopped for up to two seconds before the kill, so that it certainly holds a lease,
and at any phase of its beat. Leases are short, so that the time measured is that of noticing and deciding,
not that of survivors ending what they do. Four devices; 10 to 15 s a kill on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from p2pcollab.daemon.api_client import ApiClient
from p2pcollab.daemon.death_watch import SILENT_S
from p2pcollab.daemon.fleet import Fleet, LocalDevice, wait_until
from p2pcollab.data import inspect
from p2pcollab.errors import P2PCollabError
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import RunSpec

#: Samples of a lease: small, so that a survivor is soon free to take another.
LEASE_SAMPLES = 160
#: Far more than will be trained: the run must not end before the kills do.
EPOCHS = 2000.0
#: Share of the machine that each device trains with: the processes share what is left of a core or two.
BUDGET = 0.06
#: After this the shard counts as never taken over.
GIVEN_UP_S = 60.0
_POLL_S = 0.2

Seen = dict[tuple[str, str], int]


@dataclass
class Kill:
    """One SIGKILL, and what came of it."""

    device: str
    #: Shards of the lease that was in progress, as the dead device's own events have it; empty: none was.
    shards: list[str] = field(default_factory=list)
    #: Seconds until the first and the last of the others took it for dead.
    noticed_s: tuple[float, ...] = ()
    #: Seconds to another device's lease on each of them.
    takeover_s: dict[str, float] = field(default_factory=dict)
    #: Samples trained in the lease that was lost, and how many a lease has.
    lost_samples: int = 0
    lease_samples: int = 0
    #: Entries of its ledger before, that it lacks after the restart.
    lost_entries: list[str] = field(default_factory=list)
    #: Seconds from the start of its next daemon to a new lease of its own; None: none was seen.
    resumed_s: float | None = None


def seen(device: LocalDevice) -> Seen:
    """Samples by shard and author, as a device's ledger has them."""
    status = device.status()
    rows = status["shards"] if status else []
    return {(row["shard"], author): n for row in rows for author, n in row["samples_by"].items()}


def events(device: LocalDevice, after: float = 0.0) -> list[dict[str, Any]]:
    """What happened on a device after a moment; nothing when it does not answer."""
    with suppress(P2PCollabError), ApiClient(device.state) as client:
        return [event for event in client.events().events if event["time"] > after]
    return []


def busy(device: LocalDevice) -> dict[str, Any] | None:
    """The lease that a device is in the middle of."""
    status = device.status() if device.running else None
    work = status["work"] if status else None
    return work if work and 0 < work["samples_done"] < work["samples_total"] else None


class Killing:
    """A run in which devices are killed and come back."""

    def __init__(self, fleet: Fleet, folder: Path, devices: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._fleet = fleet
        self.kills: list[Kill] = []
        #: Runnable processes per core at each kill: what the figures are to be judged by.
        self.loads: list[float] = []
        self._restarting: dict[str, threading.Thread] = {}
        self._restarted_at: dict[str, float] = {}
        #: The ledger of each device when it was last killed.
        self._before: dict[str, tuple[Kill, Seen, float]] = {}
        #: All that any device ever showed.
        self.everything: Seen = {}
        spec = _spec(seed)
        for index in range(devices):
            fleet.add(
                f"device-{index + 1}",
                folder / str(index + 1),
                data="digits",
                share=f"{index + 1}/{devices}",
                threads=1,
                budget=BUDGET,
            )
        first, *others = fleet.devices
        first.start(mode="new", spec=spec.encode().decode(), secret_hex=secrets.token_hex(16))
        status = first.status()
        assert status is not None
        for device in others:
            device.start(mode="join", code=status["run"]["join_code"])
        wait_until(lambda: all(busy(d) for d in fleet.devices), timeout_s=180, what="all devices to train")

    def one(self) -> Kill:
        """Kill a device in the middle of a lease, wait for the others to go on with it, start it again."""
        victim, work = self._choose()
        processes = victim.processes()
        status = victim.status()
        assert status is not None
        before = seen(victim)
        self.everything = joined([self.everything, before])
        # Anywhere between two of its beats.
        time.sleep(self._rng.uniform(0.0, 2.0))
        self.loads.append(os.getloadavg()[0])
        killed = time.time()
        victim.kill()
        # It is the trainer that ends p2pd when the daemon is dead, and a stopped one would not.
        processes["trainer"].resume()
        kill = Kill(
            victim.name,
            shards=list(work["shards"]),
            lost_samples=work["samples_done"],
            lease_samples=work["samples_total"],
        )
        self._await_takeover(victim, status["device"]["id"], kill, killed)
        self._before[victim.name] = kill, before, killed
        thread = threading.Thread(target=self._restart, args=(victim,))
        thread.start()
        self._restarting[victim.name] = thread
        self.kills.append(kill)
        return kill

    def finish(self) -> None:
        """Wait until all are back, and see what they have."""
        wait_until(self._all_back, timeout_s=180, what="the last killed device to be back")

    def _choose(self) -> tuple[LocalDevice, dict[str, Any]]:
        """A device in the middle of a lease, while at least two others train as well."""
        chosen: list[tuple[LocalDevice, dict[str, Any]]] = []

        def found() -> bool:
            self._look_at_restarted()
            working = [d for d in self._fleet.devices if self._settled(d) and _trains(d)]
            if len(working) < 3:
                return False
            device = self._rng.choice(working)
            trainer = device.processes().get("trainer")
            if trainer is None:
                return False
            trainer.suspend()
            # Twice: what the trainer wrote before it stopped is on its way to the daemon.
            works = [busy(device) for _ in range(2)]
            if works[1] is not None and works[0] is not None:
                chosen[:] = [(device, works[1])]
                return True
            trainer.resume()
            return False

        wait_until(found, timeout_s=180, what="three devices to train")
        return chosen[0]

    def _settled(self, device: LocalDevice) -> bool:
        thread = self._restarting.get(device.name)
        return (
            device.running and (thread is None or not thread.is_alive()) and device.name not in self._before
        )

    def _restart(self, device: LocalDevice) -> None:
        self._restarted_at[device.name] = time.time()
        device.start(mode="resume", code=None, spec=None, secret_hex=None)

    def _look_at_restarted(self) -> None:
        """Compare those that train again with what they had."""
        for device in self._fleet.devices:
            thread = self._restarting.get(device.name)
            if device.name not in self._before or (thread is not None and thread.is_alive()):
                continue
            kill, before, killed = self._before[device.name]
            own = events(device)
            started = self._restarted_at[device.name]
            new = next((e for e in own if e["kind"] == "lease" and e["time"] > started), None)
            if new is None:
                continue
            kill.resumed_s = round(new["time"] - started, 2)
            kill.lost_entries = [
                f"{shard}/{author}"
                for (shard, author), n in before.items()
                if seen(device).get((shard, author), 0) < n
            ]
            last = next((e for e in reversed(own) if e["time"] <= killed and e["kind"] in _LEASE_KINDS), None)
            if last is None or last["kind"] != "lease" or sorted(last["shards"]) != sorted(kill.shards):
                # That lease had ended in the moment before the kill: nobody had to take it over.
                kill.shards, kill.takeover_s, kill.noticed_s, kill.lost_samples = [], {}, (), 0
            del self._before[device.name]

    def _all_back(self) -> bool:
        self._look_at_restarted()
        return not self._before

    def _await_takeover(self, victim: LocalDevice, dead: str, kill: Kill, killed: float) -> None:
        others = [device for device in self._fleet.devices if device is not victim]

        def taken() -> bool:
            noticed = []
            for device in others:
                for event in events(device, after=killed):
                    if event["kind"] == "peer-gone" and event["device"] == dead:
                        noticed.append(round(event["time"] - killed, 3))
                    elif event["kind"] == "lease":
                        # Sooner, and another device trained that shard as well, for reasons of its own.
                        late = event["time"] - killed >= SILENT_S
                        for shard in set(event["shards"]) & set(kill.shards) if late else ():
                            at = round(event["time"] - killed, 3)
                            kill.takeover_s[shard] = min(at, kill.takeover_s.get(shard, at))
            kill.noticed_s = (min(noticed), max(noticed)) if noticed else ()
            return len(kill.takeover_s) == len(kill.shards)

        deadline = time.monotonic() + GIVEN_UP_S
        while not taken() and time.monotonic() < deadline:
            time.sleep(_POLL_S)


_LEASE_KINDS = ("lease", "contribution", "lease-lost")


def _trains(device: LocalDevice) -> bool:
    status = device.status()
    return status is not None and status["phase"] in ("training", "idle")


def _spec(seed: int) -> RunSpec:
    info = inspect("digits", None)
    wishes = PlanOptions(epochs=EPOCHS, expected_samples=info.train_images, seed=seed)
    spec = plan_run(f"kills-{secrets.token_hex(4)}", info, wishes)
    schedule = spec.schedule.model_copy(update={"lease_samples": LEASE_SAMPLES})
    return spec.model_copy(update={"schedule": schedule})


def joined(ledgers: Iterable[Seen]) -> Seen:
    """What any of them has."""
    result: Seen = {}
    for ledger in ledgers:
        for key, samples in ledger.items():
            result[key] = max(samples, result.get(key, 0))
    return result


def percentile(values: list[float], part: float) -> float | None:
    """The smallest value that so large a part is not above."""
    return sorted(values)[max(0, -(-len(values) * int(part * 100) // 100) - 1)] if values else None


def summary(kills: list[Kill]) -> dict[str, Any]:
    """Figures over all kills."""
    held = [kill for kill in kills if kill.shards]
    first = [min(kill.takeover_s.values()) for kill in held if kill.takeover_s]
    every = [seconds for kill in held for seconds in kill.takeover_s.values()]
    figures: dict[str, Any] = {
        "kills": len(kills),
        "kills_in_a_lease": len(held),
        "shards_held": sum(len(kill.shards) for kill in held),
        "shards_never_taken_over": sum(len(kill.shards) - len(kill.takeover_s) for kill in held),
        "resumed": sum(kill.resumed_s is not None for kill in kills),
        "entries_lost": sum(len(kill.lost_entries) for kill in kills),
        "more_than_a_lease_lost": sum(kill.lost_samples > kill.lease_samples for kill in kills),
        "resumed_median_s": _median([kill.resumed_s for kill in kills if kill.resumed_s is not None]),
    }
    noticed = [kill.noticed_s[0] for kill in held if kill.noticed_s]
    for name, values in (
        ("noticed_by_the_first", noticed),
        ("takeover_first_shard", first),
        ("takeover_every_shard", every),
    ):
        figures[name] = {
            "n": len(values),
            "median_s": _median(values),
            "p90_s": percentile(values, 0.90),
            "p99_s": percentile(values, 0.99),
            "max_s": max(values, default=None),
        }
    return figures


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--devices", type=int, default=4, help="daemons, 3 at least (default: 4)")
    parser.add_argument("--minutes", type=float, default=120.0, help="stop after so long (default: 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--more", action="store_true", help="add to the kills that the JSON file has already")
    options = parser.parse_args()
    if options.devices < 3:
        parser.error("a takeover needs two survivors: --devices 3 or more")
    started = time.monotonic()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="p2pcollab-kills-") as folder, Fleet() as fleet:
        killing = Killing(fleet, Path(folder), options.devices, options.seed)

        earlier = earlier_kills(options.json) if options.more else []

        def report(lost: list[str] | None, equal: bool | None) -> dict[str, Any]:
            kills = earlier + killing.kills
            return {
                "command": f"scripts/kill-many takeovers --kills {options.kills} --devices {options.devices} "
                f"--seed {options.seed}",
                "seed": options.seed,
                "devices": options.devices,
                "lease_samples": LEASE_SAMPLES,
                "budget": BUDGET,
                "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
                "wall_s": round(time.monotonic() - started, 1),
                "lost_at_end": lost,
                "digests_equal_at_end": equal,
                "load_average_median": round(statistics.median(killing.loads or [0.0]), 1),
                **summary(kills),
                "each": [asdict(kill) for kill in kills],
            }

        def keep(lost: list[str] | None = None, equal: bool | None = None) -> dict[str, Any]:
            fresh = report(lost, equal)
            if options.json:
                options.json.write_text(json.dumps(fresh, indent=1) + "\n")
            return fresh

        for number in range(options.kills):
            if time.monotonic() - started > options.minutes * 60:
                print(f"stopped after {options.minutes:.0f} minutes")
                break
            kill = killing.one()
            shards = ", ".join(f"{shard} after {s:.1f} s" for shard, s in sorted(kill.takeover_s.items()))
            print(f"{number + 1:4}: {kill.device} killed; taken over: {shards or 'nothing'}", flush=True)
            keep()
        killing.finish()
        lost, equal = at_the_end(fleet, killing.everything)
        result = keep(lost, equal)
    show(result)
    bad = result["entries_lost"] or result["shards_never_taken_over"] or result["lost_at_end"]
    return 1 if bad or not equal or result["resumed"] != result["kills"] else 0


def earlier_kills(path: Path | None) -> list[Kill]:
    """The kills of an earlier run, as its file has them."""
    if path is None or not path.exists():
        return []
    return [Kill(**kill) for kill in json.loads(path.read_text())["each"]]


def at_the_end(fleet: Fleet, everything: Seen) -> tuple[list[str], bool]:
    """What any device lacks of what was ever seen, and whether all ledgers are equal once nobody trains."""
    for device in fleet.devices:
        device.processes()["trainer"].suspend()
    equal = False
    with suppress(P2PCollabError):
        wait_until(_equal(fleet), timeout_s=60, what="all ledgers to be equal")
        equal = True
    lost = [
        f"{device.name}: {shard}/{author}"
        for device in fleet.devices
        for (shard, author), n in everything.items()
        if seen(device).get((shard, author), 0) < n
    ]
    for device in fleet.devices:
        device.processes()["trainer"].resume()
    return lost, equal


def _equal(fleet: Fleet) -> Callable[[], bool]:
    def equal() -> bool:
        statuses = [device.status() for device in fleet.devices]
        return None not in statuses and len({s["ledger"]["digest"] for s in statuses if s}) == 1

    return equal


ENDS = {None: "uncompared", True: "equal", False: "UNEQUAL"}


def show(result: dict[str, Any]) -> None:
    """The figures for people."""
    print(
        f"{result['kills']} kills, {result['kills_in_a_lease']} of them in a lease; "
        f"{result['resumed']} resumed, median {result['resumed_median_s']} s to a lease of their own; "
        f"{result['entries_lost']} ledger entries lost, "
        f"{result['more_than_a_lease_lost']} lost more than a lease"
    )
    for name, title in (
        ("noticed_by_the_first", "taken for dead by the first device"),
        ("takeover_first_shard", "another's lease on the first of its shards"),
        ("takeover_every_shard", "another's lease on each of its shards"),
    ):
        figures = result[name]
        if figures["n"]:
            print(
                f"{title}: n {figures['n']}, median {figures['median_s']:.1f} s, "
                f"p90 {figures['p90_s']:.1f} s, p99 {figures['p99_s']:.1f} s, max {figures['max_s']:.1f} s"
            )
    print(
        f"never taken over: {result['shards_never_taken_over']}; at the end "
        f"{ENDS[result['digests_equal_at_end']]} ledgers, "
        f"{len(result['lost_at_end'] or [])} entries missing"
    )


if __name__ == "__main__":
    sys.exit(main())
