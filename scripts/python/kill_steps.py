"""SIGKILL of one device at named steps and at random times; see scripts/kill-many.

A life is a process that opens the state folder, trains leases on the digits with the real worker,
coordinator, store and training code, and stores what they make; only the network is missing, and the
trainer runs in the same process. It is forked from one that has imported and loaded everything, so that a
life takes a fraction of a second and not ten. It tells through a pipe what it has begun and done, and dies
at a step that was drawn before, or when its parent kills it.

The next life must open the folder without a complaint and find every contribution that was acknowledged, with
the tensors of each, and nothing that nobody made. What is lost is at most the lease that was in progress.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import platform
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from p2pcollab.coordinator import Advert, Coordinator, CoordinatorSettings
from p2pcollab.daemon.events import EventLog
from p2pcollab.daemon.fetching import Fetcher
from p2pcollab.daemon.gossip import Gossip
from p2pcollab.daemon.index import Index
from p2pcollab.daemon.intake import Intake
from p2pcollab.daemon.peer_ids import PeerIds
from p2pcollab.daemon.renewal import Renewal
from p2pcollab.daemon.session import Counters, Session
from p2pcollab.daemon.store import RunStore, Store
from p2pcollab.daemon.trainer import ReadShard, Trainer
from p2pcollab.daemon.work import Worker
from p2pcollab.daemon.workshop import Workshop
from p2pcollab.data import inspect
from p2pcollab.errors import StorageError
from p2pcollab.keys import Identity, RunKeys
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import RunSpec, ShardId
from p2pcollab.wire import decode_contribution

#: Leases of a life that is not killed.
LEASES = 2
#: Trained by the device, besides the stem: two branches are enough for what is tried here.
TASKS = frozenset({ShardId("t0"), ShardId("t1")})
SECRET = bytes(range(16))
#: A life that says nothing for so long hangs.
HANGS_S = 120.0


@dataclass(frozen=True)
class Death:
    """Where a life ends. `step` None: when its parent kills it."""

    step: str | None = None
    #: `before` or `after` the step.
    moment: str = "before"
    #: Of this many times that it comes.
    time: int = 1

    def __str__(self) -> str:
        return "at a random time" if self.step is None else f"{self.moment} {self.step}"


#: It never comes.
NOTHING = Death("nothing")


class Life:
    """In the child: tells the parent what happens, and dies where it should."""

    def __init__(self, death: Death, pipe: int) -> None:
        self._death = death
        self._pipe = pipe
        self.come: Counter[str] = Counter()
        self._write = os.write

    def tell(self, kind: str, **fields: Any) -> None:
        """One line to the parent."""
        self._write(self._pipe, json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def step(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose call is a step."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.come[name] += 1
            self._perhaps_die(name, "before")
            result = function(*args, **kwargs)
            self._perhaps_die(name, "after")
            return result

        return call

    def _perhaps_die(self, name: str, moment: str) -> None:
        if (name, moment, self.come[name]) == (self._death.step, self._death.moment, self._death.time):
            os.kill(os.getpid(), signal.SIGKILL)


class LoneTrainer(Trainer):
    """The trainer without its process: the same requests and answers, in this one."""

    def __init__(self, workshop: Workshop, life: Life) -> None:
        super().__init__(threads=1)
        self._workshop = workshop
        self._life = life

    @property
    def pid(self) -> int | None:
        return os.getpid()

    async def _ask(
        self,
        do: str,
        fields: Mapping[str, Any],
        digests: Iterable[str] = (),
        read: ReadShard | None = None,
        on_progress: Any = None,
    ) -> Any:
        blobs: dict[str, bytes] = {}
        for digest in digests:
            data = read(digest) if read is not None else None
            if data is None:
                raise StorageError(f"the shard {digest[:16]} is not in the store")
            blobs[digest] = data
        assert do == "train", do

        def on_step(samples: int, losses: Mapping[Any, float]) -> bool:
            self._life.step("training-step", lambda: None)()
            self._life.tell("progress", samples=samples)
            on_progress(samples, losses)
            return True

        result = self._workshop.train(dict(fields), blobs, on_step)
        self._life.step("trained", lambda: None)()
        return result

    async def _send(self, frame: bytes) -> None:
        pass


class NoBoard:
    """The board of a device that is alone."""

    sealed = b""

    async def read(self) -> tuple[()]:
        return ()

    def newest(self) -> tuple[()]:
        return ()

    def peer_of(self, _device: str) -> None:
        return None


class NoTransport:
    """The network of a device that is alone."""

    def follow(self, _renewal: object, _retired: object) -> None:
        pass


def spec(seed: int) -> RunSpec:
    """A run that ends long after the last kill."""
    wishes = PlanOptions(epochs=5000, seed=seed)
    planned = plan_run("steps", inspect("digits", None), wishes)
    return planned.model_copy(
        update={"schedule": planned.schedule.model_copy(update={"lease_samples": 64, "batch_size": 16})}
    )


def prepared(run: RunSpec) -> Workshop:
    """The trainer's part, with the data: made once, before the first fork, and on one thread."""
    torch.set_num_threads(1)
    workshop = Workshop()
    workshop.configure(
        {
            "niceness": 0,
            "threads": 1,
            "folder": "/",
            "spec": run.encode(),
            "source": "digits",
            "root": None,
            "share": None,
            "limit": 400,
            "download": False,
            "duty": 1.0,
            "judge_seed": 0,
        }
    )
    return workshop


