"""Plays a scenario: real daemons in a lab, the scenario's steps, and a comparison of what every device has.

Nothing is lost if every entry of any device's ledger that was seen at any step is, at the end, contained in
every device's ledger: by samples of each author in each shard's lineage.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import scenario as sc
from hosts import Hosts
from lab import Lab, cpu_controller, faketime_library, why_not

from p2pcollab.daemon.fleet import Fleet, wait_until
from p2pcollab.daemon.gossip import ROUND_S
from p2pcollab.data import inspect
from p2pcollab.errors import P2PCollabError, UsageError
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import STEM

#: Daemon, trainer and p2pd of a device, with some room.
_MEMORY_BYTES: Final = 1_200_000_000
_PREPARE_S: Final = 900.0
_COMPLETE_S: Final = 1800.0
_SETTLE_S: Final = 180.0
_BACK_S: Final = 120.0

Seen = dict[tuple[str, str], int]


@dataclass
class Settled:
    """How long ledgers took to be equal."""

    at_s: float
    #: None: they were not equal in time.
    seconds: float | None
    rounds: int | None
    within_rounds: int | None


@dataclass
class Result:
    """What came of a scenario."""

    scenario: str
    seed: int
    hosts: int
    #: What went wrong; empty: all held.
    problems: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    devices: list[dict[str, Any]] = field(default_factory=list)
    #: Entries that were seen at some step, and those that some device lacked at the end.
    entries_seen: int = 0
    entries_lost: list[str] = field(default_factory=list)
    digests_equal: bool = False
    models_equal: bool | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def check_tools(scenario: sc.Scenario) -> None:
    """See whether a scenario can be played here.

    Raises:
        UsageError: what is missing.
    """
    reason = why_not(scenario.programs)
    if reason is None and scenario.uses(sc.Skew) and faketime_library() is None:
        reason = "the library libfaketime is missing: apt-get install libfaketime"
    if reason is None and scenario.uses(sc.Slow) and cpu_controller() is None:
        reason = "this system has no cgroup controller for CPU time"
    free = psutil.virtual_memory().available
    if reason is None and free < scenario.hosts * _MEMORY_BYTES:
        need = scenario.hosts * _MEMORY_BYTES / 1e9
        reason = (
            f"{scenario.hosts} daemons need about {need:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
        )
    if reason is not None:
        raise UsageError(f"scenario {scenario.name} cannot be played here: {reason}")


def play(scenario: sc.Scenario, say: Callable[[str], None] = print) -> Result:
    """Play a scenario from beginning to end; nothing of it is left then.

    Raises:
        UsageError: it cannot be played here.
        P2PCollabError: the devices did not even start, or never trained.
    """
    check_tools(scenario)
    moments = sc.timeline(scenario)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=f"p2pcollab-lab-{os.getpid()}-"))
        )
        lab = Lab(scenario.hosts, relayed=sc.relayed_hosts(moments), quotas=scenario.uses(sc.Slow))
        stack.enter_context(lab)
        fleet = stack.enter_context(Fleet())
        hosts = Hosts(scenario, moments, lab, fleet, folder, stack)
        player = _Player(scenario, moments, fleet, hosts, say)
        # Whatever happens from here on, no device outlives it, nor asks to be waited for.
        stack.callback(hosts.kill_all)
        player.prepare()
        player.run()
        player.conclude()
        player.result.seconds = round(time.monotonic() - began, 1)
        return player.result


class _Player:
    """One performance of a scenario."""

    def __init__(
        self,
        scenario: sc.Scenario,
        moments: tuple[sc.Moment, ...],
        fleet: Fleet,
        hosts: Hosts,
        say: Callable[[str], None],
    ) -> None:
        self._scenario = scenario
        self._moments = moments
        self._fleet = fleet
        self._hosts = hosts
        self._say = say
        self._stay_away = sc.hosts_that_stay_away(moments)
        self._everything: Seen = {}
        self._made_at_cut: dict[tuple[int, ...], dict[int, int]] = {}
        self._started = 0.0
        #: When cables were last put back, until ledgers were equal once.
        self._healed: float | None = None
        self.result = Result(scenario=scenario.name, seed=scenario.seed, hosts=scenario.hosts)

    # Life

    def prepare(self) -> None:
        """Start the daemons, and wait until all train and see each other."""
        info = inspect("digits", None)
        options = PlanOptions(
            epochs=self._scenario.epochs, expected_samples=info.train_images, seed=self._scenario.seed
        )
        spec = plan_run(f"{self._scenario.name}-{secrets.token_hex(4)}", info, options)
        if self._scenario.lease_samples is not None:
            schedule = spec.schedule.model_copy(update={"lease_samples": self._scenario.lease_samples})
            spec = spec.model_copy(update={"schedule": schedule})
        self._hosts.add_all()
        first, *others = self._fleet.devices
        self._say(f"starting {len(self._fleet.devices)} daemons")
        first.start(mode="new", spec=spec.encode().decode(), secret_hex=secrets.token_hex(16))
        code = first.ask(lambda client: client.run_info()["join_code"])
        for device in others:
            device.start(mode="join", code=code)
        wait_until(self._all_there, timeout_s=_PREPARE_S, what="all hosts to see each other and train")
        self._started = time.monotonic()

    def run(self) -> None:
        """Perform the steps, each at its time."""
        for moment in self._moments:
            wait = self._started + moment.at_s - time.monotonic()
            if wait > 0:
                # Not to synchronise: a scenario says at which second a cable is pulled, and for how long.
                time.sleep(wait)
            made = self._look()
            self._say(f"{self._now():6.1f} s  {moment.label}")
            self.result.steps.append({"at_s": round(self._now(), 2), "do": moment.label, "made": made})
            if isinstance(moment.step, sc.Cut):
                self._compare_sides(moment, made)
            self._perform(moment)

    def conclude(self) -> None:
        """Wait for the scenario's end, and compare."""
        self._look()
        if self._scenario.end == "complete":
            self._say(f"{self._now():6.1f} s  waiting for the run to complete")
            self._try(lambda: wait_until(self._complete, timeout_s=_COMPLETE_S, what="the run to complete"))
            self._look()
            with self._problems():
                models = self._hosts.ask(lambda device: hashlib.sha256(device.assemble().data).hexdigest())
                self.result.models_equal = len(set(models.values())) == 1
                if not self.result.models_equal:
                    self.result.problems.append("devices assemble different models")
            self._compare()
        else:
            self._say(f"{self._now():6.1f} s  waiting for equal ledgers")
            with self._hosts.standstill():
                self._settle(None)
                # Before anybody goes on: the lease that ends next makes the ledgers differ for a moment.
                self._compare()

    # Steps

    def _perform(self, moment: sc.Moment) -> None:
        if isinstance(moment.step, sc.Settle):
            with self._hosts.standstill():
                self._settle(moment.step.within_rounds)
            return
        for number in moment.hosts:
            with self._problems():
                self._hosts.harm(moment.step, number, ends=moment.ends)
        if isinstance(moment.step, sc.Heal) or (isinstance(moment.step, sc.Cut) and moment.ends):
            self._healed = time.monotonic()

    def _settle(self, within_rounds: int | None) -> None:
        """Wait for equal ledgers."""
        at_s = round(self._now(), 2)
        # From the healing on, if that is what is waited for: looking at all devices takes a moment.
        began, self._healed = self._healed or time.monotonic(), None
        seconds = None
        with self._problems():
            wait_until(self._equal, timeout_s=_SETTLE_S, what="all ledgers to be equal")
            seconds = round(time.monotonic() - began, 2)
        rounds = None if seconds is None else math.ceil(seconds / ROUND_S)
        self.result.settled.append(Settled(at_s, seconds, rounds, within_rounds))
        if seconds is not None:
            self._say(f"{self._now():6.1f} s  all ledgers are equal after {seconds:.1f} s: {rounds} rounds")
        if within_rounds is not None and (rounds is None or rounds > within_rounds):
            self.result.problems.append(f"ledgers were not equal within {within_rounds} rounds")
        self._look()

    # Looking

    def _look(self) -> dict[int, int]:
        """Remember all that anybody has made; contributions by host.

        What dies with a device for good is not promised to survive.
        """
        statuses = self._hosts.statuses()
        for number, status in statuses.items():
            if number not in self._stay_away:
                self._everything = _joined([self._everything, _seen(status)])
        return {
            number: status["counters"].get("contributions", 0) for number, status in sorted(statuses.items())
        }

    def _compare_sides(self, moment: sc.Moment, made: dict[int, int]) -> None:
        """A cut in which one side makes nothing would show nothing."""
        if not moment.ends:
            self._made_at_cut[moment.hosts] = made
            return
        before = self._made_at_cut.pop(moment.hosts, {})
        grown = {number for number, count in made.items() if count > before.get(number, count)}
        if not grown & set(moment.hosts) or not grown - set(moment.hosts):
            self.result.problems.append(f"not both sides trained while hosts {moment.hosts} were cut off")

    def _compare(self) -> None:
        result = self.result
        wait_until(
            lambda: set(self._hosts.statuses()) == set(self._hosts.reachable()),
            timeout_s=_BACK_S,
            what="every device",
        )
        statuses = self._hosts.statuses()
        digests = {status["ledger"]["digest"] for status in statuses.values()}
        result.digests_equal = len(digests) == 1
        if not result.digests_equal:
            result.problems.append(f"there are {len(digests)} different ledgers")
        result.entries_seen = len(self._everything)
        for number, status in statuses.items():
            own = _seen(status)
            result.entries_lost += [
                f"host-{number}: {shard}/{author[:8]} {own.get((shard, author), 0)} < {samples}"
                for (shard, author), samples in self._everything.items()
                if own.get((shard, author), 0) < samples
            ]
            result.devices.append(_row(number, status))
            if self._scenario.end == "complete" and status["coverage"] < 1.0:
                result.problems.append(f"host-{number} has a coverage of {status['coverage']:.0%}")
        if result.entries_lost:
            result.problems.append(f"{len(result.entries_lost)} entries were lost")

    def _all_there(self) -> bool:
        statuses = self._hosts.statuses()
        hosts = self._scenario.hosts
        return len(statuses) == hosts and all(
            sum(peer["state"] not in ("left", "gone") for peer in status["peers"]) == hosts - 1
            and status["counters"].get("contributions")
            for status in statuses.values()
        )

    def _equal(self) -> bool:
        statuses = self._hosts.statuses()
        return (
            set(statuses) == set(self._hosts.reachable())
            and len({status["ledger"]["digest"] for status in statuses.values()}) == 1
            and all(
                _seen(status).get(key, 0) >= samples
                for status in statuses.values()
                for key, samples in self._everything.items()
            )
        )

    def _complete(self) -> bool:
        statuses = self._hosts.statuses()
        return (
            set(statuses) == set(self._hosts.reachable())
            and all(status["complete"] for status in statuses.values())
            and len({status["ledger"]["digest"] for status in statuses.values()}) == 1
        )

    @contextlib.contextmanager
    def _problems(self) -> Iterator[None]:
        """What fails is part of the result, and the scenario goes on."""
        try:
            yield
        except (P2PCollabError, OSError, psutil.Error, RuntimeError) as error:
            self.result.problems.append(f"at {self._now():.0f} s: {error}")
            self._say(f"{self._now():6.1f} s  PROBLEM: {error}")

    def _try(self, wait: Callable[[], object]) -> None:
        with self._problems():
            wait()

    def _now(self) -> float:
        return time.monotonic() - self._started


def _seen(status: Mapping[str, Any]) -> Seen:
    """Samples by shard and author, as a device's ledger has them."""
    return {
        (row["shard"], author): samples
        for row in status["shards"]
        for author, samples in row["samples_by"].items()
    }


def _joined(ledgers: Iterable[Seen]) -> Seen:
    result: Seen = {}
    for ledger in ledgers:
        for key, samples in ledger.items():
            result[key] = max(samples, result.get(key, 0))
    return result


def _row(number: int, status: Mapping[str, Any]) -> dict[str, Any]:
    counters = status["counters"]
    return {
        "host": number,
        "digest": status["ledger"]["digest"],
        "entries": status["ledger"]["entries"],
        "coverage": status["coverage"],
        "progress": round(status["progress"], 4),
        "complete": status["complete"],
        "contributions": counters.get("contributions"),
        "stem_samples": sum(n for (shard, _), n in _seen(status).items() if shard == STEM),
        "trainer_restarts": counters.get("trainer_restarts"),
        "p2pd_restarts": counters.get("p2pd_restarts"),
        "bytes_sent": counters.get("bytes_sent"),
        "warnings": status["warnings"],
    }
