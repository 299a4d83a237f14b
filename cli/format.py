"""Numbers, times and names as people read them: short, with units, never more exact than they are."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Final

_SI: Final = ("", "k", "M", "G", "T", "P", "E")


def plain(text: object, chars_max: int = 0) -> str:
    """Text that may come from a peer, fit for a terminal: no control characters, cut to `chars_max`."""
    clean = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    if chars_max and len(clean) > chars_max:
        return clean[: max(0, chars_max - 1)] + "…"
    return clean


def percent(fraction: float | None) -> str:
    """A fraction as whole per cent, rounded down so that only what is complete reads 100%."""
    if fraction is None or not math.isfinite(fraction):
        return "-"
    return f"{math.floor(fraction * 100 + 1e-9)}%"


def accuracy(fraction: float | None) -> str:
    """An accuracy in per cent with one decimal; an unknown one, which the ledger stores as 0, is a dash."""
    return f"{fraction * 100:.1f}%" if fraction else "-"


def number(value: float | None, decimals: int = 3) -> str:
    """A plain decimal number, such as a loss."""
    return f"{value:.{decimals}f}" if value is not None and math.isfinite(value) else "-"


def count(value: float | None) -> str:
    """A count with an SI prefix: 950, 12.8k, 3.20M."""
    if value is None or not math.isfinite(value):
        return "-"
    scaled, prefix = float(value), 0
    while abs(scaled) >= 999.5 and prefix < len(_SI) - 1:
        scaled, prefix = scaled / 1000, prefix + 1
    if prefix == 0:
        return f"{scaled:.0f}" if scaled == round(scaled) or scaled >= 100 else f"{scaled:.1f}"
    return f"{scaled:.{max(0, 2 - int(math.log10(max(1.0, abs(scaled)))))}f}{_SI[prefix]}"


def quantity(value: float | None, unit: str) -> str:
    """A count with an SI prefix and a unit: `3.20 MB`, `12 B`."""
    text = count(value)
    if text[-1:].isalpha():
        return f"{text[:-1]} {text[-1]}{unit}"
    return f"{text} {unit}" if text != "-" else text


def size(octets: float | None) -> str:
    """A number of bytes, in powers of 1000."""
    return quantity(octets, "B")


def duration(seconds: float | None) -> str:
    """A time span in at most two units: `4 s`, `3m 12s`, `2h 05m`, `3d 4h`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def clock(unix_s: object) -> str:
    """Local time of day of an event; an event without a usable time gets blanks of the same width."""
    try:
        return datetime.fromtimestamp(float(unix_s)).strftime("%H:%M:%S")  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return " " * 8


def plural(amount: int, noun: str, many: str = "") -> str:
    """`1 task`, `3 tasks`, `2 classes`."""
    return f"{amount} {noun if amount == 1 else many or noun + 's'}"


def names(values: object, shown_max: int = 4) -> str:
    """A comma-separated list, the tail of a long one counted."""
    items = [plain(value) for value in values] if isinstance(values, list | tuple) else []
    if len(items) <= shown_max:
        return ", ".join(items)
    return ", ".join(items[:shown_max]) + f" +{len(items) - shown_max}"
