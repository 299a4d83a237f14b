"""A scenario: hosts, and what befalls them when, as a TOML file says it. See tests/netns/scenarios.

Parsing and planning only: the same file and seed give the same timeline. `play` performs it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from p2pcollab.errors import UsageError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

#: Twelve daemons fill 12 GB of memory, and keep two cores busy.
HOSTS_MAX = 12


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Step(_Strict):
    """Something that happens. Times are seconds after all hosts train and see each other."""

    at_s: Annotated[float, Field(ge=0, le=3600, strict=False)]


class _OnHosts(Step):
    """Something that happens to hosts: those named, or as many as `pick` says, by the scenario's seed."""

    hosts: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    pick: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _either(self) -> _OnHosts:
        if bool(self.hosts) == (self.pick is not None):
            raise ValueError("give either `hosts` or `pick`")
        if len(set(self.hosts)) != len(self.hosts):
            raise ValueError("`hosts` names one of them twice")
        return self


class _Passing(_OnHosts):
    """A fault that ends by itself if `for_s` is given."""

    for_s: Annotated[float, Field(gt=0, le=3600, strict=False)] | None = None


class Cut(_Passing):
    """Cut hosts off from the others; they still hear each other. One way: `deaf` hosts hear nothing, `mute`
    ones are not heard."""

    do: Literal["cut"]
    way: Literal["both", "deaf", "mute"] = "both"


class Heal(_OnHosts):
    """Put cables back, and end one-way cuts and loss."""

    do: Literal["heal"]


class Kill(_Passing):
    """SIGKILL: a part of the device, or all of it, as when its power fails. After `for_s` it is started."""

    do: Literal["kill"]
    part: Literal["device", "daemon", "trainer", "p2pd"] = "device"


class Start(_OnHosts):
    """Start killed devices again."""

    do: Literal["start"]


class Stop(_Passing):
    """SIGSTOP, as when a laptop's lid is closed; after `for_s` SIGCONT."""

    do: Literal["stop"]
    part: Literal["device", "daemon", "trainer", "p2pd"] = "device"


class Slow(_Passing):
    """Give a host so many cores' time and no more."""

    do: Literal["slow"]
    cores: Annotated[float, Field(ge=0.01, le=64, strict=False)]


class Loss(_Passing):
    """Lose this share of the packets, in each direction."""

    do: Literal["loss"]
    share: Annotated[float, Field(gt=0, lt=1, strict=False)]


class Skew(_Passing):
    """Set the clock wrong by so much."""

    do: Literal["skew"]
    seconds: Annotated[float, Field(ge=-1e9, le=1e9, strict=False)]


class FillDisk(_Passing):
    """Leave no room on the host's disk."""

    do: Literal["fill-disk"]


class Bandwidth(_Passing):
    """Let no more through, in each direction."""

    do: Literal["bandwidth"]
    kbit_s: Annotated[int, Field(ge=8)]


class Delay(_Passing):
    """Hold each packet back, in each direction."""

    do: Literal["delay"]
    ms: Annotated[float, Field(ge=0, le=10_000, strict=False)]
    jitter_ms: Annotated[float, Field(ge=0, le=10_000, strict=False)] = 0.0


class Settle(Step):
    """Stop all trainers, and measure until all ledgers are equal and hold everything; then they go on."""

    do: Literal["settle"]
    within_rounds: Annotated[int, Field(ge=1, le=1000)]


AnyStep = Annotated[
    Cut | Heal | Kill | Start | Stop | Slow | Loss | Skew | FillDisk | Bandwidth | Delay | Settle,
    Field(discriminator="do"),
]


