"""The p2pd process: where its sockets live, and how one that outlived its daemon is found and ended."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import Field, ValidationError

from ..errors import UsageError
from ..files import write_atomic
from ..run import Frozen

#: Name of the mark's file in the state folder.
P2PD_MARK = "p2pd.json"
_PROGRAM = "p2pd"
#: Start times are rounded differently by different kernels.
_SAME_START_S = 1.0
_END_S = 3.0


class P2pdMark(Frozen):
    """Which process is our p2pd. Kept in a file, so that the daemon after a killed one can clean up."""

    pid: Annotated[int, Field(gt=0, lt=2**31)]
    #: Start time of the process, seconds since the epoch: a pid alone may be somebody else's by now.
    started: float
    #: Folder of its control sockets.
    sockets: str

    @classmethod
    def of(cls, pid: int, sockets: Path) -> P2pdMark:
        """The mark of a process that runs."""
        return cls(pid=pid, started=psutil.Process(pid).create_time(), sockets=str(sockets))

    def write(self, path: Path) -> None:
        """Keep it.

        Raises:
            StorageError: the disk refused.
        """
        write_atomic(path, self.model_dump_json().encode(), mode=0o600)


def end_stale_p2pd(path: Path) -> bool:
    """End the p2pd that a killed daemon left behind, and remove its sockets; whether there was one.

    It would keep the port: p2pd listens with SO_REUSEPORT, so a second one starts without complaint, and each
    gets some of the connections.
    """
    try:
        mark = P2pdMark.model_validate_json(path.read_bytes())
    except OSError:
        return False
    except ValidationError:
        path.unlink(missing_ok=True)
        return False
    ended = False
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(mark.pid)
        if abs(process.create_time() - mark.started) < _SAME_START_S and process.name() == _PROGRAM:
            process.kill()
            process.wait(_END_S)
            ended = True
    remove_socket_folder(Path(mark.sockets))
    path.unlink(missing_ok=True)
    return ended


def make_socket_folder() -> Path:
    """A folder that only this user can enter, for control sockets: whoever reaches them acts as this device.

    In /tmp and nowhere else, because the name of a UNIX socket has at most 104 bytes.
    """
    return Path(tempfile.mkdtemp(prefix="p2pcollab-", dir="/tmp"))


def remove_socket_folder(folder: Path) -> None:
    """Remove what `make_socket_folder` made; nothing else, whatever a damaged mark says."""
    if folder.parent == Path("/tmp") and folder.name.startswith("p2pcollab-"):  # noqa: S108
        shutil.rmtree(folder, ignore_errors=True)


def check_port_is_free(host: str, port: int) -> None:
    """See whether a port can be listened on.

    Raises:
        UsageError: another program uses it, or the address is not this device's.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise UsageError(
                f"{host}:{port} cannot be listened on: {error.strerror}",
                "choose another port with --port, or let one be chosen",
            ) from error
