"""The report from MLflow alone is the report from storage; what MLflow lacks is said, and nothing is written."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dashboards.report import render_report, report_tables
from dashboards.tables import TABLES_KEPT, shown
from dashboards.view import SweepView
from helix.data.shards import Recordings
from helix.storage import FolderStorage, Storage, sealed
from orchestration import tracking
from orchestration.asked import Asked, AskedTrial, put_asked
from orchestration.cli import main
from orchestration.from_mlflow import MlflowReadError, Reader, view_from_mlflow
from orchestration.ledger import TrialState
from orchestration.plan import Snapshot
from orchestration.tracking import Tracker, attempt_replay
from orchestration.tracking_place import tracking_uri
from orchestration.worker import run_trial

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from orchestration.cli import main; sys.exit(main())"
NOW = 1_795_000_000.0


@pytest.fixture
def sweep(tiny_sweep: Snapshot, storage: Storage, initialised: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    """A sweep of two variants on two folds that nothing was trained of, and an MLflow of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage.put("mlflow.db", initialised.read_bytes())
    put_asked(storage, tiny_sweep.asked)
    return tiny_sweep


Train = Callable[..., None]


@pytest.fixture(name="train")
def _train(tiny_data: Recordings) -> Train:
    """Trains some trials of a sweep, by their numbers."""

    def train(snapshot: Snapshot, numbers: range, **changes: Any) -> None:
        for number in numbers:
            spec = snapshot.plan[number].trial.spec
            run_trial(spec, tiny_data, snapshot.storage, sweep_id="s1", **changes)

    return train


def stop(row: dict[str, Any]) -> None:
    raise ValueError("stop <here>")


def replay(snapshot: Snapshot, folder: Path | None = None) -> SweepView:
    """Bring MLflow up to date, the report too; the view that it was told."""
    view = snapshot()
    report = None
    if folder is not None:
        report = folder / "page.html"
        report.write_text("<p>found</p>")
    assert attempt_replay(Tracker(snapshot.storage), view, report) is None
    return view


def uri_of(snapshot: Snapshot) -> str:
    return tracking_uri(snapshot.storage)


def cells(view: SweepView) -> dict[str, list[list[str]]]:
    """Every table of a view, cell by cell as it is shown."""
    return {table.name: [[shown(cell) for cell in row] for row in table.rows] for table in report_tables(view)}


def but_for_its_place(page: str) -> list[str]:
    """The lines of a report without those that say when and from where it was made."""
    return [line for line in page.splitlines() if not re.search("<dt>(Storage|Written)</dt>|<time>", line)]


def same(found: SweepView, stored: SweepView) -> None:
    assert cells(found) == cells(stored)
    assert but_for_its_place(render_report(found)) == but_for_its_place(render_report(stored))


def trial_run(snapshot: Snapshot, number: int) -> Any:
    client = MlflowClient(uri_of(snapshot))
    experiment = client.get_experiment_by_name("helix-tones")
    (run,) = client.search_runs(
        [experiment.experiment_id], f"tags.`helix.trial_id` = '{snapshot.plan[number].trial_id}'"
    )
    return run


def state_file(snapshot: Snapshot, number: int) -> Path:
    return Path(trial_run(snapshot, number).info.artifact_uri.removeprefix("file://"), "state.json")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_sweep_gives_the_same_page_and_the_same_tables_without_its_storage(
    train: Train,
    sweep: Snapshot,
    tmp_path: Path,
    storage: Storage,
    make_certificate: Callable[..., dict[str, Any]],
):
    train(sweep, range(4))
    for number, trial in enumerate((sweep.plan[0].trial_id, "of-another-setting")):
        storage.put_json(f"certificates/c{number}.json", make_certificate(f"c{number}", trial, grid="test"))
    stored = replay(sweep, tmp_path)
    for folder in ("trials", "grids", "certificates", "tracking"):
        storage.delete_folder(folder)
    found = view_from_mlflow(uri_of(sweep), "test", now=stored.created)
    same(found, stored)
    assert found.gaps == ()
    assert found.certificates == stored.certificates
    rows = [trial.state.rows for _, trial in found.trials()]
    assert all(len(one) == 2 and "train_losses" not in one[0] for one in rows)
    short = [{k: v for k, v in row.items() if k != "train_losses"} for row in stored.trials()[0][1].state.rows]
    assert list(rows[0]) == short