class Scenario(_Strict):
    """A run of real daemons on the bundled digits, and its troubles."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    #: One sentence for people: what is done, and what is to be seen.
    about: Annotated[str, Field(min_length=10, max_length=500)]
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    hosts: Annotated[int, Field(ge=2, le=HOSTS_MAX)]
    #: Length of the run. Long enough for all steps where it ends `settled`.
    epochs: Annotated[float, Field(gt=0, le=100_000, strict=False)]
    #: Share of the machine that each device trains with.
    budget: Annotated[float, Field(ge=0.01, le=1, strict=False)] = 0.1
    #: Samples of a lease, instead of what the length of the run makes them: short ones fit in a short cut.
    lease_samples: Annotated[int, Field(ge=32, le=100_000)] | None = None
    #: `complete`: the run is complete on all hosts, and all assemble the same model; `settled`: all have
    #: stopped training, and hold the same.
    end: Literal["complete", "settled"]
    #: Size of each host's disk where `fill-disk` fills one.
    disk_mb: Annotated[int, Field(ge=4, le=4096)] = 64
    steps: tuple[AnyStep, ...] = Field(default=(), strict=False, max_length=1000)

    @model_validator(mode="after")
    def _hosts_exist(self) -> Scenario:
        for number, step in enumerate(self.steps, start=1):
            if isinstance(step, _OnHosts):
                wanted = max(step.hosts, default=step.pick or 0)
                if wanted > self.hosts:
                    raise ValueError(f"step {number} ({step.do}) needs host {wanted} of {self.hosts}")
        return self

    def uses(self, *kinds: type[Step]) -> bool:
        """Whether any step is of one of these kinds."""
        return any(isinstance(step, kinds) for step in self.steps)

    @property
    def programs(self) -> tuple[str, ...]:
        """What has to be installed to play it."""
        needed = {"ip": True, "tc": self.uses(Bandwidth), "ethtool": self.uses(Delay)}
        one_way = any(isinstance(step, Cut) and step.way != "both" for step in self.steps)
        needed["iptables"] = one_way or self.uses(Loss)
        return tuple(program for program, is_needed in needed.items() if is_needed)


@dataclass(frozen=True, slots=True)
class Moment:
    """When a step begins or ends, and for which hosts."""

    at_s: float
    step: Step
    hosts: tuple[int, ...] = ()
    #: The step ends here.
    ends: bool = False

    @property
    def label(self) -> str:
        """For people."""
        kind: str = getattr(self.step, "do", "")
        fields = self.step.model_dump(exclude={"at_s", "hosts", "pick", "for_s", "do"})
        more = " ".join(f"{name}={value}" for name, value in fields.items())
        where = f" hosts {', '.join(map(str, self.hosts))}" if self.hosts else ""
        return f"{'end of ' if self.ends else ''}{kind}{where}{f' ({more})' if more else ''}"


def timeline(scenario: Scenario) -> tuple[Moment, ...]:
    """What happens, in its order; what is simultaneous, in the file's, with ends before beginnings."""
    rng = random.Random(scenario.seed)
    moments: list[tuple[float, int, int, Moment]] = []
    for place, step in enumerate(scenario.steps):
        hosts: tuple[int, ...] = ()
        if isinstance(step, _OnHosts):
            everybody = range(1, scenario.hosts + 1)
            hosts = step.hosts or tuple(sorted(rng.sample(everybody, step.pick or 0)))
        moments.append((step.at_s, 1, place, Moment(step.at_s, step, hosts)))
        if isinstance(step, _Passing) and step.for_s is not None:
            end = step.at_s + step.for_s
            moments.append((end, 0, place, Moment(end, step, hosts, ends=True)))
    return tuple(moment for *_, moment in sorted(moments, key=lambda entry: entry[:3]))


def relayed_hosts(moments: tuple[Moment, ...]) -> frozenset[int]:
    """Hosts whose packets are delayed at some time."""
    return frozenset(n for moment in moments if isinstance(moment.step, Delay) for n in moment.hosts)


def hosts_that_stay_away(moments: tuple[Moment, ...]) -> frozenset[int]:
    """Hosts that are killed and not started again."""
    away: set[int] = set()
    for moment in moments:
        if isinstance(moment.step, Kill) and moment.step.part in ("device", "daemon"):
            away = away - set(moment.hosts) if moment.ends else away | set(moment.hosts)
        elif isinstance(moment.step, Start):
            away -= set(moment.hosts)
    return frozenset(away)


def parse(text: str, where: str = "the scenario") -> Scenario:
    """Read a scenario.

    Raises:
        UsageError: it is not one; the message names the place.
    """
    try:
        return Scenario.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}") from error
    except ValidationError as error:
        raise UsageError(f"{where}: {'; '.join(_complaints(error))}") from error


def load(path: Path) -> Scenario:
    """Read a scenario's file.

    Raises:
        UsageError: there is none, or it is wrong.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the scenario {path} cannot be read: {error}") from error


def _complaints(error: ValidationError) -> Iterator[str]:
    for one in error.errors()[:3]:
        place: list[Any] = list(one["loc"])
        if place[:1] == ["steps"] and len(place) > 1:
            place[:2] = [f"step {int(place[1]) + 1}"]
        yield f"{' '.join(map(str, place)) or 'as a whole'}: {one['msg'].removeprefix('Value error, ')}"
