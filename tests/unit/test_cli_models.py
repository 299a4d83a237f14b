"""Commands about models: assemble, evaluate, predict."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from cli_output import one_error_line
from ledger_examples import contribution, device
from model_specs import model_spec
from PIL import Image
from stub_daemon import StubDaemon

from p2pcollab.assembly import assemble, to_bytes
from p2pcollab.cli.main import main
from p2pcollab.errors import IncompleteError
from p2pcollab.models import initial_shard

pytestmark = pytest.mark.usefixtures("cli_environment")


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """An untrained but whole model of four classes of 8x8 images."""
    return _model_file(tmp_path / "model.safetensors")


def _model_file(path: Path, leave_out: tuple[str, ...] = ()) -> Path:
    spec = model_spec()
    frontiers = {
        shard: (contribution(seen={0: 160}, shard=shard, run_id=spec.run_id),)
        for shard in spec.shards
        if shard not in leave_out
    }
    path.write_bytes(to_bytes(assemble(spec, frontiers, lambda one: initial_shard(spec, one.shard))))
    return path


def test_assemble_writes_the_file_and_says_what_is_in_it(
    daemon: StubDaemon, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.model = model_file.read_bytes()
    target = tmp_path / "out.safetensors"
    for verb in ("written", "replaced"):
        assert main(["assemble", "-o", str(target)]) == 0
        out = capsys.readouterr().out
        assert verb in out and hashlib.sha256(daemon.model).hexdigest() in out
    assert target.read_bytes() == daemon.model
    assert main(["assemble", "-o", str(target), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["written"] and facts["missing"] == [] and facts["coverage"] == 1.0
    assert facts["shards"][1]["contributors"] == {device(0): 160}


def test_an_incomplete_model_is_exit_code_5_names_the_tasks_and_writes_nothing(
    daemon: StubDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.model = _model_file(tmp_path / "part.safetensors", leave_out=("t1", "t3")).read_bytes()
    daemon.headers = {"X-Missing": "t1,t3", "X-Coverage": "0.5"}
    target = tmp_path / "out.safetensors"
    assert main(["assemble", "-o", str(target)]) == IncompleteError.exit_code == 5
    assert "lacks 2 of 4 tasks: class 1, class 3" in one_error_line(capsys)
    assert not target.exists()
    assert main(["assemble", "-o", str(target), "--allow-incomplete"]) == 0
    assert "warning: the model lacks 2 of 4 tasks" in capsys.readouterr().err
    assert target.exists()


def _image_folder(folder: Path, classes: int = 4, per_class: int = 10) -> Path:
    generator = np.random.default_rng(0)
    for index in range(classes):
        (folder / f"class {index}").mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class {index}" / f"{number}.png")
    return folder


def test_evaluate_counts_right_answers_by_class(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _image_folder(tmp_path / "images")
    words = ["evaluate", "--model", str(model_file), "--data", str(folder)]
    assert main([*words, "--all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 40 and [row["images"] for row in result["classes"]] == [10] * 4
    assert result["accuracy"] == sum(row["right"] for row in result["classes"]) / 40
    assert main([*words, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["images"] < 40
    assert main([*words, "--all"]) == 0
    assert "on 40 images" in capsys.readouterr().out


def test_predict_names_the_likeliest_classes(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _image_folder(tmp_path / "images") / "class 0"
    words = ["predict", "--model", str(model_file), "--top", "2"]
    assert main([*words, str(folder / "0.png"), str(folder / "1.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.count("class ") >= 2 and "%" in line for line in lines)
    assert main([*words, "--json", str(folder)]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert len(predictions) == 10
    assert all(
        1 >= one["classes"][0]["probability"] >= one["classes"][1]["probability"] for one in predictions
    )


def test_predict_leaves_out_what_is_no_image_and_says_so(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _image_folder(tmp_path / "images") / "class 0"
    (tmp_path / "fake.jpg").write_text("no image")
    words = ["predict", "--model", str(model_file)]
    assert main([*words, str(folder / "0.png"), str(tmp_path / "fake.jpg")]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1 and "fake.jpg" in captured.err
    assert main([*words, str(tmp_path / "fake.jpg")]) == 2
    assert "fake.jpg" in one_error_line(capsys)
    assert main([*words, str(tmp_path / "nowhere.jpg")]) == 2
    assert "nowhere.jpg" in one_error_line(capsys)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_a_damaged_model_file_is_one_clear_line(
    damage: str, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = model_file.read_bytes()
    flipped = bytes([data[-5] ^ 1])
    broken = {"empty": b"", "text": b"hello", "cut": data[:-9], "flipped": data[:-5] + flipped + data[-4:]}
    (tmp_path / "broken.safetensors").write_bytes(broken[damage])
    for words in (["evaluate", "--data", "digits"], ["predict", "x.png"]):
        assert main([*words, "--model", str(tmp_path / "broken.safetensors")]) == 2
        assert "broken.safetensors" in one_error_line(capsys)
