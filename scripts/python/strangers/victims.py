"""The devices that are attacked, seen from outside: their status, their memory, what is stored of theirs."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import psutil
from PIL import Image
from sklearn.datasets import load_digits

from p2pcollab.daemon.api_client import ApiClient
from p2pcollab.daemon.fleet import LocalDevice
from p2pcollab.daemon.network_namespace import call_in_network
from p2pcollab.errors import PeerError
from p2pcollab.ledger import Contribution
from p2pcollab.run import RunId
from p2pcollab.wire import decode_contribution

T = TypeVar("T")

#: Names that are nowhere by chance.
_BIRDS: Final = (
    "kingfisher",
    "lapwing",
    "nightingale",
    "oystercatcher",
    "peregrine",
    "redshank",
    "shearwater",
    "turnstone",
    "wheatear",
    "yellowhammer",
)
CLASSES: Final = tuple(f"{bird}-{digit}" for digit, bird in enumerate(_BIRDS))


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as class folders, under names that can be told from noise."""
    images, labels = load_digits(return_X_y=True)
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        picture = np.uint8(pixels.reshape(8, 8) * 15)
        Image.fromarray(picture).save(place / f"{index:04}.png")


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Do something in a named network namespace."""
    return call_in_network(Path("/run/netns", namespace), work)


class Victim:
    """A device, and the host that it runs on."""

    def __init__(self, device: LocalDevice, namespace: str, host: str) -> None:
        self.device = device
        self.namespace = namespace
        self.host = host

    def status(self) -> dict[str, Any]:
        """As its API gives it."""

        def ask() -> dict[str, Any]:
            with ApiClient(self.device.state) as client:
                return client.status()

        return inside(self.namespace, ask)

    def memory(self) -> dict[str, int]:
        """Bytes of daemon and p2pd that are theirs alone. The trainer hears nothing from the network.

        Without pages of files, which the kernel takes back and reads again as it likes.
        """
        found = {}
        for part, process in self.device.processes().items():
            if part != "trainer":
                status = Path(f"/proc/{process.pid}/status").read_text()
                found[part] = sum(
                    int(line.split()[1]) * 1024
                    for line in status.splitlines()
                    if line.startswith(("RssAnon:", "VmSwap:"))
                )
        return found

    def descriptors(self) -> int:
        """Open files of the daemon and of p2pd."""
        processes = self.device.processes()
        return sum(processes[part].num_fds() for part in ("daemon", "p2pd") if part in processes)

    @property
    def run_folder(self) -> Path:
        """What it keeps of its only run."""
        (folder,) = (self.device.state / "runs").iterdir()
        return folder

    def encoded_contributions(self) -> list[bytes]:
        """The ledger as it is on the disk."""
        path = self.run_folder / "ledger.sqlite"
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
        try:
            return [row[0] for row in connection.execute("SELECT encoded FROM contributions")]
        finally:
            connection.close()

    def shards(self, known: Container[str] = ()) -> dict[str, bytes]:
        """The shards that it holds now, by digest, but for those that are known."""
        found = {}
        for path in (self.run_folder / "shards").glob("*/*.safetensors"):
            if path.stem in known:
                continue
            try:
                found[path.stem] = path.read_bytes()
            except FileNotFoundError:
                continue  # no longer needed, and removed
        return found


class ShardCollector:
    """Keeps a copy of every shard that the victims ever hold: they remove what they need no longer."""

    def __init__(self, victims: list[Victim]) -> None:
        self._victims = victims
        self._stop = threading.Event()
        self.shards: dict[str, bytes] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            for victim in self._victims:
                self.shards.update(victim.shards(self.shards))

    def stop(self) -> None:
        """Collect no more."""
        self._stop.set()
        self._thread.join()


class MemoryWatch:
    """The most memory that the victims' daemons and p2pds had while it ran."""

    def __init__(self, victims: list[Victim]) -> None:
        self._victims = victims
        self._stop = threading.Event()
        self.peak: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> MemoryWatch:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._stop.wait(0.25):
            self._look()

    def _look(self) -> None:
        for victim in self._victims:
            try:
                for part, size in victim.memory().items():
                    self.peak[part] = max(size, self.peak.get(part, 0))
            except psutil.Error:
                continue


def foreign_contributions(victims: list[Victim], run_id: RunId, honest: set[str]) -> list[str]:
    """What is in the ledgers and was not written there by its own device: forged, foreign, or never made.

    A device's own ledger is what it wrote: nobody else may have a newer contribution of it, or another one of
    the same version.
    """
    wrong: list[str] = []
    ledgers: dict[str, list[Contribution]] = {}
    # The authors' own ledgers are read last: what they make meanwhile is no other device's invention.
    for victim in victims:
        entries = []
        for data in victim.encoded_contributions():
            try:
                entries.append(decode_contribution(data, run_id))
            except PeerError as error:
                wrong.append(f"{victim.device.name}: {error}")
        ledgers[victim.device.name] = entries
    own: dict[tuple[str, str], Contribution] = {}
    for victim in victims:
        device = victim.status()["device"]["id"]
        for data in victim.encoded_contributions():
            entry = decode_contribution(data, run_id)
            if entry.device == device:
                own[entry.key] = entry
    for name, entries in ledgers.items():
        for entry in entries:
            made = own.get(entry.key)
            if entry.device not in honest:
                wrong.append(f"{name}: {entry.shard} of {entry.device}, which is no device of the run")
            elif made is None or entry.version > made.version:
                wrong.append(f"{name}: {entry.shard} of {entry.device}, which its author does not have")
            elif entry.version == made.version and entry.signature != made.signature:
                wrong.append(f"{name}: {entry.shard} of {entry.device} is another one than its author's")
    return wrong
