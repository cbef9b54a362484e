"""MLflow, the real thing on SQLite: two levels of runs that come out the same however often they are replayed."""

import csv
import io
import json
import math
import shutil
import sqlite3
import threading
import time
from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import mlflow.pyfunc
import pandas as pd
import pytest
import soundfile
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, load_text
from mlflow.exceptions import MlflowException
from requests import HTTPError
from scipy import stats

from dashboards.confusion import confusion_csv, confusion_of
from dashboards.summary import SELECTIONS, statistic, summarise
from helix.data.shards import Recordings
from helix.storage import FolderStorage, Storage, sealed
from orchestration import tracking
from orchestration.grid import Trial
from orchestration.plan import Snapshot, make_plan
from orchestration.tracking import (
    BackgroundTracker,
    Tracker,
    attempt_replay,
    logged,
)
from orchestration.tracking_place import tracking_uri
from orchestration.worker import run_trial


@pytest.fixture
def sweep(tiny_sweep: Snapshot, storage: Storage, initialised: Path, monkeypatch):
    """(snapshot, plan) of two variants on two folds, nothing trained yet, with a database of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage.put("mlflow.db", initialised.read_bytes())
    return tiny_sweep, tiny_sweep.plan


def train(entry, recordings: Recordings, storage: Storage, **changes) -> None:
    run_trial(entry.trial.spec, recordings, storage, sweep_id="s1", **changes)


def runs(storage: Storage) -> dict[str, list]:
    client = MlflowClient(tracking_uri(storage))
    found = client.search_runs([client.get_experiment_by_name("helix-tones").experiment_id])
    levels: dict[str, list] = {"cell": [], "trial": [], "report": []}
    for run in found:
        levels[run.data.tags["helix.level"]].append(run)
    return levels


def history(storage: Storage, run, metric: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri(storage))
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]


def test_trials_lie_under_their_cell_with_mean_and_std(sweep, tiny_data, storage):
    snapshot, plan = sweep
    for entry in plan:
        train(entry, tiny_data, storage)
    Tracker(storage).replay(snapshot())
    levels = runs(storage)
    assert len(levels["cell"]) == 2
    assert len(levels["trial"]) == 4
    for cell in levels["cell"]:
        children = [run for run in levels["trial"] if run.data.tags["mlflow.parentRunId"] == cell.info.run_id]
        values = [run.data.metrics["best_test_accuracy"] for run in children]
        assert len(children) == 2
        assert cell.data.metrics["n"] == 2
        assert cell.data.metrics["best_test_accuracy"] == pytest.approx(sum(values) / 2)
        assert cell.data.metrics["best_test_accuracy_std"] == pytest.approx(abs(values[0] - values[1]) / 2)
        assert cell.info.status == "FINISHED"
    assert {run.data.params["fold"] for run in levels["trial"]} == {"1", "2"}
    assert {run.info.status for run in levels["trial"]} == {"FINISHED"}


def test_replaying_adds_nothing(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    for _ in range(3):
        Tracker(storage).replay(snapshot())
    levels = runs(storage)
    assert (len(levels["cell"]), len(levels["trial"])) == (1, 1)
    assert [step for step, _ in history(storage, levels["trial"][0], "test_accuracy")] == [1, 2]


def test_a_tracker_that_died_before_it_counted_its_rows_sends_them_again_without_a_trace(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    Tracker(storage).replay(snapshot())
    run = runs(storage)["trial"][0]
    client = MlflowClient(tracking_uri(storage))
    client.set_tag(run.info.run_id, "helix.rows", "0")
    Tracker(storage).replay(snapshot())
    assert [step for step, _ in history(storage, run, "train_loss")] == [1, 2]


def test_what_mlflow_holds_of_a_trial_shows_gaps_and_duplicates(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    uri, name = tracking_uri(storage), plan[0].trial_id
    assert logged(uri, name, "test_accuracy") == []
    Tracker(storage).replay(snapshot())
    rows = [(row["epoch"], 100 * row["test_accuracy"]) for row in snapshot.states()[name].rows]
    assert logged(uri, name, "test_accuracy") == rows
    run = next(run for run in runs(storage)["trial"] if run.data.tags["helix.trial_id"] == name)
    MlflowClient(uri).log_metric(run.info.run_id, "test_accuracy", 1.0, step=2)
    assert [step for step, _ in logged(uri, name, "test_accuracy")] == [1, 2, 2]


def test_what_validation_says_of_an_epoch_hides_not_what_it_chose(sweep, tiny_data, storage):
    snapshot, plan = sweep
    spec = plan[0].trial.spec
    trial = replace(plan[0].trial, spec=replace(spec, protocol=replace(spec.protocol, validation="held_out")))
    snapshot.plan = make_plan([trial], tiny_data)
    train(snapshot.plan[0], tiny_data, storage)
    Tracker(storage).replay(snapshot())
    (run,), result = runs(storage)["trial"], storage.get_json(f"trials/{snapshot.plan[0].trial_id}/result.json")
    assert run.data.metrics["validation_accuracy"] == 100 * result["accuracy"]["validation"]
    told = [(row["epoch"], 100 * row["validation_accuracy"]) for row in result["rows"]]
    assert history(storage, run, "held_out_accuracy") == told


def test_a_trial_is_followed_while_it_runs_and_after_it_failed(sweep, tiny_data, storage, monkeypatch):
    snapshot, plan = sweep
    seen = []

    def watch(row):
        Tracker(storage).replay(snapshot())
        run = runs(storage)["trial"][0]
        seen.append((run.info.status, len(history(storage, run, "test_loss"))))
        raise ValueError("stop here")

    train(plan[0], tiny_data, storage, on_epoch=watch)
    assert seen == [("RUNNING", 1)]
    Tracker(storage).replay(snapshot())
    run = runs(storage)["trial"][0]
    assert run.info.status == "FAILED"
    assert "stop here" in run.data.tags["helix.error"]
    run_trial(plan[0].trial.spec, tiny_data, storage, sweep_id="s2")
    Tracker(storage).replay(snapshot())
    run = runs(storage)["trial"][0]
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(storage, run, "test_loss")] == [1, 2]


def test_the_run_of_a_cell_ends_as_its_trials_did(sweep, tiny_data, storage):
    snapshot, plan = sweep
    snapshot.plan = cell = [entry for entry in plan if entry.trial.variant == plan[0].trial.variant]
    seen = []

    def stop(row):
        Tracker(storage).replay(snapshot())
        seen.append(runs(storage)["cell"][0].info.status)
        raise ValueError("stop here")

    def status() -> str:
        Tracker(storage).replay(snapshot())
        return runs(storage)["cell"][0].info.status

    for entry in cell:
        train(entry, tiny_data, storage, on_epoch=stop)
    assert seen == ["RUNNING", "RUNNING"]
    assert status() == "FAILED"
    run_trial(cell[0].trial.spec, tiny_data, storage, sweep_id="s2")
    assert status() == "FAILED", "one of its trials did"
    run_trial(cell[1].trial.spec, tiny_data, storage, sweep_id="s2")
    assert status() == "FINISHED"
    (run,) = runs(storage)["cell"]
    finished = max(storage.get_json(f"trials/{entry.trial_id}/result.json")["finished"] for entry in cell)
    assert run.info.end_time >= int(1000 * finished)


def test_a_lost_database_is_rebuilt_from_storage(sweep, tiny_data, storage, initialised):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    Tracker(storage).replay(snapshot())
    before = runs(storage)["trial"][0].data.metrics
    storage.put("mlflow.db", initialised.read_bytes())
    Tracker(storage).replay(snapshot())
    assert runs(storage)["trial"][0].data.metrics == before


def test_the_mean_of_a_cell_is_over_all_its_trials_whichever_sweep_trained_them(sweep, tiny_data, storage):
    snapshot, plan = sweep
    for fold in (1, 2):
        snapshot.plan = [entry for entry in plan if entry.trial.spec.data.fold == fold]
        for entry in snapshot.plan:
            train(entry, tiny_data, storage)
        Tracker(storage).replay(snapshot())
    levels = runs(storage)
    for cell in levels["cell"]:
        children = [run for run in levels["trial"] if run.data.tags["mlflow.parentRunId"] == cell.info.run_id]
        values = [run.data.metrics["last_accuracy"] for run in children]
        assert cell.data.metrics["n"] == len(values) == 2
        assert cell.data.metrics["last_accuracy"] == pytest.approx(sum(values) / 2)
        assert cell.data.metrics["last_accuracy_std"] == pytest.approx(abs(values[0] - values[1]) / 2)


def test_trials_move_under_the_new_run_of_a_cell_whose_run_was_deleted(sweep, tiny_data, storage):
    snapshot, plan = sweep
    for entry in plan:
        train(entry, tiny_data, storage)
    Tracker(storage).replay(snapshot())
    client = MlflowClient(tracking_uri(storage))
    before = runs(storage)
    gone = before["cell"][0].info.run_id
    client.delete_run(gone)
    # The next sweep asks for one fold only; the trials of the other one are of the cell too.
    snapshot.plan = [entry for entry in plan if entry.trial.spec.data.fold == 1]
    Tracker(storage).replay(snapshot())
    after = runs(storage)
    cells = {run.info.run_id: run.info.run_name for run in after["cell"]}
    assert len(cells) == 2 and gone not in cells
    assert {run.info.run_id for run in after["trial"]} == {run.info.run_id for run in before["trial"]}
    for run in after["trial"]:
        assert run.info.run_name.startswith(f"{cells[run.data.tags['mlflow.parentRunId']]} fold")
    assert [cell.data.metrics["n"] for cell in after["cell"]] == [2, 2]


def test_cells_that_differ_in_anything_differ_in_a_param(sweep, tiny_data, storage):
    snapshot, plan = sweep
    entry = plan[0]
    spec = entry.trial.spec
    other = replace(spec, training=replace(spec.training, lr=5e-4))
    for trial in (entry.trial, Trial(variant=entry.trial.variant, spec=other)):
        snapshot.plan = make_plan([trial], tiny_data)
        train(snapshot.plan[0], tiny_data, storage)
        Tracker(storage).replay(snapshot())
    first, second = (run.data.params for run in runs(storage)["cell"])
    assert {key for key in first if first[key] != second[key]} == {"training.lr"}


def test_a_server_that_is_down_is_reported_in_one_line_and_stops_nothing(sweep, tiny_data, storage, monkeypatch):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    problem = attempt_replay(Tracker(storage), snapshot())
    assert problem is not None
    assert "\n" not in problem
    said = problem.partition("(")[2].partition("). Nothing is lost: ")[0]
    assert len(said) <= tracking.MOST_SAID and said.endswith("\N{HORIZONTAL ELLIPSIS}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert attempt_replay(Tracker(storage), snapshot()) is None
    assert len(runs(storage)["trial"]) == 1


def test_passwords_are_not_printed(sweep, tiny_data, storage, monkeypatch):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:s3cret@127.0.0.1:9")
    problem = attempt_replay(Tracker(storage), snapshot())
    assert problem is not None
    assert "s3cret" not in problem


@pytest.mark.parametrize("password", ["pa/SECRET", "SECRET PW", "p@SECRET"])
def test_a_password_that_is_no_proper_part_of_an_address_is_not_printed(
    password, sweep, tiny_data, storage, monkeypatch
):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bob:{password}@127.0.0.1:9")
    problem = attempt_replay(Tracker(storage), snapshot())
    assert problem is not None
    assert "SECRET" not in problem


def test_the_ui_shows_metrics_and_not_the_view_for_language_models(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    Tracker(storage).replay(snapshot())
    experiment = MlflowClient(tracking_uri(storage)).get_experiment_by_name("helix-tones")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_storage_that_is_away_for_a_while_does_not_end_the_tracking():
    calls = []

    def snapshot():
        calls.append(len(calls))
        raise ConnectionError("away")

    tracker = SimpleNamespace(uri="nowhere")
    with BackgroundTracker(tracker, snapshot, every_s=0.01) as background:
        deadline = time.monotonic() + 10
        while len(calls) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(calls) >= 3
    assert background.problem == "away"


# What changes once it was told


def look(snapshot: Snapshot):
    """The view of somebody who saw nothing before."""
    snapshot._known = {}
    return snapshot()


def one_cell(sweep, tiny_data: Recordings, storage: Storage) -> tuple[Snapshot, list[str]]:
    """A finished cell of two folds with two seeds each, told to MLflow; the accuracies of all of them differ."""
    snapshot, plan = sweep
    specs = [entry.trial.spec for entry in plan if entry.trial.variant == plan[0].trial.variant]
    trials = [Trial(variant=plan[0].trial.variant, spec=replace(spec, seed=seed)) for spec in specs for seed in (0, 1)]
    snapshot.plan = make_plan(trials, tiny_data)
    for at, entry in enumerate(snapshot.plan):
        train(entry, tiny_data, storage)
        key = f"trials/{entry.trial_id}/result.json"
        result = {name: item for name, item in storage.get_json(key).items() if name != "sha256"}
        storage.put_json(key, sealed({**result, "accuracy": dict.fromkeys(SELECTIONS, 0.9 - 0.06 * at**2)}))
    Tracker(storage).replay(look(snapshot))
    return snapshot, [entry.trial_id for entry in snapshot.plan]


def shown_of_the_cell(storage: Storage) -> dict[str, float]:
    (cell,) = runs(storage)["cell"]
    return cell.data.metrics


def agree(storage: Storage, snapshot: Snapshot) -> None:
    """MLflow says of the only cell what the report says."""
    (summary,) = summarise(look(snapshot))
    metrics = shown_of_the_cell(storage)
    for rule, one in summary.accuracy.items():
        for name, value in (("", one.mean), ("_std", one.std), ("_ci95_low", one.low), ("_ci95_high", one.high)):
            told = metrics.get(f"{rule}_accuracy{name}", math.nan)
            assert math.isnan(told) if value is None else told == pytest.approx(100 * value), (rule, name)
    assert metrics["n"] == summary.selected.n


def test_a_cell_that_lost_results_shows_what_is_left_of_it(sweep, tiny_data, storage):
    snapshot, names = one_cell(sweep, tiny_data, storage)
    agree(storage, snapshot)
    assert "best_test_accuracy_ci95_low" in shown_of_the_cell(storage)
    kept = {name: storage.get(f"trials/{name}/result.json") for name in names}
    for left, name in zip((3, 2, 1, 0), reversed(names), strict=True):
        storage.put(f"trials/{name}/result.json", b"{")
        Tracker(storage).replay(look(snapshot))
        agree(storage, snapshot)
        assert shown_of_the_cell(storage)["n"] == left
        assert math.isnan(shown_of_the_cell(storage)["best_test_accuracy_ci95_low"]) == (left < 3)  # one fold is left
    (cell,) = runs(storage)["cell"]
    assert math.isnan(cell.data.metrics["best_test_accuracy"])
    assert "confusion.csv" not in {
        file.path for file in MlflowClient(tracking_uri(storage)).list_artifacts(cell.info.run_id)
    }
    assert cell.data.tags["helix.interval"] == cell.data.tags["helix.confusion"]
    assert cell.data.tags["helix.confusion"] == "none: no trial has a result any more"
    for name, result in kept.items():
        storage.put(f"trials/{name}/result.json", result)
    for _ in range(2):
        Tracker(storage).replay(look(snapshot))
    agree(storage, snapshot)
    assert history(storage, cell, "n") == [(4, 4), (5, 3), (6, 2), (7, 1), (8, 0), (9, 4)]
    assert text_of(storage, cell, "confusion.csv").startswith("is / taken for")


def test_runs_whose_metrics_are_gone_are_listed_and_sorted_with_the_others(sweep, tiny_data, storage):
    snapshot, names = one_cell(sweep, tiny_data, storage)
    for name in names:
        storage.put(f"trials/{name}/result.json", b"{")
    Tracker(storage).replay(look(snapshot))
    client = MlflowClient(tracking_uri(storage))
    experiment = client.get_experiment_by_name("helix-tones")
    for order in ("ASC", "DESC"):
        found = client.search_runs([experiment.experiment_id], order_by=[f"metrics.best_test_accuracy {order}"])
        assert len(found) == 5  # a cell and its four trials


def test_results_that_changed_and_are_as_many_are_told(sweep, tiny_data, storage):
    snapshot, names = one_cell(sweep, tiny_data, storage)
    key = f"trials/{names[0]}/result.json"
    result = {name: item for name, item in storage.get_json(key).items() if name != "sha256"}
    storage.put_json(key, sealed({**result, "accuracy": dict.fromkeys(SELECTIONS, 0.1)}))  # of the same time
    Tracker(storage).replay(look(snapshot))
    agree(storage, snapshot)


def test_another_standard_deviation_is_shown_and_so_is_the_first_one_again(sweep, tiny_data, storage):
    snapshot, _ = one_cell(sweep, tiny_data, storage)
    view = look(snapshot)
    seen = [shown_of_the_cell(storage)["best_test_accuracy_std"]]
    for std in ("sample", view.std, view.std):
        Tracker(storage).replay(replace(view, std=std))
        seen.append(shown_of_the_cell(storage)["best_test_accuracy_std"])
    assert seen[1] == pytest.approx(seen[0] * math.sqrt(2)) and seen[2:] == [seen[0], seen[0]]
    (cell,) = runs(storage)["cell"]
    assert [step for step, _ in history(storage, cell, "best_test_accuracy_std")] == [4, 5, 6]


@pytest.mark.parametrize("before", ["get_metric_history", "get_run", "log_batch"])
def test_a_replay_that_another_one_overtakes_tells_no_point_a_second_time(sweep, tiny_data, storage, before: str):
    snapshot, _ = one_cell(sweep, tiny_data, storage)
    view, late, quick = replace(look(snapshot), std="sample"), Tracker(storage), Tracker(storage)
    late.replay(look(snapshot))
    client = late._client
    own, overtaken = getattr(client, before), []

    def overtake(*given, **named):
        if not overtaken:
            overtaken.append(before)
            quick.replay(view)
        return own(*given, **named)

    setattr(client, before, overtake)
    late.replay(view)
    (cell,) = runs(storage)["cell"]
    assert overtaken
    for metric in ("n", "best_test_accuracy", "best_test_accuracy_std"):
        assert [step for step, _ in history(storage, cell, metric)] == [4, 5]


# A folder that was copied or moved


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def seen_from(snapshot: Snapshot, folder: Path) -> Snapshot:
    """The sweep as it lies in another folder."""
    there = copy(snapshot)
    there.storage, there._known = FolderStorage(folder), {}
    return there


@pytest.mark.parametrize("name", ["copied", "what 50%20? of#it"])
@pytest.mark.parametrize("moved", [False, True])
def test_the_database_of_a_copied_or_moved_folder_is_left_alone_and_one_says_what_to_do(
    name: str, moved: bool, sweep, tiny_data, storage: FolderStorage, tmp_path: Path, initialised: Path
):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    assert attempt_replay(Tracker(storage), snapshot()) is None
    report = tmp_path / "test.html"
    report.write_text("<p>of the copy</p>")
    (shutil.move if moved else shutil.copytree)(storage.root, tmp_path / name)
    there = seen_from(snapshot, tmp_path / name)
    train(plan[2], tiny_data, there.storage)
    before = files(tmp_path)
    tracker = Tracker(there.storage)
    problem = attempt_replay(tracker, look(there), report)
    assert files(tmp_path) == before
    assert problem is not None and "\n" not in problem
    for path in (storage.root / "mlflow-artifacts", storage.root, tmp_path / name / "mlflow.db"):
        assert str(path) in problem
    assert "is left as it is: it keeps the files of helix-tones in " in problem and "does not take it" not in problem
    # Without the database; under another name too, for MLflow keeps a removed file open as long as a process lives.
    shutil.move(tmp_path / name, tmp_path / f"{name} 2")
    there = seen_from(snapshot, tmp_path / f"{name} 2")
    there.storage.put("mlflow.db", initialised.read_bytes())  # in place of the seconds in which MLflow makes its tables
    assert attempt_replay(Tracker(there.storage), look(there), report) is None
    assert len(runs(there.storage)["trial"]) == 2
    if not moved:
        assert files(storage.root) == {
            path.removeprefix("storage/"): text for path, text in before.items() if path.startswith("storage/")
        }


def test_a_folder_by_another_name_is_the_same_folder(sweep, tiny_data, tmp_path: Path, initialised: Path):
    snapshot, plan = sweep
    (tmp_path / "a disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a disk")
    for folder in (tmp_path / "link" / "runs 1", tmp_path / "a disk" / "runs 1"):
        here = seen_from(snapshot, folder)
        if not folder.exists():
            shutil.copytree(snapshot.storage.root, folder)
        train(plan[0], tiny_data, here.storage)
        assert attempt_replay(Tracker(here.storage), look(here)) is None
    database = sqlite3.connect(tmp_path / "a disk" / "runs 1" / "mlflow.db")
    with database:
        for location in (f"{tmp_path / 'link'}/runs 1/mlflow-artifacts/", f"file://{tmp_path}/a%20disk/runs%201/x/"):
            database.execute("update experiments set artifact_location = ? where name = 'helix-tones'", [location])
            database.commit()
            assert attempt_replay(Tracker(here.storage), look(here)) is None
    database.close()
    shutil.move(tmp_path / "a disk" / "runs 1", tmp_path / "disk 2")
    (tmp_path / "a disk" / "runs 1").symlink_to(tmp_path / "disk 2")
    there = seen_from(snapshot, tmp_path / "disk 2")
    assert attempt_replay(Tracker(there.storage), look(there)) is None, "the old name leads here"


# What a run holds beside its points


def text_of(storage: Storage, run, name: str) -> str:
    return load_text(f"{run.info.artifact_uri}/{name}")


def trained(sweep, tiny_data: Recordings, storage: Storage) -> list:
    """Everything trained and replayed; the plan."""
    snapshot, plan = sweep
    for entry in plan:
        train(entry, tiny_data, storage)
    Tracker(storage).replay(snapshot())
    return plan


def test_a_cell_has_the_corrected_interval_over_folds_beside_its_mean(sweep, tiny_data, storage):
    trained(sweep, tiny_data, storage)
    results = [storage.get_json(f"trials/{name}/result.json") for name in storage.children("trials")]
    (ratio,) = {result["test_clips"] / result["train_clips"] for result in results}
    levels = runs(storage)
    for cell in levels["cell"]:
        children = [run for run in levels["trial"] if run.data.tags["mlflow.parentRunId"] == cell.info.run_id]
        for rule in ("best_test", "last", "validation"):
            values = [run.data.metrics[f"{rule}_accuracy"] for run in children]
            found = [cell.data.metrics.get(f"{rule}_accuracy_ci95_{end}") for end in ("low", "high")]
            if len(set(values)) == 1:
                assert found == [None, None]  # values without a spread have no interval
            else:
                shared = math.sqrt(1 + 2 * ratio)  # the folds share training clips
                wanted = stats.t.interval(0.95, 1, loc=sum(values) / 2, scale=shared * stats.sem(values))
                assert found == pytest.approx(wanted)
        said = f"t over 2 folds, corrected for shared training clips ({ratio:.3g} test to training), 95%"
        assert cell.data.tags["helix.interval"] == f"{said}; seeds of a fold are averaged first"


def test_a_fold_with_more_seeds_weighs_as_much_as_the_other_in_mlflow_too(sweep, tiny_data, storage):
    snapshot, plan = sweep
    cell = [entry for entry in plan if entry.trial.variant == plan[0].trial.variant]
    snapshot.plan = cell
    for entry in cell:
        train(entry, tiny_data, storage)
    for seed in (1, 2):  # of another sweep: no trial of this one
        run_trial(replace(cell[0].trial.spec, seed=seed), tiny_data, storage, sweep_id="s2")
    values: dict[tuple[int, int], float] = {}
    for at, name in enumerate(storage.children("trials")):
        spec = storage.get_json(f"trials/{name}/spec.json")["spec"]
        result = storage.get_json(f"trials/{name}/result.json")
        value = values[spec["data"]["fold"], spec["seed"]] = 0.3 + 0.06 * at**2
        result = {key: item for key, item in result.items() if key != "sha256"}
        storage.put_json(f"trials/{name}/result.json", sealed({**result, "accuracy": dict.fromkeys(SELECTIONS, value)}))
    assert len(values) == 4
    Tracker(storage).replay(snapshot())
    (parent,) = runs(storage)["cell"]
    (summary,) = summarise(snapshot())
    wanted = statistic(values, "population", ratio=summary.ratio)
    by_fold = [fmean(value for (one, _), value in values.items() if one == fold) for fold in (1, 2)]
    assert parent.data.metrics["best_test_accuracy"] == pytest.approx(100 * fmean(by_fold))
    assert parent.data.metrics["best_test_accuracy"] != pytest.approx(100 * fmean(values.values()))
    assert parent.data.metrics["best_test_accuracy_ci95_low"] == pytest.approx(100 * (wanted.low or 0))
    assert parent.data.metrics["n"] == 4
    assert parent.data.tags["helix.interval"].startswith("t over 4 runs in 2 folds, corrected")


def test_what_the_machine_did_is_under_mlflows_own_names(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    Tracker(storage).replay(snapshot())
    run = runs(storage)["trial"][0]
    rows = snapshot.states()[plan[0].trial_id].rows
    for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "process_memory_peak_megabytes"):
        points = history(storage, run, f"system/{name}")
        assert points == [(row["epoch"], row["system"][name]) for row in rows]
    assert run.data.metrics["system/process_memory_peak_megabytes"] > 50


def test_a_trial_names_the_code_and_the_data_that_made_it(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    for _ in range(2):
        Tracker(storage).replay(snapshot())
    levels = runs(storage)
    run = MlflowClient(tracking_uri(storage)).get_run(levels["trial"][0].info.run_id)
    code = snapshot.states()[plan[0].trial_id].attempts[0]["code"]
    tags = run.data.tags
    assert len(code["source_sha256"]) == len(code["constraints_sha256"]) == 64
    assert tags["helix.code.source_sha256"] == code["source_sha256"]
    assert tags["helix.code.constraints_sha256"] == code["constraints_sha256"]
    assert tags["helix.code.commit"] == code["commit"] == tags.get("mlflow.source.git.commit", "unknown")
    assert tags["helix.code.dirty"] == str(code["dirty"]).lower()
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("tones", tiny_data.manifest_sha256[:16])
    source = json.loads(given.dataset.source)
    assert source["manifest_sha256"] == tiny_data.manifest_sha256
    assert source["uri"] == f"{storage!r}/{tiny_data.prepared.prefix}"
    assert json.loads(given.dataset.profile)["recordings"] == 96


def test_a_trial_that_ran_under_two_codes_names_both_and_one_of_long_ago_none(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    key = next(storage.keys(f"trials/{plan[0].trial_id}/attempts"))
    record = storage.get_json(key)
    later = {"commit": "b" * 40, "dirty": True, "source_sha256": "c" * 64, "constraints_sha256": "unknown"}
    storage.put_json(f"{key[:-5]}-later.json", record | {"code": later, "started": record["started"] + 1})
    storage.put_json(key, {name: value for name, value in record.items() if name != "code"})
    Tracker(storage).replay(snapshot())
    tags = runs(storage)["trial"][0].data.tags
    assert tags["helix.code.commit"] == f"unknown, {'b' * 40}"
    assert tags["helix.code.dirty"] == "unknown, true"
    assert tags["mlflow.source.git.commit"] == "b" * 40


def test_the_spec_and_what_was_taken_for_what_are_files_of_the_run(sweep, tiny_data, storage):
    plan = trained(sweep, tiny_data, storage)
    levels = runs(storage)
    pooled: Counter[tuple[str, str]] = Counter()
    for run in levels["trial"]:
        name = run.data.tags["helix.trial_id"]
        assert json.loads(text_of(storage, run, "spec.json")) == storage.get_json(f"trials/{name}/spec.json")
        head, *rows = csv.reader(io.StringIO(text_of(storage, run, "confusion.csv")))
        assert tuple(head[1:]) == tuple(row[0] for row in rows) == tiny_data.classes
        counts = {(row[0], guess): int(n) for row in rows for guess, n in zip(head[1:], row[1:], strict=True)}
        right = sum(n for (label, guess), n in counts.items() if label == guess)
        assert 100 * right / sum(counts.values()) == pytest.approx(run.data.metrics["best_test_accuracy"])
        assert run.data.tags["helix.confusion"].startswith("epoch ")
        if run.data.tags["mlflow.parentRunId"] == levels["cell"][0].info.run_id:
            pooled.update(counts)
    head, *rows = csv.reader(io.StringIO(text_of(storage, levels["cell"][0], "confusion.csv")))
    assert {(row[0], g): int(n) for row in rows for g, n in zip(head[1:], row[1:], strict=True)} == dict(pooled)
    assert len(plan) == 4


def test_a_result_of_an_earlier_version_says_that_its_confusion_is_of_the_last_epoch():
    old = {"confusion": [[0, 0, 3], [1, 0, 1]]}
    triples, said = confusion_of(old)
    assert triples == old["confusion"] and said.startswith("the last epoch")
    new = old | {"selected_confusion": [[0, 1, 4]], "selected_epoch": 7}
    assert confusion_of(new) == ([[0, 1, 4]], "epoch 7, the one that the protocol selects")
    assert confusion_csv(triples, ["a,b", "c"]) == 'is / taken for,"a,b",c\n"a,b",3,0\nc,1,0\n'


def test_runs_of_an_earlier_version_get_the_files_that_they_lack(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    Tracker(storage).replay(snapshot())
    client = MlflowClient(tracking_uri(storage))
    run = runs(storage)["trial"][0]
    client.delete_tag(run.info.run_id, "helix.confusion")
    before = text_of(storage, run, "confusion.csv")
    Path(run.info.artifact_uri.removeprefix("file://"), "confusion.csv").unlink()
    Tracker(storage).replay(snapshot())
    assert text_of(storage, run, "confusion.csv") == before


def versions(storage: Storage) -> dict[str, list]:
    client = MlflowClient(tracking_uri(storage))
    found: dict[str, list] = {model.name: [] for model in client.search_registered_models()}
    for name, of_name in found.items():
        of_name += client.search_model_versions(f"name = '{name}'")
    return found


def test_the_best_of_a_finished_cell_is_one_registered_model_that_predicts(
    sweep, tiny_data, storage, tmp_path, monkeypatch
):
    snapshot, plan = sweep
    for entry in plan[:-1]:
        train(entry, tiny_data, storage)
    Tracker(storage).replay(snapshot())
    assert len(versions(storage)) == 1  # of the other cell one trial is not done
    train(plan[-1], tiny_data, storage)
    for _ in range(3):
        Tracker(storage).replay(snapshot())
    found = versions(storage)
    assert [len(of_name) for of_name in found.values()] == [1, 1]
    client = MlflowClient(tracking_uri(storage))
    soundfile.write(tmp_path / "a.wav", tiny_data.wave(0), 16_000, subtype="PCM_16")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(storage))
    for cell in runs(storage)["cell"]:
        children = [run for run in runs(storage)["trial"] if run.data.tags["mlflow.parentRunId"] == cell.info.run_id]
        best = max(children, key=lambda run: run.data.metrics["best_test_accuracy"])
        name = cell.data.tags["helix.model"].split("/")[1]
        version = client.get_model_version_by_alias(name, "best")
        trial = client.get_run(version.run_id)
        assert trial.data.metrics["best_test_accuracy"] == best.data.metrics["best_test_accuracy"]
        model = mlflow.pyfunc.load_model(f"models:/{name}@best")
        said = model.predict(pd.DataFrame({"path": [str(tmp_path / "a.wav")]}))
        assert said["class"][0] in tiny_data.classes


def test_a_version_that_was_made_and_not_recorded_is_found_again(sweep, tiny_data, storage):
    trained(sweep, tiny_data, storage)
    snapshot, _ = sweep
    storage.delete_folder("tracking")
    client = MlflowClient(tracking_uri(storage))
    for cell in runs(storage)["cell"]:
        client.delete_tag(cell.info.run_id, "helix.model_sha256")
    Tracker(storage).replay(snapshot())
    assert [len(of_name) for of_name in versions(storage).values()] == [1, 1]
    levels = runs(storage)
    assert (len(levels["cell"]), len(levels["trial"])) == (2, 4)


def test_damaged_weights_are_told_on_their_cell_and_keep_nothing_else_from_mlflow(sweep, tiny_data, storage):
    snapshot, plan = sweep
    for entry in plan:
        train(entry, tiny_data, storage)
    for entry in plan[::2]:  # both trials of the first variant
        key = f"trials/{entry.trial_id}/best/model.safetensors"
        storage.put(key, b"broken" + storage.get(key)[6:])
    Tracker(storage).replay(snapshot())
    said = {run.info.run_name: run.data.tags["helix.model"] for run in runs(storage)["cell"]}
    assert "are damaged" in said[plan[0].trial.variant.name]
    assert said[plan[1].trial.variant.name].startswith("models:/")
    assert [len(of_name) for of_name in versions(storage).values()] == [1]


def test_the_report_and_the_certificates_lie_beside_the_cells(sweep, tiny_data, storage, tmp_path, make_certificate):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    for number, trial in enumerate((plan[0].trial_id, "of-another-grid")):
        certificate = make_certificate(f"c{number}", trial, grid="another")
        storage.put_json(f"certificates/c{number}.json", certificate)
    report = tmp_path / "test.html"
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "work.csv").write_text("variant,trials\n")
    (tmp_path / "test" / "confusion-of-more.csv").write_text("of a larger sweep\n")
    for text in ("<p>half</p>", "<p>whole</p>"):
        report.write_text(text)
        assert attempt_replay(Tracker(storage), snapshot(), report) is None
        (tmp_path / "test" / "confusion-of-more.csv").unlink(missing_ok=True)
    (run,) = runs(storage)["report"]
    kept = Path(download_artifacts(f"{run.info.artifact_uri}/test"))
    assert [path.name for path in kept.iterdir()] == ["work.csv"], "tables of the report before are gone"
    assert text_of(storage, run, "test.html") == "<p>whole</p>"
    assert text_of(storage, run, "test/work.csv") == "variant,trials\n", "where the page looks for it"
    found = Path(download_artifacts(f"{run.info.artifact_uri}/certificates"))
    assert [path.name for path in found.iterdir()] == ["c0.json"]
    assert "Does it replay?" in run.data.tags["mlflow.note.content"]
    assert "test.html is under Artifacts." in run.data.tags["mlflow.note.content"]


def test_a_run_that_was_deleted_by_hand_is_made_again_with_everything(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    tracker = Tracker(storage)
    tracker.replay(snapshot())
    client = MlflowClient(tracking_uri(storage))
    first = runs(storage)["trial"][0]
    client.delete_run(first.info.run_id)
    Tracker(storage).replay(snapshot())
    (second,) = runs(storage)["trial"]
    assert second.info.run_id != first.info.run_id
    assert second.data.metrics["best_test_accuracy"] == first.data.metrics["best_test_accuracy"]
    assert [step for step, _ in history(storage, second, "test_accuracy")] == [1, 2]
    assert "is / taken for" in text_of(storage, second, "confusion.csv")


def test_a_tracker_that_remembers_a_deleted_run_looks_again(sweep, tiny_data, storage):
    snapshot, plan = sweep
    tracker = Tracker(storage)
    seen = []

    def watch(row):
        seen.append(attempt_replay(tracker, snapshot()))
        if row["epoch"] == 1:
            run = runs(storage)["trial"][0]
            MlflowClient(tracking_uri(storage)).delete_run(run.info.run_id)

    train(plan[0], tiny_data, storage, on_epoch=watch)
    attempt_replay(tracker, snapshot())
    assert attempt_replay(tracker, snapshot()) is None
    (run,) = runs(storage)["trial"]
    assert [step for step, _ in history(storage, run, "test_accuracy")] == [1, 2]


def test_the_printed_links_name_the_cells_of_the_sweep(sweep, tiny_data, storage):
    snapshot, _ = sweep
    tracker = Tracker(storage)
    assert tracker.compare_links(snapshot()) == {}
    trained(sweep, tiny_data, storage)
    tracker.replay(snapshot())
    links = tracker.compare_links(snapshot())["tones"]
    cells = {run.info.run_id for run in runs(storage)["cell"]}
    assert all(run in links["compare"] for run in cells)
    assert "viewStateShareKey=helix" in links["runs"]
    experiment = MlflowClient(tracking_uri(storage)).get_experiment_by_name("helix-tones")
    shared = json.loads(experiment.tags["mlflow.sharedViewState.helix"])
    assert "metrics.`best_test_accuracy`" in shared["selectedColumns"]


# Several at once


@pytest.mark.parametrize(
    "error", [HTTPError("403 Client Error: DELETE"), MlflowException("no"), NotImplementedError()], ids=repr
)
def test_files_that_may_not_be_removed_keep_nothing_else_from_mlflow(
    sweep, tiny_data, storage, tmp_path, monkeypatch, error
):
    """A server may want more rights for removing a file than for all the rest; some stores cannot do it."""
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    report = tmp_path / "test.html"
    (tmp_path / "test").mkdir()
    for name in ("old.csv", "new.csv"):
        (tmp_path / "test" / name).write_text("variant,trials\n")
    report.write_text("<p>found</p>")
    assert attempt_replay(Tracker(storage), snapshot(), report) is None
    (tmp_path / "test" / "old.csv").unlink()

    def refused(_path: str) -> None:
        raise error

    monkeypatch.setattr(tracking, "get_artifact_repository", lambda *_where: SimpleNamespace(delete_artifacts=refused))
    storage.delete(f"trials/{plan[0].trial_id}/result.json")
    report.write_text("<p>anew</p>")
    assert attempt_replay(Tracker(storage), snapshot(), report) is None
    levels = runs(storage)
    assert text_of(storage, levels["report"][0], "test.html") == "<p>anew</p>"
    assert levels["report"][0].info.status == "FINISHED" and levels["cell"][0].data.metrics["n"] == 0


def test_a_database_that_others_put_their_runs_into_is_no_copy(sweep, tiny_data, storage, tmp_path, monkeypatch):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    uri = tracking_uri(storage)
    MlflowClient(uri).create_experiment("helix-my-notes", artifact_location=(tmp_path / "notes").as_uri())
    other = FolderStorage(tmp_path / "other")
    for key in storage.keys("trials"):
        other.put(key, storage.get(key))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mine = copy(snapshot)
    mine.storage = other
    assert attempt_replay(Tracker(other), mine()) is None
    experiment = MlflowClient(uri).get_experiment_by_name("helix-tones")
    assert experiment.artifact_location == (storage.root / "mlflow-artifacts").as_uri(), "beside its database"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert attempt_replay(Tracker(storage), snapshot()) is None


@pytest.mark.service
def test_replays_at_once_make_one_run_and_one_model_and_no_point_twice(
    sweep, tiny_data, storage, mlflow_server, monkeypatch
):
    snapshot, plan = sweep
    for entry in plan:
        train(entry, tiny_data, storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    view, barrier, problems = snapshot(), threading.Barrier(4), []

    def replay():
        tracker = Tracker(storage)
        barrier.wait()
        problems.extend(attempt_replay(tracker, view) for _ in range(3))

    def replay_at_once():
        threads = [threading.Thread(target=replay) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)

    replay_at_once()
    assert len(problems) == 12
    assert attempt_replay(Tracker(storage), view) is None
    # Then what is told changes, for all of them at once.
    view = replace(view, std="sample")
    replay_at_once()
    assert len(problems) == 24
    assert attempt_replay(Tracker(storage), view) is None
    levels = runs(storage)
    assert Counter(run.data.tags["helix.key"] for run in levels["cell"] + levels["trial"]).most_common(1)[0][1] == 1
    assert (len(levels["cell"]), len(levels["trial"])) == (2, 4)
    for run in levels["trial"]:
        for metric in ("test_accuracy", "system/cpu_utilization_percentage"):
            assert [step for step, _ in history(storage, run, metric)] == [1, 2]
    for run in levels["cell"]:
        assert [step for step, _ in history(storage, run, "best_test_accuracy")] == [2, 3]
        assert len(run.inputs.dataset_inputs) <= 1
    assert [len(of_name) for of_name in versions(storage).values()] == [1, 1]
