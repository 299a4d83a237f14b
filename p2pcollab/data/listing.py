"""What a data folder holds, as values: files by class, divided into training and test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["image", "clip"]


class DataFile(NamedTuple):
    """An example on disk: its name relative to its class's folder, with forward slashes, and its file."""

    name: str
    path: Path
    #: Of a clip that is cut out of a longer recording: where it begins. None: the file's middle.
    start_ms: int | None = None
    #: How much louder the clip is made.
    gain_db: float = 0.0


ClassFiles = Mapping[str, tuple[DataFile, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderListing:
    """What a data folder holds. Classes and their files are sorted by name; empty classes are left out."""

    root: Path
    kind: Kind
    train: ClassFiles
    test: ClassFiles
    #: Long recordings of nothing in particular; of clips only.
    background: tuple[DataFile, ...] = ()
    notes: tuple[str, ...]

    def with_files(self, train: ClassFiles, test: ClassFiles, *notes: str) -> FolderListing:
        """The same folder with other files, and more notes."""
        return replace(self, train=train, test=test, notes=(*self.notes, *notes))
