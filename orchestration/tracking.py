"""Storage -> MLflow: one run per trial under one parent run per cell. A view that can be replayed at any time.

What MLflow shows is computed from storage alone. A run is found again by its tag, finished rows are counted by a tag,
and a row's points carry the time at which the row was made, so that points which are sent twice are one point.
"""

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, ViewType

from dashboards.summary import SELECTIONS, CellSummary, statistic, summarise
from dashboards.view import CellView, SweepView, TrialView
from helix.storage import FolderStorage, Storage, json_bytes

logger = logging.getLogger(__name__)

#: MLflow refuses more than 1000 metrics in one call.
BATCH = 1000

#: Values of a row that become metrics, in percent where they are accuracies.
ACCURACIES = ("train_accuracy", "test_accuracy", "validation_accuracy")
PLAIN = ("train_loss", "test_loss", "validation_loss", "lr", "seconds")

#: The state of a trial -> what MLflow calls it.
STATUS = {"done": "FINISHED", "running": "RUNNING", "failed": "FAILED", "partial": "KILLED"}


def local_folder(storage: Storage) -> Path:
    """Where files lie that have to be files: in the folder of the storage, or in ./runs where it is a bucket."""
    return storage.root if isinstance(storage, FolderStorage) else Path("runs").absolute()


