"""The scripts that are run by hand. What they call is there: scripts/test checks their types."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_examples import write_classes, write_image

from p2pcollab.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_the_collected_figures_are_those_of_the_single_results(tmp_path: Path) -> None:
    collected = tmp_path / "reliability.json"
    script = ROOT / "scripts" / "python" / "reliability.py"
    subprocess.run([sys.executable, str(script), "--json", str(collected)], check=True, cwd=tmp_path)
    kept = json.loads((ROOT / "docs" / "results" / "reliability.json").read_text())
    assert json.loads(collected.read_text()) == kept, "run scripts/reliability"


def test_a_result_is_not_made_again_wherever_the_data_lie(tmp_path: Path) -> None:
    data, results = write_classes(tmp_path / "here", cat=12, dog=12), tmp_path / "results"
    script = ROOT / "scripts" / "python" / "bench_method.py"

    def bench(data: Path) -> dict[str, str]:
        options = f"--dataset pets --model digits --epochs 1 --seeds 0 --columns AD --devices 2 --data {data}"
        command = [sys.executable, str(script), *options.split(), "--results", str(results)]
        subprocess.run(command, check=True, cwd=tmp_path)
        return {path.name: path.read_text() for path in results.glob("*.json")}

    made = bench(data)
    assert sorted(name.split("-")[2] for name in made) == ["A", "D", "measured"]
    # A version that had another field, not set here, has kept this one.
    (assembled,) = (path for path in results.glob("*.json") if "-D-" in path.name)
    kept = json.loads(assembled.read_text())
    kept["spec"]["model"]["of_an_older_version"] = None
    assembled.write_text(json.dumps(kept))
    made[assembled.name] = assembled.read_text()
    assert bench(data.rename(tmp_path / "there")) == made


def test_what_only_says_where_points_are_lost_can_have_fewer_seeds(tmp_path: Path) -> None:
    data, results = write_classes(tmp_path / "here", cat=12, dog=12), tmp_path / "results"
    script = ROOT / "scripts" / "python" / "bench_method.py"
    options = (
        f"--dataset pets --model digits --epochs 1 --columns AB --data {data} --results {results} --seeds 0,1"
    )
    command = [sys.executable, str(script), *options.split(), "--price-seeds"]
    subprocess.run([*command, "1", "--json", "made.json"], check=True, cwd=tmp_path)
    made = sorted(path.name.split("-")[2:4] for path in results.glob("*.json"))
    assert made == [["A", "0"], ["A", "1"], ["B", "1"]]
    (row,) = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert (row["A_seeds"], row["B_seeds"]) == (2, 1)
    assert {row[key] for key in ("D_mean", "gap_mean", "saving_max", "epoch_seconds_ratio")} == {None}
    assert "(1 of 2 seeds)" in (tmp_path / "made.table.md").read_text()
    refused = subprocess.run([*command, "2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == "--price-seeds 2 has others than --seeds 0,1"


def test_results_have_one_name_where_a_setting_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouped network has one softmax: nothing of it depends on the decoupled losses' examples."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "python")
    configuration = importlib.import_module("method.configuration").Configuration

    def names(**settings: float) -> list[str]:
        made = configuration(
            dataset="digits", source="digits", root=None, model="digits", name="", epochs=2.0, limit=None,
            speeds=(1.0,), partition="shared", groups=None, settings=settings,
        )  # fmt: skip
        return [made.key(column, 0) for column in "ABCD"]

    same = [one == other for one, other in zip(names(), names(negatives=0.5, positives=2), strict=True)]
    assert same == [True, True, False, False]
    same = [one == other for one, other in zip(names(), names(branch_width=0.5), strict=True)]
    assert same == [True, False, False, False]


def test_columns_are_compared_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "python")
    report = importlib.import_module("method.report")
    dense = [{"seed": 0, "accuracy": 0.5}, {"seed": 1, "accuracy": 0.75}]
    assembled = [{"seed": 1, "accuracy": 0.875}, {"seed": 2, "accuracy": 0.25}]
    assert report.differences(assembled, dense) == {1: 12.5}


def test_each_clip_is_in_the_test_of_one_fold_and_no_speaker_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = {f"{word}/{speaker:08x}_nohash_0.wav" for word in ("yes", "no") for speaker in range(40)}
    clips |= {f"_silence_/{number}.wav" for number in range(40)}
    for clip in {*clips, "_background_noise_/hum.wav"}:
        (tmp_path / "data" / clip).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / clip).touch()
    monkeypatch.syspath_prepend(ROOT / "scripts" / "python")
    script = importlib.import_module("speech_folds")
    counts = script.divide(tmp_path / "data", 4, tmp_path / "out")
    tests = [
        (tmp_path / "out" / f"fold-{fold}" / "testing_list.txt").read_text().split() for fold in range(4)
    ]
    assert [len(lines) for lines in tests] == counts
    assert sorted(line for lines in tests for line in lines) == sorted(clips)
    speakers = [{Path(line).name for line in lines if "nohash" in line} for lines in tests]
    assert sum(map(len, speakers)) == 40 and all(speakers)
    assert (tmp_path / "out" / "fold-3" / "_background_noise_" / "hum.wav").exists()
    with pytest.raises(UsageError, match="fold-0 is there already"):
        script.divide(tmp_path / "data", 4, tmp_path / "out")


def test_classes_are_grouped_by_a_table_by_likeness_or_by_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shades = {"coal": 20, "crow": 30, "milk": 240, "swan": 230}
    for name, shade in shades.items():
        for number in range(6):
            write_image(tmp_path / "data" / name / f"{number}.png", shade=shade + number)
    table, out = tmp_path / "table.csv", tmp_path / "groups.txt"
    table.write_text("fine,coarse\ncoal,thing\nmilk,thing\ncrow,bird\nswan,bird\n")
    monkeypatch.syspath_prepend(ROOT / "scripts" / "python")
    script = importlib.import_module("group_classes")

    def groups(*options: str) -> set[frozenset[str]]:
        arguments = ["group-classes", "--data", str(tmp_path / "data"), "--out", str(out), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        assert script.main() == 0
        return {frozenset(line.split(", ")) for line in out.read_text().splitlines()}

    assert groups("--by", "table", "--table", str(table)) == {
        frozenset({"coal", "milk"}),
        frozenset({"crow", "swan"}),
    }
    assert groups("--by", "likeness", "--size", "2") == {
        frozenset({"coal", "crow"}),
        frozenset({"milk", "swan"}),
    }
    for size in (1, 2, 3):
        drawn = groups("--by", "chance", "--size", str(size), "--seed", "1")
        assert sorted(name for names in drawn for name in names) == sorted(shades)
        assert max(map(len, drawn)) == size
    table.write_text("fine,coarse\ncoal,thing\n")
    with pytest.raises(UsageError, match="says nothing of 'crow'"):
        groups("--by", "table", "--table", str(table))
    table.write_text("class,group\ncoal,thing\n")
    with pytest.raises(UsageError, match="no columns"):
        groups("--by", "table", "--table", str(table))
    table.write_bytes(b"fine,coarse\n\xff\xfe,thing\n")
    with pytest.raises(UsageError, match="cannot be read"):
        groups("--by", "table", "--table", str(table))
