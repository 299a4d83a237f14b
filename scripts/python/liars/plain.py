"""The defence switched off, by substitution: every contribution is believed, and merging is a plain mean.

The product has no such switch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

from p2pcollab import assembly, belief, merging, shards
from p2pcollab.claims import Claims
from p2pcollab.daemon.workshop import Workshop
from p2pcollab.ledger import Contribution


class Credulous(Claims):
    """Believes everything."""

    def witness(self, one: Contribution, other: Contribution) -> bool:  # noqa: ARG002
        return False

    def settle(self, live: object, now: float) -> list[Contribution]:  # noqa: ARG002
        believed = list(self.held_back)
        self._held_back.clear()
        return believed


def _check_nothing(_self: Workshop, fields: dict[str, Sequence[object]], _blobs: object) -> dict[str, object]:
    return {"verdicts": [None] * len(fields["trials"]), "macs": 0}


@contextmanager
def plain_averaging() -> Iterator[None]:
    """Within it, devices check nothing that could stop a lie."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(belief, "Claims", Credulous))
        stack.enter_context(mock.patch.object(Workshop, "check", _check_nothing))
        stack.enter_context(mock.patch.object(merging, "ROBUST_MIN", 10**9))
        stack.enter_context(mock.patch.object(shards, "_check_values", lambda _name, _tensor: None))
        assert vars(assembly)["merge"] is merging.merge
        yield
