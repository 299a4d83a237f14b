"""Small recordings and runs of clips for the tests of audio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from p2pcollab.run import AudioSpec, InputSpec, ModelSpec, RunSpec, Schedule, TaskSpec

#: Cheap to compute: 20 bands, 25 frames.
SMALL = AudioSpec(clip_ms=500, hop_ms=20, window_ms=32, bands=20)


def clip_input(audio: AudioSpec = SMALL, augment: str = "none") -> InputSpec:
    """An input of clips, normalised from 0..1 to -1..1."""
    return InputSpec.model_validate(
        {
            "channels": 1,
            "height": audio.bands,
            "width": audio.frames,
            "mean": (0.5,),
            "std": (0.5,),
            "augment": augment,
            "audio": audio,
        }
    )


def clip_run(
    classes: tuple[str, ...] = ("high", "low"), *, audio: AudioSpec = SMALL, augment: str = "none"
) -> RunSpec:
    """A run of clips with one task per class."""
    return RunSpec(
        name="words",
        classes=classes,
        tasks=tuple(TaskSpec(id=f"t{index}", classes=(index,)) for index in range(len(classes))),
        model=ModelSpec(family="kws", stem_stages=2, branch_width=0.25),
        input=clip_input(audio, augment),
        schedule=Schedule(budget_samples=100, lease_samples=10, batch_size=8, peak_lr=0.05),
        seed=3,
    )


def tone(
    hertz: float, *, seconds: float = 0.5, rate: int = 16_000, loudness: float = 0.3, noise_seed: int = 0
) -> npt.NDArray[np.float32]:
    """A sine that starts and ends softly, in a little noise."""
    time = np.arange(round(seconds * rate)) / rate
    hiss = np.random.default_rng(noise_seed).normal(0, 0.003, len(time))
    return (loudness * np.sin(2 * np.pi * hertz * time) * np.sin(np.pi * time / seconds) + hiss).astype(
        np.float32
    )


def write_sound(
    path: Path, samples: npt.NDArray[np.float32], rate: int = 16_000, subtype: str | None = None
) -> Path:
    """An audio file of the kind that its name says, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def write_words(root: Path, count: int, **pitches: float) -> Path:
    """A folder for each word with so many recordings of a tone, each a little off in pitch and loudness."""
    for word, hertz in pitches.items():
        generator = np.random.default_rng(int(hertz))
        for number in range(count):
            sound = tone(
                hertz * generator.uniform(0.95, 1.05),
                loudness=generator.uniform(0.05, 0.5),
                noise_seed=number,
            )
            write_sound(root / word / f"{number:03}.wav", sound)
    return root


def write_speech(root: Path, *words: str, speakers: int, background_s: float = 0.0, takes: int = 1) -> Path:
    """Words in the layout of Speech Commands, each said by every speaker; perhaps background noise."""
    for index, word in enumerate(words):
        for speaker in range(speakers):
            for take in range(takes):
                name = f"{speaker:08x}_nohash_{take}.wav"
                write_sound(root / word / name, tone(300 + 100 * index, noise_seed=speaker))
    if background_s:
        noise = np.random.default_rng(1).normal(0, 0.1, round(background_s * 16_000)).astype(np.float32)
        write_sound(root / "_background_noise_" / "hiss.wav", noise)
    return root
