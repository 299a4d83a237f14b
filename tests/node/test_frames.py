"""Frames between the daemon and its trainer."""

from __future__ import annotations

import io

import pytest

from p2pcollab.daemon.frames import BrokenFrame, encode_frame, read_frame


def test_frames_come_back_as_they_were() -> None:
    fields = {"id": 3, "do": "train", "data": bytes(range(256)), "frontiers": {"t0": [b"x"]}}
    file = io.BytesIO(encode_frame(fields) + encode_frame({}))
    assert read_frame(file) == fields
    assert read_frame(file) == {}
    assert read_frame(file) is None


@pytest.mark.parametrize(
    "data",
    [b"\x00", b"\x00\x00\x00\x05abc", b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\x05", b"hello world"],
)
def test_what_is_not_a_frame_is_refused_before_memory_is_taken(data: bytes) -> None:
    with pytest.raises(BrokenFrame):
        read_frame(io.BytesIO(data))
