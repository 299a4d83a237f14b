"""Names of classes in one line, as a person writes them: separated by commas, quoted as in CSV (RFC 4180)."""

from __future__ import annotations

import csv
from collections.abc import Iterable

from .errors import UsageError


def split_names(text: str, where: str) -> list[str]:
    """The names in a line; one that is not quoted has no space around it, but perhaps nothing in it.

    Args:
        where: what the line is, for the error.

    Raises:
        UsageError: the quotes are wrong.
    """
    try:
        return next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise UsageError(
            f"{where} cannot be read: {error}",
            'quote a name with a comma in it, as in "salt, pepper", and write " within it twice',
        ) from error


def join_names(names: Iterable[str]) -> str:
    """The line that `split_names` reads as these names."""
    return ", ".join(map(_quoted, names))


def _quoted(name: str) -> str:
    """A name as it is, or quoted where it would be read as something else; # begins a comment in files."""
    if name == name.strip() and not name.startswith("#") and not set(name) & set(',"'):
        return name
    return '"' + name.replace('"', '""') + '"'
