"""Names and counts as they go into messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def shown(text: str | Path) -> str:
    """A name as it may go to a terminal or into JSON: file names hold any bytes, control sequences too."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def listed(items: Sequence[str], most: int = 3) -> str:
    """The first few items, and how many more there are."""
    first = ", ".join(items[:most])
    return f"{first} and {len(items) - most} more" if len(items) > most else first


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 image`, `2 images`."""
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"
