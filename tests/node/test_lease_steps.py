"""What the trainer does between the steps of a lease: it pauses, tells its progress, and serves requests."""

from __future__ import annotations

from typing import Any

from p2pcollab.daemon.trainer_process import LeaseSteps, Request
from p2pcollab.run import ShardId

BRANCH = ShardId("t0")


class FakeInbox:
    """Requests that come in while time passes."""

    def __init__(self, *requests: Request) -> None:
        self.now = 0.0
        self.requests = list(requests)

    def get(self, wait_s: float | None = None) -> Request | None:
        if self.requests:
            return self.requests.pop(0)
        self.now += wait_s or 0.0
        return None

    def clock(self) -> float:
        return self.now


class FakeProcess:
    """Keeps what was sent and answered; an answer takes a second."""

    def __init__(self, inbox: FakeInbox) -> None:
        self.inbox = inbox
        self.sent: list[dict[str, Any]] = []
        self.answered: list[str] = []

    def send(self, fields: dict[str, Any]) -> None:
        self.sent.append(fields)

    def answer(self, request: Request) -> None:
        self.answered.append(request.do)
        self.inbox.now += 1.0


def steps(duty: float, *requests: Request) -> tuple[FakeInbox, FakeProcess, LeaseSteps]:
    inbox = FakeInbox(*requests)
    process = FakeProcess(inbox)
    as_process: Any = process
    as_inbox: Any = inbox
    return inbox, process, LeaseSteps(as_process, as_inbox, 7, duty, inbox.clock)


def test_quarter_of_the_budget_sleeps_three_times_as_long_as_it_computes() -> None:
    inbox, _, step = steps(0.25)
    for number in range(1, 4):
        inbox.now += 0.5
        assert step(number * 32, {BRANCH: 1.0})
        assert inbox.now == number * 2.0


def test_progress_is_sent_at_most_five_times_a_second() -> None:
    inbox, process, step = steps(1.0)
    for number in range(100):
        inbox.now += 0.01
        step(number, {BRANCH: 1.0})
    assert [report["progress"] for report in process.sent] == [0, 20, 40, 60, 80]
    assert process.sent[0]["id"] == 7


def test_requests_during_a_lease_are_served_or_refused_and_their_time_is_not_the_leases() -> None:
    _, process, step = steps(
        1.0,
        Request(id=1, do="assemble", fields={}),
        Request(id=2, do="configure", fields={}),
        Request(id=3, do="cancel", fields={}),
    )
    assert step(32, {})
    assert process.answered == ["assemble"]
    assert step.served_s == 1.0
    assert "during a lease" in process.sent[-1]["error"]["what"]


def test_cancel_ends_the_lease_in_the_middle_of_a_pause() -> None:
    inbox, _, step = steps(0.5, Request(id=7, do="cancel", fields={}))
    inbox.now += 4.0
    assert not step(32, {})
    assert inbox.now == 4.0
