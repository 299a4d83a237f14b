"""Scenario files: what is a scenario, what is not and why, and what happens when."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario import Cut, Kill, Skew, hosts_that_stay_away, load, parse, relayed_hosts, timeline

from p2pcollab.errors import UsageError

SCENARIOS = sorted(Path(__file__).with_name("scenarios").glob("*.toml"))

HEAD = """
name = "example"
about = "An example of what a scenario can be."
seed = 7
hosts = 4
epochs = 10
end = "settled"
"""


def step(text: str) -> str:
    return f"[[steps]]\n{text}\n"


CUT = step('at_s = 5\ndo = "cut"\nhosts = [3, 4]\nfor_s = 60')


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_kept_scenario_is_one_and_is_named_like_its_file(path: Path) -> None:
    scenario = load(path)
    assert scenario.name == path.stem
    assert timeline(scenario) == timeline(scenario)


def test_fault_with_a_length_ends_by_itself() -> None:
    moments = timeline(parse(HEAD + CUT))
    assert [(moment.at_s, moment.ends, moment.hosts) for moment in moments] == [
        (5.0, False, (3, 4)),
        (65.0, True, (3, 4)),
    ]


def test_what_ends_at_a_moment_ends_before_what_begins_then() -> None:
    settle = step('at_s = 65\ndo = "settle"\nwithin_rounds = 8')
    moments = timeline(parse(HEAD + settle + CUT))
    assert [moment.label for moment in moments][1:] == [
        "end of cut hosts 3, 4 (way=both)",
        "settle (within_rounds=8)",
    ]


def test_hosts_are_picked_by_the_seed() -> None:
    text = step('at_s = 1\ndo = "kill"\npick = 2')
    picked = {seed: timeline(parse(HEAD.replace("seed = 7", f"seed = {seed}") + text)) for seed in range(20)}
    hosts = {moments[0].hosts for moments in picked.values()}
    assert len(hosts) > 1
    assert all(len(set(chosen)) == 2 and max(chosen) <= 4 for chosen in hosts)
    assert picked[7] == timeline(parse(HEAD + text))


def test_only_what_a_scenario_needs_must_be_installed() -> None:
    assert parse(HEAD + CUT).programs == ("ip",)
    one_way = CUT + 'way = "deaf"\n'
    assert parse(HEAD + one_way).programs == ("ip", "iptables")
    delay = step('at_s = 1\ndo = "delay"\nhosts = [2]\nms = 50')
    assert parse(HEAD + delay).programs == ("ip", "ethtool")
    assert relayed_hosts(timeline(parse(HEAD + delay))) == {2}


def test_devices_that_nobody_starts_again_stay_away() -> None:
    kill = step('at_s = 1\ndo = "kill"\nhosts = [1, 2, 3]')
    again = step('at_s = 9\ndo = "start"\nhosts = [2]')
    trainer = step('at_s = 5\ndo = "kill"\npart = "trainer"\nhosts = [4]')
    assert hosts_that_stay_away(timeline(parse(HEAD + kill + again + trainer))) == {1, 3}
    assert hosts_that_stay_away(timeline(parse(HEAD + kill.replace("[1", "[4") + "for_s = 5\n"))) == set()


def test_defaults_and_integers_for_seconds_are_taken() -> None:
    scenario = parse(HEAD + step('at_s = 1\ndo = "skew"\nhosts = [1]\nseconds = -90') + CUT)
    assert isinstance(scenario.steps[0], Skew) and scenario.steps[0].seconds == -90.0
    assert isinstance(scenario.steps[1], Cut) and scenario.steps[1].way == "both"
    kill = parse(HEAD + step('at_s = 1\ndo = "kill"\nhosts = [1]')).steps[0]
    assert isinstance(kill, Kill) and kill.part == "device"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("not toml", "is not TOML"),
        (HEAD.replace("seed = 7", ""), "seed: Field required"),
        (HEAD.replace("hosts = 4", "hosts = 40"), "hosts: Input should be less than or equal to 12"),
        (HEAD.replace("hosts = 4", 'hosts = "4"'), "hosts: Input should be a valid integer"),
        (HEAD.replace('"example"', '"../x"'), "name: String should match"),
        (HEAD + "colour = 3", "colour: Extra inputs are not permitted"),
        (HEAD + step('at_s = 1\ndo = "explode"\nhosts = [1]'), "step 1: Input tag 'explode'"),
        (HEAD + step('at_s = -1\ndo = "cut"\nhosts = [1]'), "step 1 cut at_s: Input should be greater"),
        (HEAD + step('at_s = nan\ndo = "cut"\nhosts = [1]'), "step 1 cut at_s"),
        (HEAD + step('at_s = 1\ndo = "cut"'), "step 1 cut: give either `hosts` or `pick`"),
        (HEAD + step('at_s = 1\ndo = "cut"\nhosts = [1]\npick = 1'), "give either `hosts` or `pick`"),
        (HEAD + step('at_s = 1\ndo = "cut"\nhosts = [1, 1]'), "names one of them twice"),
        (HEAD + step('at_s = 1\ndo = "cut"\nhosts = [5]'), "step 1 (cut) needs host 5 of 4"),
        (HEAD + step('at_s = 1\ndo = "cut"\npick = 5'), "step 1 (cut) needs host 5 of 4"),
        (HEAD + CUT + step('at_s = 1\ndo = "heal"\nhosts = [1]\nfor_s = 3'), "step 2 heal for_s: Extra"),
        (
            HEAD + step('at_s = 1\ndo = "loss"\nhosts = [1]\nshare = 1.5'),
            "share: Input should be less than 1",
        ),
        (HEAD + step('at_s = 1\ndo = "slow"\nhosts = [1]'), "step 1 slow cores: Field required"),
        (HEAD + step('at_s = 1\ndo = "kill"\nhosts = [1]\npart = "disk"'), "part: Input should be 'device'"),
    ],
)
def test_file_that_is_no_scenario_is_refused_with_the_place(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(text, "x.toml")
    assert str(refusal.value).startswith("x.toml")
    assert complaint in str(refusal.value)


def test_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read"):
        load(tmp_path / "nowhere.toml")