def tracking_uri(storage: Storage) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the local folder."""
    path = re.sub("[%?#]", lambda odd: quote(odd.group()), str(local_folder(storage) / "mlflow.db"))
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def without_secrets(text: str) -> str:
    """An address, or a text that holds addresses, as it may be printed: without users and passwords."""
    return re.sub(r"://[^/\s]*@", "://", text)


class Tracker:
    """Brings MLflow up to date with a view of a sweep. One process at a time may create a new SQLite file."""

    def __init__(self, storage: Storage):
        # A server that is down must cost the sweep seconds and not the minutes of MLflow's default retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.storage, self.uri = storage, tracking_uri(storage)
        self._client: MlflowClient | None = None
        self._runs: dict[str, dict[str, Run]] = {}
        self._settled: set[str] = set()
        self._cells: dict[str, str] = {}
        self._finished: dict[str, dict[str, float]] = {}

    def replay(self, view: SweepView) -> None:
        """Send everything that MLflow lacks. Raises whatever MLflow raises; calling again continues."""
        client = self._client = self._client or MlflowClient(self.uri)
        for summary in summarise(view):
            experiment = self._experiment(client, summary.cell.dataset)
            begun = [trial for trial in summary.cell.trials if trial.state.status != "missing"]
            if not begun:
                continue
            parent = None
            for trial in begun:
                described = self.storage.get_json(f"trials/{trial.trial_id}/spec.json")
                if described is None:
                    continue
                parent = parent or self._cell(client, experiment, view, summary, described)
                self._trial(client, experiment, view, summary.cell, trial, parent, described)
            if parent is not None:
                self._summary(client, view, parent)

    def _experiment(self, client: MlflowClient, dataset: str) -> str:
        name = f"helix-{dataset}"
        found = client.get_experiment_by_name(name)
        if found is not None:
            experiment = found.experiment_id
        else:
            local = self.uri.startswith("sqlite:")
            experiment = client.create_experiment(
                name,
                artifact_location=(local_folder(self.storage) / "mlflow-artifacts").as_uri() if local else None,
                # Without this tag the UI opens in a view for language models, which shows no metrics.
                tags={"mlflow.experimentKind": "custom_model_development"},
            )
        if experiment not in self._runs:
            self._runs[experiment] = _runs_by_key(client, experiment)
        return experiment

    def _run(
        self, client: MlflowClient, experiment: str, key: str, name: str, tags: dict[str, str], start: float
    ) -> Run:
        """The run whose tag helix.key is `key`, made now if there is none."""
        runs = self._runs[experiment]
        if key not in runs:
            tags = {"helix.key": key, "mlflow.runName": name, "mlflow.source.name": "helix", **tags}
            runs[key] = client.create_run(experiment, start_time=int(start * 1000), run_name=name, tags=tags)
        return runs[key]

    def _cell(
        self, client: MlflowClient, experiment: str, view: SweepView, summary: CellSummary, described: dict[str, Any]
    ) -> Run:
        key = f"cell-{cell_id(described)}"
        new = key not in self._runs[experiment]
        attempts = [attempt["started"] for trial in summary.cell.trials for attempt in trial.state.attempts]
        started = min(attempts, default=time.time())
        run = self._run(client, experiment, key, summary.cell.variant, {"helix.level": "cell"}, started)
        if new:
            client.log_batch(run.info.run_id, params=_params(view, summary.cell, described))
        return run

    def _trial(
        self,
        client: MlflowClient,
        experiment: str,
        view: SweepView,
        cell: CellView,
        trial: TrialView,
        parent: Run,
        described: dict[str, Any],
    ) -> None:
        if trial.trial_id in self._settled:
            return
        state = trial.state
        new = trial.trial_id not in self._runs[experiment]
        tags = {"mlflow.parentRunId": parent.info.run_id, "helix.level": "trial", "helix.trial_id": trial.trial_id}
        name = f"{cell.variant} fold {trial.fold} seed {trial.seed}"
        started = state.attempts[0]["started"] if state.attempts else time.time()
        run = self._run(client, experiment, trial.trial_id, name, tags, started)
        run_id = run.info.run_id
        if new:
            own = [Param("fold", str(trial.fold)), Param("seed", str(trial.seed))]
            client.log_batch(run_id, params=[*_params(view, cell, described), *own])
        sent = int(run.data.tags.get("helix.rows", 0))
        if sent < len(state.rows):
            metrics = [metric for row in state.rows[sent:] for metric in _metrics(row)]
            for start in range(0, len(metrics), BATCH):
                client.log_batch(run_id, metrics=metrics[start : start + BATCH])
            self._tag(client, run, "helix.rows", str(len(state.rows)))
        if run.data.tags.get("helix.status") != state.status:
            end = None
            if state.result is not None:
                end = int(state.result["finished"] * 1000)
                chosen = state.result["accuracy"]
                client.log_batch(
                    run_id, metrics=[Metric(f"{rule}_accuracy", 100 * chosen[rule], end, 0) for rule in chosen]
                )
                self._tag(client, run, "helix.weights_sha256", state.result["weights_sha256"])
            if state.error:
                self._tag(client, run, "helix.error", state.error[:5000])
            if state.status == "running":
                client.update_run(run_id, status="RUNNING")
            else:
                client.set_terminated(run_id, STATUS[state.status], end_time=end)
            self._tag(client, run, "helix.status", state.status)
        if state.status == "done":
            self._settled.add(trial.trial_id)

    def _summary(self, client: MlflowClient, view: SweepView, parent: Run) -> None:
        """Mean, standard deviation and n over every finished trial of the cell, whichever sweep trained it."""
        found = self._accuracies(parent.data.tags["helix.key"])
        state = f"{len(found)} {view.std}"
        if not found or parent.data.tags.get("helix.summary") == state:
            return
        now = int(time.time() * 1000)
        # The compare page of the UI opens with the metric that was logged first.
        values: dict[str, float | None] = {}
        for rule in SELECTIONS:
            over = statistic([accuracy[rule] for accuracy in found], view.std)
            values[f"{rule}_accuracy"], values[f"{rule}_accuracy_std"] = _percent(over.mean), _percent(over.std)
        values["n"] = len(found)
        metrics = [Metric(name, value, now, len(found)) for name, value in values.items() if value is not None]
        client.log_batch(parent.info.run_id, metrics=metrics)
        client.set_terminated(parent.info.run_id, "FINISHED")
        self._tag(client, parent, "helix.summary", state)

    def _accuracies(self, key: str) -> list[dict[str, float]]:
        """The accuracies of every finished trial in storage whose cell is `key`; what is read once is remembered."""
        for name in self.storage.children("trials"):
            if name not in self._cells:
                described = self.storage.get_json(f"trials/{name}/spec.json")
                if described is not None:
                    self._cells[name] = f"cell-{cell_id(described)}"
        for name in [name for name, cell in self._cells.items() if cell == key and name not in self._finished]:
            result = self.storage.get_json(f"trials/{name}/result.json")
            if result is not None:
                self._finished[name] = result["accuracy"]
        return [accuracy for name, accuracy in sorted(self._finished.items()) if self._cells[name] == key]

    def _tag(self, client: MlflowClient, run: Run, key: str, value: str) -> None:
        client.set_tag(run.info.run_id, key, value)
        run.data.tags[key] = value


class BackgroundTracker:
    """Replays while a sweep runs, in a thread. MLflow being slow, down or gone does not concern the sweep."""

    def __init__(self, tracker: Tracker, snapshot: Callable[[], SweepView], *, every_s: float = 10.0):
        self.tracker, self.snapshot, self.every_s = tracker, snapshot, every_s
        self.problem: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow-tracking", daemon=True)

    def __enter__(self) -> "BackgroundTracker":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(self.every_s):
            try:
                view = self.snapshot()
            except OSError as error:  # the storage is away; it is read again next time, and by whoever ends the sweep
                self.problem = str(error)
                continue
            self.problem = attempt_replay(self.tracker, view)


def attempt_replay(tracker: Tracker, view: SweepView) -> str | None:
    """Replay once; None, or what was wrong in one line. The rows stay in storage either way."""
    try:
        tracker.replay(view)
    except Exception as error:  # MLflow is a view: none of its troubles may stop a sweep
        logger.debug("MLflow replay failed", exc_info=True)
        return without_secrets(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")[:200]
    return None


def cell_id(described: dict[str, Any]) -> str:
    """The identity that the trials of one cell share: everything but fold and seed. `described` is a spec.json."""
    spec = dict(described["spec"])
    spec["data"] = {key: value for key, value in spec["data"].items() if key != "fold"}
    del spec["seed"]
    shared = {"spec": spec, "data_manifest": described["data_manifest"], "science": described["science_version"]}
    return hashlib.sha256(json_bytes(shared)).hexdigest()[:16]


def _runs_by_key(client: MlflowClient, experiment: str) -> dict[str, Run]:
    """Every run of ours in an experiment, by its tag helix.key."""
    runs: dict[str, Run] = {}
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=1000,
            order_by=["start_time"],
            page_token=token,
        )
        for run in page:
            if "helix.key" in run.data.tags:
                runs.setdefault(run.data.tags["helix.key"], run)
        token = page.token
        if not token:
            return runs


def _params(view: SweepView, cell: CellView, described: dict[str, Any]) -> list[Param]:
    """What the compare page sets side by side: the words for a cell, then every key of its spec but fold and seed."""
    values = {
        "dataset": cell.dataset,
        "frontend": cell.frontend,
        "backbone": cell.backbone,
        "pattern": " ".join(cell.pattern),
        "attention_layers": cell.pattern.count("attention"),
        "profile": view.profile,
        "parameters": cell.parameters,
        "tokens": cell.tokens,
    }
    spec = described["spec"]
    for part in ("training", "augment", "protocol"):
        values |= {f"{part}.{key}": value for key, value in spec[part].items()}
    for part in ("data", "model"):
        for member, options in spec[part]["options"].items():
            flat = options if isinstance(options, dict) else {member: options}
            prefix = f"{part}.{member}" if isinstance(options, dict) else part
            values |= {f"{prefix}.{key}": value for key, value in flat.items()}
    values |= {"model.width": spec["model"]["width"], "model.pool_tokens": spec["model"]["pool_tokens"]}
    return [Param(key, str(value)) for key, value in values.items() if value is not None]


def _metrics(row: dict[str, Any]) -> list[Metric]:
    when, epoch = int(row["time"] * 1000), row["epoch"]
    accuracies = [Metric(name, 100 * row[name], when, epoch) for name in ACCURACIES if name in row]
    return accuracies + [Metric(name, row[name], when, epoch) for name in PLAIN if name in row]


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def logged(uri: str, trial_id: str, metric: str) -> list[tuple[int, float]]:
    """Every point (step, value) of a metric that MLflow holds of a trial, by step; gaps and duplicates show."""
    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    tagged = f"tags.`helix.trial_id` = '{trial_id}'"
    runs = client.search_runs(experiments, filter_string=tagged) if experiments else []
    points = [point for run in runs for point in client.get_metric_history(run.info.run_id, metric)]
    return sorted((point.step, point.value) for point in points)
