"""Augmented clips are the clip, a little later or earlier, perhaps in noise; never anything else."""

from __future__ import annotations

import numpy as np
import pytest
from audio_examples import SMALL, clip_input
from hostile_bytes import quick
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab.data import augment
from p2pcollab.data.augment import Augmentation

SPEC = clip_input(augment="speech")
#: 100 ms in frames of `SMALL`.
REACH = 5


def speech(count: int, seed: int = 0) -> np.ndarray:
    """Spectrograms with something in the middle and silence at both ends, so that a shift loses nothing."""
    clips = np.zeros((count, 1, SMALL.bands, SMALL.frames), dtype=np.uint8)
    generator = np.random.default_rng(seed)
    clips[..., REACH:-REACH] = generator.integers(1, 256, (count, 1, SMALL.bands, SMALL.frames - 2 * REACH))
    return clips


def hum(level: int = 90) -> np.ndarray:
    """One steady background."""
    return np.full((1, 1, SMALL.bands, SMALL.frames), level, dtype=np.uint8)


def augmented(clips: np.ndarray, noise: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    return Augmentation(SPEC, noise, np.random.default_rng(seed))(clips.copy())


def power(clips: np.ndarray) -> np.ndarray:
    """Power of each pixel, as the quantisation defines it; what is at the floor has none."""
    return np.where(clips > 0, 10 ** (clips * SMALL.db_per_level / 10), 0.0)


@quick
@given(count=st.integers(1, 20), seed=st.integers(0, 1000), recorded=st.booleans())
def test_shape_type_and_the_input_stay_and_a_seed_decides_all(count, seed, recorded):
    clips, noise = speech(count), hum() if recorded else None
    before = clips.copy()
    first = augmented(clips, noise, seed)
    assert first.dtype == np.uint8
    assert first.shape == clips.shape
    assert np.array_equal(first, augmented(clips, noise, seed))
    assert np.array_equal(clips, before)


def test_another_seed_gives_other_clips():
    assert not np.array_equal(augmented(speech(20), seed=1), augmented(speech(20), seed=2))


def test_a_shift_keeps_what_is_said_and_reaches_a_tenth_of_a_second_both_ways(monkeypatch):
    monkeypatch.setattr(augment, "_NOISY", 0.0)
    clips = speech(200)
    shifts = set()
    for before, after in zip(clips, augmented(clips), strict=True):
        starts = [np.flatnonzero(clip[0].any(axis=0)).min() for clip in (before, after)]
        shift = starts[1] - starts[0]
        shifts.add(int(shift))
        assert np.array_equal(np.roll(before, shift, axis=2), after)
    assert shifts == set(range(-REACH, REACH + 1))


@pytest.mark.parametrize("noise", [None, hum(), hum(20), hum(255)], ids=["made up", "hum", "soft", "loud"])
def test_noise_only_adds_and_is_softer_than_the_clip(monkeypatch, noise):
    monkeypatch.setattr(augment, "_NOISY", 1.0)
    monkeypatch.setattr(augment, "_SHIFT_MS", 0)
    clips = speech(50)
    noisy = augmented(clips, noise)
    assert (noisy >= clips).all()
    quiet = np.ones(SMALL.frames, dtype=bool)
    quiet[REACH:-REACH] = False
    assert (noisy[..., quiet] > 0).mean() > 0.5, "it is heard where nothing is said"
    extra = power(noisy[..., quiet]).mean(axis=(1, 2, 3)) / power(clips).mean(axis=(1, 2, 3))
    snr_db = -10 * np.log10(extra)
    low, high = augment._SNR_DB
    assert snr_db.min() > low - 2
    assert snr_db.max() < high + 2


def test_powers_add_as_they_do_in_a_plain_second_implementation(monkeypatch):
    monkeypatch.setattr(augment, "_NOISY", 1.0)
    monkeypatch.setattr(augment, "_SHIFT_MS", 0)
    monkeypatch.setattr(augment, "_SNR_DB", (10.0, 10.0))
    clips, noise = speech(20), hum(100)
    noisy = augmented(clips, noise)
    for clip, mixed in zip(clips, noisy, strict=True):
        # A steady hum at 10 dB below the clip's mean power.
        hum_level = round(10 * np.log10(power(clip).mean() / 10) / SMALL.db_per_level)
        exact = 10 * np.log10(power(clip) + power(np.array(hum_level))) / SMALL.db_per_level
        assert np.abs(mixed - exact.clip(0, 255)).max() <= 1.5


def test_about_half_of_the_clips_get_noise():
    clips = speech(400)
    silent_ends = (augmented(clips, hum())[..., [0, -1]] == 0).all(axis=(1, 2, 3))
    # Of the clean ones only those that were not shifted to the very border.
    assert 0.35 < 1 - silent_ends.mean() < 0.75


def test_silence_stays_silence():
    nothing = np.zeros((50, 1, SMALL.bands, SMALL.frames), dtype=np.uint8)
    assert augmented(nothing, hum()).max() < 10
    assert np.array_equal(augmented(nothing, nothing[:1]), nothing)


def test_without_augmentation_clips_are_left_alone():
    clips = speech(10)
    plain = Augmentation(clip_input(), hum(), np.random.default_rng(0))
    assert np.array_equal(plain(clips.copy()), clips)
