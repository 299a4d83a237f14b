"""Random changes to training examples that leave their class as it is.

Everything works on the bytes of a whole batch at once: on a small device it must not cost as much as the
training that it serves.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from ..run import AudioSpec, InputSpec

Pixels = npt.NDArray[np.uint8]

#: Images are moved by up to this fraction of their size.
_SHIFT_FRACTION: Final = 8
#: Clips are moved by up to this: what a speaker's start varies by.
_SHIFT_MS: Final = 100
#: Fraction of the clips to which background noise is added.
_NOISY: Final = 0.5
#: How much louder than the noise the clip is.
_SNR_DB: Final = (5.0, 25.0)
#: Made-up backgrounds, where there are no recorded ones.
_INVENTED: Final = 32
#: By how much their spectra fall from the lowest band to the highest. White noise rises: bands widen.
_TILT_DB: Final = (-10.0, 30.0)


class Augmentation:
    """One kind of random change, with what it needs prepared once."""

    def __init__(self, spec: InputSpec, noise: Pixels | None, generator: np.random.Generator) -> None:
        """
        Args:
            noise: backgrounds to add to clips, uint8 [N, 1, H, W]; None: they are made up.
        """
        self._kind = spec.augment
        self._generator = generator
        self._speech = None
        if spec.audio is not None and spec.augment == "speech":
            if noise is None:
                noise = _invented_noise(spec.audio, generator)
            self._speech = _Speech(spec.audio, noise)

    def __call__(self, images: Pixels) -> Pixels:
        """A batch, uint8 [B, C, H, W], changed; the given one may be overwritten."""
        if self._kind == "none":
            return images
        if self._speech is not None:
            return self._speech.with_noise(self._speech.delayed(images, self._generator), self._generator)
        images = _shifted(images, self._generator)
        if self._kind == "crop-flip":
            mirrored = self._generator.random(len(images)) < 0.5
            images[mirrored] = images[mirrored][..., ::-1]
        return images


def _shifted(images: Pixels, generator: np.random.Generator) -> Pixels:
    """Each image moved by its own random distance; what comes in at the border is the image reflected."""
    size, _, height, width = images.shape
    reach_y, reach_x = height // _SHIFT_FRACTION, width // _SHIFT_FRACTION
    if reach_y == 0 and reach_x == 0:
        return images
    padded = np.pad(images, ((0, 0), (0, 0), (reach_y, reach_y), (reach_x, reach_x)), mode="reflect")
    # One window per possible distance, as views: picking one for each image copies rows, not single pixels.
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    down = generator.integers(0, 2 * reach_y + 1, size)
    right = generator.integers(0, 2 * reach_x + 1, size)
    return windows[np.arange(size), :, down, right]


class _Speech:
    """Time shifts and noise for spectrograms whose bytes are decibels.

    Two sounds together have the sum of their powers. In decibels that is the louder one and a little more,
    which depends on their distance alone: one look-up for each pixel, and no logarithm.
    """

    def __init__(self, spec: AudioSpec, noise: Pixels) -> None:
        self._step_db = spec.db_per_level
        self._reach = min(_SHIFT_MS // spec.hop_ms, spec.frames - 1)
        levels = np.arange(256)
        power = 10 ** (levels * self._step_db / 10)
        #: What is at the floor is taken for silence.
        power[0] = 0.0
        self._power = power.astype(np.float32)
        self._together = np.round(10 * np.log10(1 + 10 ** (-levels * self._step_db / 10)) / self._step_db)
        self._together = self._together.astype(np.int16)
        self._noise = noise
        self._noise_db = self._loudness_db(noise)

    def delayed(self, clips: Pixels, generator: np.random.Generator) -> Pixels:
        """Each clip moved by its own random time; what comes in is silence."""
        reach = self._reach
        padded = np.pad(clips, ((0, 0), (0, 0), (0, 0), (reach, reach)))
        windows = sliding_window_view(padded, clips.shape[3], axis=3)
        later = generator.integers(0, 2 * reach + 1, len(clips))
        chosen: Pixels = windows[np.arange(len(clips)), :, :, later]
        return chosen

    def with_noise(self, clips: Pixels, generator: np.random.Generator) -> Pixels:
        """Some clips with a random background at a random distance below them."""
        noisy = np.flatnonzero(generator.random(len(clips)) < _NOISY)
        which = generator.integers(0, len(self._noise), len(noisy))
        snr_db = generator.uniform(*_SNR_DB, len(noisy))
        gain_db = self._loudness_db(clips[noisy]) - self._noise_db[which] - snr_db
        gain = np.round(gain_db / self._step_db).astype(np.int16)[:, None, None, None]
        noise = self._noise[which].astype(np.int16)
        noise = np.where(noise > 0, (noise + gain).clip(0, 255), 0)
        clip = clips[noisy].astype(np.int16)
        louder, softer = np.maximum(clip, noise), np.minimum(clip, noise)
        more = np.where(softer > 0, self._together[louder - softer], 0)
        clips[noisy] = np.minimum(louder + more, 255).astype(np.uint8)
        return clips

    def _loudness_db(self, clips: Pixels) -> npt.NDArray[np.float64]:
        """Mean power of each clip in decibels above the floor, at least 0."""
        mean = self._power[clips].mean(axis=(1, 2, 3), dtype=np.float64)
        loudness: npt.NDArray[np.float64] = 10 * np.log10(np.maximum(mean, 1.0))
        return loudness


def _invented_noise(spec: AudioSpec, generator: np.random.Generator) -> Pixels:
    """Steady noise of random colours, uint8 [N, 1, H, W], in the middle of the range."""
    shape = (_INVENTED, 1, spec.bands, spec.frames)
    tilt_db = generator.uniform(*_TILT_DB, (_INVENTED, 1, 1, 1))
    slope = np.linspace(0.5, -0.5, spec.bands)[None, None, :, None]
    # The power of noise in a narrow band is distributed exponentially.
    flutter_db = 10 * np.log10(generator.exponential(1.0, shape).clip(1e-3))
    levels = 128 + (tilt_db * slope + flutter_db) / spec.db_per_level
    noise: Pixels = levels.round().clip(1, 255).astype(np.uint8)
    return noise
