"""What storage keeps of what was asked and of who drives it: whole, small, and without secrets."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dashboards.view import DataFacts
from helix.storage import FolderStorage, Storage, json_bytes, sealed
from orchestration.asked import (
    DRIVER_S,
    DRIVERS,
    Asked,
    AskedTrial,
    DriverRecord,
    asked_grids,
    drives,
    put_asked,
    read_asked,
    read_drivers,
)
from orchestration.grid import expand, load_grid
from orchestration.ledger import SILENCE_S, TrialState
from orchestration.money import Prices
from orchestration.verification import verify_storage

FACTS = DataFacts(name="tones", classes=6, recordings=576, chance=1 / 6, expected=576, notes=("one", "two"))


def asked(*, folds: range = range(1, 3), seeds: range = range(1)) -> Asked:
    trials = expand(load_grid("demo"), folds=list(folds), seeds=list(seeds))
    return Asked(
        grid="demo",
        question="Which?",
        command="python orchestration/sweep.py --grid demo",
        data=(FACTS,),
        trials=tuple(
            AskedTrial(
                trial_id=f"{number:016x}",
                variant=trial.variant.name,
                backbone=trial.variant.backbone,
                spec=trial.spec,
                parameters=1000,
                tokens=80,
            )
            for number, trial in enumerate(trials)
        ),
        prices=Prices(usd={("g5.xlarge", "spot"): 0.4, ("g5.xlarge", "on-demand"): 1.0}),
    )


def test_what_was_asked_is_read_back_as_it_was(storage: Storage):
    assert read_asked(storage, "demo") is None
    assert asked_grids(storage) == []
    given = asked()
    put_asked(storage, given)
    found = read_asked(storage, "demo")
    assert found is not None
    assert sorted(found.trials, key=lambda one: one.trial_id) == list(given.trials)
    assert replace(found, trials=()) == replace(given, trials=())
    states = {one.trial_id: TrialState(trial_id=one.trial_id, status="missing") for one in given.trials}
    seen = [one.view(states, storage="file:///s", now=1.0) for one in (found, given)]
    assert seen[0] == seen[1]
    assert asked_grids(storage) == ["demo"]


def test_what_is_asked_last_counts(storage: Storage):
    put_asked(storage, asked())
    put_asked(storage, asked(folds=range(3, 4)))
    found = read_asked(storage, "demo")
    assert found is not None and {one.spec.data.fold for one in found.trials} == {3}


def test_two_thousand_trials_are_a_small_file():
    many = asked(folds=range(1, 5), seeds=range(84))
    assert len(many.trials) == 2016
    assert len(json_bytes(many.as_json())) < 100_000


def test_a_plan_that_was_changed_or_is_of_another_version_is_refused(storage: Storage):
    put_asked(storage, asked())
    whole = storage.get_json("grids/demo/plan.json")
    storage.put_json("grids/demo/plan.json", whole | {"command": "rm"})
    with pytest.raises(ValueError, match="does not match its own checksum"):
        read_asked(storage, "demo")
    assert verify_storage(storage).damaged == ["grids/demo/plan.json: does not match its own checksum"]
    body = {key: value for key, value in whole.items() if key != "sha256"}
    storage.put_json("grids/demo/plan.json", sealed(body | {"format": 99}))
    with pytest.raises(ValueError, match="is of format 99, and this version reads 1"):
        read_asked(storage, "demo")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda plan: plan.update(command=["rm"]), "it has ['rm'] for command, wanted a text"),
        (lambda plan: plan.pop("question"), "it has no question"),
        (lambda plan: plan["data"][0].update(recordings=[]), "its data set 1 has [] for recordings, wanted a whole"),
        (
            lambda plan: plan["data"][0].update(notes=[1]),
            "its data set 1 has [1] for notes, wanted a list, each a text",
        ),
        (lambda plan: plan["data"].append(None), "its data set 2 is no JSON object but NoneType"),
        (lambda plan: plan["cells"][1].update(variant=["a"]), "its cell 2 has ['a'] for variant, wanted a text"),
        (lambda plan: plan["cells"][0].update(backbone={}), "its cell 1 has {} for backbone, wanted a text"),
        (lambda plan: plan["cells"][0].pop("tokens"), "its cell 1 has no tokens"),
        (lambda plan: plan["cells"][0].update(parameters="1"), "its cell 1 has '1' for parameters, wanted a whole"),
        (lambda plan: plan["cells"][0]["trials"].append([1, 2]), "for trials, wanted a list, each [a text, a whole"),
        (lambda plan: plan["cells"][0]["spec"]["data"].update(options=None), "data.options"),
        (lambda plan: plan["cells"][0]["spec"]["data"]["options"].update(clips_per_class=10**30), "too large"),
        (lambda plan: plan["cells"][0]["spec"]["protocol"].update(select="luck"), "Invalid value 'luck'"),
        (
            lambda plan: plan["cells"][0]["spec"]["model"].update(pattern=[["mamba"]]),
            "the model of its cell 1 has [['mamba']] for pattern, wanted a list, each a text",
        ),
        (lambda plan: plan.update(prices=[["g5.xlarge", "spot", "0.4"]]), "for prices, wanted a list, each [a text, a"),
        (lambda plan: plan.update(cells=[]), "it has no trials"),
    ],
)
def test_a_plan_of_wrong_types_is_none_though_its_seal_is_whole(storage: Storage, change: Any, wrong: str):
    plan = {name: value for name, value in asked().as_json().items() if name != "sha256"}
    change(plan)
    storage.put_json("grids/demo/plan.json", sealed(plan))
    with pytest.raises(ValueError, match=f"^grids/demo/plan.json is no plan: .*{re.escape(wrong)}.* writes it again$"):
        read_asked(storage, "demo")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Counting(FolderStorage):
    puts = 0

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.puts += 1
        super().put(key, data)


def test_a_driver_says_what_is_new_at_once_and_that_it_lives_now_and_then(tmp_path: Path):
    storage, clock = Counting(tmp_path), Clock()
    record = DriverRecord(storage, "demo", "s1", clock=clock)
    for _ in range(5):
        record.say(waiting="", stopped=None)
    assert storage.puts == 1
    record.say(waiting="waiting for a GPU: 0 of 2 nodes started", stopped=None)
    assert storage.puts == 2
    clock.now += DRIVER_S
    record.say()
    assert storage.puts == 3
    (said,) = read_drivers(storage, "demo")
    assert (said["waiting"], said["time"]) == ("waiting for a GPU: 0 of 2 nodes started", clock.now)
    assert drives(said, now=clock.now + SILENCE_S - 1)
    assert not drives(said, now=clock.now + SILENCE_S)
    record.end()
    (said,) = read_drivers(storage, "demo")
    assert said["waiting"] == "" and not drives(said, now=clock.now)


def test_a_storage_that_is_away_does_not_hold_a_driver_up(tmp_path: Path):
    class Away(FolderStorage):
        away = True

        def put(self, key: str, data: bytes | memoryview) -> None:
            if self.away:
                raise ConnectionError("away")
            super().put(key, data)

    storage = Away(tmp_path)
    record = DriverRecord(storage, "demo", "s1", clock=Clock())
    record.say(waiting="for a machine")
    assert read_drivers(storage, "demo") == []
    storage.away = False
    record.say()
    assert read_drivers(storage, "demo")[0]["waiting"] == "for a machine"


def test_only_the_last_drivers_are_read(storage: Storage):
    for number in range(9):
        DriverRecord(storage, "demo", f"20260101-00000{number}-abcdef", clock=Clock()).say()
    assert [one["sweep_id"][14] for one in read_drivers(storage, "demo")] == [str(n) for n in range(9)][-DRIVERS:]


def test_neither_record_holds_anything_of_the_environment(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-key")
    put_asked(storage, asked())
    DriverRecord(storage, "demo", "s1", clock=Clock()).say(waiting="x")
    written = "".join(json.dumps(storage.get_json(key)) for key in storage.keys("grids"))
    assert "a-very-secret-key" not in written


def test_what_a_driver_said_that_cannot_be_read_is_passed_over(storage: Storage):
    DriverRecord(storage, "demo", "s2", clock=Clock()).say(waiting="x")
    for name, data in (("s1", b"{oh"), ("s3", b"[]"), ("s4", b'{"time": "noon"}')):
        storage.put(f"grids/demo/drivers/{name}.json", data)
    assert [one["sweep_id"] for one in read_drivers(storage, "demo")] == ["s2"]