def test_a_half_finished_sweep_with_a_failed_and_a_stopped_trial_gives_the_same(train: Train, sweep: Snapshot):
    train(sweep, range(1))
    train(sweep, range(1, 2), on_epoch=stop)
    train(sweep, range(2, 3), on_epoch=stop)
    key = next(iter(sweep.storage.keys(f"trials/{sweep.plan[2].trial_id}/attempts")))
    sweep.storage.put_json(key, sweep.storage.get_json(key) | {"outcome": "lost"})
    stored = replay(sweep)
    states = {trial.trial_id: trial.state.status for _, trial in stored.trials()}
    assert [states[entry.trial_id] for entry in sweep.plan] == ["done", "failed", "partial", "missing"]
    found = view_from_mlflow(uri_of(sweep), "test", now=stored.created)
    same(found, stored)
    assert found.gaps == ()
    assert "stop &lt;here&gt;" in render_report(found)


def test_a_trial_that_runs_is_shown_by_its_points(train: Train, sweep: Snapshot):
    seen = []

    def look(row: dict[str, Any]) -> None:
        stored = replay(sweep)
        seen.append((stored, view_from_mlflow(uri_of(sweep), "test", now=stored.created)))

    train(sweep, range(1), on_epoch=look)
    for epoch, (stored, found) in enumerate(seen, start=1):
        (theirs, ours) = (view.trials()[0][1].state for view in (stored, found))
        assert (ours.status, ours.epochs_done) == ("running", epoch) == (theirs.status, theirs.epochs_done)
        assert cells(found)["trials"] == cells(stored)["trials"]
        assert "Running is what MLflow was told last" in found.gaps[0]
        for mine, row in zip(ours.rows, theirs.rows, strict=True):
            assert mine["test_accuracy"] == pytest.approx(row["test_accuracy"])
            assert mine["seconds"] == row["seconds"]


def test_the_file_of_a_running_trial_is_not_sent_again_at_every_epoch(train: Train, sweep: Snapshot):
    told = []

    def look(row: dict[str, Any]) -> None:
        replay(sweep)
        told.append(trial_run(sweep, 0).data.tags["helix.state"])

    train(sweep, range(1), on_epoch=look)
    replay(sweep)
    assert len(set(told)) == 1 and len(told) == 2
    assert trial_run(sweep, 0).data.tags["helix.state"] not in told


