"""Audio files become spectrograms of the run's shape, and what is no clip is named and left out."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from audio_examples import SMALL, clip_run, tone, write_sound
from hostile_bytes import quick
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from p2pcollab import limits
from p2pcollab.data.audio import UnreadableClipError, decode, duration_ms, spectrogram
from p2pcollab.data.examples import load_images
from p2pcollab.data.listing import DataFile
from p2pcollab.errors import DataError
from p2pcollab.run import AudioSpec


def decoded(path: Path, spec: AudioSpec = SMALL, **cut: float) -> np.ndarray:
    return decode(DataFile(path.name, path)._replace(**cut), spec)


def loudest_band(levels: np.ndarray) -> int:
    return int(levels.astype(int).sum(axis=(0, 2)).argmax())


# The spectrogram


def test_a_clip_has_one_byte_per_band_and_frame_with_low_tones_first():
    low, high = (spectrogram(tone(hertz), SMALL) for hertz in (200, 4000))
    assert low.dtype == np.uint8
    assert low.shape == (1, 20, 25)
    assert loudest_band(low) < 5
    assert loudest_band(high) > 12


def test_the_same_samples_give_the_same_bytes():
    assert np.array_equal(spectrogram(tone(700), SMALL), spectrogram(tone(700), SMALL))


def test_ten_decibels_more_are_as_many_levels_more():
    soft, loud = (spectrogram(loudness * tone(700), SMALL).astype(int) for loudness in (0.1, 10**-0.5))
    inside = (soft > 0) & (loud < 255)
    assert inside.any()
    assert np.abs((loud - soft)[inside] - 10 / SMALL.db_per_level).max() <= 1.5


def test_nothing_is_the_floor_and_a_sine_at_full_scale_is_within_the_range():
    assert not spectrogram(np.zeros(SMALL.clip_samples, np.float32), SMALL).any()
    time = np.arange(SMALL.clip_samples) / SMALL.sample_rate_hz
    sine = spectrogram(np.sin(2 * np.pi * 1000 * time).astype(np.float32), SMALL)
    assert 200 < sine.max() < 255


@quick
@given(
    rate=st.sampled_from(range(8000, 49_000, 1000)),
    hop_ms=st.integers(5, 100),
    window_ms=st.integers(10, 200),
    bands=st.integers(8, 128),
    frames=st.integers(1, 100),
)
def test_whatever_a_spec_allows_the_library_computes(rate, hop_ms, window_ms, bands, frames):
    """A spec comes from a peer: one that the library gives up on would end every device's trainer."""
    try:
        spec = AudioSpec(
            sample_rate_hz=rate, clip_ms=hop_ms * frames, hop_ms=hop_ms, window_ms=window_ms, bands=bands
        )
    except ValidationError:
        return
    levels = spectrogram(np.full(spec.clip_samples, 0.1, np.float32), spec)
    assert levels.shape == (1, bands, frames)


# Files


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.WAV"])
def test_every_format_is_read(tmp_path, name):
    path = write_sound(tmp_path / name, tone(700))
    levels = decoded(path).astype(int)
    reference = spectrogram(tone(700), SMALL).astype(int)
    # Where there is something to hear; lossy formats spare the rest.
    heard = reference > 150
    assert np.abs(levels - reference)[heard].mean() < 6


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_every_rate_is_brought_to_the_runs(tmp_path, rate):
    path = write_sound(tmp_path / "a.wav", tone(700, rate=rate), rate)
    levels, reference = decoded(path), spectrogram(tone(700), SMALL)
    assert loudest_band(levels) == loudest_band(reference)
    assert abs(int(levels.max()) - int(reference.max())) <= 3


def test_channels_are_mixed(tmp_path):
    both = np.stack([tone(700), np.zeros(8000, np.float32)], axis=1)
    path = write_sound(tmp_path / "a.wav", both, subtype="FLOAT")
    assert np.array_equal(decoded(path), spectrogram(tone(700) / 2, SMALL))


def test_a_short_clip_gets_silence_on_both_sides(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(700, seconds=0.1))
    loud = np.flatnonzero(decoded(path)[0].max(axis=0) > 100)
    assert loud.min() >= 9
    assert loud.max() <= 15


def test_of_a_long_clip_the_middle_is_taken(tmp_path):
    silence = np.zeros(16_000, np.float32)
    samples = np.concatenate([tone(200), silence, tone(4000), silence, tone(200)])
    path = write_sound(tmp_path / "a.wav", samples, subtype="FLOAT")
    assert np.array_equal(decoded(path), spectrogram(tone(4000), SMALL))


def test_a_cut_begins_where_it_says_and_is_as_loud_as_it_says(tmp_path):
    path = write_sound(
        tmp_path / "a.wav", np.concatenate([tone(200), tone(4000), tone(200)]), subtype="FLOAT"
    )
    cut = decoded(path, start_ms=500, gain_db=-20.0)
    assert np.array_equal(cut, spectrogram(tone(4000) * np.float32(0.1), SMALL))
    assert duration_ms(path) == 1500


