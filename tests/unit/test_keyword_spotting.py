"""From a folder of recordings to a model that names them, in one process; and real speech, where it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from audio_examples import write_words
from ledger_examples import contribution

from p2pcollab import cost
from p2pcollab.assembly import assemble, load_model, to_bytes
from p2pcollab.cli.main import main
from p2pcollab.cli.options import data_source
from p2pcollab.data import ArrayDataset, eval_batches, inspect, load
from p2pcollab.data.batches import batches
from p2pcollab.data.folders import scan
from p2pcollab.errors import UsageError
from p2pcollab.models import FAMILIES, initial_shard
from p2pcollab.planning import PlanOptions, plan_run
from p2pcollab.run import STEM, RunSpec, ShardId
from p2pcollab.shards import ShardTensors
from p2pcollab.training import accuracy, train_branches, train_stem

TONES = {"high": 2500.0, "low": 200.0, "middle": 800.0}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three "words", forty times each."""
    return write_words(tmp_path_factory.mktemp("recordings"), 40, **TONES)


def trained(spec: RunSpec, data: ArrayDataset) -> bytes:
    """A model file after a lease on the stem and one on all branches."""
    samples = spec.schedule.budget_samples
    stem = train_stem(
        spec,
        initial_shard(spec, STEM),
        batches(data, spec, seed=1, samples=samples),
        start_progress=0.0,
        samples=samples,
    ).tensors[STEM]
    tasks = [ShardId(task.id) for task in spec.tasks]
    made = train_branches(
        spec,
        stem,
        {shard: initial_shard(spec, shard) for shard in tasks},
        batches(data, spec, seed=2, samples=samples),
        start_progress=dict.fromkeys(tasks, 0.0),
        samples=samples,
    )
    tensors: dict[ShardId, ShardTensors] = {STEM: stem, **made.tensors}
    run_id = spec.run_id
    frontiers = {shard: (contribution(seen={0: samples}, shard=shard, run_id=run_id),) for shard in tensors}
    return to_bytes(assemble(spec, frontiers, lambda one: tensors[one.shard]))


@pytest.fixture(scope="module")
def model_file(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the three words, with the settings that a run gets by itself."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        spec = plan_run("words", inspect(str(recordings)), PlanOptions(epochs=6, seed=1))
        path = tmp_path_factory.mktemp("model") / "words.safetensors"
        path.write_bytes(trained(spec, load(str(recordings), spec).train))
    return path


# Generated recordings


def test_words_are_told_apart_after_a_short_training(recordings, model_file):
    loaded = load_model(model_file)
    assert loaded.spec.model.family == "kws"
    assert loaded.spec.input.augment == "speech"
    test = load(str(recordings), loaded.spec).test
    assert len(test) == 24
    assert accuracy(loaded.model, eval_batches(test, loaded.spec)) > 0.8


def test_predict_names_what_is_said(model_file, tmp_path, capsys):
    write_words(tmp_path, 3, **TONES)
    clips = [str(tmp_path / word) for word in TONES]
    assert main(["predict", "--model", str(model_file), "--json", *clips]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    said = [Path(one["image"]).parent.name for one in predictions]
    assert said == [word for word in TONES for _ in range(3)]
    assert (
        np.mean([one["classes"][0]["class"] == word for one, word in zip(predictions, said, strict=True)])
        > 0.7
    )


def test_predict_on_one_clip_is_one_line(model_file, tmp_path, capsys):
    write_words(tmp_path, 1, low=200.0)
    assert main(["predict", "-m", str(model_file), "--top", "1", str(tmp_path / "low" / "000.wav")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'low' / '000.wav'}"[:60])
    assert line.endswith("%")


def test_predict_tells_the_others_when_a_clip_is_bad(model_file, tmp_path, capsys):
    write_words(tmp_path, 1, low=200.0)
    (tmp_path / "low" / "bad.wav").write_bytes(b"nonsense")
    assert main(["predict", "-m", str(model_file), str(tmp_path / "low")]) == 1
    captured = capsys.readouterr()
    assert "000.wav" in captured.out
    assert "1 clip cannot be read" in captured.err and "bad.wav" in captured.err


def test_evaluate_counts_clips(recordings, model_file, capsys):
    assert main(["evaluate", "-m", str(model_file), "--data", str(recordings)]) == 0
    text = capsys.readouterr().out
    assert "on 24 clips" in text
    assert "image" not in text


def test_an_image_size_is_refused_for_clips(recordings, capsys):
    assert main(["new", "words", "--data", str(recordings), "--image-size", "64"]) == 2
    assert "--image-size is for images, and these are audio clips" in capsys.readouterr().err


def test_the_daemon_finds_a_folder_that_was_named_from_another_one(recordings, monkeypatch):
    monkeypatch.chdir(recordings)
    assert data_source("speech-commands:.") == f"speech-commands:{recordings}"
    assert data_source("./low") == str(recordings / "low")


# Networks


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_spectrograms(recordings, family):
    spec = plan_run("words", inspect(str(recordings)), PlanOptions(family=family, seed=1))
    data = load(str(recordings), spec, limit=6).train
    result = train_stem(
        spec,
        initial_shard(spec, STEM),
        batches(data, spec, seed=1, samples=2),
        start_progress=0.0,
        samples=2,
    )
    assert np.isfinite(result.losses[STEM])
    assert result.macs == result.samples * cost.training_macs(spec, (STEM,))
    shard = ShardId("t0")
    assert cost.training_macs_dense(spec) > 3 * cost.training_macs(spec, (shard,))


def test_clips_get_the_network_for_keywords_unless_another_is_wanted(recordings):
    info = inspect(str(recordings))
    assert plan_run("words", info, PlanOptions()).model.family == "kws"
    assert plan_run("words", info, PlanOptions(family="alexnet")).model.family == "alexnet"
    with pytest.raises(UsageError, match="--image-size"):
        plan_run("words", info, PlanOptions(image_size=(32, 32)))


# Real speech


def test_real_speech_is_read_and_divided_by_speaker():
    folder = _speech_commands()
    info = inspect(f"speech-commands:{folder}")
    spec = plan_run("speech", info, PlanOptions(seed=1))
    data = load(f"speech-commands:{folder}", spec, limit=240)
    assert min(data.train.counts(12)) >= 18
    assert len(data.test) == 1205
    assert not any("cannot be read" in note for note in data.notes)
    # Neither all floor nor all ceiling: the range suits recordings as people make them.
    levels = data.test.images
    assert (levels == 255).mean() < 0.001
    assert (levels == 0).mean() < 0.25
    listing = scan(folder)
    who = [
        {file.name.rpartition("_nohash_")[0].rpartition("_")[2] for files in part.values() for file in files}
        for part in (listing.train, listing.test)
    ]
    assert who[0] & who[1] == {""}, "no speaker is on both sides; silence has none"


def _speech_commands() -> Path:
    """The unpacked 12-class set, where somebody has it."""
    root = os.environ.get("P2PCOLLAB_DATA_ROOT")
    folder = Path(root or "") / "SpeechCommands" / "speech_commands_v0.02"
    if not root or not folder.is_dir():
        pytest.skip(
            "set P2PCOLLAB_DATA_ROOT to a folder with SpeechCommands/speech_commands_v0.02 to read it"
        )
    return folder
