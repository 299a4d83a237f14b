"""Coverage-guided fuzzing of everything that parses bytes from outside; see scripts/fuzz.

Each target runs in a process of its own. An input that takes too long is tried again before it counts,
because machines are busy. Memory is what Python allocates, for every 50th input and every one that raises the
process's peak; and that peak itself.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

TESTS = Path(__file__).parents[2] / "tests" / "unit"
sys.path[:0] = [str(TESTS), str(Path(__file__).parent)]

if TYPE_CHECKING:
    from fuzzing import Target

#: Every so many inputs the memory of one is measured.
_MEMORY_EVERY = 50
#: Times that an input which seems too slow is tried again.
_CONFIRM = 5
#: A raised peak of the process that is looked into.
_PEAK_STEP_BYTES = 2 * 2**20
#: The largest mutants make a corpus that nobody reads.
_KEPT_BYTES_MAX = 8192
_KEPT_MAX = 40
#: Of the package, what is not worth instrumenting: it parses nothing, and slows everything down.
_UNGUIDED = ["p2pcollab.models", "p2pcollab.training", "p2pcollab.data", "p2pcollab.cli"]


class Broken(Exception):
    """A promise was broken."""


class Meter:
    """Runs a target on inputs, and keeps what that cost."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.inputs = 0
        self.accepted = 0
        self.slowest_ms = 0.0
        self.peak_bytes = 0
        self._process_peak = _peak_rss()
        self.process_growth = 0

    def feed(self, data: bytes) -> None:
        """One input.

        Raises:
            Broken: it broke the promise, or took too much.
        """
        self.inputs += 1
        began = time.thread_time_ns()
        check = self._attempt(data)
        took_ms = (time.thread_time_ns() - began) / 1e6
        if took_ms > self.slowest_ms:
            # What is slow by accident is not slow again.
            took_ms = min([took_ms, *(self._timed(data) for _ in range(_CONFIRM))])
            self.slowest_ms = max(self.slowest_ms, took_ms)
            bound = self._bound_ms(data)
            if took_ms > bound:
                raise Broken(f"{took_ms:.1f} ms of CPU time, {bound:.0f} are allowed")
        if check is not None:
            self.accepted += 1
            try:
                check()
            except BaseException as error:
                raise Broken(f"accepted, but {type(error).__name__}: {error}") from error
        peak = _peak_rss()
        if self.inputs % _MEMORY_EVERY == 0 or peak - self._process_peak > _PEAK_STEP_BYTES:
            self.process_growth += peak - self._process_peak
            self._process_peak = peak
            self._measure_memory(data)

    def _attempt(self, data: bytes) -> Callable[[], None] | None:
        try:
            return self.target.attempt(data)
        except BaseException as error:
            raise Broken(f"{type(error).__name__}: {error}") from error

    def _timed(self, data: bytes) -> float:
        began = time.thread_time_ns()
        self._attempt(data)
        return (time.thread_time_ns() - began) / 1e6

    def _bound_ms(self, data: bytes) -> float:
        from fuzzing import CPU_MS_MAX

        return CPU_MS_MAX + self.target.cpu_ms_per_mib * len(data) / 2**20

    def _measure_memory(self, data: bytes) -> None:
        from fuzzing import MEMORY_BYTES_MAX

        tracemalloc.start()
        try:
            self._attempt(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        self.peak_bytes = max(self.peak_bytes, peak)
        if peak > MEMORY_BYTES_MAX:
            raise Broken(f"{peak / 2**20:.0f} MiB of memory, {MEMORY_BYTES_MAX / 2**20:.0f} are allowed")

    def try_bombs(self) -> dict[str, Any]:
        """The largest inputs, each measured; what they cost at most."""
        meter = Meter(self.target)
        for bomb in self.target.bombs():
            meter.feed(bomb)
            meter._measure_memory(bomb)
        return {
            "inputs": meter.inputs,
            "slowest_ms": round(meter.slowest_ms, 2),
            "peak_mib": round(meter.peak_bytes / 2**20, 2),
        }

    def figures(self) -> dict[str, Any]:
        """What was measured."""
        return {
            "inputs": self.inputs,
            "accepted": self.accepted,
            "slowest_ms": round(self.slowest_ms, 2),
            "peak_mib": round(self.peak_bytes / 2**20, 2),
            "process_growth_mib": round(self.process_growth / 2**20, 1),
        }


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# One target, in a process of its own


def fuzz_one(name: str, inputs: int, seed: int, folder: Path, *, guided: bool, keep: bool) -> None:
    """Fuzz a target; the result is left in `folder`, and this process ends."""
    if guided:
        import atheris

        with atheris.instrument_imports(include=["p2pcollab"], exclude=_UNGUIDED):
            from fuzz_targets import TARGETS

            import p2pcollab.daemon.board
            import p2pcollab.daemon.streams
            import p2pcollab.daemon.transport  # noqa: F401
    else:
        from fuzz_targets import TARGETS
    target = TARGETS[name]
    seeds = folder / "seeds"
    seeds.mkdir(parents=True)
    for number, data in enumerate([*target.examples(), *(path.read_bytes() for path in target.corpus())]):
        (seeds / f"{number:04}").write_bytes(data)
    meter = Meter(target)
    failure: dict[str, str] = {}

    def end() -> None:
        result = {**meter.figures(), "failure": failure}
        if keep and not failure:
            result["kept"] = _keep(target, seeds)
        (folder / "result.json").write_text(json.dumps(result))
        ctypes.CDLL(None).fflush(None)
        os._exit(1 if failure else 0)

    def one(data: bytes) -> None:
        try:
            meter.feed(data)
        except Broken as error:
            failure.update(_kept_failure(target, data, error))
            end()
        if meter.inputs >= inputs:
            end()

    if guided:
        _guided(target, one, seed, seeds)
    else:
        rng = random.Random(seed)
        pool = [path.read_bytes() for path in sorted(seeds.iterdir())]
        while True:
            one(_mutant(rng.choice(pool), target, rng, None))


def _guided(target: Target, one: Callable[[bytes], None], seed: int, seeds: Path) -> None:
    import atheris

    def custom_mutator(data: bytes, size_max: int, mutation_seed: int) -> bytes:
        rng = random.Random(mutation_seed)
        return _mutant(data, target, rng, lambda raw: atheris.Mutate(raw, size_max))[:size_max]

    arguments = [
        "fuzz",
        f"-seed={seed or 1}",
        f"-max_len={target.length_max}",
        "-len_control=0",
        "-rss_limit_mb=4096",
        "-timeout=60",
        "-print_final_stats=0",
        str(seeds),
    ]
    atheris.Setup(arguments, one, custom_mutator=custom_mutator)
    atheris.Fuzz()


def _mutant(
    data: bytes, target: Target, rng: random.Random, native: Callable[[bytes], bytes] | None
) -> bytes:
    import fuzz_mutator

    mutant = None
    if rng.random() < 0.6:
        mutant = fuzz_mutator.mutate(data, target.form, target.prefix, rng)
    if mutant is None:
        mutant = native(data) if native else fuzz_mutator.blind(data, rng)
    return mutant[: target.length_max]


def _kept_failure(target: Target, data: bytes, error: Broken) -> dict[str, str]:
    from fuzzing import CORPUS

    path = CORPUS / target.name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {"what": str(error), "input": str(path), "traceback": traceback.format_exc()}


def _keep(target: Target, found: Path) -> int:
    """Keep of what was found the smallest inputs that between them reach every place reached; how many."""
    from fuzzing import CORPUS

    kept = CORPUS / target.name
    kept.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.examples()):
        path = kept / f"valid-{number}"
        if not path.exists():
            path.write_bytes(data)
    reached: set[tuple[Any, ...]] = set()
    for path in target.corpus():
        reached |= _places(target, path.read_bytes())
    before = len(list(kept.iterdir()))
    for path in sorted(found.iterdir(), key=lambda path: path.stat().st_size):
        data = path.read_bytes()
        if len(data) > _KEPT_BYTES_MAX or len(list(kept.iterdir())) >= before + _KEPT_MAX:
            break
        places = _places(target, data)
        if places - reached:
            reached |= places
            (kept / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    return len(list(kept.iterdir()))


def _places(target: Target, data: bytes) -> set[tuple[Any, ...]]:
    """Steps from line to line of this package that an input makes, and the error that it ends with."""
    places: set[tuple[Any, ...]] = set()
    last: list[int] = [0]

    def local(frame: Any, event: str, _argument: Any) -> Any:
        if event == "line":
            places.add((frame.f_code.co_filename, last[0], frame.f_lineno))
            last[0] = frame.f_lineno
        return local

    def trace(frame: Any, _event: str, _argument: Any) -> Any:
        return (
            local
            if "/p2pcollab/" in frame.f_code.co_filename or "/daemon/" in frame.f_code.co_filename
            else None
        )

    sys.settrace(trace)
    try:
        target.parse(data)
    except Exception as error:
        # What differs in the numbers alone is one place.
        places.add((type(error).__name__, re.sub(r"[0-9a-f]{2,}|\d+", "#", str(error))[:60]))
    finally:
        sys.settrace(None)
    return places


# All of them


def run_target(name: str, inputs: int, options: argparse.Namespace, guided: bool) -> dict[str, Any]:
    """Fuzz a target in a process of its own; its row, which is printed."""
    folder = Path(tempfile.mkdtemp(prefix="p2pcollab-fuzz-"))
    try:
        command = [sys.executable, __file__, "--child", str(folder / "work"), "--target", name]
        command += ["--inputs", str(inputs), "--seed", str(options.seed)]
        command += ["--keep"] if options.keep else []
        command += [] if guided else ["--blind"]
        began = time.monotonic()
        child = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        seconds = time.monotonic() - began
        found = folder / "work" / "result.json"
        if found.exists():
            row = json.loads(found.read_text())
        else:
            row = {
                "inputs": 0,
                "failure": {"what": f"exit code {child.returncode}", "traceback": child.stderr[-3000:]},
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    places = re.findall(r"cov: (\d+) ft: (\d+)", child.stderr)
    row = {"target": name, "edges": int(places[-1][0]) if places else None, "seconds": round(seconds), **row}
    if not row["failure"]:
        row |= _bombs(name)
    _print(row)
    return row


def _bombs(name: str) -> dict[str, Any]:
    """In this process, where nothing is instrumented: that costs three times as much for each small thing."""
    from fuzz_targets import TARGETS

    try:
        return {"bombs": Meter(TARGETS[name]).try_bombs()}
    except Broken as error:
        return {"failure": {"what": f"a bomb: {error}", "traceback": traceback.format_exc()}}


def _print(row: dict[str, Any]) -> None:
    if row["failure"]:
        print(f"{row['target']:20} FAILED after {row['inputs']} inputs: {row['failure']['what']}")
        print(f"    {row['failure'].get('input', '')}\n{row['failure']['traceback']}", flush=True)
        return
    bombs = row["bombs"]
    print(
        f"{row['target']:20} {row['inputs']:8} inputs, {row['accepted']:7} accepted, "
        f"{row['edges'] or '?':>5} edges; slowest {row['slowest_ms']:6.2f} ms, peak {row['peak_mib']:6.2f} "
        f"MiB; {bombs['inputs']:3} bombs: {bombs['slowest_ms']:6.2f} ms, {bombs['peak_mib']:6.2f} MiB; "
        f"{row['seconds']} s",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets (default: 100,000)")
    parser.add_argument("--target", default="all", help="one target, several with commas, or all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--keep", action="store_true", help="add to tests/corpus what reaches new places")
    parser.add_argument("--blind", action="store_true", help="do without atheris")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz_one(
            options.target,
            options.inputs,
            options.seed,
            options.child,
            guided=not options.blind,
            keep=options.keep,
        )
    from fuzz_targets import TARGETS

    names = list(TARGETS) if options.target == "all" else options.target.split(",")
    for name in names:
        if name not in TARGETS:
            parser.error(f"no target {name!r}: one of {', '.join(TARGETS)}")
    guided = not options.blind and _version("atheris") is not None
    share = -(-options.inputs // len(names))
    rows = [run_target(name, share, options, guided) for name in names]
    total, failed = sum(row["inputs"] for row in rows), [row for row in rows if row["failure"]]
    if options.json:
        result = {
            "inputs": total,
            "seed": options.seed,
            "engine": f"atheris {_version('atheris')}" if guided else "blind mutation",
            "python": platform.python_version(),
            "machine": platform.machine(),
            "targets": [{**row, "promise": TARGETS[row["target"]].promise} for row in rows],
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    slowest = max((row.get("slowest_ms", 0) for row in rows), default=0)
    print(f"{total} inputs, {len(failed)} targets failed, slowest input {slowest} ms")
    return 1 if failed else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
