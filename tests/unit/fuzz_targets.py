"""Every fuzz target, by name."""

from __future__ import annotations

from fuzz_files import FRAME, MODEL, SEALED_MODEL, SHARD, STATE
from fuzz_messages import (
    BOARD_VALUE,
    CALL,
    CONTRIBUTION,
    MESSAGE,
    NOTICE,
    RECORD,
    SEALED_RECORD,
    SIGNED_CONTRIBUTION,
    SIGNED_NOTICE,
    STREAM,
)
from fuzz_text import ADDRESS, ANNOUNCEMENT, JOIN_CODE, PACKET, RUN_SPEC
from fuzzing import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        MESSAGE,
        CALL,
        CONTRIBUTION,
        SIGNED_CONTRIBUTION,
        NOTICE,
        SIGNED_NOTICE,
        RECORD,
        SEALED_RECORD,
        BOARD_VALUE,
        JOIN_CODE,
        RUN_SPEC,
        ADDRESS,
        ANNOUNCEMENT,
        PACKET,
        STREAM,
        FRAME,
        SHARD,
        MODEL,
        SEALED_MODEL,
        STATE,
    )
}
