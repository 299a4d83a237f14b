"""Cross-validation over the speakers of a folder of recordings; see scripts/speech-folds.

Each fold is a folder of links to the classes' folders and a `testing_list.txt` of its own. A clip is in
fold I of N if crc32(SPEAKER) % 100 is in the I-th of N equal ranges, so that no speaker is on both sides;
clips without a speaker in their name go by CLASS/NAME.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path

from p2pcollab.data.speech import BACKGROUND, speaker_of
from p2pcollab.errors import P2PCollabError, UsageError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="a folder with one folder of clips per class"
    )
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="where fold-0, fold-1, ... are made")
    options = parser.parse_args()
    if not 2 <= options.folds <= 100:
        parser.error("--folds: from 2 to 100")
    return options


def fold_of(label: str, name: str, folds: int) -> int:
    """The fold whose test a clip is in, 0-based."""
    who = speaker_of(name) or f"{label}/{name}"
    return zlib.crc32(who.encode("utf-8", "surrogateescape")) % 100 * folds // 100


def divide(root: Path, folds: int, out: Path) -> list[int]:
    """Make the folds; how many clips each has for the test.

    Raises:
        UsageError: there is no class in the folder, or the folds are there already.
    """
    labels = sorted(path for path in root.absolute().iterdir() if path.is_dir())
    names = {
        path.name: sorted(file.name for file in path.iterdir() if file.is_file())
        for path in labels
        if path.name != BACKGROUND
    }
    if not names:
        raise UsageError(f"{root} has no folder of clips")
    tests: list[list[str]] = [[] for _ in range(folds)]
    for label, files in names.items():
        for name in files:
            tests[fold_of(label, name, folds)].append(f"{label}/{name}\n")
    for fold, clips in enumerate(tests):
        folder = out / f"fold-{fold}"
        if folder.exists():
            raise UsageError(f"{folder} is there already", "remove it, or give another --out")
        folder.mkdir(parents=True)
        for path in labels:
            (folder / path.name).symlink_to(path, target_is_directory=True)
        (folder / "testing_list.txt").write_text("".join(clips), encoding="utf-8", errors="surrogateescape")
    return list(map(len, tests))


def main() -> int:
    options = parse()
    counts = divide(options.data, options.folds, options.out)
    for fold, count in enumerate(counts):
        print(f"{options.out / f'fold-{fold}'}: {count} of {sum(counts)} clips are for the test")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (P2PCollabError, OSError) as error:
        sys.exit(f"speech-folds: {error}")
