"""Folders of recordings become the run's data: Speech Commands with its lists, silence and unknown words."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from audio_examples import SMALL, clip_run, tone, write_sound, write_speech, write_words
from data_examples import run_spec, write_classes, write_image
from hostile_bytes import quick
from hypothesis import given
from hypothesis import strategies as st

from p2pcollab import limits
from p2pcollab.data import default_input, inspect, load, parse_source
from p2pcollab.data.batches import batches
from p2pcollab.data.folders import scan
from p2pcollab.data.listing import DataFile
from p2pcollab.data.partition import Share
from p2pcollab.data.speech import (
    BACKGROUND,
    SILENCE,
    TASK_CLASSES,
    UNKNOWN,
    WORDS,
    background_cuts,
    published_part,
    with_task_classes,
)
from p2pcollab.errors import DataError
from p2pcollab.run import RunSpec

OTHERS = ("bed", "bird", "cat")


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def speakers(files: tuple[DataFile, ...]) -> set[str]:
    found = [re.search(r"([0-9a-f]{8})_nohash_", file.name) for file in files]
    return {match[1] for match in found if match}


# Folders of words


def test_a_folder_of_recordings_suggests_a_run_of_clips(tmp_path):
    info = inspect(str(write_words(tmp_path, 10, high=2000, low=200)))
    assert info.classes == ("high", "low")
    assert info.class_counts == (8, 8)
    assert (info.channels, info.height, info.width, info.augment) == (1, 40, 100, "speech")
    spec = clip_run().model_copy(update={"input": default_input(info)})
    assert RunSpec.decode(spec.encode()) == spec


def test_mean_and_deviation_are_those_of_the_spectrograms(tmp_path):
    info = inspect(str(write_words(tmp_path, 10, high=2000, low=200)))
    spec = clip_run().model_copy(update={"input": default_input(info)})
    pixels = load(str(tmp_path), spec).train.images / 255
    assert info.mean == pytest.approx((pixels.mean(),), abs=1e-3)
    assert info.std == pytest.approx((pixels.std(),), abs=1e-3)


@pytest.mark.parametrize(("seconds", "clip_ms"), [(0.3, 1000), (1.2, 1000), (1.6, 1500), (20.0, 3000)])
def test_clips_of_a_run_are_about_as_long_as_the_files_usually_are(tmp_path, seconds, clip_ms):
    for word in ("no", "yes"):
        for number in range(3):
            write_sound(tmp_path / word / f"{number}.wav", tone(300, seconds=seconds))
        write_sound(tmp_path / word / "odd.wav", tone(300, seconds=0.1))
    audio = inspect(str(tmp_path)).audio
    assert audio is not None and audio.clip_ms == clip_ms


def test_recordings_are_loaded_with_one_in_five_held_out_and_keep_their_labels(tmp_path):
    data = load(str(write_words(tmp_path, 20, high=2000, low=200)), clip_run())
    assert data.train.counts(2) == (16, 16)
    assert data.test.counts(2) == (4, 4)
    assert data.train.images.shape == (32, 1, SMALL.bands, SMALL.frames)
    for part in (data.train, data.test):
        loudest = part.images.max(axis=(1, 3)).argmax(axis=1)
        assert np.array_equal(part.labels == 0, loudest > 5)
    assert any("one clip in five of each class is held out" in note for note in data.notes)


def test_train_and_test_folders_shares_and_limits_work_as_for_images(tmp_path):
    write_words(tmp_path / "train", 6, high=2000, low=200)
    write_words(tmp_path / "test", 2, high=2000, low=200)
    data = load(str(tmp_path), clip_run(), share=Share(1, 2), limit=8)
    assert data.train.counts(2) == (2, 2)
    assert data.test.counts(2) == (2, 2)
    assert "limited to 8 of 12 training clips" in data.notes
    assert "share 1/2: 4 of 8 training clips" in data.notes


def test_the_majority_decides_what_a_mixed_folder_holds_and_the_rest_is_counted(tmp_path):
    write_words(tmp_path, 5, high=2000, low=200)
    write_image(tmp_path / "low" / "cover.png")
    info = inspect(str(tmp_path))
    assert info.audio is not None
    assert "1 other entry ignored: low/cover.png" in info.notes
    write_classes(tmp_path, high=9, low=9)
    assert inspect(str(tmp_path)).audio is None


def test_a_run_takes_its_own_kind_from_a_mixed_folder(tmp_path):
    write_words(tmp_path, 5, high=2000, low=200)
    write_classes(tmp_path, high=9, low=9)
    assert len(load(str(tmp_path), clip_run()).train) == 8
    assert len(load(str(tmp_path), run_spec(("high", "low"))).train) == 14


def test_a_run_of_clips_refuses_images_and_the_other_way_round(tmp_path):
    write_classes(tmp_path / "images", high=3, low=3)
    with pytest.raises(DataError, match="holds a clip") as caught:
        load(str(tmp_path / "images"), clip_run())
    assert "WAV" in caught.value.fix
    write_words(tmp_path / "sounds", 3, high=2000, low=200)
    with pytest.raises(DataError, match="holds an image"):
        load(str(tmp_path / "sounds"), run_spec(("high", "low")))
    with pytest.raises(DataError, match="holds images, and this run is of audio clips"):
        load("digits", clip_run(tuple("0123456789")))


def test_bad_recordings_are_skipped_named_and_counted(tmp_path):
    write_words(tmp_path, 5, high=2000, low=200)
    (tmp_path / "low" / "bad.wav").write_bytes(b"nonsense")
    write_sound(tmp_path / "low" / "none.wav", np.zeros(0, np.float32))
    data = load(str(tmp_path), clip_run())
    assert len(data.train) + len(data.test) == 10
    (note,) = (note for note in data.notes if "cannot be read" in note)
    assert note.startswith("2 clips cannot be read and left out: ")
    assert "low/bad.wav (not audio, or of an unknown format)" in note
    assert "low/none.wav (empty)" in note


def test_a_folder_without_one_readable_recording_is_refused(tmp_path):
    for word in ("no", "yes"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "a.wav").write_bytes(b"nonsense")
    for use in (lambda: load(str(tmp_path), clip_run(("no", "yes"))), lambda: inspect(str(tmp_path))):
        with pytest.raises(DataError, match="can be read"):
            use()


def test_loose_recordings_are_refused_with_what_to_do(tmp_path):
    write_sound(tmp_path / "a.wav", tone(300))
    with pytest.raises(DataError, match="holds 1 clip, but no class folders"):
        inspect(str(tmp_path))


# The split of Speech Commands


def test_the_lists_decide_and_validation_clips_stay_out(tmp_path):
    write_speech(tmp_path, "yes", "no", speakers=6)
    (tmp_path / "testing_list.txt").write_text(
        "yes/00000000_nohash_0.wav\nno/00000001_nohash_0.wav\nno/gone_nohash_0.wav\n"
    )
    (tmp_path / "validation_list.txt").write_bytes(b"yes/00000002_nohash_0.wav\r\n")
    data = load(str(tmp_path), clip_run(("yes", "no")))
    assert data.train.counts(2) == (4, 5)
    assert data.test.counts(2) == (1, 1)
    assert any("testing_list.txt; 1 validation clip not used" in note for note in data.notes)


def test_an_empty_validation_list_and_none_are_the_same(tmp_path):
    write_speech(tmp_path, "yes", "no", speakers=3)
    (tmp_path / "testing_list.txt").write_text("yes/00000000_nohash_0.wav\nno/00000000_nohash_0.wav")
    without = scan(tmp_path)
    (tmp_path / "validation_list.txt").write_text("")
    assert scan(tmp_path) == without
    assert not any("not used" in note for note in without.notes)


def test_a_list_that_cannot_be_a_list_is_refused(tmp_path, monkeypatch):
    write_speech(tmp_path, "yes", "no", speakers=1)
    (tmp_path / "testing_list.txt").write_text("x" * 100)
    monkeypatch.setattr(limits, "SPLIT_LIST_BYTES_MAX", 99)
    with pytest.raises(DataError, match=r"testing_list.txt is larger than"):
        scan(tmp_path)


@quick
@given(st.text("0123456789abcdef", min_size=8, max_size=8), st.integers(0, 9))
def test_the_published_rule_is_followed(speaker, take):
    """Against the function in the README of Speech Commands."""
    digest = int(hashlib.sha1(speaker.encode()).hexdigest(), 16)
    percentage = (digest % 2**27) * (100.0 / (2**27 - 1))
    expected = "validation" if percentage < 10 else "test" if percentage < 20 else "train"
    assert published_part(f"{speaker}_nohash_{take}.wav") == expected
    assert published_part(f"marvin_{speaker}_nohash_{take}.wav.wav") == expected
    assert published_part(f"sub/{speaker}_nohash_{take}.wav") == expected


def test_about_a_tenth_each_is_for_test_and_validation():
    parts = Counter(published_part(f"{number:08x}_nohash_0.wav") for number in range(5000))
    assert parts["test"] == pytest.approx(500, abs=80)
    assert parts["validation"] == pytest.approx(500, abs=80)


def test_without_lists_no_speaker_is_on_both_sides(tmp_path):
    write_speech(tmp_path, "yes", "no", speakers=40, takes=2)
    for number in range(20):
        write_sound(tmp_path / UNKNOWN / f"bed_{number:08x}_nohash_0.wav.wav", tone(500))
    listing = scan(tmp_path)
    train, test = (
        set().union(*(speakers(files) for files in part.values())) for part in (listing.train, listing.test)
    )
    assert train and test
    assert not train & test
    assert any("divided by speaker" in note and "validation clips not used" in note for note in listing.notes)


# Silence and unknown words


def test_background_noise_is_no_class_and_serves_the_augmentation(tmp_path):
    write_speech(tmp_path, "yes", "no", speakers=10, background_s=10)
    assert inspect(str(tmp_path)).classes == ("no", "yes")
    data = load(str(tmp_path), clip_run(("no", "yes"), augment="speech"))
    assert data.train.noise is not None
    assert data.train.noise.shape[1:] == data.train.images.shape[1:]
    assert data.train.where(data.train.labels == 0).noise is data.train.noise
    assert len([*batches(data.train, clip_run(("no", "yes"), augment="speech"), seed=1, samples=20)]) == 3


def test_without_background_recordings_clips_of_silence_serve_the_augmentation(tmp_path):
    write_words(tmp_path, 10, yes=300)
    for number in range(10):
        write_sound(tmp_path / SILENCE / f"{number}.wav", tone(1, loudness=0.0, noise_seed=number))
    data = load(str(tmp_path), clip_run((SILENCE, "yes")))
    assert np.array_equal(data.train.noise, data.train.images[data.train.labels == 0])
    write_words(tmp_path / "no silence", 5, yes=300, no=500)
    assert load(str(tmp_path / "no silence"), clip_run(("no", "yes"))).train.noise is None


@quick
@given(length_ms=st.integers(0, 60_000), count=st.integers(0, 50), clip_ms=st.integers(100, 3000))
def test_cuts_are_within_their_part_and_training_never_hears_the_test(length_ms, count, clip_ms):
    recording = DataFile("hiss.wav", Path("hiss.wav"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("p2pcollab.data.audio.duration_ms", lambda path: length_ms)
        train = background_cuts([recording] * 2, count, clip_ms, "train")
        test = background_cuts([recording] * 2, count, clip_ms, "test")
    border_ms = round(length_ms * 0.8)
    assert all(0 <= cut.start_ms <= border_ms - clip_ms for cut in train)
    assert all(border_ms <= cut.start_ms <= length_ms - clip_ms for cut in test)
    assert len(train) == (count if border_ms >= clip_ms else 0)
    assert len(test) == (count if length_ms - border_ms >= clip_ms else 0)


def test_a_run_with_silence_and_unknown_gets_them_from_a_folder_of_words(tmp_path):
    write_speech(tmp_path, "yes", "no", *OTHERS, speakers=30, background_s=20)
    listing = with_task_classes(scan(tmp_path), ("yes", "no", SILENCE, UNKNOWN), 500)
    assert set(listing.train) == {"yes", "no", SILENCE, UNKNOWN}
    for part in (listing.train, listing.test):
        sizes = {name: len(files) for name, files in part.items()}
        assert sizes[SILENCE] == sizes[UNKNOWN] == round((sizes["yes"] + sizes["no"]) / 2)
    drawn = listing.train[UNKNOWN]
    assert {file.name.split("/")[0] for file in drawn} == set(OTHERS), "all other words are heard"
    assert not speakers(drawn) & speakers(listing.test[UNKNOWN])
    assert len({file.gain_db for file in listing.train[SILENCE]}) > 1
    assert any(note.startswith(f"{UNKNOWN}: ") and "3 other words" in note for note in listing.notes)
    assert any(note.startswith(f"{SILENCE}: ") and BACKGROUND in note for note in listing.notes)
    again = with_task_classes(scan(tmp_path), ("yes", "no", SILENCE, UNKNOWN), 500)
    assert again == listing, "the same clips on every start"


def test_folders_called_silence_and_unknown_are_used_as_they_are(tmp_path):
    write_speech(tmp_path, "yes", UNKNOWN, SILENCE, "bed", speakers=5, background_s=10)
    listing = scan(tmp_path)
    assert with_task_classes(listing, ("yes", SILENCE, UNKNOWN), 500) == listing


def test_a_device_that_has_only_other_words_helps_with_the_unknown(tmp_path):
    write_speech(tmp_path, "bed", "bird", speakers=10)
    listing = with_task_classes(scan(tmp_path), ("yes", UNKNOWN), 500)
    assert set(listing.train) == {UNKNOWN}
    assert len(listing.train[UNKNOWN]) > 10


def test_a_run_without_unknown_skips_other_words(tmp_path):
    write_speech(tmp_path, "yes", "no", "bed", speakers=5)
    data = load(str(tmp_path), clip_run(("no", "yes")))
    assert any(re.fullmatch(r"class 'bed' is not in this run: \d clips skipped", note) for note in data.notes)


# The task with twelve classes


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """All ten words, three others, and background noise: the archive in small."""
    return write_speech(tmp_path / "archive", *WORDS, *OTHERS, speakers=6, background_s=8)


def test_the_scheme_makes_the_task_with_twelve_classes(archive):
    source = parse_source(f"speech-commands:{archive}")
    assert str(source) == f"speech-commands:{archive}"
    info = inspect(source)
    assert info.classes == TASK_CLASSES
    assert min(info.class_counts) >= 1
    assert max(info.class_counts) - min(info.class_counts) <= 1
    spec = clip_run(info.classes)
    data = load(source, spec)
    assert data.train.counts(12) == info.class_counts
    plain = load(str(archive), spec)
    assert np.array_equal(plain.train.images, data.train.images), "joining needs no scheme"


def test_the_folder_alone_has_a_class_for_each_word(archive):
    assert inspect(str(archive)).classes == tuple(sorted((*WORDS, *OTHERS)))


@pytest.mark.parametrize(
    ("words", "background_s", "reason"),
    [
        (WORDS[1:] + OTHERS, 8, "no training clips of yes, of the ten words"),
        (WORDS + OTHERS, 0, f"has neither {SILENCE} nor {BACKGROUND}"),
        (WORDS, 8, f"has neither {UNKNOWN} nor other words"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_for_the_task(tmp_path, words, background_s, reason):
    write_speech(tmp_path, *words, speakers=6, background_s=background_s)
    with pytest.raises(DataError, match=reason) as caught:
        inspect(f"speech-commands:{tmp_path}")
    assert "without `speech-commands:`" in caught.value.fix


@pytest.mark.parametrize("text", ["speech-commands:", "speech-commands:/no/such/folder"])
def test_the_scheme_needs_a_folder(text):
    with pytest.raises(DataError, match="no folder"):
        inspect(text)