def live(folder: Path, run: RunSpec, workshop: Workshop, death: Death, pipe: int) -> NoReturn:
    """One life, in a process of its own."""
    life = Life(death, pipe)
    try:
        _make_steps(life)
        asyncio.run(_live(folder, run, workshop, life))
        life.tell("end", steps=life.come)
    except BaseException:
        life.tell("failed", trace=traceback.format_exc())
    finally:
        os._exit(0)


def _make_steps(life: Life) -> None:
    for name in ("open", "write", "fsync", "replace", "unlink", "mkdir"):
        setattr(os, name, life.step(f"os.{name}", getattr(os, name)))
    for owner, method, name in (
        (RunStore, "put_shard", "put-shard"),
        (RunStore, "put_contributions", "put-contributions"),
        (RunStore, "add_event", "add-event"),
        (RunStore, "add_metric", "add-metric"),
        (RunStore, "set_meta", "set-meta"),
        (RunStore, "collect_garbage", "collect-garbage"),
        (RunStore, "close", "close-run"),
        (Store, "close", "close-store"),
        (Index, "_transact", "index-transaction"),
    ):
        setattr(owner, method, life.step(name, getattr(owner, method)))


async def _live(folder: Path, run: RunSpec, workshop: Workshop, life: Life) -> None:
    store = life.step("open-store", Store.open)(folder)
    identity = Identity.from_bytes(store.identity_seed())
    encoded = run.encode()
    known = store.runs()
    opened: RunStore = life.step(
        "open-run", lambda: store.open_run(known[0]) if known else store.create_run(encoded, SECRET)
    )()
    session, board = _session(opened, run, identity, LoneTrainer(workshop, life), life)
    renewal = Renewal(session, board, opened.rotation, on_secret=lambda _secret: None)
    intake, peer_ids = Intake(session, renewal), PeerIds(session, board)
    gossip = Gossip(session, board, renewal, intake, peer_ids)
    life.step("restore", intake.restore)(opened.load_contributions())
    life.tell("found", **_found(opened, identity))

    async def publish() -> None:
        life.step("claim", lambda: None)()
        session.coordinator.record_fields()

    worker = Worker(
        session,
        gossip,
        intake,
        Fetcher(session, intake, peer_ids),
        publish,
        on_first_step=lambda: None,
        on_claim=lambda: None,
    )
    session.coordinator.advert = Advert(
        speed=1e9, class_counts=workshop.train_data.counts(len(run.classes)), tasks=TASKS
    )
    for number in range(LEASES):
        assert await worker._one_lease()
        life.tell("ack", **_found(opened, identity))
        opened.set_meta({"counters": {"contributions": number}, "port": 4001}, durable=False)
        held = opened.digests()
        opened.collect_garbage(held - session.coordinator.keep(held))
    opened.close()
    store.close()


