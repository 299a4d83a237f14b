"""Whole devices as users run them, with real processes: they find each other, train, fail and come back."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import digits_runs as runs
import pytest

from p2pcollab.daemon import observe as observing
from p2pcollab.daemon.fleet import Fleet, LocalDevice
from p2pcollab.daemon.observe import harvest, observe
from p2pcollab.daemon.options import DaemonOptions
from p2pcollab.errors import ExitCode, NoPeersError, NotAuthorisedError, StorageError
from p2pcollab.run import JoinCode

# One run of three unlike devices, looked at from all sides once it is complete.


@dataclass(frozen=True, slots=True, kw_only=True)
class Household:
    """A complete run whose devices still run."""

    fleet: Fleet
    folder: Path
    code: str
    #: Created the run; has examples of every class, and would rather train the 7.
    desktop: LocalDevice
    #: Trains the tasks of 8 and 9 only.
    picky: LocalDevice
    #: Has a folder with images of 0, 1 and 2, and nothing else.
    narrow: LocalDevice
    #: Has no data.
    watcher: LocalDevice

    @property
    def trainers(self) -> tuple[LocalDevice, ...]:
        return (self.desktop, self.picky, self.narrow)

    @property
    def devices(self) -> tuple[LocalDevice, ...]:
        return (*self.trainers, self.watcher)


@pytest.fixture(scope="module")
def household(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Household]:
    folder = tmp_path_factory.mktemp("household")
    spec = runs.digits_spec("household", epochs=8)
    images = runs.write_digits(folder / "images", spec, classes=("0", "1", "2"), part="train", most=60)
    with Fleet() as fleet:
        desktop = runs.add_digits(fleet, "desktop", folder, "1/2", prefer=("7",))
        picky = runs.add_digits(fleet, "picky", folder, "2/2", tasks=("8", "9"))
        narrow = fleet.add("narrow", folder / "narrow", data=str(images), threads=1)
        watcher = fleet.add("watcher", folder / "watcher")
        code = runs.create(desktop, spec)
        # A task belongs to whoever has examples of it *and* is there: the desktop must be there first.
        runs.freeze_in_a_lease(desktop)
        for device in (picky, narrow, watcher):
            device.start(mode="join", code=code)
        # With their data: what the desktop holds goes round among all three then.
        for device in (picky, narrow):
            runs.eventually(
                lambda device=device: ready(desktop, device), f"{device.name} to be seen as one that trains"
            )
        runs.eventually(lambda: "observer" in runs.peer_states(desktop), "the watcher to be seen as one")
        desktop.processes()["trainer"].resume()
        runs.complete(desktop, picky, narrow, watcher)
        yield Household(
            fleet=fleet,
            folder=folder,
            code=code,
            desktop=desktop,
            picky=picky,
            narrow=narrow,
            watcher=watcher,
        )


def ready(device: LocalDevice, other: LocalDevice) -> bool:
    """Whether a device sees that another one takes leases."""
    return bool(runs.known(other)) and runs.peer_state(device, runs.device_id(other)) in ("idle", "training")


def _visitor(code: str, folder: Path) -> DaemonOptions:
    return DaemonOptions(mode="join", state=folder, code=code, interface="127.0.0.1")


def test_devices_find_each_other_with_nothing_but_the_join_code(household: Household) -> None:
    for device in household.devices:
        names = {peer["name"] for peer in runs.status(device)["peers"] if peer["state"] != "left"}
        assert names >= {other.name for other in household.devices if other is not device}


def test_models_assembled_on_different_devices_are_byte_identical_and_whole(household: Household) -> None:
    models = [device.assemble() for device in household.devices]
    assert len({model.data for model in models}) == 1
    first = models[0]
    assert first.missing == () and first.coverage == 1.0
    assert not runs.missing_shards(first.data)
    # Chance is 0.1. It is not 0.9 because one device knows three digits only, from a few images.
    assert runs.digits_accuracy(first.data) > 0.5


def test_every_device_with_data_trains_and_one_without_does_not(household: Household) -> None:
    authors = {author for _, author in runs.seen(household.desktop)}
    assert authors == {runs.device_id(device) for device in household.trainers}


def test_a_device_trains_only_the_tasks_that_it_was_told_to(household: Household) -> None:
    assert runs.trained_by(household.picky) <= {"t8", "t9"}


def test_a_device_trains_only_tasks_that_it_has_examples_of(household: Household) -> None:
    assert runs.trained_by(household.narrow) <= {"t0", "t1", "t2"}
    counts = runs.status(household.narrow)["device"]["data"]["class_counts"]
    assert [count > 0 for count in counts] == [True] * 3 + [False] * 7


def test_a_preferred_task_is_in_the_first_lease_of_tasks(household: Household) -> None:
    assert "t7" in next(lease for lease in runs.leases_of(household.desktop) if lease != ["stem"])


def test_a_visitor_with_the_join_code_sees_the_run_and_leaves_no_trace(household: Household) -> None:
    before = runs.status(household.desktop)
    view = observe(_visitor(household.code, household.folder))
    assert view["complete"] and view["progress"] == 1.0
    assert view["run"]["id"] == before["run"]["id"]
    assert view["ledger"] == before["ledger"]
    assert {peer["name"] for peer in view["peers"]} >= {device.name for device in household.devices}
    after = runs.status(household.desktop)
    assert [peer["device"] for peer in after["peers"]] == [peer["device"] for peer in before["peers"]]


def test_a_visitor_with_the_join_code_assembles_the_same_bytes(household: Household) -> None:
    data, missing, coverage = harvest(_visitor(household.code, household.folder))
    assert data == household.picky.assemble().data
    assert (missing, coverage) == ((), 1.0)


def test_the_join_code_of_the_run_with_another_secret_is_refused(household: Household) -> None:
    wrong = runs.with_secret(household.code, secrets.token_bytes(16))
    entries = runs.status(household.desktop)["ledger"]
    intruder = household.fleet.add("intruder", household.folder / "intruder", data="digits")
    launched = intruder.start(mode="join", code=wrong).launched
    assert launched is not None and launched.process.stdout is not None
    with pytest.raises(NotAuthorisedError):
        observe(_visitor(wrong, household.folder))
    assert launched.process.wait(runs.DEADLINE_S) == ExitCode.NOT_AUTHORISED
    reason = json.loads(launched.process.stdout.read().splitlines()[-1])
    assert reason["kind"] == "NotAuthorisedError" and reason["exit_code"] == ExitCode.NOT_AUTHORISED
    after = runs.status(household.desktop)
    assert after["ledger"] == entries
    assert "intruder" not in {peer["name"] for peer in after["peers"]}


def test_a_run_that_nobody_is_in_is_not_found(household: Household, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "_FIND_S", 4.0)
    other = runs.digits_spec("another", epochs=4)
    code = JoinCode.create(secrets.token_bytes(16), other.run_id)
    with pytest.raises(NoPeersError, match=r"no device of this run was found on .* \(127\.0\.0\.1\)"):
        observe(_visitor(str(code), household.folder))


def test_a_second_daemon_on_a_state_folder_is_refused_and_the_first_is_named(household: Household) -> None:
    launched = household.desktop.launched
    assert launched is not None
    second = LocalDevice("second", household.desktop.state, {})
    with pytest.raises(StorageError, match=rf"process {launched.pid}\b"):
        second.start(mode="resume")
    assert runs.status(household.desktop)["complete"]


# Faults


def test_the_tasks_of_a_killed_device_are_taken_over_and_it_comes_back_with_its_ledger(
    tmp_path: Path,
) -> None:
    with Fleet() as fleet:
        creator = runs.add_digits(fleet, "creator", tmp_path, "1/3")
        second = runs.add_digits(fleet, "second", tmp_path, "2/3")
        late = runs.add_digits(fleet, "late", tmp_path, "3/3")
        code = runs.create(creator, runs.digits_spec("takeover", epochs=5))
        own = runs.device_id(creator)
        runs.eventually(lambda: runs.contributed(creator), "the creator to train")
        # Its trainer stands still, so that it certainly holds a lease when it is killed.
        held = runs.freeze_in_a_lease(creator)
        second.start(mode="join", code=code)
        runs.eventually(
            lambda: runs.known(second) and runs.lost(runs.seen(creator), runs.seen(second)) == [],
            "the creator's work to spread",
        )
        runs.eventually(lambda: runs.contributed(second), "the second device to train")
        second.processes()["trainer"].suspend()
        before = runs.seen(creator)
        processes = runs.parts(creator)
        creator.kill()
        processes["trainer"].resume()
        runs.eventually(lambda: runs.all_gone(processes.values()), "trainer and p2pd to follow their daemon")

        # Only the second device is left to give the run spec.
        late.start(mode="join", code=code)
        runs.eventually(lambda: runs.contributed(late), "the late device to train")
        second.processes()["trainer"].resume()
        runs.complete(second, late)
        after = runs.seen(late)
        for shard in held:
            others = {author for (trained, author) in after if trained == shard and author != own}
            assert others and after.get((shard, own), 0) == before.get((shard, own), 0)

        # Nothing in a state folder depends on where it lies.
        creator.state = creator.state.rename(tmp_path / "moved")
        creator.start(mode="resume", spec=None, secret_hex=None, state=str(creator.state))
        runs.eventually(lambda: runs.known(creator), "the creator to be back in the run")
        assert runs.device_id(creator) == own
        assert runs.lost(before, runs.seen(creator)) == []
        # It has only just begun to listen, and waits for those who have what it lacks.
        assert creator.assemble().missing == ()
        runs.complete(creator, second, late)
        for device in (creator, second, late):
            assert runs.lost(before, runs.seen(device)) == []
        assert creator.assemble().data == late.assemble().data


def test_a_daemon_outlives_its_trainer_and_its_p2pd_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with Fleet() as fleet:
        first = runs.add_digits(fleet, "first", tmp_path, "1/2")
        second = runs.add_digits(fleet, "second", tmp_path, "2/2")
        code = runs.create(first, runs.digits_spec("parts", epochs=4))
        # So that it does not complete the run alone.
        runs.freeze_in_a_lease(first)
        second.start(mode="join", code=code)
        runs.training(second)
        before = runs.parts(second)
        second.kill("trainer")
        second.kill("p2pd")
        first.processes()["trainer"].resume()
        runs.complete(first, second)

        after = runs.parts(second)
        assert after["daemon"].pid == before["daemon"].pid
        assert after["trainer"].pid != before["trainer"].pid
        assert after["p2pd"].pid != before["p2pd"].pid
        counters = runs.status(second)["counters"]
        assert counters["trainer_restarts"] == 1 and counters["p2pd_restarts"] == 1
        other = runs.device_id(first)
        runs.eventually(lambda: runs.peer_state(second, other) == "complete", "the devices to meet again")
        model = first.assemble().data
        assert model == second.assemble().data
        assert runs.digits_accuracy(model) > 0.9

        # Nothing is left to train, and a model is still assembled.
        second.kill("trainer")
        runs.eventually(
            lambda: runs.status(second)["counters"]["trainer_restarts"] == 2,
            "the trainer to be started again",
        )
        assert second.assemble().data == model
        after = runs.parts(second)

        # The trainer and p2pd that were started again are watched over like the first ones.
        second.kill("daemon")
        runs.eventually(lambda: runs.all_gone(after.values()), "trainer and p2pd to follow their daemon")

        processes = runs.parts(first).values()
        assert first.leave() == ExitCode.OK
        assert runs.all_gone(processes)
