"""Twelve attacks by a stranger on a run that trains; see scripts/attack-strangers.

Three devices train in network namespaces, a fourth namespace is the stranger's, and the switch between them
records every packet. After each attack: what is on the board and in the ledgers, against what the devices
wrote themselves, their memory, and whether training went on. After all of them the counter-checks, without
which nothing of it would count: the same writes by somebody with the join code are accepted and seen, and a
shard, a contribution, the run spec and names that were sent in clear are found in the recording, whole.
"""

from __future__ import annotations

import argparse
import json
import platform
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from strangers.attacks import ATTACKS
from strangers.capture import Recording
from strangers.evidence import CONTROL_PORT, RUN_NAME, Evidence, plant, searched, secret_words
from strangers.processes import Recorder, StrangerProcess
from strangers.victims import (
    MemoryWatch,
    ShardCollector,
    Victim,
    foreign_contributions,
    inside,
    write_digits,
)

from p2pcollab.daemon.fleet import Fleet, wait_until
from p2pcollab.daemon.kept import KeptFile
from p2pcollab.data import inspect
from p2pcollab.errors import P2PCollabError
from p2pcollab.keys import Identity
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import JoinCode, RunId, RunSpec

_HERE: Final = Path(__file__).parent
sys.path.insert(0, str(_HERE.parents[1] / "tests" / "netns"))
from lab import Lab, why_not  # noqa: E402

DEVICES: Final = 3
#: Long enough that training outlasts all attacks.
EPOCHS: Final = 20_000
#: Each attack's tries, in as many parts: memory that grows in every one of them is not bounded.
PARTS: Final = 4
#: For what takes seconds: the machine may be busy.
PATIENCE_S: Final = 600.0
MIB: Final = 1024 * 1024


def identity_of(state: Path) -> Identity:
    seed = KeptFile(state / "identity.key", fix="").read([])
    assert seed is not None
    return Identity.from_bytes(seed)