def test_sounds_beyond_full_scale_are_clipped_and_numbers_that_are_none_refused(tmp_path):
    loud = write_sound(tmp_path / "loud.wav", 1e30 * tone(700), subtype="FLOAT")
    assert decoded(loud).max() > 200
    broken = tone(700)
    broken[4000] = np.nan
    with pytest.raises(UnreadableClipError, match="damaged"):
        decoded(write_sound(tmp_path / "nan.wav", broken, subtype="FLOAT"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not audio"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "not audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not audio"),
        (bytes(10_000), "not audio"),
    ],
)
def test_what_is_no_audio_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(UnreadableClipError, match=reason):
        decoded(path)


def test_an_empty_recording_is_refused(tmp_path):
    with pytest.raises(UnreadableClipError, match="empty"):
        decoded(write_sound(tmp_path / "a.wav", np.zeros(0, np.float32)))


def test_a_recording_that_is_too_long_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "CLIP_S_MAX", 2)
    path = write_sound(tmp_path / "a.wav", np.zeros(33_000, np.float32))
    with pytest.raises(UnreadableClipError, match="longer than 2 s"):
        decoded(path)
    assert decoded(path, start_ms=100).shape == (1, 20, 25), "a cut of it is a clip"


def test_a_file_that_is_too_large_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "AUDIO_FILE_BYTES_MAX", limits.MIB)
    path = tmp_path / "a.wav"
    with path.open("wb") as file:
        file.truncate(limits.MIB + 1)
    with pytest.raises(UnreadableClipError, match="larger than 1 MiB"):
        decoded(path)


def test_rates_and_channels_out_of_range_are_refused(tmp_path):
    with pytest.raises(UnreadableClipError, match="sample rate of 1000 Hz"):
        decoded(write_sound(tmp_path / "a.wav", tone(100, rate=1000), 1000))
    many = np.zeros((100, limits.AUDIO_CHANNELS_MAX + 1), np.float32)
    with pytest.raises(UnreadableClipError, match="9 channels"):
        decoded(write_sound(tmp_path / "b.wav", many))


def test_a_header_that_promises_more_than_there_is_costs_no_memory(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(700))
    data = bytearray(path.read_bytes())
    where = data.index(b"data") + 4
    data[where : where + 4] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(data)
    with contextlib.suppress(UnreadableClipError):
        assert decoded(path).shape == (1, 20, 25)


def test_other_kinds_of_sound_files_are_refused(tmp_path):
    path = write_sound(tmp_path / "a.aiff", tone(700)).rename(tmp_path / "a.wav")
    with pytest.raises(UnreadableClipError, match="AIFF files are not read"):
        decoded(path)


@quick
@given(position=st.integers(0, 400), value=st.integers(0, 255), length=st.integers(20, 4000))
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path_factory, position, value, length):
    folder = tmp_path_factory.mktemp("damaged")
    for suffix in ("wav", "flac", "ogg"):
        path = write_sound(folder / f"a.{suffix}", tone(700, seconds=0.2))
        data = bytearray(path.read_bytes()[:length])
        data[min(position, len(data) - 1)] = value
        path.write_bytes(data)
        with contextlib.suppress(UnreadableClipError):
            assert decoded(path).dtype == np.uint8


def test_a_pipe_is_no_clip_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    caught: list[Exception] = []

    def read() -> None:
        try:
            decoded(tmp_path / "a.wav")
        except UnreadableClipError as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert [str(error) for error in caught] == ["not a file"]


def test_a_library_that_does_not_load_is_explained(tmp_path, monkeypatch):
    path = write_sound(tmp_path / "a.wav", tone(700))
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    with pytest.raises(DataError, match="kaldi-native-fbank cannot be imported") as caught:
        decoded(path)
    assert caught.value.fix == "pip install kaldi-native-fbank"


def test_images_need_no_audio_library():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['soundfile', 'soxr', 'kaldi_native_fbank']));"
        "from p2pcollab.data import inspect; print(inspect('digits').train_images)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "1438"


# For prediction


def test_clips_for_prediction_come_from_files_and_folders(tmp_path):
    single = write_sound(tmp_path / "one.wav", tone(300))
    for name in ("b.flac", "a.wav"):
        write_sound(tmp_path / "more" / name, tone(600))
    (tmp_path / "more" / "cover.jpg").write_bytes(b"x")
    loaded = load_images([single, tmp_path / "more"], clip_run())
    assert [path.name for path in loaded.paths] == ["one.wav", "a.wav", "b.flac"]
    assert loaded.images.shape == (3, 1, 20, 25)
    assert loaded.notes == ()


def test_clips_that_cannot_be_predicted_are_named(tmp_path):
    good = write_sound(tmp_path / "good.wav", tone(300))
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"nonsense")
    loaded = load_images([bad, good], clip_run())
    assert loaded.paths == (good,)
    (note,) = loaded.notes
    assert note.startswith("1 clip cannot be read and left out: ") and "bad.wav (not audio" in note
    with pytest.raises(DataError, match="no clip can be read") as caught:
        load_images([bad], clip_run())
    assert "WAV" in caught.value.fix


def test_a_folder_without_a_clip_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="holds no clip"):
        load_images([tmp_path], clip_run())