def _session(
    opened: RunStore, run: RunSpec, identity: Identity, trainer: Trainer, life: Life
) -> tuple[Session, Any]:
    """A lone device's session, and the board that it reads."""

    def keep_event(event: Any) -> None:
        opened.add_event(event.id, event.time, event.kind, event.text, event.fields)
        if event.kind == "lease":
            life.tell("lease", shards=event.fields["shards"], samples=event.fields["samples"])

    rng = random.Random(identity.seed)
    nothing = Advert(speed=1.0, class_counts=(0,) * len(run.classes), works=False)
    transport: Any = NoTransport()
    board: Any = NoBoard()
    session = Session(
        spec=run,
        run_id=run.run_id,
        identity=identity,
        keys=RunKeys.derive(SECRET),
        store=opened,
        coordinator=Coordinator(
            run, identity.device, nothing, CoordinatorSettings(), rng, first_beat=round(time.time() * 1000)
        ),
        transport=transport,
        trainer=trainer,
        events=EventLog(time.time, sink=keep_event),
        counters=Counters(),
        random=rng,
    )
    # Ids go on where the last life left them.
    session.events._next_id = max((event[0] for event in opened.events(1)), default=0) + 1
    return session, board


def _found(opened: RunStore, identity: Identity) -> dict[str, Any]:
    """What the folder holds of this device's work: samples by shard, and what is wrong with it."""
    own: dict[str, int] = {}
    wrong = [f"the store complains: {notice}" for notice in opened.notices()]
    for encoded in opened.load_contributions():
        entry = decode_contribution(encoded, opened.run_id)
        assert entry.device == identity.device
        own[entry.shard] = dict(entry.seen)[identity.device]
        try:
            if opened.get_shard(entry.tensors_digest) is None:
                wrong.append(f"{entry.shard} has no tensors")
        except StorageError as error:
            wrong.append(str(error))
    return {"device": identity.device, "own": own, "wrong": wrong}


