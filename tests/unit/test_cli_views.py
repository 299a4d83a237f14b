"""What is shown fits its width, says the essential, and can be harmed by no name that a peer chooses."""

from __future__ import annotations

import io

import pytest
import status_samples as samples
from rich.console import Console, RenderableType

from p2pcollab.cli import format as fmt
from p2pcollab.cli.view_demo import demo_line, demo_summary, demo_view
from p2pcollab.cli.view_live import live_view, log_line
from p2pcollab.cli.view_model import assembly_page, evaluation_page, prediction_lines
from p2pcollab.cli.view_status import peers_page, status_page

WIDTHS = (60, 80, 120, 200)


def drawn(page: RenderableType, width: int) -> str:
    """What a terminal of that width would show, without colours. Nothing may be wider."""
    stream = io.StringIO()
    Console(file=stream, width=width, height=500, color_system=None, highlight=False, emoji=False).print(page)
    text = stream.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    return text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("height", [24, 30, 50])
@pytest.mark.parametrize("classes", [samples.TEN, samples.HUNDRED], ids=["10-classes", "100-classes"])
def test_live_view_fits_the_terminal(width: int, height: int, classes: tuple[str, ...]) -> None:
    peers = 3 if classes is samples.TEN else 20
    view = live_view(
        samples.status(classes, peers=peers), samples.events(), width=width, height=height, message="leaving"
    )
    text = drawn(view, width)
    assert len(text.splitlines()) <= height
    for essential in ("pets", "training", "coverage 90%", "812/s", classes[0], "leaving"):
        assert essential in text


def test_live_view_with_many_tasks_shows_own_ones_and_sums_up_the_rest() -> None:
    status = samples.status(samples.HUNDRED, peers=20, work=8)
    text = drawn(live_view(status, [], width=80, height=30), 80)
    assert "class-00" in text and "and 2 more tasks" in text
    assert "other tasks:" in text and "complete" in text and "waiting" in text
    assert "more devices" in text


def test_live_view_with_few_tasks_shows_each_with_accuracy_and_devices() -> None:
    text = drawn(live_view(samples.status(), samples.events(), width=80, height=40), 80)
    for label in ("stem", *samples.TEN):
        assert label in text
    assert "82.3%" in text and "laptop" in text


def test_live_view_of_a_device_that_knows_nothing_yet() -> None:
    text = drawn(live_view(samples.early_status(), [], width=80, height=24), 80)
    assert "looking for devices" in text and "no run yet" in text
    drawn(live_view({}, [], width=80, height=24), 80)


def test_live_view_of_a_complete_run_says_so() -> None:
    text = drawn(live_view(samples.status(complete=True), [], width=80, height=40), 80)
    assert "100%" in text and "✓" in text and "the run is complete" in text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("classes", [samples.TEN, samples.HUNDRED], ids=["10-classes", "100-classes"])
def test_status_page_names_run_code_and_peers(width: int, classes: tuple[str, ...]) -> None:
    text = drawn(status_page(samples.status(classes), width=width), width)
    for essential in ("pets", "alexnet", "laptop", "eth0", "jetson", "the clock of pi"):
        assert essential in text
    if width >= 80:
        assert "P2P-AAAA-BBBB-CCCC-DDDD-EEEE-FFFF-GGGG-HHHH-IIII-JJJJ" in text


def test_status_page_names_classes_that_this_device_has_no_data_of() -> None:
    status = samples.status()
    status["device"]["data"]["class_counts"] = [0, 0, *[10] * 8]
    assert "none of airplane, automobile" in drawn(status_page(status, width=200), 200)


def test_status_page_of_a_device_that_knows_nothing_yet() -> None:
    assert "not known yet" in drawn(status_page(samples.early_status(), width=80), 80)


@pytest.mark.parametrize("width", WIDTHS)
def test_peers_page_shows_every_peer(width: int) -> None:
    text = drawn(peers_page(samples.status(peers=20), width=width), width)
    assert all(f"device-{index}" in text for index in range(4, 20))


def test_markup_and_escape_sequences_in_a_peers_name_are_shown_not_obeyed() -> None:
    status = samples.status()
    status["peers"][0]["name"] = "[bold]x\x1b[2Jy"
    status["shards"][1]["holders"] = ["[red]z\x07"]
    event = {"id": 1, "time": 0.0, "kind": "peer", "text": "[link=evil]\x1b]0;title\x07"}
    for page in (
        live_view(status, [event], width=120, height=60),
        status_page(status, width=120),
        peers_page(status, width=120),
    ):
        text = drawn(page, 120)
        assert "\x1b" not in text and "\x07" not in text
        assert "[bold]x" in text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("devices", [4, 5, 12])
def test_demo_view_shows_every_device(width: int, devices: int) -> None:
    state = samples.demo_state(devices)
    text = drawn(demo_view(state, width=width, height=24), width)
    assert len(text.splitlines()) <= 26
    for row in state["devices"]:
        assert row["name"] in text
    for essential in ("KILLED", "LATE", "waiting", "coverage 90%", "31 s", "pi was killed"):
        assert essential in text


