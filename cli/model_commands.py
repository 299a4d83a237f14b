"""`assemble`, `evaluate` and `predict`: the global model as a file, and what it can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..errors import DataError, ExitCode, IncompleteError, UsageError
from . import options as opt
from .output import console, note, print_json, say, show, state_folder

if TYPE_CHECKING:
    from ..data import ArrayDataset, LoadedData

_PANEL: Final = "The model"
_ASSEMBLE_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab assemble -o pets.safetensors

p2pcollab assemble -o pets.safetensors --code P2P-7KQ2-…      (without a daemon)
"""
_EVALUATE_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab evaluate --model pets.safetensors --data ./photos

p2pcollab evaluate --model pets.safetensors --data ./held-out --all --json
"""
_PREDICT_EXAMPLES: Final = """[bold]Examples[/bold]

p2pcollab predict --model pets.safetensors cat.jpg dog.png

p2pcollab predict --model pets.safetensors --top 1 --json ./inbox

p2pcollab predict --model words.safetensors clip.wav
"""

Model = Annotated[
    Path,
    typer.Option(
        "--model",
        "-m",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="A model file that `assemble` wrote.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command("assemble", rich_help_panel=_PANEL, epilog=_ASSEMBLE_EXAMPLES)(assemble)
    app.command("evaluate", rich_help_panel=_PANEL, epilog=_EVALUATE_EXAMPLES)(evaluate)
    app.command("predict", rich_help_panel=_PANEL, epilog=_PREDICT_EXAMPLES)(predict)


def assemble(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write; replaced if it is there.")
    ],
    code: opt.Code = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Write the model even where tasks are missing.")
    ] = False,
    interface: opt.Interface = None,
    peer: opt.Peer = None,
    state: opt.State = None,
    as_json: opt.Json = False,
) -> None:
    """Put the global model together from what the run's devices have, and write it as one safetensors file.

    Exit code 5, and no file, when tasks are missing and --allow-incomplete is not given.
    """
    path = output.expanduser().absolute()
    if path.is_dir():
        raise UsageError(
            f"-o: {output} is a folder", f"name a file in it, for example {output / 'model.safetensors'}"
        )
    if not path.parent.is_dir():
        raise UsageError(f"-o: there is no folder {path.parent}", "create it, or choose another one")
    data, missing, coverage = _harvest(code, interface, peer, state)
    summary = _describe(data, missing, coverage)
    written = allow_incomplete or not missing
    if written:
        from ..files import write_atomic

        replaced = path.exists()
        write_atomic(path, data)
        summary |= {"path": str(path), "replaced": replaced}
    if as_json:
        print_json({"path": None, "replaced": False, **summary, "written": written})
    elif written:
        from .view_model import assembly_page

        show(assembly_page(summary, width=console().width))
    if missing:
        what = f"the model lacks {len(missing)} of {summary['tasks']} tasks: {', '.join(summary['missing'])}"
        if not written:
            raise IncompleteError(
                what, "wait until somebody has trained them, or write it with --allow-incomplete"
            )
        note(f"warning: {what}")


def _harvest(
    code: str | None, interface: str | None, peers: list[str] | None, state: Path | None
) -> tuple[bytes, Sequence[str], float]:
    """The model from this device's daemon; with a join code and no daemon, from the run's devices."""
    from ..daemon.api_client import ApiClient
    from .observing import daemon_or_code, observer_options

    folder = state_folder(state)
    join_code = daemon_or_code(folder, code)
    if join_code is None:
        with ApiClient(folder) as client:
            model = client.assemble()
        return model.data, model.missing, model.coverage
    from ..daemon.observe import harvest

    note("no daemon runs here: asking the run's devices …")
    return harvest(observer_options(folder, join_code, interface, peers))


def _describe(data: bytes, missing: Sequence[str], coverage: float) -> dict[str, Any]:
    """What the file says of itself, for people and scripts. Its header is JSON: no need for torch."""
    from ..run import PROTOCOLS_READ, RunSpec, ShardId

    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    spec = RunSpec.decode(metadata["run_spec"].encode(), PROTOCOLS_READ)
    provenance = json.loads(metadata["provenance"])
    return {
        "run": spec.name,
        "run_id": spec.run_id,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "coverage": coverage,
        "tasks": len(spec.tasks),
        "missing": [spec.label(ShardId(shard)) for shard in missing],
        "shards": [
            {
                "shard": shard,
                "label": spec.label(ShardId(shard)),
                "generation": entry["generation"],
                "samples": entry["samples"],
                "contributors": entry["contributors"],
            }
            for shard, entry in provenance.items()
        ],
    }


def evaluate(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="A folder of class folders, `speech-commands:DIR`, `torchvision:NAME`, or `digits`.",
        ),
    ],
    data_root: opt.DataRoot = None,
    download: opt.Download = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Use the training data too: for a folder held out as a whole.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Test a model on labelled images or audio clips: accuracy, in all and by class."""
    source = opt.data_source(data)
    assert source is not None
    from ..assembly import load_model
    from ..data import eval_batches, load
    from ..report import class_reports
    from ..training import log_probabilities

    loaded = load_model(model.expanduser())
    images = load(source, loaded.spec, opt.folder(data_root), download=download)
    dataset = _whole(images) if everything else images.test
    noun = loaded.spec.input.noun
    if len(dataset) == 0:
        raise DataError(f"{data} has no test {noun}s", f"add some, or use --all for the training {noun}s")
    scores_NC, labels_N = log_probabilities(loaded.model, eval_batches(dataset, loaded.spec))
    reports = class_reports(loaded.spec.classes, scores_NC.argmax(1).numpy(), labels_N.numpy())
    right = sum(report.right for report in reports)
    result = {
        "model": str(model),
        "data": data,
        "noun": noun,
        "images": len(dataset),
        "accuracy": right / len(dataset),
        "coverage": loaded.coverage,
        "missing": [loaded.spec.label(shard) for shard in loaded.missing],
        "classes": [
            {
                "class": report.name,
                "images": report.images,
                "right": report.right,
                "accuracy": report.accuracy,
                "mistaken_for": report.mistaken_for,
                "mistaken": report.mistaken,
            }
            for report in reports
        ],
        "notes": list(images.notes),
    }
    if as_json:
        print_json(result)
        return
    from .view_model import evaluation_page

    show(evaluation_page(result, width=console().width))


