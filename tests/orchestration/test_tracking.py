"""MLflow, the real thing on SQLite: two levels of runs that come out the same however often they are replayed."""

import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from helix.data.shards import Recordings
from helix.storage import FolderStorage, Storage, open_storage
from orchestration import tracking
from orchestration.grid import VARIANTS, Grid, Trial
from orchestration.plan import Snapshot, make_plan
from orchestration.tracking import BackgroundTracker, Tracker, attempt_replay, logged, without_secrets
from orchestration.worker import run_trial


@pytest.fixture(scope="module")
def initialised(tmp_path_factory) -> Path:
    """An empty MLflow database; making its tables takes seconds, so it is made once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def sweep(tiny_spec, tiny_data: Recordings, storage: Storage, initialised: Path, monkeypatch):
    """(snapshot, plan) of two variants on two folds, nothing trained yet, with a database of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage.put("mlflow.db", initialised.read_bytes())
    trials = []
    for fold in (1, 2):
        for variant in VARIANTS[3::2]:
            spec = replace(
                tiny_spec,
                data=replace(tiny_spec.data, fold=fold),
                model=replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern[2:4]),
                training=replace(tiny_spec.training, epochs=2),
            )
            trials.append(Trial(variant=variant, spec=spec))
    plan = make_plan(trials, tiny_data)
    grid = Grid(question="Does it replay?", dataset="tones", folds=(1, 2))
    snapshot = Snapshot(grid_name="test", grid=grid, plan=plan, recordings=tiny_data, storage=storage, command="test")
    return snapshot, plan


def train(entry, recordings: Recordings, storage: Storage, **changes) -> None:
    run_trial(entry.trial.spec, recordings, storage, sweep_id="s1", **changes)


def runs(storage: Storage) -> dict[str, list]:
    client = MlflowClient(tracking.tracking_uri(storage))
    found = client.search_runs([client.get_experiment_by_name("helix-tones").experiment_id])
    levels: dict[str, list] = {"cell": [], "trial": []}
    for run in found:
        levels[run.data.tags["helix.level"]].append(run)
    return levels


def history(storage: Storage, run, metric: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking.tracking_uri(storage))
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
    client = MlflowClient(tracking.tracking_uri(storage))
    client.set_tag(run.info.run_id, "helix.rows", "0")
    Tracker(storage).replay(snapshot())
    assert [step for step, _ in history(storage, run, "train_loss")] == [1, 2]


def test_what_mlflow_holds_of_a_trial_shows_gaps_and_duplicates(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    uri, name = tracking.tracking_uri(storage), plan[0].trial_id
    assert logged(uri, name, "test_accuracy") == []
    Tracker(storage).replay(snapshot())
    rows = [(row["epoch"], 100 * row["test_accuracy"]) for row in snapshot.states()[name].rows]
    assert logged(uri, name, "test_accuracy") == rows
    run = next(run for run in runs(storage)["trial"] if run.data.tags["helix.trial_id"] == name)
    MlflowClient(uri).log_metric(run.info.run_id, "test_accuracy", 1.0, step=2)
    assert [step for step, _ in logged(uri, name, "test_accuracy")] == [1, 2, 2]


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
    assert without_secrets("https://me:secret@mlflow.example:5000/x") == "https://mlflow.example:5000/x"
    assert without_secrets("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_the_ui_shows_metrics_and_not_the_view_for_language_models(sweep, tiny_data, storage):
    snapshot, plan = sweep
    train(plan[0], tiny_data, storage)
    Tracker(storage).replay(snapshot())
    experiment = MlflowClient(tracking.tracking_uri(storage)).get_experiment_by_name("helix-tones")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.parametrize("name", ["what?", "run#1", "50%20 of"])
def test_a_folder_with_an_odd_name_holds_its_database(name: str, tmp_path: Path, initialised: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = FolderStorage(tmp_path / name)
    storage.put("mlflow.db", initialised.read_bytes())
    MlflowClient(tracking.tracking_uri(storage)).create_experiment("found")
    database = sqlite3.connect(storage.path("mlflow.db"))
    assert ("found",) in database.execute("select name from experiments").fetchall()
    database.close()


def test_the_database_of_a_bucket_is_a_file_of_this_folder(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri(open_storage("s3://bucket/x")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


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
