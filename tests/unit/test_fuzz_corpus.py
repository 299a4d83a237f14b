"""Every parser of bytes from outside: nothing but its documented errors, and no memory beyond what is needed.

`scripts/fuzz` looks for inputs that break this; those that it found, and those that reach far, are kept in
tests/corpus.
"""

from __future__ import annotations

import importlib.util
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import TARGETS
from fuzzing import CORPUS, MEMORY_BYTES_MAX, Target
from hostile_bytes import BOMBS, mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


def within_memory(target: Target, inputs: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each input, and whether it was accepted; fails where one takes too much."""
    for data in inputs:
        tracemalloc.start()
        try:
            accepted = target.accepts(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MEMORY_BYTES_MAX, f"{peak / 2**20:.0f} MiB for {data[:60]!r}"
        yield data, accepted


@each_target
def test_kept_inputs_raise_only_what_is_documented(target: Target) -> None:
    kept = target.corpus()
    assert kept
    for _ in within_memory(target, (path.read_bytes() for path in kept)):
        pass


@each_target
def test_what_was_valid_stays_valid(target: Target) -> None:
    kept = [path for path in target.corpus() if path.name.startswith("valid-")]
    assert len(kept) >= len(list(target.examples()))
    for path in kept:
        assert target.accepts(path.read_bytes()), path


@each_target
def test_bombs_and_lying_lengths_are_refused_before_memory_is_taken(target: Target) -> None:
    for _ in within_memory(target, target.bombs()):
        pass


@each_target
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_invented_inputs_raise_only_what_is_documented(target: Target, data: st.DataObject) -> None:
    example = data.draw(st.sampled_from(list(target.examples())))
    target.accepts(data.draw(mutated(example) | st.binary(max_size=300) | st.sampled_from(BOMBS)))


def test_corpus_has_a_folder_for_each_target_and_no_other() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


def fuzzer() -> Any:
    """scripts/python/fuzz.py, as a module."""
    path = Path(__file__).parents[2] / "scripts" / "python" / "fuzz.py"
    found = importlib.util.spec_from_file_location("fuzz", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def waste_time(_data: bytes) -> None:
    sum(range(2_000_000))


def waste_memory(data: bytes) -> None:
    del data
    bytes(2 * MEMORY_BYTES_MAX)


def accept_and_doubt(_data: bytes) -> Any:
    def check() -> None:
        raise AssertionError("it is not what it was")

    return check


@pytest.mark.parametrize(
    ("parse", "reason"),
    [
        (lambda data: data[10], "IndexError"),
        (waste_time, "CPU time"),
        (waste_memory, "MiB"),
        (accept_and_doubt, "not what it was"),
    ],
    ids=["undocumented error", "time", "memory", "wrong result"],
)
def test_fuzzer_notices_each_kind_of_broken_promise(parse: Any, reason: str) -> None:
    module = fuzzer()
    target = Target(name="x", promise="", parse=parse, allowed=(ValueError,), examples=tuple)
    meter = module.Meter(target)
    with pytest.raises(module.Broken, match=reason):
        for _ in range(50):
            meter.feed(b"input")


def test_fuzzer_takes_documented_errors() -> None:
    module = fuzzer()
    target = Target(name="x", promise="", parse=int, allowed=(ValueError,), examples=tuple)
    meter = module.Meter(target)
    for _ in range(60):
        meter.feed(b"no number")
    assert meter.figures()["accepted"] == 0