def _whole(images: LoadedData) -> ArrayDataset:
    import numpy as np

    from ..data import ArrayDataset

    return ArrayDataset(
        images=np.concatenate([images.train.images, images.test.images]),
        labels=np.concatenate([images.train.labels, images.test.labels]),
    )


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="Images, or audio clips if it is a model of these; or folders."),
    ],
    model: Model,
    top: Annotated[
        int, typer.Option("--top", min=1, metavar="N", help="How many classes to name per file.")
    ] = 3,
    as_json: opt.Json = False,
) -> None:
    """Say what is on images or in clips. Exit code 1 if some cannot be read; the others are still told."""
    from ..assembly import load_model
    from ..data import ArrayDataset, eval_batches, load_images
    from ..models import probabilities
    from ..training import log_probabilities

    loaded = load_model(model.expanduser())
    found = load_images([path.expanduser() for path in images], loaded.spec)
    import numpy as np

    dataset = ArrayDataset(images=found.images, labels=np.zeros(len(found.images), dtype=np.int64))
    scores_NC, _ = log_probabilities(loaded.model, eval_batches(dataset, loaded.spec))
    best = probabilities(scores_NC).topk(min(top, len(loaded.spec.classes)))
    predictions: list[Mapping[str, Any]] = [
        {
            "image": str(path),
            "classes": [
                {"class": loaded.spec.classes[index], "probability": round(probability, 6)}
                for probability, index in zip(values, indices, strict=True)
            ],
        }
        for path, values, indices in zip(
            found.paths, best.values.tolist(), best.indices.tolist(), strict=True
        )
    ]
    if as_json:
        missing = [loaded.spec.label(shard) for shard in loaded.missing]
        print_json({"predictions": predictions, "missing": missing, "notes": list(found.notes)})
    else:
        from .view_model import prediction_lines

        for line in prediction_lines(predictions):
            say(line)
        for remark in found.notes:
            note(f"warning: {remark}")
    if found.notes:
        raise typer.Exit(ExitCode.ERROR)