def test_runs_of_an_earlier_version_give_points_and_accuracies_and_say_what_is_not_there(train: Train, sweep: Snapshot):
    train(sweep, range(2))
    stored = replay(sweep)
    client, run = MlflowClient(uri_of(sweep)), trial_run(sweep, 0)
    client.delete_tag(run.info.run_id, "helix.state")
    state_file(sweep, 0).unlink()
    found = view_from_mlflow(uri_of(sweep), "test", now=stored.created)
    assert found.gaps[0].startswith(f"Of 1 trial ({sweep.plan[0].trial_id}) MLflow holds points and accuracies alone")
    assert "earlier version" in found.gaps[0]
    assert found.gaps[0] in render_report(found)
    states = {trial.trial_id: trial.state for _, trial in found.trials()}
    whole = {trial.trial_id: trial.state for _, trial in stored.trials()}
    old, known = states[sweep.plan[0].trial_id], whole[sweep.plan[0].trial_id]
    assert old.result is not None and known.result is not None
    assert old.result["accuracy"] == pytest.approx(known.result["accuracy"])
    assert old.result["weights_sha256"] == known.result["weights_sha256"]
    assert [row["test_accuracy"] for row in old.rows] == pytest.approx([row["test_accuracy"] for row in known.rows])
    assert old.attempts == ()
    replay(sweep)  # the same sweep again sends what lacks
    assert view_from_mlflow(uri_of(sweep), "test", now=stored.created).gaps == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: "no json {",
        lambda value: json.dumps([1, 2]),
        lambda value: json.dumps(value | {"status": "failed"}),
        lambda value: json.dumps(sealed({"trial_id": value["trial_id"], "status": "done", "attempts": []})),
        lambda value: json.dumps(sealed({"trial_id": "another", "status": "partial", "attempts": []})),
        lambda value: json.dumps(sealed({"trial_id": value["trial_id"], "status": "partial", "attempts": [{"a": 1}]})),
        lambda value: json.dumps(
            sealed({"trial_id": value["trial_id"], "status": "done", "attempts": [], "result": {"rows": [3]}})
        ),
        lambda value: "[" * 100_000,
    ],
)
def test_a_damaged_file_is_told_and_takes_nothing_else_with_it(
    train: Train, sweep: Snapshot, damage: Callable[[Any], str]
):
    train(sweep, range(2))
    stored = replay(sweep)
    path = state_file(sweep, 0)
    value = json.loads(path.read_text())
    value.pop("sha256")
    path.write_text(damage(value))
    found = view_from_mlflow(uri_of(sweep), "test", now=stored.created)
    assert found.gaps[0].startswith(f"Of 1 trial ({sweep.plan[0].trial_id})")
    assert "damaged" in found.gaps[0]
    assert cells(found)["accuracy-tones"][0][:9] == cells(stored)["accuracy-tones"][0][:9]
    replay(sweep)
    assert view_from_mlflow(uri_of(sweep), "test", now=stored.created).gaps == ()


def test_a_whole_file_that_the_run_was_not_told_is_not_believed(train: Train, sweep: Snapshot):
    train(sweep, range(2))
    stored = replay(sweep)
    path = state_file(sweep, 0)
    value = json.loads(path.read_text())
    del value["sha256"], value["result"]["sha256"]
    value["result"]["accuracy"] = dict.fromkeys(value["result"]["accuracy"], 0.123)
    path.write_text(json.dumps(sealed(value)))  # as a copy of the storage left it that trained on
    found = view_from_mlflow(uri_of(sweep), "test", now=stored.created)
    assert found.gaps[0].startswith(f"Of 1 trial ({sweep.plan[0].trial_id})") and "missing or damaged" in found.gaps[0]
    assert cells(found)["accuracy-tones"][0][:9] == cells(stored)["accuracy-tones"][0][:9]
    replay(sweep)
    same(view_from_mlflow(uri_of(sweep), "test", now=stored.created), stored)


def test_a_file_that_is_younger_than_what_was_read_of_its_run_is_believed(train: Train, sweep: Snapshot):
    seen = []

    def look(row: dict[str, Any]) -> None:
        replay(sweep)
        seen.append(trial_run(sweep, 0))

    train(sweep, range(1), on_epoch=look)
    replay(sweep)
    told = Reader(uri_of(sweep))._told(sweep.plan[0].trial_id, seen[-1:])
    assert (told.state.status, told.lacking) == ("done", "")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', json.dumps(sealed({"format": 1})), "null"])
def test_a_damaged_plan_is_refused_by_its_name(train: Train, sweep: Snapshot, text: str):
    train(sweep, range(1))
    replay(sweep)
    client = MlflowClient(uri_of(sweep))
    (run,) = client.search_runs(["1"], "tags.`helix.level` = 'report'")
    client.log_text(run.info.run_id, text, "plan.json")
    with pytest.raises(ValueError, match=f"plan.json of run {run.info.run_id}"):
        view_from_mlflow(uri_of(sweep), "test", now=NOW)


