"""The processes beside the devices: who records the switch, and the stranger."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from p2pcollab.errors import P2PCollabError

_HERE: Final = Path(__file__).parent


class Recorder:
    """The recording of the switch, in a process in its namespace."""

    def __init__(self, namespace: str, bridge: str, path: Path) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, str(_HERE / "capture.py")]
        self._process = subprocess.Popen(
            [*command, bridge, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "recording":
            raise P2PCollabError("the switch's packets cannot be recorded")

    def stop(self) -> dict[str, int]:
        """Packets recorded and dropped."""
        told, _ = self._process.communicate(timeout=60)
        return dict(json.loads(told))

    def end(self) -> None:
        """End it, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class StrangerProcess:
    """The stranger, in a process in its namespace."""

    def __init__(self, namespace: str, brief: dict[str, Any], log: Path) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-W", "ignore"]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, "-m", "strangers.attacks"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=_HERE.parent,
            )
        self._log = log
        self.hello = self._ask(brief)

    def attack(self, name: str, first: int, tries: int) -> dict[str, Any]:
        """Some tries."""
        return self._ask({"attack": name, "first": first, "tries": tries})

    def insider(self) -> dict[str, Any]:
        """The counter-check."""
        return self._ask({"attack": "insider"})

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise P2PCollabError(f"the stranger ended: {self._log.read_text()[-2000:]}")
        return dict(json.loads(line))

    def end(self) -> None:
        """End it and its p2pd."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
