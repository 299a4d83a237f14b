"""Data sets as arrays: class folders, torchvision sets, the bundled digits, and how they are divided.

`sources` finds and loads, `partition` divides, `examples` reads files for prediction, `batches` feeds
training. The last is the only one that imports torch, so it is imported when it is asked for. The functions
`batches` and `partition` have the names of their modules and come from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arrays import ArrayDataset, LoadedData
from .examples import LoadedImages, load_images
from .naming import Source, SourceInfo, parse_source
from .partition import Share
from .sources import default_input, default_root, inspect, load

if TYPE_CHECKING:
    from .batches import eval_batches

__all__ = [
    "ArrayDataset",
    "LoadedData",
    "LoadedImages",
    "Share",
    "Source",
    "SourceInfo",
    "default_input",
    "default_root",
    "eval_batches",
    "inspect",
    "load",
    "load_images",
    "parse_source",
]


def __getattr__(name: str) -> Any:
    if name == "eval_batches":
        from .batches import eval_batches

        return eval_batches
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
