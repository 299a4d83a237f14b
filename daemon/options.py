"""What the daemon is told when it starts: one JSON object on its standard input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from ..errors import UsageError
from ..run import Frozen


class DaemonOptions(Frozen):
    """How one device takes part in a run. Nothing in here needs to be equal on two devices."""

    mode: Literal["new", "join", "resume"]
    #: State folder.
    state: Path
    #: Join code; with `new` made from `spec` and `secret_hex`.
    code: str | None = None
    #: Canonical run spec, for `new`.
    spec: str | None = None
    secret_hex: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None
    #: Data source: a folder, `speech-commands:FOLDER`, `torchvision:NAME` or `digits`.
    data: str | None = None
    data_root: Path | None = None
    download: bool = False
    #: `I/N`: use only the I-th of N equal parts of the training data.
    share: str | None = None
    #: Use at most this many training images of the whole set, before it is divided.
    limit: Annotated[int, Field(ge=1)] | None = None
    #: Network interface name or address; chosen when not given.
    interface: str | None = None
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    #: Addresses to try besides those that zeroconf finds: `HOST:PORT/PEER-ID` or a multiaddr.
    peers: tuple[str, ...] = ()
    #: Class names that this device would rather train.
    prefer: tuple[str, ...] = ()
    #: Class names that this device trains only.
    tasks: tuple[str, ...] = ()
    #: Share of the machine that training may use; all of it when not given.
    budget: Annotated[float, Field(ge=0.01, le=1.0)] | None = None
    #: Threads of the trainer; from the budget when not given.
    threads: Annotated[int, Field(ge=1, le=256)] | None = None
    #: The device's name for people; the host's when not given.
    nickname: str | None = None
    #: Keep every shard rather than this device's quota.
    replicate_all: bool = False
    #: Leave cleanly when standard input ends.
    attached: bool = False

    @property
    def share_of_machine(self) -> float:
        """The budget, 0..1."""
        return 1.0 if self.budget is None else self.budget

    @classmethod
    def parse(cls, line: bytes) -> DaemonOptions:
        """Read the line that the launcher wrote.

        Raises:
            UsageError: it is not what a launcher of this version writes.
        """
        try:
            return cls.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UsageError(f"the daemon was started with a wrong option {where}: {first['msg']}") from error