@dataclass
class Tally:
    """What came of the lives."""

    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    #: Lives that reached the end although a death was drawn: the step did not come so often.
    unharmed: int = 0
    #: Restarts that found everything and trained on; lives killed before they could are not among them.
    resumed: int = 0
    #: Samples that each kill in a lease cost, and how many a lease had.
    lost: list[tuple[int, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many kills."""
        return self.kills.total()


class Parent:
    """Makes lives, kills them, and compares each with the one before."""

    def __init__(self, folder: Path, run: RunSpec, seed: int) -> None:
        self._folder = folder
        self._workshop = prepared(run)
        self._run = run
        self._rng = random.Random(seed)
        self._device: str | None = None
        #: Own samples by shard that were acknowledged.
        self._acknowledged: dict[str, int] = {}
        #: Samples that each shard may have beyond that, if the last moment's work was stored.
        self._maybe: dict[str, int] = {}
        #: How often each step came in the newest life that was not killed.
        self.steps: dict[str, int] = {}
        self.tally = Tally()

    def one(self, death: Death) -> None:
        """One life, to its end."""
        read, write = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            live(self._folder, self._run, self._workshop, death, write)
        os.close(write)
        lines = self._watch(pid, read, death)
        _, status = os.waitpid(pid, 0)
        os.close(read)
        self._judge(death, lines, killed=os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)

    def _watch(self, pid: int, read: int, death: Death) -> list[dict[str, Any]]:
        """Read what a life says; at a random moment of it kill it, if it is to die so."""
        patience = self._rng.randrange(40) if death.step is None else None
        data = b""
        while True:
            if patience is not None and data.count(b"\n") >= patience:
                # Not at the moment of a line, but anywhere after it.
                time.sleep(self._rng.uniform(0.0, 0.03))
                os.kill(pid, signal.SIGKILL)
                patience = None
            ready, _, _ = select.select([read], [], [], HANGS_S)
            if not ready:
                os.kill(pid, signal.SIGKILL)
                self.tally.problems.append(f"a life to die {death} hung")
            chunk = os.read(read, 65_536)
            if not chunk:
                break
            data += chunk
        # The last line may be half of one.
        return [json.loads(line) for line in data.split(b"\n")[:-1]]

    def _judge(self, death: Death, lines: list[dict[str, Any]], *, killed: bool) -> None:
        tally = self.tally
        if killed:
            tally.kills[str(death)] += 1
        else:
            tally.unharmed += 1
        lease: dict[str, Any] | None = None
        done = 0
        for line in lines:
            match line["kind"]:
                case "failed":
                    tally.problems.append(f"a life to die {death} failed: {line['trace']}")
                case "found":
                    self._compare(death, line)
                case "end":
                    self.steps = line["steps"]
                case "lease":
                    lease, done = line, 0
                    self._maybe = dict.fromkeys(line["shards"], line["samples"])
                case "progress":
                    done = line["samples"]
                case "ack":
                    self._acknowledged, self._maybe, lease = line["own"], {}, None
                    tally.problems += [f"{death}: {wrong}" for wrong in line["wrong"]]
        if any(line["kind"] == "progress" for line in lines):
            tally.resumed += 1
        if killed and lease is not None:
            tally.lost.append((done, lease["samples"]))

    def _compare(self, death: Death, found: dict[str, Any]) -> None:
        problems = [f"found before dying {death}: {wrong}" for wrong in found["wrong"]]
        if self._device not in (None, found["device"]):
            problems.append("the identity is another one")
        self._device = found["device"]
        own: dict[str, int] = found["own"]
        for shard in self._acknowledged.keys() | own.keys():
            least, has = self._acknowledged.get(shard, 0), own.get(shard, 0)
            if not least <= has <= least + self._maybe.get(shard, 0):
                problems.append(
                    f"{shard} has {has} samples; {least} were acknowledged, {self._maybe.get(shard, 0)} more "
                    "may be there"
                )
        self.tally.problems += problems
        self._acknowledged, self._maybe = dict(own), {}


def deaths(steps: Mapping[str, int], rng: random.Random, random_share: float) -> Iterator[Death]:
    """Where lives end: before and after each named step in turn, and at random times between; for ever.

    Args:
        steps: how often each comes in a life that is not killed.
    """
    named = [(step, moment) for step in sorted(steps) for moment in ("before", "after")]
    for number in itertools.count():
        if rng.random() < random_share:
            yield Death()
        step, moment = named[number % len(named)]
        yield Death(step, moment, rng.randint(1, steps[step]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long (default: 60)")
    parser.add_argument(
        "--random", type=float, default=0.4, help="kills at random times for each one at a named step"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="folder on the disk to try (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    started = time.monotonic()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="p2pcollab-steps-", dir=options.state) as folder:
        parent = Parent(Path(folder) / "state", spec(options.seed), options.seed)
        tally = parent.tally
        # The first life makes the folder, the second shows what an ordinary one does.
        parent.one(NOTHING)
        parent.one(NOTHING)
        if tally.problems:
            raise SystemExit("\n".join(tally.problems))
        for death in deaths(parent.steps, rng, options.random):
            if tally.count >= options.kills or time.monotonic() - started > options.minutes * 60:
                break
            parent.one(death)
            if tally.problems:
                print("\n".join(tally.problems[:5]))
                break
            if tally.count % 50 == 0 and tally.count:
                print(f"{tally.count} kills, {len(tally.problems)} problems", flush=True)
        # A last life that nobody harms.
        parent.one(NOTHING)
    result = figures(tally, options, time.monotonic() - started)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['kills']} kills at {len(result['by_moment'])} moments; "
        f"{result['resumed']} lives trained on; "
        f"{len(tally.problems)} problems; most lost: {result['samples_lost_max']} of a lease's "
        f"{result['lease_samples']} samples"
    )
    return 1 if tally.problems else 0


def figures(tally: Tally, options: argparse.Namespace, wall_s: float) -> dict[str, Any]:
    """For the JSON file."""
    return {
        "command": f"scripts/kill-many steps --kills {options.kills} --seed {options.seed}",
        "seed": options.seed,
        "kills": tally.count,
        "kills_at_random_times": tally.kills[str(Death())],
        "lives_that_died_of_nothing": tally.unharmed,
        "resumed": tally.resumed,
        "problems": tally.problems,
        "kills_in_a_lease": len(tally.lost),
        "samples_lost_max": max((lost for lost, _ in tally.lost), default=0),
        "lease_samples": max((samples for _, samples in tally.lost), default=0),
        "more_than_a_lease_lost": sum(lost > samples for lost, samples in tally.lost),
        "by_moment": dict(sorted(tally.kills.items())),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "wall_s": round(wall_s, 1),
    }


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
