"""Where data come from: class folders of images or clips, torchvision's sets, and the bundled digits.

`inspect` says what a source holds, for a run that is to be made from it; `load` reads it for a run that
exists, whose classes and input it then follows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import platformdirs

from ..errors import DataError
from ..run import InputSpec, RunSpec
from .arrays import ArrayDataset, LoadedData
from .class_folders import inspect_folder, load_folder
from .classes import match_classes
from .examples import finished
from .images import fit_array
from .known import TORCHVISION
from .naming import Source, SourceInfo, parse_source
from .partition import Cut, Share
from .readers import PublicArrays, not_found, read_digits, read_torchvision, relabelled


def default_root() -> Path:
    """Where torchvision's sets are kept if the user does not say."""
    return platformdirs.user_data_path("p2pcollab") / "datasets"


def inspect(source: Source | str, root: Path | None = None, *, download: bool = False) -> SourceInfo:
    """What a source holds, without reading all of it.

    Args:
        root: where torchvision's sets are kept; not used for other sources.
        download: a torchvision set that is not there will be fetched when it is loaded.

    Raises:
        DataError: the source is not there, or no run can be made from it.
    """
    source = parse_source(source) if isinstance(source, str) else source
    if source.path is not None:
        return inspect_folder(source)
    known = source.known
    assert known is not None
    folder = (root or default_root()) / known.folder
    if source.kind == "torchvision" and not download and not folder.is_dir():
        raise not_found(known, root or default_root())
    return SourceInfo(
        source=source,
        classes=known.classes,
        class_counts=known.train_per_class,
        **known.input.model_dump(),
    )


def default_input(info: SourceInfo) -> InputSpec:
    """The input of a new run that is made from a source."""
    return InputSpec(
        channels=info.channels,
        height=info.height,
        width=info.width,
        mean=info.mean,
        std=info.std,
        augment=info.augment,
        audio=info.audio,
    )


def load(
    source: Source | str,
    spec: RunSpec,
    root: Path | None = None,
    *,
    share: Share | None = None,
    limit: int | None = None,
    download: bool = False,
    seed: int | None = None,
) -> LoadedData:
    """Read a source for a run.

    Args:
        root: where torchvision's sets are kept; not used for other sources.
        share: take only this part of the training examples. Parts taken with equal seeds are disjoint.
        limit: use at most this many training examples of the whole set, before it is divided into parts.
        download: fetch a torchvision set that is not there.
        seed: of the division into parts and of the limit; the run's if not given.

    Raises:
        DataError: the source is not there, or holds nothing for this run.
    """
    source = parse_source(source) if isinstance(source, str) else source
    assert limit is None or limit >= 1
    cut = Cut(share=share, limit=limit, seed=spec.seed if seed is None else seed)
    if source.path is not None:
        return load_folder(source, spec, cut)
    if spec.input.audio is not None:
        raise DataError(
            f"{source.describe()} holds images, and this run is of audio clips", "give a folder of clips"
        )
    if source.kind == "digits":
        return _load_arrays(source, spec, cut, read_digits)
    known, data_root = TORCHVISION[source.name], root or default_root()
    return _load_arrays(source, spec, cut, lambda: read_torchvision(known, data_root, download))


def _load_arrays(
    source: Source, spec: RunSpec, cut: Cut, read: Callable[[], tuple[PublicArrays, PublicArrays]]
) -> LoadedData:
    known = source.known
    assert known is not None
    found = dict(zip(known.classes, known.train_per_class, strict=True))
    # Before anything is read: data that do not fit the run are refused at once.
    matched, notes = match_classes(found, spec.classes, source.describe(), spec.input.noun)
    run_label = np.array([matched.get(name, -1) for name in known.classes], dtype=np.int64)
    train, test = (relabelled(arrays, run_label) for arrays in read())
    chosen, cut_notes = cut.choose(train.labels, spec.input.noun)
    return finished(
        ArrayDataset(images=fit_array(train.images[chosen], spec.input), labels=train.labels[chosen]),
        ArrayDataset(images=fit_array(test.images, spec.input), labels=test.labels),
        spec,
        (*notes, *cut_notes),
    )