def board_of(statuses: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """What the devices believe of each other: (device, name, address)."""
    return {
        (peer["device"], peer["name"], peer["address"]) for status in statuses for peer in status["peers"]
    }


def memory(victims: list[Victim]) -> dict[str, int]:
    """The largest of each part."""
    found: dict[str, int] = {}
    for victim in victims:
        for part, size in victim.memory().items():
            found[part] = max(size, found.get(part, 0))
    return found


def trained(status: dict[str, Any]) -> tuple[int, int]:
    """How far a device is: samples in its ledger, and in its present lease."""
    work = status["work"] or {"samples_done": 0}
    return sum(row["samples"] for row in status["shards"]), work["samples_done"]


def links(status: dict[str, Any]) -> int:
    """How many other devices it sees alive."""
    return sum(peer["state"] not in ("gone", "left") for peer in status["peers"])


def held(statuses: list[dict[str, Any]]) -> dict[str, int]:
    """What strangers could fill, at its fullest."""
    bounds = [status["board"] for status in statuses]
    return {name: max(bound[name] for bound in bounds) for name in bounds[0]}


def in_mib(sizes: dict[str, int]) -> dict[str, float]:
    return {part: round(size / MIB, 1) for part, size in sizes.items()}


def one_attack(
    name: str, tries: int, stranger: StrangerProcess, victims: list[Victim], run_id: RunId, honest: set[Any]
) -> dict[str, Any]:
    """All tries of one attack, and what has come of them."""
    before = [victim.status() for victim in victims]
    rss_before, descriptors = memory(victims), [victim.descriptors() for victim in victims]
    outcomes: dict[str, int] = {}
    errors: dict[str, int] = {}
    heard: dict[str, int] = {}
    believed: set[Any] = set()
    seconds = 0.0
    rss_parts = []
    with MemoryWatch(victims) as watch:
        for part in range(PARTS):
            first, last = tries * part // PARTS, tries * (part + 1) // PARTS
            told = stranger.attack(name, first, last - first)
            for counts, new in (
                (outcomes, told["outcomes"]),
                (errors, told["errors"]),
                (heard, told["heard"]),
            ):
                for key, count in new.items():
                    counts[key] = counts.get(key, 0) + count
            seconds += told["seconds"]
            believed |= board_of([victim.status() for victim in victims])
            rss_parts.append(in_mib(memory(victims)))
    at = [trained(status) for status in before]

    def went_on() -> bool:
        now = [victim.status() for victim in victims]
        trains = all(trained(status) != then for status, then in zip(now, at, strict=True))
        return trains and all(links(status) == DEVICES - 1 for status in now)

    wait_until(went_on, timeout_s=PATIENCE_S, what="devices that see each other and train on")
    after = [victim.status() for victim in victims]
    believed |= board_of(after)
    strange = sorted(map(str, believed - honest))
    foreign = foreign_contributions(victims, run_id, {device for device, _, _ in honest})
    lured = {method: count for method, count in heard.items() if method.endswith("with a body")}
    return {
        "attack": name,
        "tries": tries,
        "outcomes": outcomes,
        "errors": errors,
        "refusals_counted_by_the_devices": sum(
            now["counters"]["strangers_refused"] - then["counters"]["strangers_refused"]
            for then, now in zip(before, after, strict=True)
        ),
        "answered": outcomes.get("answered", 0),
        "foreign_records": strange,
        "foreign_contributions": foreign,
        "requests_lured_out": lured,
        "proofs_lured_out": sum(heard.values()) - sum(lured.values()),
        "accepted_writes": outcomes.get("answered", 0) + len(strange) + len(foreign) + sum(lured.values()),
        "links_of_devices": [links(status) for status in after],
        "held_before": held(before),
        "held_after": held(after),
        "rss_mib_before": in_mib(rss_before),
        "rss_mib_after_each_quarter": rss_parts,
        "rss_mib_peak": in_mib(watch.peak),
        "descriptors_before": descriptors,
        "descriptors_after": [victim.descriptors() for victim in victims],
        "p2pd_restarts": sum(s["counters"]["p2pd_restarts"] for s in after),
        "seconds": round(seconds, 1),
    }


def record_connections(path: Path, victims: list[Victim], at_most: int) -> list[bytes]:
    """What devices have said to each other at the beginning of real connections: for replays."""
    hosts = {victim.host for victim in victims}
    flows = [
        data[:65_536]
        for (protocol, source, _, destination, _), data in Recording.read(path).flows.items()
        if protocol == "tcp" and source in hosts and destination in hosts and len(data) > 500
    ]
    return flows[:at_most]


def say_in_clear(sender: str, receiver: str, address: str, data: bytes) -> None:
    """Send something without encryption, for the counter-check."""

    def listen() -> socket.socket:
        listener = socket.create_server((address, CONTROL_PORT))
        listener.settimeout(PATIENCE_S)
        return listener

    def send() -> None:
        with socket.create_connection((address, CONTROL_PORT), timeout=PATIENCE_S) as connection:
            connection.sendall(data)

    def drain() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            while connection.recv(1 << 16):
                pass

    with inside(receiver, listen) as listener:
        draining = threading.Thread(target=drain)
        draining.start()
        inside(sender, send)
        draining.join()


def planned(digits: Path, seed: int) -> RunSpec:
    """A run with short leases, so that something is written all the time."""
    info = inspect(str(digits), None)
    spec = plan_run(RUN_NAME, info, PlanOptions(epochs=EPOCHS, expected_samples=info.train_images, seed=seed))
    schedule = spec.schedule.model_copy(update={"lease_samples": 8 * spec.schedule.batch_size})
    return spec.model_copy(update={"schedule": schedule})


def add_victims(lab: Lab, fleet: Fleet, folder: Path, digits: Path) -> list[Victim]:
    """A device on each host but the last, which is the stranger's."""
    *hosts, outside = lab.hosts
    victims = []
    for number, host in enumerate(hosts, start=1):
        # Or packets to false addresses would never leave the device, and prove nothing.
        subprocess.run(
            ["ip", "-n", host.namespace, "route", "add", "default", "via", outside.address], check=True
        )
        device = fleet.add(
            f"honest-device-{number}",
            folder / str(number),
            prefix=host.prefix,
            interface=host.address,
            data=str(digits),
            share=f"{number}/{DEVICES}",
            threads=1,
            # The stranger needs the core as well.
            budget=0.25,
        )
        victims.append(Victim(device, host.namespace, host.address))
    return victims


def start_training(victims: list[Victim], spec: RunSpec, code: JoinCode) -> None:
    """One device opens the run, the others join; until they see each other and train."""
    first, *others = victims
    first.device.start(mode="new", spec=spec.encode().decode(), secret_hex=code.secret.hex())
    for victim in others:
        victim.device.start(mode="join", code=str(code))
    wait_until(
        lambda: all(
            links(status) == DEVICES - 1 and status["work"] and status["ledger"]["entries"] > 0
            for status in (victim.status() for victim in victims)
        ),
        timeout_s=PATIENCE_S,
        what="the devices to see each other and train",
    )


def is_seen(device: str, victims: list[Victim], run_id: RunId, believed: set[str]) -> bool:
    """Whether an insider's record and contribution reach the devices, in a minute."""
    try:
        wait_until(
            lambda: (
                any(peer["device"] == device for peer in victims[0].status()["peers"])
                and bool(foreign_contributions(victims, run_id, believed))
            ),
            timeout_s=60,
            what="the insider's record and contribution to be accepted",
        )
    except P2PCollabError:
        return False
    return True


def run(tries: int, names: list[str], seed: int, folder: Path) -> dict[str, Any]:
    """All of it."""
    digits = folder / "digits"
    write_digits(digits)
    spec = planned(digits, seed)
    code = JoinCode.create(secrets.token_bytes(16), spec.run_id)
    path = folder / "packets.pcap"
    with Lab(DEVICES + 1) as lab, Fleet() as fleet:
        outside = lab.hosts[-1]
        victims = add_victims(lab, fleet, folder, digits)
        first = victims[0]
        recorder = Recorder(lab._switch, "lan", path)
        stranger = None
        collector = None
        try:
            start_training(victims, spec, code)
            collector = ShardCollector(victims)
            statuses = [victim.status() for victim in victims]
            honest = board_of(statuses)
            identities = [identity_of(victim.device.state) for victim in victims]
            brief = {
                "address": outside.address,
                "seed": seed,
                "victims": [
                    {"host": victim.host, "port": status["device"]["port"], "seed": identity.seed.hex()}
                    for victim, status, identity in zip(victims, statuses, identities, strict=True)
                ],
                "spec": str(first.run_folder / "spec.json"),
                "secret": code.secret.hex(),
                "contributions": [data.hex() for data in first.encoded_contributions()],
                "wire": [data.hex() for data in record_connections(path, victims, 20)],
            }
            stranger = StrangerProcess(outside.namespace, brief, folder / "stranger.log")
            rows = []
            for name in names:
                rows.append(one_attack(name, tries, stranger, victims, spec.run_id, honest))
                print(row_text(rows[-1]), flush=True)
                (folder / "attacks.json").write_text(json.dumps(rows))

            # The counter-checks. What is planted is looked for, even if it is replaced at this moment.
            collector.shards.update(first.shards())
            samples = {
                "shards": next(iter(collector.shards.values())),
                "contributions": first.encoded_contributions()[0],
                "run spec": spec.encode(),
            }
            words = secret_words(str(code), spec.run_id, spec.encode(), victims, identities)
            say_in_clear(first.namespace, outside.namespace, outside.address, plant(words, samples))
            answers = stranger.insider()
            believed = {item[0] for item in honest}
            seen = is_seen(stranger.hello["device"], victims, spec.run_id, believed)
            collector.stop()
        finally:
            if collector is not None:
                collector.stop()
            if stranger is not None:
                stranger.end()
            told = None
            try:
                told = recorder.stop()
            finally:
                recorder.end()
        for victim in victims:
            collector.shards.update(victim.shards())
        # What was planted may be in no ledger any more.
        ledger = {samples["contributions"]}
        ledger |= {entry for victim in victims for entry in victim.encoded_contributions()}
    capture, found_again = searched(
        Evidence(recording=path, words=words, samples=samples, shards=collector.shards, ledger=ledger),
        spec.run_id,
        told,
    )
    return {
        "what": "attacks by a stranger without the join code on three devices that train",
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
        "seed": seed,
        "tries_each": tries,
        "attacks": rows,
        "accepted_writes": sum(row["accepted_writes"] for row in rows),
        "capture": capture,
        "counter_checks": {
            "insiders_calls": answers,
            "insiders_record_and_contribution_seen": seen,
            **found_again,
        },
    }


def row_text(row: dict[str, Any]) -> str:
    return (
        f"  {row['attack']:20} {row['tries']:5} tries {row['seconds']:6.1f} s: accepted "
        f"{row['accepted_writes']}, outcomes {row['outcomes']}, counted "
        f"{row['refusals_counted_by_the_devices']}, "
        f"RSS MiB {row['rss_mib_before']} -> {row['rss_mib_after_each_quarter'][-1]} "
        f"(peak {row['rss_mib_peak']}), held {row['held_after']}, links {row['links_of_devices']}"
    )


def faults(result: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    capture, checks = result["capture"], result["counter_checks"]
    wrong = []
    if result["accepted_writes"]:
        wrong.append(f"{result['accepted_writes']} writes were accepted")
    if capture["bytes_in_clear"]:
        wrong.append(f"{capture['bytes_in_clear']} bytes were in clear")
    if capture["packets_to_an_address_outside"]:
        wrong.append("packets went to an address outside the network")
    if capture["dropped"] or capture["bytes_missing_between_segments"]:
        wrong.append("the recording has gaps")
    found = checks["pieces_sent_in_clear_and_found"]
    blind = [kind for kind, count in checks["pieces_sent_in_clear"].items() if found.get(kind, 0) < count]
    if checks["words_sent_in_clear_and_missed"] or blind:
        wrong.append("the search does not find all that was sent in clear")
    if set(checks["insiders_calls"].values()) != {"answered"}:
        wrong.append("an insider was refused as well: the attacks prove nothing")
    if not checks["insiders_record_and_contribution_seen"]:
        wrong.append("what an insider wrote is not seen: the comparison proves nothing")
    for row in result["attacks"]:
        if row["errors"]:
            wrong.append(f"{row['attack']}: the stranger failed: {row['errors']}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=1000, help="of each attack (default: 1000)")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="which (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep", type=Path, help="folder for the recording and all state, kept afterwards")
    options = parser.parse_args()
    names = options.attacks.split(",")
    if unknown := sorted(set(names) - set(ATTACKS)):
        parser.error(f"no attack {', '.join(unknown)}: they are {', '.join(ATTACKS)}")
    reason = why_not()
    if reason:
        print(f"scripts/attack-strangers: {reason}", file=sys.stderr)
        return 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="p2pcollab-strangers-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            result = run(options.tries, names, options.seed, folder)
        except P2PCollabError as error:
            print(f"scripts/attack-strangers: {error}", file=sys.stderr)
            return 1
    result["seconds"] = round(time.monotonic() - start, 1)
    wrong = faults(result)
    result["faults"] = wrong
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    capture = result["capture"]
    print(
        f"{len(names)} attacks x {options.tries} tries: {result['accepted_writes']} writes accepted; "
        f"{capture['packets']} packets, {capture['bytes'] / MIB:.1f} MiB recorded "
        f"({capture['dropped']} dropped), searched in {capture['seconds_of_search']:.0f} s for "
        f"{len(capture['searched_for']['words'])} words and "
        f"{sum(capture['searched_for']['pieces'].values())} pieces of files: "
        f"{capture['bytes_in_clear']} bytes of records or tensors in clear"
    )
    for fault in wrong:
        print(f"FAULT: {fault}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
