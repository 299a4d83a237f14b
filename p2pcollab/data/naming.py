"""Naming a data source: what the user gives as --data, and what such a source turns out to hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ..errors import DataError
from ..run import AudioSpec
from .known import DIGITS, TORCHVISION, KnownSet
from .words import shown

#: Before a folder with Speech Commands: the task with twelve classes, instead of one class for each folder.
SPEECH_SCHEME: Final = "speech-commands"


@dataclass(frozen=True, slots=True)
class Source:
    """A data source as the user named it: a kind, and the folder's path or the set's name."""

    kind: Literal["folder", "speech-commands", "torchvision", "digits"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.kind in ("torchvision", "speech-commands") else self.name

    @property
    def path(self) -> Path | None:
        """The folder; None for the other sets."""
        return Path(self.name) if self.kind in ("folder", "speech-commands") else None

    @property
    def known(self) -> KnownSet | None:
        """The public data set, or None for a folder."""
        if self.path is not None:
            return None
        return DIGITS if self.kind == "digits" else TORCHVISION[self.name]

    def describe(self) -> str:
        """The source in words."""
        if self.path is not None:
            return f"the folder {shown(self.name)}"
        return (
            "the bundled digits" if self.known is DIGITS else f"{TORCHVISION[self.name].title} (torchvision)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """What a source holds: enough to make a run from it.

    Fields:
        class_counts: training examples of each class, as far as file names tell.
        mean, std: per channel, of pixel values in 0..1.
        audio: how clips become examples; None: the source holds images.
    """

    source: Source
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    channels: Literal[1, 3]
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Literal["none", "shift", "crop-flip", "speech"]
    audio: AudioSpec | None = None
    notes: tuple[str, ...] = ()

    @property
    def train_images(self) -> int:
        """Training examples in all."""
        return sum(self.class_counts)


def parse_source(text: str) -> Source:
    """Read what the user gave as --data. A folder called like a set is meant by `./digits`.

    Raises:
        DataError: it is empty, names no folder, or a torchvision set that is not supported.
    """
    if not text.strip():
        raise DataError("the data source is empty", f"give a folder of class folders, {_known_names()}")
    if text.strip() == "digits":
        return Source("digits", "digits")
    scheme, colon, name = text.strip().partition(":")
    if scheme == SPEECH_SCHEME and colon:
        if not name:
            raise DataError(f"{SPEECH_SCHEME}: names no folder", f"write {SPEECH_SCHEME}:FOLDER")
        return Source("speech-commands", str(Path(name).expanduser()))
    if scheme == "torchvision" and colon:
        wanted = name.lower().replace("-", "").replace("_", "")
        if wanted not in TORCHVISION:
            raise DataError(f"there is no data set torchvision:{shown(name)} here", f"use {_known_names()}")
        return Source("torchvision", wanted)
    return Source("folder", str(Path(text).expanduser()))


def existing_folder(source: Source) -> Path:
    """The folder of a source that is one.

    Raises:
        DataError: it is not there, and called like a public set.
    """
    path = source.path
    assert path is not None
    bare = path.name.lower().replace("-", "").replace("_", "")
    if not path.exists() and bare in TORCHVISION:
        raise DataError(
            f"there is no folder {shown(path)}", f"for the public data set, write torchvision:{bare}"
        )
    return path


def _known_names() -> str:
    return f"{SPEECH_SCHEME}:FOLDER, {', '.join(f'torchvision:{name}' for name in TORCHVISION)} or digits"
