"""What must never be on the network in clear: what it is, what of it is sent in clear to see that the search
finds it, and the search itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from p2pcollab.keys import Identity, RunKeys
from p2pcollab.records import BOARD_DEVICES
from p2pcollab.run import JoinCode, RunId
from p2pcollab.wire import decode_contribution

from .capture import Recording
from .needles import VALUES_MIN, Needles, pieces_to_find, search
from .victims import CLASSES, Victim

RUN_NAME: Final = "strangers-test-run"
#: What is planted goes to this port.
CONTROL_PORT: Final = 7777
#: Nobody has business there: one of the false addresses.
OUTSIDE: Final = "198.51.100.7"
_RUN_WORD: Final = "run name"
_MDNS_PORT: Final = 5353
_FIELDS: Final = (
    "class_counts",
    "lease_sequence",
    "lease_samples",
    "tensors_digest",
    "tensors_bytes",
    "stem_digest",
    "public_key",
    "generation",
    "run_prefix",
    "data_offsets",
    "running_var",
    "num_batches_tracked",
    "DHTProtocol.rpc_",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is searched for in the recording, and what was sent in clear to see that the search finds it."""

    recording: Path
    #: Secrets and names, by what they are.
    words: dict[str, bytes]
    #: One of each kind of file that was sent in clear.
    samples: dict[str, bytes]
    #: All that were trained and seen.
    shards: dict[str, bytes]
    ledger: set[bytes]


def secret_words(
    code: str, run_id: RunId, spec: bytes, victims: list[Victim], identities: list[Identity]
) -> dict[str, bytes]:
    """What must never be on the network in clear, by what it is."""
    secret = JoinCode.parse(code).secret
    keys = RunKeys.derive(secret)
    words: dict[str, bytes] = {
        _RUN_WORD: RUN_NAME.encode(),
        "join code": code[4:].encode(),
        "run secret": secret,
        "run secret in hexadecimal": secret.hex().encode(),
        "run id": run_id.encode(),
        "board name": keys.board_name(BOARD_DEVICES).encode(),
        "run spec": spec[:48],
        "name of our calls": b"p2pcollab/1/",
    }
    for name, key in (("board", keys.board_key), ("seal", keys.seal_key), ("auth", keys.auth_key)):
        words[f"{name} key"] = key
    words |= {f"class {name}": name.encode() for name in CLASSES}
    words |= {f"field {name}": name.encode() for name in _FIELDS}
    for victim, identity in zip(victims, identities, strict=True):
        words[f"device id of {victim.device.name}"] = identity.device.encode()
        words[f"name {victim.device.name}"] = victim.device.name.encode()
        words[f"key of {victim.device.name}"] = identity.seed
    return words


def plant(words: dict[str, bytes], files: dict[str, bytes]) -> bytes:
    """What is sent in clear for the counter-check: the words, and each file at each offset modulo 8.

    The search reads numbers of 8 bytes, so it could be blind at one of these and not at the others.
    """
    planted = bytearray(b" ".join(words.values()))
    for data in files.values():
        for offset in range(8):
            planted += bytes((offset - len(planted)) % 8) + data
    return bytes(planted)


def searched(
    evidence: Evidence, run_id: RunId, told: dict[str, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the evidence is in the recording, and whether the search finds what was sent in clear.

    Args:
        told: what the recorder says of itself.
    """
    began = time.monotonic()
    recording = Recording.read(evidence.recording)
    samples, words = evidence.samples, evidence.words
    files = {
        "shards": evidence.shards.values(),
        "contributions": evidence.ledger,
        "run spec": [samples["run spec"]],
    }
    needles = Needles(words, files)
    result, control = (
        search(recording, needles, planted_port=CONTROL_PORT, told={_RUN_WORD: _MDNS_PORT}, planted=planted)
        for planted in (False, True)
    )
    capture = {
        **told,
        "bytes": recording.packet_bytes,
        "bytes_missing_between_segments": recording.missing_bytes,
        # Against this, how many shards were seen and are searched for.
        "shards_trained_at_least": _shards_trained(evidence.ledger, run_id),
        "searched_for": {
            "words": sorted(words),
            "files": {kind: len(contents) for kind, contents in files.items()},
            "pieces": needles.pieces,
            f"pieces_left_out_with_less_than_{VALUES_MIN}_values": needles.plain,
        },
        **result,
        "seconds_of_search": round(time.monotonic() - began, 1),
        "packets_to_an_address_outside": recording.sent_to.get(OUTSIDE, 0),
    }
    found_again = {
        "words_sent_in_clear_and_missed": sorted(
            set(words) - {item["what"] for item in control["words_found"]}
        ),
        "pieces_sent_in_clear": {kind: 8 * pieces_to_find(data) for kind, data in samples.items()},
        "pieces_sent_in_clear_and_found": {item["what"]: item["pieces"] for item in control["pieces_found"]},
    }
    return capture, found_again


def _shards_trained(ledger: set[bytes], run_id: RunId) -> int:
    """At least how many states of shards were made: each is built on the one before it."""
    newest: dict[str, int] = {}
    for data in ledger:
        entry = decode_contribution(data, run_id)
        newest[entry.shard] = max(entry.generation, newest.get(entry.shard, 0))
    return sum(newest.values())
