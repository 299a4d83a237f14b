"""The run spec and the join code: one encoding each, and nothing from outside is believed."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from typing import Any

import pytest
from hostile_bytes import BOMBS, mutated, only_raises, quick
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.errors import IncompatibleError, PeerError, UsageError
from p2pcollab.run import (
    PROTOCOLS_READ,
    STEM,
    AudioSpec,
    InputSpec,
    JoinCode,
    ModelSpec,
    RunId,
    RunSpec,
    Schedule,
    ShardId,
    TaskSpec,
)

SPEC = RunSpec(
    name="pets",
    classes=("cat", "dog", "snow leopard", "größe"),
    tasks=(
        TaskSpec(id="t0", classes=(0,)),
        TaskSpec(id="t1", classes=(1,)),
        TaskSpec(id="t2", classes=(2, 3)),
        TaskSpec(id="t3", classes=(0, 3)),
    ),
    model=ModelSpec(family="alexnet", stem_stages=2, branch_width=0.25),
    input=InputSpec(channels=1, height=8, width=8, mean=(0.5,), std=(0.25,), augment="shift"),
    schedule=Schedule(budget_samples=1000, lease_samples=100, batch_size=10, peak_lr=0.1),
    seed=7,
)

secrets = st.binary(min_size=16, max_size=16)
run_ids = st.binary(min_size=32, max_size=32).map(lambda raw: RunId(raw.hex()))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"


CLIPS = InputSpec(
    channels=1, height=40, width=100, mean=(0.5,), std=(0.25,), augment="speech", audio=AudioSpec()
)


def _clips(**changes: Any) -> bytes:
    """A run of clips whose input, or whose `audio`, is altered."""
    fields = CLIPS.model_dump(mode="json")
    audio = {name: value for name, value in changes.items() if name in AudioSpec.model_fields}
    rest = {name: value for name, value in changes.items() if name not in audio}
    return _altered(input=fields | {"audio": fields["audio"] | audio} | rest)


def _altered(**changes: Any) -> bytes:
    fields = json.loads(SPEC.encode()) | changes
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_run_spec_round_trip_keeps_bytes_and_id() -> None:
    decoded = RunSpec.decode(SPEC.encode())
    assert decoded == SPEC
    assert decoded.encode() == SPEC.encode()
    assert decoded.run_id == SPEC.run_id == hashlib.sha256(SPEC.encode()).hexdigest()


def test_a_run_of_clips_is_read_as_it_was_written() -> None:
    spec = RunSpec.decode(_clips())
    assert spec.input == CLIPS
    assert spec.encode() == _clips()


def test_a_run_of_images_says_nothing_of_audio() -> None:
    assert b"audio" not in SPEC.encode()
    with pytest.raises(PeerError):
        RunSpec.decode(_altered(input=SPEC.input.model_dump(mode="json")))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_rate_hz": 16_001},
        {"sample_rate_hz": 1_000_000},
        {"clip_ms": 10_010},
        {"clip_ms": 1_005},
        {"hop_ms": 0},
        {"window_ms": 5},
        {"hop_ms": 50, "width": 20},
        {"bands": 80, "height": 80, "sample_rate_hz": 8000},
        {"bands": 39},
        {"height": 39},
        {"width": 99},
        {"channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3},
        {"floor_db": -1e30},
        {"top_db": -60.0},
        {"augment": "crop-flip"},
        {"augment": "shift"},
        {"extra": 1},
    ],
)
def test_settings_of_clips_that_cannot_be_are_the_peers_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="not valid"):
        RunSpec.decode(_clips(**changes))


def test_images_are_not_augmented_like_speech() -> None:
    with pytest.raises(PeerError, match="images cannot be augmented like speech"):
        RunSpec.decode(_altered(input=json.loads(SPEC.encode())["input"] | {"augment": "speech"}))


def test_any_difference_makes_another_run() -> None:
    assert SPEC.model_copy(update={"seed": 8}).run_id != SPEC.run_id


def test_shards_are_the_stem_and_one_per_task() -> None:
    assert SPEC.shards == (STEM, "t0", "t1", "t2", "t3")
    assert [SPEC.label(shard) for shard in SPEC.shards] == [
        "stem",
        "cat",
        "dog",
        "snow leopard+größe",
        "cat+größe",
    ]
    assert (SPEC.budget(STEM), SPEC.budget(ShardId("t0"))) == (700, 1000)
    with pytest.raises(UsageError):
        SPEC.task(ShardId("t9"))


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(json.loads(SPEC.encode())).encode(),
        SPEC.encode() + b"\n",
        SPEC.encode().replace(b'"seed":7', b'"seed":7.0'),
        SPEC.encode().replace(b'"seed":7', b'"seed":"7"'),
        SPEC.encode().replace(b'"seed":7', b'"seed":7,"seed":7'),
        SPEC.encode().replace("ö".encode(), b"\\u00f6"),
        SPEC.encode().decode().encode("utf-16"),
    ],
)
def test_only_the_canonical_form_of_a_run_spec_is_read(data: bytes) -> None:
    with pytest.raises(PeerError):
        RunSpec.decode(data)


@pytest.mark.parametrize(
    "data",
    [
        _altered(extra=1),
        _altered(classes=["cat"]),
        _altered(classes=["cat", "cat", "dog", "bird"]),
        _altered(classes=["cat", "dog", "bird", "no\u0000name"]),
        _altered(tasks=[{"id": "t0", "classes": [0]}]),
        _altered(tasks=[{"id": "t0", "classes": [0, 1, 2, 3, 4]}]),
        _altered(tasks=[{"id": "t0", "classes": [0, 1, 2, 3, 3]}]),
        _altered(tasks=[{"id": "t0", "classes": [0, 1]}, {"id": "t0", "classes": [2, 3]}]),
        _altered(tasks=[{"id": "../t0", "classes": [0, 1, 2, 3]}]),
        _altered(seed=-1),
        _altered(name="x" * 65),
        SPEC.encode().replace(b'"peak_lr":0.1', b'"peak_lr":NaN'),
        SPEC.encode().replace(b'"name":"pets"', b'"name":"\\ud800"'),
        b"x" * (limits.RUN_SPEC_BYTES_MAX + 1),
        *BOMBS,
    ],
)
def test_a_hostile_run_spec_is_the_peers_fault(data: bytes) -> None:
    with pytest.raises((PeerError, IncompatibleError)):
        RunSpec.decode(data)


def test_a_run_of_another_protocol_version_is_incompatible_not_malformed() -> None:
    with pytest.raises(IncompatibleError):
        RunSpec.decode(_altered(protocol=3, something_new=True))


def test_runs_of_the_last_version_can_be_read_but_not_taken_part_in() -> None:
    last = _altered(protocol=1)
    with pytest.raises(IncompatibleError, match="speaks 2"):
        RunSpec.decode(last)
    assert RunSpec.decode(last, PROTOCOLS_READ).encode() == last


@pytest.mark.parametrize(
    "changes", [{"\x1b[2J\x9b\x07" * 100: 1}, {"protocol": 10**4000}, {"schedule": {"\x1b[2J": 1}}]
)
def test_a_hostile_run_spec_cannot_write_to_a_terminal(changes: dict[str, Any]) -> None:
    with pytest.raises((PeerError, IncompatibleError)) as caught:
        RunSpec.decode(_altered(**changes))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@quick
@given(st.binary(max_size=300) | mutated(SPEC.encode()))
def test_any_bytes_as_run_spec_raise_only_peer_errors(data: bytes) -> None:
    only_raises((PeerError, IncompatibleError), lambda: RunSpec.decode(data))


@quick
@given(st.sampled_from(sorted(RunSpec.model_fields)), json_values)
def test_any_field_value_in_a_run_spec_raises_only_peer_errors(name: str, value: object) -> None:
    data = json.dumps(json.loads(SPEC.encode()) | {name: value}).encode()
    only_raises((PeerError, IncompatibleError), lambda: RunSpec.decode(data))


@given(secrets, run_ids)
@quick
def test_join_code_round_trip(secret: bytes, run_id: RunId) -> None:
    code = JoinCode.create(secret, run_id)
    parsed = JoinCode.parse(str(code))
    assert parsed == code
    assert parsed.secret == secret
    assert run_id.startswith(parsed.run_prefix)


@given(secrets, run_ids, st.randoms(use_true_random=False))
@quick
def test_join_code_is_read_whatever_its_case_and_groups(
    secret: bytes, run_id: RunId, rng: random.Random
) -> None:
    code = JoinCode.create(secret, run_id)
    sloppy = "".join(
        rng.choice([letter.lower(), letter, letter + " ", letter + "-", "\n" + letter])
        for letter in str(code).replace("-", "")
    )
    assert JoinCode.parse(sloppy) == code


def test_every_single_mistyped_character_of_a_join_code_is_found() -> None:
    for seed in range(5):
        rng = random.Random(seed)
        text = str(JoinCode.create(rng.randbytes(16), RunId(rng.randbytes(32).hex())))
        for place, right in enumerate(text):
            for wrong in ALPHABET + "0189-=?é":
                if wrong == right:
                    continue
                with pytest.raises(UsageError):
                    JoinCode.parse(text[:place] + wrong + text[place + 1 :])


def test_a_join_code_with_a_character_lost_added_or_swapped_is_found() -> None:
    rng = random.Random(1)
    text = str(JoinCode.create(rng.randbytes(16), RunId(rng.randbytes(32).hex()))).replace("-", "")
    for place in range(len(text)):
        with pytest.raises(UsageError):
            JoinCode.parse(text[:place] + text[place + 1 :])
        with pytest.raises(UsageError):
            JoinCode.parse(text[:place] + "A" + text[place:])
    for place in range(len(text) - 1):
        swapped = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
        if swapped != text:
            with pytest.raises(UsageError):
                JoinCode.parse(swapped)


@given(st.text(max_size=80) | st.text(ALPHABET + "= -", max_size=80).map(lambda text: "P2P-" + text))
@quick
def test_any_text_as_join_code_raises_only_usage_errors(text: str) -> None:
    only_raises(UsageError, lambda: JoinCode.parse(text))


def test_a_join_code_of_another_length_is_refused() -> None:
    for length in (5, 20, 30):
        with pytest.raises(UsageError):
            JoinCode.parse("P2P-" + base64.b32encode(bytes(length)).decode())


def test_the_secret_does_not_appear_in_a_join_codes_repr() -> None:
    code = JoinCode.create(b"sixteen bytes ok", SPEC.run_id)
    assert "sixteen" not in repr(code)
    assert b"sixteen".hex() not in repr(code)


def test_labels_of_tasks_tell_them_apart_and_stay_short() -> None:
    names = tuple(f"class {index}" for index in range(8))
    tasks = (
        TaskSpec(id="t0", classes=(0, 1)),
        TaskSpec(id="t1", classes=tuple(range(8))),
        TaskSpec(id="t2", classes=(0, 1)),
    )
    spec = SPEC.model_copy(update={"classes": names, "tasks": tasks})
    assert [spec.label(shard) for shard in spec.shards] == [
        "stem",
        "class 0+class 1",
        "class 0+class 1+class 2+class 3+class 4+3 more",
        "class 0+class 1 (2)",
    ]
