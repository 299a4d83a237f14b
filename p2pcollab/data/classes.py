"""Which class of the run a class of the data is."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .words import counted, listed, shown


def match_classes(
    found: Mapping[str, int], classes: Sequence[str], where: str | Path, noun: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Match names in the data with the run's: exactly, else whatever the case and the Unicode form.

    Args:
        found: class name in the data -> its number of examples.
        classes: the run's class names.
        where: the data, for messages.
        noun: what an example is called in messages.

    Returns:
        Name in the data -> index into `classes`, without the names that the run does not know; and notes.

    Raises:
        DataError: no class of the data is in the run.
    """
    exact = {name: index for index, name in enumerate(classes)}
    similar: dict[str, int | None] = {}
    for name, index in exact.items():
        # Two classes of the run that differ in case only leave nothing to fall back on.
        similar[folded(name)] = None if folded(name) in similar else index
    matched: dict[str, int] = {}
    notes: list[str] = []
    unknown: list[str] = []
    for name in found:
        index_found = exact.get(name, similar.get(folded(name)))
        if index_found is None:
            unknown.append(name)
            continue
        matched[name] = index_found
        if classes[index_found] != name:
            notes.append(f"class '{shown(name)}' is taken for the run's class '{classes[index_found]}'")
    if found and not matched:
        raise DataError(
            f"no class of {where} is in this run: it has {listed([repr(shown(name)) for name in unknown])}",
            f"rename the class folders: the run has {listed([repr(name) for name in classes], 12)}",
        )
    return matched, (*notes, *_unknown_notes(unknown, found, noun))


def missing_note(counts: Sequence[int], classes: Sequence[str], noun: str) -> tuple[str, ...]:
    """The note about classes of the run of which this device has no training example, if there are any."""
    missing = [repr(name) for name, count in zip(classes, counts, strict=True) if count == 0]
    if not missing:
        return ()
    return (f"no training {noun} of {len(missing)} of the run's {len(classes)} classes: {listed(missing)}",)


def folded(name: str) -> str:
    """A class name as it is compared: whatever its case and its Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _unknown_notes(unknown: Sequence[str], found: Mapping[str, int], noun: str) -> list[str]:
    if len(unknown) <= 3:
        return [
            f"class '{shown(name)}' is not in this run: {counted(found[name], noun)} skipped"
            for name in unknown
        ]
    total = sum(found[name] for name in unknown)
    names = listed([repr(shown(name)) for name in unknown])
    return [f"{len(unknown)} classes are not in this run ({names}): {counted(total, noun)} skipped"]