def test_runs_of_other_grids_and_deleted_ones_are_not_taken_for_ours(train: Train, sweep: Snapshot):
    train(sweep, range(4))
    stored = replay(sweep)
    whole = sweep.plan
    sweep.plan, sweep.grid_name = whole[:2], "other"
    put_asked(sweep.storage, sweep.asked)
    replay(sweep)
    others = view_from_mlflow(uri_of(sweep), "other", now=NOW)
    assert {trial.trial_id for _, trial in others.trials()} == {entry.trial_id for entry in whole[:2]}
    assert others.gaps == ()
    same(view_from_mlflow(uri_of(sweep), "test", now=stored.created), stored)
    sweep.plan = whole
    MlflowClient(uri_of(sweep)).delete_run(trial_run(sweep, 3).info.run_id)
    found = view_from_mlflow(uri_of(sweep), "test", now=NOW)
    states = {trial.trial_id: trial.state.status for _, trial in found.trials()}
    assert states[whole[3].trial_id] == "missing"
    assert found.gaps == (
        f"The runs of 1 trial ({whole[3].trial_id}) were deleted in MLflow and are shown as missing.",
    )


def test_what_was_asked_last_counts_and_no_second_run_appears(train: Train, sweep: Snapshot, tmp_path: Path):
    train(sweep, range(2))
    replay(sweep)
    sweep.plan = sweep.plan[:2]
    put_asked(sweep.storage, sweep.asked)
    for _ in range(2):
        stored = replay(sweep, tmp_path)
    same(view_from_mlflow(uri_of(sweep), "test", now=stored.created), stored)
    runs = MlflowClient(uri_of(sweep)).search_runs(["1"])
    levels = sorted(run.data.tags["helix.level"] for run in runs)
    assert levels == ["cell", "cell", "report", "trial", "trial"]


def test_a_grid_that_mlflow_does_not_know_is_refused_with_those_that_it_knows(train: Train, sweep: Snapshot):
    with pytest.raises(ValueError, match="holds no sweep of 'test'; it holds none at all"):
        view_from_mlflow(uri_of(sweep), "test", now=NOW)
    train(sweep, range(1))
    sweep.storage.delete_folder("grids")  # as an earlier version left it
    replay(sweep)
    with pytest.raises(ValueError, match="holds no sweep of 'test'"):
        view_from_mlflow(uri_of(sweep), "test", now=NOW)
    put_asked(sweep.storage, sweep.asked)
    replay(sweep)
    with pytest.raises(ValueError, match="holds no sweep of 'tset'; it holds: test"):
        view_from_mlflow(uri_of(sweep), "tset", now=NOW)
    client = MlflowClient(uri_of(sweep))
    (run,) = client.search_runs(["1"], "tags.`helix.level` = 'report'")
    client.delete_tag(run.info.run_id, "helix.plan")
    with pytest.raises(ValueError, match="earlier versions did not send; helix report from the storage sends it"):
        view_from_mlflow(uri_of(sweep), "test", now=NOW)


@pytest.mark.parametrize(
    ("told", "gone"),
    [("the run of its report, .* was deleted", False), ("there are runs of trials, and no run of a report", True)],
)
def test_a_deleted_report_is_told_and_the_next_sweep_puts_it_back(train: Train, sweep: Snapshot, told: str, gone: bool):
    train(sweep, range(1))
    stored = replay(sweep)
    client = MlflowClient(uri_of(sweep))
    (run,) = client.search_runs(["1"], "tags.`helix.level` = 'report'")
    if gone:  # as mlflow gc leaves it: nothing says any more that there was a report
        client.delete_tag(run.info.run_id, "helix.level")
    client.delete_run(run.info.run_id)
    with pytest.raises(ValueError, match=f"no sweep of 'test'; {told}.*; helix report from the storage sends it"):
        view_from_mlflow(uri_of(sweep), "test", now=NOW)
    with pytest.raises(ValueError, match="no sweep of 'tset'; "):
        view_from_mlflow(uri_of(sweep), "tset", now=NOW)
    replay(sweep)
    assert view_from_mlflow(uri_of(sweep), "test", now=stored.created).grid == "test"


