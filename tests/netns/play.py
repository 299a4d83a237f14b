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
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import scenario as sc
from lab import Host, Lab, cpu_controller, faketime_library, why_not

from p2pcollab.daemon.fleet import Fleet, LocalDevice, wait_until
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
        player = _Player(scenario, moments, lab, fleet, folder, say, stack)
        # Whatever happens from here on, no device outlives it, nor asks to be waited for.
        stack.callback(player.end_all)
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
        lab: Lab,
        fleet: Fleet,
        folder: Path,
        say: Callable[[str], None],
        stack: contextlib.ExitStack,
    ) -> None:
        self._scenario = scenario
        self._moments = moments
        self._lab = lab
        self._fleet = fleet
        self._folder = folder
        self._say = say
        self._stack = stack
        self._stay_away = sc.hosts_that_stay_away(moments)
        #: Hosts whose daemon is stopped, and cannot be asked.
        self._stopped: set[int] = set()
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
        for number, host in enumerate(self._lab.hosts, start=1):
            self._fleet.add(
                f"host-{number}",
                self._state_folder(number),
                prefix=self._prefix(number, host),
                interface=host.address,
                data="digits",
                share=f"{number}/{self._scenario.hosts}",
                threads=1,
                budget=self._scenario.budget,
            )
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
                models = self._ask_all(lambda device: hashlib.sha256(device.assemble().data).hexdigest())
                self.result.models_equal = len(set(models.values())) == 1
                if not self.result.models_equal:
                    self.result.problems.append("devices assemble different models")
            self._compare()
        else:
            self._say(f"{self._now():6.1f} s  waiting for equal ledgers")
            with self._standstill():
                self._settle(None)
                # Before anybody goes on: the lease that ends next makes the ledgers differ for a moment.
                self._compare()

    def end_all(self) -> None:
        """SIGKILL all daemons with all that is theirs."""
        for device in self._fleet.devices:
            if device.launched is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(device.launched.process.pid, signal.SIGKILL)
                device.launched.process.wait()

    # Steps

    def _perform(self, moment: sc.Moment) -> None:
        if isinstance(moment.step, sc.Settle):
            with self._standstill():
                self._settle(moment.step.within_rounds)
            return
        for number in moment.hosts:
            with self._problems():
                self._harm(moment.step, number, ends=moment.ends)
        if isinstance(moment.step, sc.Heal) or (isinstance(moment.step, sc.Cut) and moment.ends):
            self._healed = time.monotonic()

    def _harm(self, step: sc.Step, number: int, *, ends: bool) -> None:
        lab, host = self._lab, self._lab.hosts[number - 1]
        match step:
            case sc.Cut(way="both") if not ends:
                lab.cut(host)
            case sc.Cut(way="deaf") if not ends:
                lab.deafen(host)
            case sc.Cut(way="mute") if not ends:
                lab.mute(host)
            case sc.Cut() | sc.Heal():
                lab.heal(host)
            case sc.Kill():
                self._restart(number) if ends else self._kill(number, step.part)
            case sc.Start():
                self._restart(number)
            case sc.Stop():
                self._pause(number, step.part, go_on=ends)
            case sc.Slow():
                lab.limit_cpu(host, None if ends else step.cores)
            case sc.Loss():
                lab.lose(host, 0.0 if ends else step.share)
            case sc.Skew():
                self._clock(number).write_text(f"{0 if ends else step.seconds:+}")
            case sc.FillDisk():
                self._empty_disk(number) if ends else self._fill_disk(number)
            case sc.Bandwidth():
                lab.limit_bandwidth(host, 0 if ends else step.kbit_s)
            case sc.Delay():
                lab.delay(host, *((0.0, 0.0) if ends else (step.ms, step.jitter_ms)))
            case _:
                raise AssertionError(f"nobody performs {step}")

    def _kill(self, number: int, part: str) -> None:
        device = self._device(number)
        if part != "device":
            device.kill(part)
            return
        assert device.launched is not None
        os.killpg(device.launched.process.pid, signal.SIGKILL)
        device.launched.process.wait()

    def _restart(self, number: int) -> None:
        device = self._device(number)
        if not device.running:
            device.start(mode="resume", code=None, spec=None, secret_hex=None)

    def _pause(self, number: int, part: str, *, go_on: bool) -> None:
        processes = self._device(number).processes()
        chosen = list(processes.values()) if part == "device" else [processes[part]]
        for process in chosen:
            process.resume() if go_on else process.suspend()
        if part in ("device", "daemon"):
            (self._stopped.discard if go_on else self._stopped.add)(number)

    def _fill_disk(self, number: int) -> None:
        with contextlib.suppress(OSError), self._ballast(number).open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def _empty_disk(self, number: int) -> None:
        self._ballast(number).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _standstill(self) -> Iterator[None]:
        """Nobody makes anything new."""
        trainers = [t for d in self._reachable().values() if (t := d.processes().get("trainer")) is not None]
        for trainer in trainers:
            trainer.suspend()
        try:
            yield
        finally:
            for trainer in trainers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    trainer.resume()

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
        statuses = self._statuses()
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
            lambda: set(self._statuses()) == set(self._reachable()), timeout_s=_BACK_S, what="every device"
        )
        statuses = self._statuses()
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
        statuses = self._statuses()
        hosts = self._scenario.hosts
        return len(statuses) == hosts and all(
            sum(peer["state"] not in ("left", "gone") for peer in status["peers"]) == hosts - 1
            and status["counters"].get("contributions")
            for status in statuses.values()
        )

    def _equal(self) -> bool:
        statuses = self._statuses()
        return (
            set(statuses) == set(self._reachable())
            and len({status["ledger"]["digest"] for status in statuses.values()}) == 1
            and all(
                _seen(status).get(key, 0) >= samples
                for status in statuses.values()
                for key, samples in self._everything.items()
            )
        )

    def _complete(self) -> bool:
        statuses = self._statuses()
        return (
            set(statuses) == set(self._reachable())
            and all(status["complete"] for status in statuses.values())
            and len({status["ledger"]["digest"] for status in statuses.values()}) == 1
        )

    def _statuses(self) -> dict[int, dict[str, Any]]:
        """Of all devices that can answer, by number."""

        def status(device: LocalDevice) -> dict[str, Any] | None:
            with contextlib.suppress(P2PCollabError):
                return device.status()
            return None

        answers = self._ask_all(status)
        return {number: answer for number, answer in answers.items() if answer is not None}

    def _ask_all(self, question: Callable[[LocalDevice], Any]) -> dict[int, Any]:
        devices = self._reachable()
        with ThreadPoolExecutor(max(1, len(devices))) as pool:
            return dict(zip(devices, pool.map(question, devices.values()), strict=True))

    def _reachable(self) -> Mapping[int, LocalDevice]:
        """Those that run and are not stopped."""
        return {
            number: device
            for number, device in enumerate(self._fleet.devices, start=1)
            if device.running and number not in self._stopped
        }

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

    # Hosts

    def _device(self, number: int) -> LocalDevice:
        return self._fleet.devices[number - 1]

    def _hosts_of(self, kind: type[sc.Step]) -> set[int]:
        return {number for m in self._moments if isinstance(m.step, kind) for number in m.hosts}

    def _state_folder(self, number: int) -> Path:
        """The state folder; on a small disk of its own where it will be filled."""
        folder = self._folder / f"host-{number}"
        folder.mkdir()
        if number not in self._hosts_of(sc.FillDisk):
            return folder
        size = f"size={self._scenario.disk_mb}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
        self._stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=False)
        return folder / "state"

    def _ballast(self, number: int) -> Path:
        return self._folder / f"host-{number}" / "ballast"

    def _clock(self, number: int) -> Path:
        return self._folder / f"clock-{number}"

    def _prefix(self, number: int, host: Host) -> tuple[str, ...]:
        if number not in self._hosts_of(sc.Skew):
            return host.prefix
        library, clock = faketime_library(), self._clock(number)
        clock.write_text("+0")
        return (
            *(*host.prefix, "env", f"LD_PRELOAD={library}", f"FAKETIME_TIMESTAMP_FILE={clock}"),
            *("FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"),
        )


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
