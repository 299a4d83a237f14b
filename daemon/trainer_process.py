"""The trainer process: reads requests on standard input, trains, answers on standard output.

Started by `trainer.Trainer`. A thread reads the requests, so that the end of the daemon is noticed at once,
whatever is being computed; everything else happens in the main thread, one thing after the other. Standard
output carries messages only: what a library prints goes to standard error, which is the daemon's log.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Final

from ..errors import P2PCollabError, RunError
from .error_fields import error_to_fields
from .frames import BrokenFrame, Fields, encode_frame, read_frame

if TYPE_CHECKING:
    from ..run import ShardId
    from .workshop import Workshop

_PROGRESS_EVERY_S: Final = 0.2
#: Requests that are served between the steps of a lease.
_BETWEEN_STEPS: Final = ("check", "assemble", "evaluate")
#: Two processes that started within this of each other under the same id do not exist.
_SAME_PROCESS_S: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, with the shards that came ahead of it, by digest."""

    id: int
    do: str
    fields: Fields
    blobs: dict[str, bytes] = field(default_factory=dict)


class Inbox:
    """Requests from the daemon, read by a thread of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._blobs: dict[int, dict[str, bytes]] = {}
        self._guarded: tuple[int, float] = (0, 0.0)
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def get(self, wait_s: float | None = None) -> Request | None:
        """The next request, after up to `wait_s` seconds (`None`: as long as it takes)."""
        try:
            return self._requests.get(timeout=wait_s)
        except queue.Empty:
            return None

    def _read(self) -> None:
        # Whatever goes wrong here, a trainer that no longer hears the daemon must not stay behind.
        try:
            while (frame := read_frame(self._file)) is not None:
                self._take(frame)
        except BrokenFrame:
            traceback.print_exc()
        finally:
            self.end()

    def _take(self, frame: Fields) -> None:
        match frame["do"]:
            case "blob":
                self._blobs.setdefault(frame["id"], {})[frame["digest"]] = frame["data"]
            case "forget":
                self._blobs.pop(frame["id"], None)
                self._requests.put(Request(id=frame["id"], do="cancel", fields=frame))
            case "guard":
                self._guarded = (frame["pid"], frame["create_time"])
            case do:
                blobs = self._blobs.pop(frame["id"], {})
                self._requests.put(Request(id=frame["id"], do=do, fields=frame, blobs=blobs))

    def end(self) -> None:
        """The daemon has gone: take with it what it left, and go."""
        pid, create_time = self._guarded
        if pid:
            import psutil

            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if abs(process.create_time() - create_time) < _SAME_PROCESS_S:
                    process.kill()
        os._exit(0)


class TrainerProcess:
    """Serves requests, one after the other; some of them between the steps of a lease."""

    def __init__(self, inbox: Inbox, output: BinaryIO, workshop: Workshop) -> None:
        self._inbox = inbox
        self._output = output
        self._workshop = workshop
        #: What came before there was a run to do it for.
        self._waiting: list[Request] = []
        #: Leases that were cancelled before they came: their shards travel ahead of them.
        self._cancelled: deque[int] = deque(maxlen=64)

    def serve(self) -> None:
        """Serve for ever; the end of the requests ends the process."""
        while True:
            request = self._inbox.get()
            if request is None:
                continue
            if request.do == "cancel":
                self._cancelled.append(request.id)
            elif request.do != "configure" and not self._workshop.configured:
                self._waiting.append(request)
            else:
                self.answer(request)
            while self._waiting and self._workshop.configured:
                self.answer(self._waiting.pop(0))

    def answer(self, request: Request) -> None:
        """Do what a request asks, and answer it whatever happens."""
        try:
            reply = self._perform(request)
        except P2PCollabError as error:
            reply = {"error": error_to_fields(error)}
        except MemoryError:
            fix = "use a smaller model or less data on this device"
            reply = {"error": error_to_fields(RunError("the trainer ran out of memory", fix))}
        except Exception as error:
            traceback.print_exc()
            what = f"the trainer failed: {type(error).__name__}: {error}"
            reply = {"error": error_to_fields(RunError(what, "the daemon's log says more"))}
        self.send({**reply, "id": request.id})

    def send(self, fields: Fields) -> None:
        """Write a message to the daemon."""
        try:
            self._output.write(encode_frame(fields))
            self._output.flush()
        except BrokenPipeError:
            self._inbox.end()

    def _perform(self, request: Request) -> Fields:
        workshop, fields, blobs = self._workshop, request.fields, request.blobs
        match request.do:
            case "configure":
                return workshop.configure(fields)
            case "measure":
                return workshop.measure()
            case "train":
                if request.id in self._cancelled:
                    return workshop.nothing_trained()
                steps = LeaseSteps(self, self._inbox, request.id, workshop.duty)
                reply = workshop.train(fields, blobs, steps)
                return {**reply, "seconds": reply["seconds"] - steps.served_s}
            case "check":
                return workshop.check(fields, blobs)
            case "assemble":
                return workshop.assemble(fields, blobs)
            case "evaluate":
                return workshop.evaluate(fields)
            case do:
                raise RunError(f"the trainer does not know how to {do!r}")


class LeaseSteps:
    """What happens between the steps of a lease: progress, pauses for the budget, other requests, the end."""

    def __init__(
        self,
        process: TrainerProcess,
        inbox: Inbox,
        lease_id: int,
        duty: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._process = process
        self._inbox = inbox
        self._lease_id = lease_id
        self._pause_per_busy_s = 1.0 / duty - 1.0
        self._clock = clock
        self._resumed = clock()
        # The first step is reported at once.
        self._reported = self._resumed - _PROGRESS_EVERY_S
        #: Seconds that other requests have taken.
        self.served_s = 0.0

    def __call__(self, samples_done: int, losses: Mapping[ShardId, float]) -> bool:
        """After a step; `False` ends the lease."""
        now = self._clock()
        if now - self._reported >= _PROGRESS_EVERY_S:
            self._reported = now
            self._process.send({"id": self._lease_id, "progress": samples_done, "losses": dict(losses)})
        go_on = self._rest((now - self._resumed) * self._pause_per_busy_s)
        self._resumed = self._clock()
        return go_on

    def _rest(self, pause_s: float) -> bool:
        """Let the pause pass, serving what comes meanwhile; `False` if the lease is cancelled."""
        end = self._clock() + pause_s
        while (request := self._inbox.get(max(0.0, end - self._clock()))) is not None:
            if request.do == "cancel":
                if request.id == self._lease_id:
                    return False
                continue
            began = self._clock()
            self._serve(request)
            self.served_s += self._clock() - began
        return True

    def _serve(self, request: Request) -> None:
        if request.do in _BETWEEN_STEPS:
            self._process.answer(request)
        else:
            busy = RunError(f"the trainer cannot {request.do} during a lease")
            self._process.send({"id": request.id, "error": error_to_fields(busy)})


def main() -> None:
    """Serve the daemon that started this process, until it ends."""
    # Ctrl-C in the terminal is for the daemon, which ends this process when its own work is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox = Inbox(sys.stdin.buffer)
    from .workshop import Workshop

    TrainerProcess(inbox, output, Workshop()).serve()


if __name__ == "__main__":
    main()
