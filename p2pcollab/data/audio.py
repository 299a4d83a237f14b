"""Audio files to examples: decoded, brought to the run's rate and length, and seen as a log-mel spectrogram.

libsndfile decodes, soxr resamples, kaldi-native-fbank computes the bands. They are imported when the first
clip is read, so that a machine on which one of them does not load still works with images.
"""

from __future__ import annotations

import importlib
import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from .. import limits
from ..errors import DataError
from ..run import LOWEST_HZ, AudioSpec
from .listing import DataFile

if TYPE_CHECKING:
    from .images import Pixels

Samples = npt.NDArray[np.float32]
"""One channel, float32 [S], -1..1 where nothing is overdriven."""

SUFFIXES: Final = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3"})
#: What libsndfile may try, whatever the file is called.
FORMATS: Final = frozenset({"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"})

_DB_PER_NEPER: Final = 10 / math.log(10)


class UnreadableClipError(Exception):
    """One file is not a usable clip. Its text is the reason, a few words; never leaves `data/`."""


def decode(file: DataFile, spec: AudioSpec) -> Pixels:
    """A clip's spectrogram, uint8 [1, bands, frames]: the louder, the greater; low frequencies first.

    Of a longer file the middle is taken, or what begins at `start_ms`; a shorter one gets silence around it.

    Raises:
        UnreadableClipError: it is damaged, too long, not audio, or may not be read.
        DataError: the audio libraries do not load.
    """
    return spectrogram(_clip(file, spec), spec)


def duration_ms(path: Path) -> int:
    """How long a recording is, from its header.

    Raises:
        UnreadableClipError: it is damaged, not audio, or may not be read.
        DataError: the audio libraries do not load.
    """
    with _opened(path) as sound:
        _check(sound, whole=False)
        return int(sound.frames * 1000 // sound.samplerate)


def spectrogram(samples: Samples, spec: AudioSpec) -> Pixels:
    """The log-mel spectrogram of a clip of the run's rate and length, uint8 [1, bands, frames]."""
    bank = _library("kaldi_native_fbank")
    options = bank.FbankOptions()
    options.frame_opts.samp_freq = float(spec.sample_rate_hz)
    options.frame_opts.frame_shift_ms = float(spec.hop_ms)
    options.frame_opts.frame_length_ms = float(spec.window_ms)
    # Random noise against log(0) by default; the floor of the range does that as well.
    options.frame_opts.dither = 0.0
    # As many frames as hops: those at the ends see the clip mirrored beyond them.
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = spec.bands
    options.mel_opts.low_freq = LOWEST_HZ
    computer = bank.OnlineFbank(options)
    # As a list: item by item from an array takes a third longer.
    computer.accept_waveform(float(spec.sample_rate_hz), samples.tolist())
    computer.input_finished()
    assert computer.num_frames_ready == spec.frames
    energies_WH = np.stack([computer.get_frame(index) for index in range(spec.frames)])
    levels_WH = (energies_WH * _DB_PER_NEPER - spec.floor_db) / spec.db_per_level
    return np.ascontiguousarray(levels_WH.T.round().clip(0, 255).astype(np.uint8)[None])


def supported_formats() -> str:
    """The kinds of files that can be read, for people."""
    return "WAV, FLAC, OGG or MP3 files"


def _clip(file: DataFile, spec: AudioSpec) -> Samples:
    with _opened(file.path) as sound:
        _check(sound, whole=file.start_ms is None)
        rate: int = sound.samplerate
        # No more is read than is used, whatever the header says of the rest.
        wanted = -(-spec.clip_ms * rate // 1000)
        start = (sound.frames - wanted) // 2 if file.start_ms is None else file.start_ms * rate // 1000
        try:
            sound.seek(min(max(0, start), sound.frames))
            samples: Samples = sound.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
        except Exception as error:  # as the decoders of images, libsndfile's raise what they like
            raise UnreadableClipError("damaged") from error
    if len(samples) == 0 or not np.isfinite(samples).all():
        raise UnreadableClipError("damaged")
    # Files of floating-point numbers may hold any: as loud as the loudest of the others is enough.
    samples = samples.clip(-1.0, 1.0)
    if rate != spec.sample_rate_hz:
        samples = _library("soxr").resample(samples, rate, spec.sample_rate_hz)
    return _centred(samples * np.float32(10 ** (file.gain_db / 20)), spec.clip_samples)


def _check(sound: Any, *, whole: bool) -> None:
    """Refuse what cannot be a clip before it is read. `Any`: soundfile has no types."""
    if sound.frames == 0:
        raise UnreadableClipError("empty")
    if not 1 <= sound.channels <= limits.AUDIO_CHANNELS_MAX:
        raise UnreadableClipError(f"{sound.channels} channels are too many")
    if not limits.AUDIO_RATE_HZ_MIN <= sound.samplerate <= limits.AUDIO_RATE_HZ_MAX:
        raise UnreadableClipError(f"a sample rate of {sound.samplerate} Hz is out of range")
    if whole and sound.frames > limits.CLIP_S_MAX * sound.samplerate:
        raise UnreadableClipError(f"longer than {limits.CLIP_S_MAX} s")


def _centred(samples: Samples, size: int) -> Samples:
    """Cut, or padded with silence, evenly at both ends."""
    missing = size - len(samples)
    if missing <= 0:
        return samples[-missing // 2 :][:size]
    return np.pad(samples, (missing // 2, missing - missing // 2))


def _opened(path: Path) -> Any:
    """An open `soundfile.SoundFile`. `Any`: it has no types."""
    soundfile = _library("soundfile")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableClipError("not a file")
        if status.st_size > limits.AUDIO_FILE_BYTES_MAX:
            raise UnreadableClipError(f"larger than {limits.AUDIO_FILE_BYTES_MAX // limits.MIB} MiB")
        # libsndfile says of all that the operating system refuses that it is a "system error".
        with path.open("rb"):
            pass
        # As bytes: names need not be text.
        sound = soundfile.SoundFile(os.fsencode(path))
    except FileNotFoundError as error:
        raise UnreadableClipError("does not exist") from error
    except PermissionError as error:
        raise UnreadableClipError("may not be read") from error
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UnreadableClipError("not audio, or of an unknown format") from error
    if sound.format not in FORMATS:
        sound.close()
        raise UnreadableClipError(f"{sound.format} files are not read")
    return sound


def _library(name: str) -> Any:
    """An audio library. `Any`: none of them has types that hold.

    Raises:
        DataError: it does not load.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a missing or unfit shared library is an OSError, among others
        package = name.replace("_", "-")
        raise DataError(f"{package} cannot be imported: {error}", f"pip install {package}") from error
