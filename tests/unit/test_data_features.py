"""Spectrograms are computed once; a cache that is stale, damaged or in the way never changes what is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from audio_examples import SMALL, clip_input, tone, write_sound

from p2pcollab import limits
from p2pcollab.data import audio, features
from p2pcollab.data.features import decode_clips
from p2pcollab.data.listing import DataFile

SPEC = clip_input()


@pytest.fixture
def clips(tmp_path: Path) -> list[DataFile]:
    """Three good recordings and, as the second, a bad one."""
    files = [write_sound(tmp_path / "clips" / f"{name}.wav", tone(200 * (name + 1))) for name in range(4)]
    files[1].write_bytes(b"nonsense")
    return [DataFile(file.name, file) for file in files]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose spectrograms have been computed."""
    names: list[str] = []
    decode = audio.decode

    def counting(file: DataFile, spec: object) -> object:
        names.append(file.name)
        return decode(file, spec)

    monkeypatch.setattr(audio, "decode", counting)
    return names


def read(clips: list[DataFile], cache: Path | None) -> tuple[np.ndarray, dict[int, str]]:
    """What can be read, and the failures."""
    images, failures = decode_clips(clips, SPEC, cache)
    return images[[index for index in range(len(clips)) if index not in failures]], dict(failures)


def test_the_second_time_only_what_could_not_be_read_is_tried_again(clips, computed, tmp_path):
    first, failures = read(clips, tmp_path / "cache")
    assert sorted(computed) == [clip.name for clip in clips]
    computed.clear()
    second, again = read(clips, tmp_path / "cache")
    assert computed == ["1.wav"]
    assert np.array_equal(first, second)
    assert failures == again == {1: "not audio, or of an unknown format"}
    assert np.array_equal(first, read(clips, None)[0])


def test_a_file_that_has_become_readable_is_read(clips, tmp_path):
    read(clips, tmp_path / "cache")
    write_sound(clips[1].path, tone(400))
    images, failures = read(clips, tmp_path / "cache")
    assert len(images) == 4
    assert not failures


def test_a_changed_file_is_computed_anew_even_if_its_size_and_date_are_the_same(clips, tmp_path):
    before, _ = read(clips, tmp_path / "cache")
    path = clips[0].path
    status = path.stat()
    write_sound(path, tone(3000))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after, _ = read(clips, tmp_path / "cache")
    assert not np.array_equal(before[0], after[0])
    assert np.array_equal(before[1:], after[1:])


def test_other_settings_and_other_cuts_are_other_entries(clips, tmp_path):
    cache = tmp_path / "cache"
    read(clips, cache)
    finer = clip_input(SMALL.model_copy(update={"floor_db": -90.0}))
    images, _ = decode_clips(clips, finer, cache)
    assert np.array_equal(images[0], audio.decode(clips[0], finer.audio))
    louder = [clip._replace(gain_db=6.0) for clip in clips]
    assert np.array_equal(read(louder, cache)[0], read(louder, None)[0])
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: data[:-7] + bytes([data[-7] ^ 1]) + data[-6:],
        lambda data: bytes(len(data)),
        lambda data: data[:40] + b"\x00" + data[41:] if data[40] else data[:40] + b"\x01" + data[41:],
    ],
    ids=["cut", "longer", "empty", "flipped", "zeros", "other"],
)
def test_a_damaged_cache_is_noticed_and_repaired(clips, computed, tmp_path, damage):
    cache = tmp_path / "cache"
    good, _ = read(clips, cache)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    computed.clear()
    assert np.array_equal(read(clips, cache)[0], good)
    assert len(computed) == 4
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(clips, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    images, _ = read(clips, tmp_path / "cache")
    assert len(images) == 3


def test_many_clips_are_several_entries_so_that_an_interrupted_start_was_not_for_nothing(
    clips, computed, tmp_path, monkeypatch
):
    monkeypatch.setattr(features, "_CLIPS_PER_FILE", 2)
    whole, failures = read(clips, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert failures == {1: "not audio, or of an unknown format"}
    sorted((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)[1].unlink()
    computed.clear()
    assert np.array_equal(read(clips, tmp_path / "cache")[0], whole)
    assert sorted(computed) == ["1.wav", "2.wav", "3.wav"]


def test_what_was_not_used_for_longest_goes_first(clips, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    entries = {}
    for clip in (clips[0], clips[2], clips[3]):
        before = set(cache.iterdir()) if cache.exists() else set()
        read([clip], cache)
        (entries[clip.name],) = set(cache.iterdir()) - before
    for age, name in enumerate(("0.wav", "2.wav", "3.wav")):
        os.utime(entries[name], ns=(0, 10**18 + age))
    read([clips[0]], cache)
    size = entries["0.wav"].stat().st_size
    monkeypatch.setattr(limits, "FEATURE_CACHE_BYTES_MAX", 2 * size)
    read([clips[3]], cache)
    assert set(cache.iterdir()) == {entries["0.wav"], entries["3.wav"]}


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert features.default_cache() == tmp_path / "p2pcollab" / "features"