def test_no_database_is_made_where_there_is_none(tmp_path: Path):
    with pytest.raises(MlflowReadError, match="is no database"):
        view_from_mlflow(f"sqlite:///{tmp_path}/mlflow.db", "demo", now=NOW)
    (tmp_path / "a page").write_text("<html>")
    with pytest.raises(MlflowReadError, match="is no SQLite database"):
        view_from_mlflow(f"sqlite:///{tmp_path}/a%20page", "demo", now=NOW)
    assert [path.name for path in tmp_path.iterdir()] == ["a page"]


@pytest.mark.parametrize("uri", ["http://bob:s3cret@127.0.0.1:9", "http://bob:s3cret pw@127.0.0.1:9", "gopher://x"])
def test_a_server_that_does_not_answer_is_one_line_without_secrets(uri: str):
    with pytest.raises(MlflowReadError) as caught:
        view_from_mlflow(uri, "demo", now=NOW)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("code", "said"),
    [(401, "_PASSWORD say them"), (403, "_PASSWORD say them"), (404, "404"), (500, "experiments/search failed")],
)
def test_a_server_that_refuses_or_is_no_mlflow_is_one_line(code: int, said: str, monkeypatch: pytest.MonkeyPatch):
    class Refuses(BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline()
            self.close_connection = True
            if not self.raw_requestline or not self.parse_request():
                return
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"<html>no\nway</html>")

        def log_request(self, *args: Any) -> None:
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bob")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(MlflowReadError, match=said) as caught:
            view_from_mlflow(f"http://127.0.0.1:{server.server_port}", "demo", now=NOW)
        server.shutdown()
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_more_runs_than_a_page_holds_are_all_read(train: Train, sweep: Snapshot, monkeypatch: pytest.MonkeyPatch):
    train(sweep, range(4))
    stored = replay(sweep)
    monkeypatch.setattr("orchestration.from_mlflow.PAGE", 1)
    same(view_from_mlflow(uri_of(sweep), "test", now=stored.created), stored)