def test_demo_view_without_devices_shows_the_phase() -> None:
    state = {"phase": "central baseline", "elapsed_s": 3.0, "message": "40%", "devices": []}
    assert "central baseline" in drawn(demo_view(state, width=80, height=24), 80)
    assert "central baseline" in demo_line(state)


def test_demo_line_says_how_far() -> None:
    assert "3 devices running" in demo_line(samples.demo_state()) and "53%" in demo_line(samples.demo_state())


@pytest.mark.parametrize("width", WIDTHS)
def test_demo_summary_compares_with_central_training(width: int) -> None:
    text = drawn(demo_summary(samples.demo_result(), width=width), width)
    for essential in ("96.1%", "97.2%", "-1.1", "11.8x", "equal", "4.20", "812", "killed"):
        assert essential in text


def test_demo_summary_shouts_when_digests_differ() -> None:
    result = samples.demo_result() | {"digests": ["a" * 64, "b" * 64]}
    assert "DIFFERENT" in drawn(demo_summary(result, width=80), 80)


def test_log_line_holds_speed_loss_and_time_left() -> None:
    line = log_line(samples.status())
    for essential in ("training airplane, automobile", "812 samples/s", "loss 0.213", "9 s left", "3 peers"):
        assert essential in line
    assert "discovering" in log_line(samples.early_status())


def test_assembly_page_names_digest_and_coverage() -> None:
    summary = {
        "run": "pets",
        "run_id": "ab" * 32,
        "sha256": "cd" * 32,
        "bytes": 4_200_000,
        "coverage": 0.9,
        "tasks": 40,
        "missing": ["cat"],
        "path": "/x/pets.safetensors",
        "replaced": True,
        "shards": [
            {"shard": f"t{n}", "label": f"c{n}", "generation": 3, "samples": 900, "contributors": {"d1": 900}}
            for n in range(40)
        ],
    }
    text = drawn(assembly_page(summary, width=100), 100)
    for essential in ("cd" * 32, "90%", "replaced", "/x/pets.safetensors", "and 16 more tasks"):
        assert essential in text


def test_evaluation_page_names_what_a_class_is_mistaken_for() -> None:
    rows = [
        {"class": "cat", "images": 10, "right": 7, "accuracy": 0.7, "mistaken_for": "dog", "mistaken": 3},
        {"class": "dog", "images": 0, "right": 0, "accuracy": None, "mistaken_for": None, "mistaken": 0},
    ]
    result = {
        "noun": "clip",
        "images": 10,
        "accuracy": 0.7,
        "missing": ["dog"],
        "classes": rows,
        "notes": ["1 file skipped"],
    }
    text = drawn(evaluation_page(result, width=80), 80)
    for essential in ("70.00%", "dog (3)", "lacks 1 task", "1 file skipped"):
        assert essential in text


def test_prediction_is_one_line_per_image() -> None:
    classes = [{"class": "cat", "probability": 0.931}, {"class": "dog", "probability": 0.042}]
    assert list(prediction_lines([{"image": "a.jpg", "classes": classes}])) == ["a.jpg  cat 93.1%  dog 4.2%"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fmt.percent(0.9999), "99%"),
        (fmt.percent(1.0), "100%"),
        (fmt.percent(0.29), "29%"),
        (fmt.percent(None), "-"),
        (fmt.count(950), "950"),
        (fmt.count(12_800), "12.8k"),
        (fmt.count(999_700), "1.00M"),
        (fmt.count(0), "0"),
        (fmt.count(0.4), "0.4"),
        (fmt.size(3_200_000), "3.20 MB"),
        (fmt.size(12), "12 B"),
        (fmt.size(None), "-"),
        (fmt.duration(3.6), "4 s"),
        (fmt.duration(192), "3m 12s"),
        (fmt.duration(7500), "2h 05m"),
        (fmt.duration(None), "-"),
        (fmt.accuracy(0.0), "-"),
        (fmt.plural(1, "class", "classes"), "1 class"),
        (fmt.names(["a", "b", "c", "d", "e"]), "a, b, c, d +1"),
        (fmt.plain("a\x1b[2Jb"), "a\N{REPLACEMENT CHARACTER}[2Jb"),
        (fmt.clock("nonsense"), " " * 8),
    ],
)
def test_numbers_read_as_people_write_them(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize("width", [80, 200])
def test_refused_contributions_are_shown_with_device_task_and_reason(width: int) -> None:
    status = samples.status()
    for page in (status_page(status, width=width), live_view(status, [], width=width, height=40)):
        assert "pi (automobile): it is worse than what it" in drawn(page, width)
    for nothing in (status | {"refused": []}, {**samples.early_status()}):
        assert "it is worse" not in drawn(status_page(nothing, width=width), width)


def test_a_refusals_text_from_a_peer_cannot_write_to_the_terminal() -> None:
    status = samples.status()
    status["refused"] = [{"name": "\x1b[2J", "label": "\x1b]0;", "reason": "\x07[bold]", "time": "never"}]
    for page in (status_page(status, width=80), live_view(status, [], width=80, height=40)):
        text = drawn(page, 80)
        assert "\x1b" not in text and "\x07" not in text
        assert "[bold]" in text