def many(train: Train, make: Snapshot, trials: int, epochs: int) -> tuple[Asked, dict[str, TrialState]]:
    """A made-up sweep of so many trials: one trained trial, copied under other ids and folds."""
    train(make, range(1))
    entry, state = make.plan[0], make.states()[make.plan[0].trial_id]
    assert state.result is not None
    rows = [state.rows[-1] | {"epoch": epoch, "step": epoch, "train_losses": [1.0] * 50} for epoch in range(epochs)]
    asked, states = [], {}
    for number in range(trials):
        name = f"{number:016x}"
        spec = replace(entry.trial.spec, data=replace(entry.trial.spec.data, fold=number % 4 + 1), seed=number // 4)
        asked.append(AskedTrial(trial_id=name, variant="mamba-mel", backbone="mamba", spec=spec))
        result = state.result | {"trial_id": name, "rows": rows}
        states[name] = replace(state, trial_id=name, rows=tuple(rows), result=result, epochs_done=epochs)
    return replace(make.asked, trials=tuple(asked)), states


def told(asked: Asked, states: dict[str, TrialState], uri: str, storage: Storage) -> None:
    """What a tracker would have sent of these states, but the points, which a finished trial is not read by."""
    client = MlflowClient(uri)
    tracker = Tracker(storage)
    tracker.uri, tracker._client = uri, client
    experiment = tracker._experiment(client, "tones")
    for state in states.values():
        value = tracking.state_as_json(state)
        tags = {"helix.level": "trial", "helix.trial_id": state.trial_id, "helix.state": value["sha256"]}
        run = client.create_run(experiment, tags=tags)
        client.log_text(run.info.run_id, json.dumps(value), tracking.STATE_FILE)
    put_asked(storage, asked)
    tracker._parents["tones", "mamba-mel"] = ""
    tracker._asked(client, asked.view(states, storage="", now=NOW))


def test_a_report_of_two_hundred_trials_takes_seconds(
    train: Train, sweep: Snapshot, capsys: pytest.CaptureFixture[str]
):
    asked, states = many(train, sweep, trials=200, epochs=100)
    told(asked, states, uri_of(sweep), sweep.storage)
    began, worked = time.perf_counter(), time.process_time()
    found = view_from_mlflow(uri_of(sweep), "test", now=NOW)
    read, page = time.perf_counter() - began, render_report(found)
    spent = time.process_time() - worked
    with capsys.disabled():
        sys.stdout.write(f"\n200 trials of 100 epochs: read in {read:.1f} s, with the page {spent:.1f} s of work\n")
    assert len(found.trials()) == 200 and found.gaps == ()
    assert len(page) < 10e6
    assert spent < 20


# The command


def helix(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HELIX_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_user_gets_page_and_tables_and_nothing_else_is_written(
    train: Train, sweep: Snapshot, tmp_path: Path, storage: Storage
):
    train(sweep, range(4))
    stored = replay(sweep)
    assert isinstance(storage, FolderStorage)
    here, kept = tmp_path / "here", tmp_path / "kept"
    here.mkdir()
    shutil.move(storage.root / "trials", kept)  # nobody needs it
    before = files(storage.root)
    uri = uri_of(sweep)
    ended = helix("report", "--grid", "test", "--from-mlflow", "--tracking-uri", uri, folder=here)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert files(storage.root) == before
    tables = report_tables(stored)
    assert sorted(path.name for path in (here / "reports").iterdir()) == ["test", "test.html"]
    written = {path.name for path in (here / "reports" / "test").iterdir()} - {TABLES_KEPT}
    assert len(written) == 3 * len(tables)
    assert f"tables:  {3 * len(tables)} files in reports/test" in ended.stdout
    assert "the storage of the sweep was not read" in (here / "reports" / "test.html").read_text()
    ended = helix(
        "report", "--from-mlflow", "--grid", "test", "--out", "a/b.html", folder=here, MLFLOW_TRACKING_URI=uri
    )
    assert ended.returncode == 0 and (here / "a" / "b.html").is_file() and (here / "a" / "b" / "trials.csv").is_file()


def test_an_unfinished_sweep_ends_with_one_and_what_cannot_be_done_with_two(
    train: Train,
    sweep: Snapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    train(sweep, range(1))
    replay(sweep)
    report = ("report", "--from-mlflow", "--grid", "test")
    assert helix(*report, folder=tmp_path, MLFLOW_TRACKING_URI=uri_of(sweep)).returncode == 1
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for more, said in (
        (("--tracking-uri", "http://bob:s3cret@127.0.0.1:9"), "refused: MLflow at http://127.0.0.1:9: "),
        (("--out", "page"), "refused: --out is page; wanted a name that ends in .html"),
        ((), f"refused: {tmp_path}/runs/mlflow.db is no database"),
    ):
        assert main([*report, *more]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith(said)
        assert "s3cret" not in told.err and "Traceback" not in told.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.service
def test_a_server_over_http_gives_the_same(
    train: Train,
    tiny_sweep: Snapshot,
    tiny_data: Recordings,
    storage: Storage,
    mlflow_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    put_asked(storage, tiny_sweep.asked)
    train(tiny_sweep, range(3))
    stored = replay(tiny_sweep, tmp_path)
    assert isinstance(storage, FolderStorage)
    shutil.rmtree(storage.root)
    same(view_from_mlflow(mlflow_server, "test", now=stored.created), stored)
    assert not storage.root.exists()
