"""Storage -> MLflow: one run per trial under one parent run per cell. A view that can be replayed at any time.

What MLflow shows is computed from storage alone. A run is found again by its tag, finished rows are counted by a tag,
and a row's points carry the time at which the row was made, so that points which are sent twice are one point. Which
run is a trial's is agreed on in the storage (orchestration/once.py), so that two replays at once make one.

    experiment helix-<data set>
      <variant>                    a cell: mean, std, interval and n over its trials; confusion.csv
        <variant> fold 1 seed 0    a trial: params, a point per epoch, system metrics, data set, spec.json, state.json,
                                   confusion.csv; model/ where it is the best of its cell
      report of <grid>             what a grid found: the report, certificates/; and what it asked, plan.json

plan.json and state.json hold what orchestration/from_mlflow.py makes the report of without the storage.
"""

import contextlib
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from dashboards.confusion import confusion_csv, confusion_of, pooled_confusion
from dashboards.counts import counts_of, overlap
from dashboards.summary import SELECTIONS, CellSummary, statistic, summarise
from dashboards.tables import FORMATS
from dashboards.text import shortened
from dashboards.view import CellView, SweepView, TrialView
from helix.addresses import shown_uri, without_secrets
from helix.data.shards import Prepared, find
from helix.errors import in_one_line
from helix.statistics import CONFIDENCE
from helix.storage import CorruptObjectError, Storage, is_sealed, json_bytes, sealed
from orchestration.asked import plan_key
from orchestration.ledger import CERTIFICATES, Records, TrialState, begun_trials
from orchestration.lineage import UNKNOWN
from orchestration.model_store import best_weights_sha256, register
from orchestration.once import made_once
from orchestration.records import checked_result
from orchestration.tracking_place import (
    ElsewhereError,
    artifact_location,
    be_brief,
    experiment_name,
    local_path,
    require_here,
    tracking_uri,
)

logger = logging.getLogger(__name__)

#: So many characters of what was wrong with MLflow are told.
MOST_SAID = 200

#: MLflow refuses more than 1000 metrics in one call.
BATCH = 1000

#: Values of a row that become metrics: accuracies, in percent and by what they are called there, and others.
ACCURACIES = {
    "train_accuracy": "train_accuracy",
    "test_accuracy": "test_accuracy",
    # A result has a validation_accuracy, that of the epoch which validation chose, and MLflow shows one of a name.
    "validation_accuracy": "held_out_accuracy",
}
PLAIN = ("train_loss", "test_loss", "validation_loss", "lr", "seconds")

#: What the metrics of the interval of a cell's mean are called.
INTERVAL = f"ci{100 * CONFIDENCE:.0f}"

#: The columns that the printed address of the run list opens with, and the tag by which MLflow's UI finds them.
COLUMNS = (
    "attributes.`Dataset`",
    *(f"metrics.`{name}`" for name in ("best_test_accuracy", "best_test_accuracy_std", "validation_accuracy", "n")),
    *(f"params.`{name}`" for name in ("frontend", "pattern", "fold", "seed", "parameters", "tokens", "profile")),
)
SHARED_VIEW = "mlflow.sharedViewState."
VIEW_KEY = "helix"
#: The menu of MLflow's UI for training; it opens with the one for language models.
MENU = "workflowType=machine_learning"

#: The files of runs that hold what was asked of a grid, and what storage knows of a trial.
PLAN_FILE, STATE_FILE = "plan.json", "state.json"

#: What of a row is in no file: a loss for each step is much, and no report shows it.
LEFT_OUT = ("train_losses",)

#: What is remembered of a result.
KEPT = (
    *("accuracy", "finished", "classes", "confusion", "selected_confusion", "selected_epoch"),
    *("train_clips", "test_clips"),
)

#: So many characters of a sha256 are a digest: of a manifest that of a data set, of which MLflow keeps 36 at most.
DIGEST = 16

#: The state of a trial -> what MLflow calls it.
STATUS = {"done": "FINISHED", "running": "RUNNING", "failed": "FAILED", "partial": "KILLED"}


class Tracker:
    """Brings MLflow up to date with a view of a sweep. One process at a time may create a new SQLite file."""

    def __init__(self, storage: Storage):
        be_brief()
        self.storage, self.uri = storage, tracking_uri(storage)
        self._client: MlflowClient | None = None
        self._specs: dict[str, dict[str, Any]] = {}
        self._cells: dict[str, str] = {}
        self._finished: dict[str, dict[str, Any]] = {}
        self._prepared: dict[str, Prepared | None] = {}
        self._forget()

    def _forget(self) -> None:
        """Drop what is remembered of MLflow; what is remembered of finished trials stays true."""
        self._runs: dict[str, dict[str, Run]] = {}
        self._databases: dict[str, str] = {}
        self._settled: set[str] = set()
        #: Of how many trials the best one of each cell is registered, by the run of the cell.
        self._registered: dict[str, int] = {}
        #: The runs of the cells that were replayed, by data set and variant.
        self._parents: dict[tuple[str, str], str] = {}

    def replay(self, view: SweepView) -> None:
        """Send everything that MLflow lacks. Calling again continues.

        Raises ElsewhereError, with nothing sent, where MLflow would write into another folder, and what MLflow raises.
        """
        client = self._connected(view)
        try:
            for summary in summarise(view):
                self._replay_cell(client, view, summary)
            self._asked(client, view)
        except Exception:
            self._forget()  # a run may have been deleted by hand: the next replay looks again
            raise

    def publish(self, view: SweepView, report: Path) -> None:
        """Put the report of a grid, its tables and the certificates of its trials into a run beside its cells."""
        client = self._connected(view)
        for dataset in dict.fromkeys(cell.dataset for cell in view.cells):
            run = self._report(client, view, dataset)
            client.log_artifact(run.info.run_id, str(report))
            if (tables := report.with_suffix("")).is_dir():  # the report links to them
                client.log_artifacts(run.info.run_id, str(tables), report.stem)
                self._drop_stale(client, run, tables)
            ours = {trial.trial_id for cell, trial in view.trials() if cell.dataset == dataset}
            for certificate in view.certificates:
                if certificate.get("trial_id") in ours or certificate.get("grid") == view.grid:
                    name = f"{CERTIFICATES}/{certificate['certificate_id']}.json"
                    client.log_dict(run.info.run_id, certificate, name)
            links = self.compare_links(view).get(dataset, {})
            told = [f"{view.question.strip()}", f"`{view.command}`", f"{report.name} is under Artifacts."]
            told += [f"[{what}]({link})" for what, link in links.items()]
            self._tag(client, run, "mlflow.note.content", "\n\n".join(told))
            client.set_terminated(run.info.run_id, "FINISHED")

    def _connected(self, view: SweepView) -> MlflowClient:
        """The client. Raises ElsewhereError where the database of this storage names files of another folder."""
        client = self._client = self._client or MlflowClient(self.uri)
        require_here(client, self.storage, self.uri, dict.fromkeys(cell.dataset for cell in view.cells))
        return client

    def _drop_stale(self, client: MlflowClient, run: Run, tables: Path) -> None:
        """Remove the tables that an earlier report put beside this one and that are no part of it any more."""
        stale = [
            file.path
            for file in client.list_artifacts(run.info.run_id, tables.name)
            if not (tables / Path(file.path).name).exists() and Path(file.path).suffix.removeprefix(".") in FORMATS
        ]
        self._drop(run, stale)

    def _drop(self, run: Run, paths: Sequence[str]) -> None:
        """Remove files of a run, where that is allowed: a server may want more rights for it than for all the rest."""
        assert run.info.artifact_uri is not None, run.info.run_id
        artifacts = get_artifact_repository(run.info.artifact_uri, self.uri)
        for path in paths:
            try:
                artifacts.delete_artifacts(path)
            except (MlflowException, OSError, NotImplementedError):  # what an answer of HTTP raises is an OSError
                logger.debug("%s of run %s stays", path, run.info.run_id, exc_info=True)

    def compare_links(self, view: SweepView) -> dict[str, dict[str, str]]:
        """For each data set the fragments of MLflow's UI that compare the cells of the view and list their runs."""
        found: dict[str, dict[str, str]] = {}
        for dataset in dict.fromkeys(cell.dataset for cell in view.cells):
            experiment = next(
                (one for one, name in self._databases.items() if name.startswith(f"helix-{dataset}-")), ""
            )
            cells = [self._parents.get((dataset, cell.variant), "") for cell in view.cells if cell.dataset == dataset]
            runs = [run for run in cells if run]
            if experiment and runs:
                links = {"runs": f"#/experiments/{experiment}/runs?viewStateShareKey={VIEW_KEY}&{MENU}"}
                if len(runs) > 1:
                    asked = {"runs": runs, "experiments": [experiment]}
                    query = "&".join(f"{key}={quote(json_bytes(value), safe='')}" for key, value in asked.items())
                    links = {"compare": f"#/compare-runs?{query}&{MENU}", **links}
                found[dataset] = links
        return found

    def _replay_cell(self, client: MlflowClient, view: SweepView, summary: CellSummary) -> None:
        begun = [trial for trial in summary.cell.trials if trial.state.status != "missing"]
        experiment = self._experiment(client, summary.cell.dataset)
        parent, described = None, None
        for trial in begun:
            described = self._described(trial.trial_id)
            if described is None:
                continue
            parent = parent or self._cell(client, experiment, view, summary, described)
            self._trial(client, experiment, view, summary.cell, trial, parent, described)
        if parent is not None:
            self._parents[summary.cell.dataset, summary.cell.variant] = parent.info.run_id
            self._summary(client, experiment, view, summary, parent)
            self._status(client, summary.cell, parent)
            self._adopt(client, experiment, parent)

    def _report(self, client: MlflowClient, view: SweepView, dataset: str) -> Run:
        """The run of what a grid asked and found."""
        tags = {"helix.level": "report", "helix.grid": view.grid}
        experiment = self._experiment(client, dataset)
        return self._run(client, experiment, f"report-{view.grid}", f"report of {view.grid}", tags, view.created)

    def _asked(self, client: MlflowClient, view: SweepView) -> None:
        """Put what was asked of the grid last, as storage keeps it, beside the cells that anything was done for."""
        plan = None
        with contextlib.suppress(CorruptObjectError):  # a damaged one is mended by the next sweep
            plan = self.storage.get_json(plan_key(view.grid)) if self._parents else None
        if plan is None or not is_sealed(plan):
            return
        for dataset in dict.fromkeys(dataset for dataset, _ in self._parents):
            run = self._report(client, view, dataset)
            if run.data.tags.get("helix.plan") != plan["sha256"]:
                client.log_text(run.info.run_id, json_bytes(plan).decode(), PLAN_FILE)
                self._tag(client, run, "helix.plan_time", f"{view.created:.3f}")
                self._tag(client, run, "helix.plan", plan["sha256"])

    def _experiment(self, client: MlflowClient, dataset: str) -> str:
        name = experiment_name(dataset)
        found = client.get_experiment_by_name(name)
        if found is None:
            shown = {"searchFilter": "", "orderByKey": "attributes.start_time", "orderByAsc": True}
            try:
                client.create_experiment(
                    name,
                    artifact_location=artifact_location(self.uri),
                    tags={
                        # Without this tag the UI opens in a view for language models, which shows no metrics.
                        "mlflow.experimentKind": "custom_model_development",
                        f"{SHARED_VIEW}{VIEW_KEY}": json.dumps({**shown, "selectedColumns": COLUMNS}),
                    },
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another replay was quicker
                    raise
            found = client.get_experiment_by_name(name)
            assert found is not None, name
        experiment = found.experiment_id
        if experiment not in self._runs:
            # A database that was lost and made anew has other runs under the same address.
            self._databases[experiment] = f"{name}-{experiment}-{found.creation_time}"
            self._runs[experiment] = _runs_by_key(client, experiment)
        return experiment

    def _run(
        self, client: MlflowClient, experiment: str, key: str, name: str, tags: dict[str, str], start: float
    ) -> Run:
        """The run whose tag helix.key is `key`, made now if there is none."""
        runs = self._runs[experiment]
        if key in runs:
            return runs[key]
        tags = {"helix.key": key, "mlflow.runName": name, "mlflow.source.name": "helix", **tags}

        def made() -> str:
            return client.create_run(experiment, start_time=int(start * 1000), run_name=name, tags=tags).info.run_id

        def tagged() -> str | None:
            asked = f"tags.`helix.key` = '{key}'"
            found = client.search_runs([experiment], asked, ViewType.ACTIVE_ONLY, order_by=["start_time"])
            return found[0].info.run_id if found else None

        def lives(run_id: str) -> bool:
            try:
                return client.get_run(run_id).info.lifecycle_stage == "active"
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False

        run_id = made_once(
            self.storage,
            f"{self._databases[experiment]}/runs/{key}",
            find=tagged,
            make=made,
            remove=client.delete_run,
            lives=lives,
        )
        runs[key] = client.get_run(run_id)
        return runs[key]

    def _cell(
        self, client: MlflowClient, experiment: str, view: SweepView, summary: CellSummary, described: dict[str, Any]
    ) -> Run:
        key = f"cell-{cell_id(described)}"
        attempts = [attempt["started"] for trial in summary.cell.trials for attempt in trial.state.attempts]
        started = min(attempts, default=time.time())
        run = self._run(client, experiment, key, summary.cell.variant, {"helix.level": "cell"}, started)
        if not run.data.params:
            self._begin(client, run, _params(view, summary.cell, described), described)
        return run

    def _begin(self, client: MlflowClient, run: Run, params: Sequence[Param], described: dict[str, Any]) -> None:
        """What does not change of a run: its data set, then its params, whose presence tells that both are there."""
        client.log_inputs(run.info.run_id, [self._dataset(described)])
        client.log_batch(run.info.run_id, params=params)
        run.data.params.update({param.key: param.value for param in params})

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
        tags = {"mlflow.parentRunId": parent.info.run_id, "helix.level": "trial", "helix.trial_id": trial.trial_id}
        name = f"{cell.variant} fold {trial.fold} seed {trial.seed}"
        started = state.attempts[0]["started"] if state.attempts else time.time()
        run = self._run(client, experiment, trial.trial_id, name, tags, started)
        run_id = run.info.run_id
        if not run.data.params:
            own = [Param("fold", str(trial.fold)), Param("seed", str(trial.seed))]
            self._begin(client, run, [*_params(view, cell, described), *own], described)
        lineage = _lineage(state.attempts)
        if lineage.items() - run.data.tags.items():
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in lineage.items()])
            run.data.tags.update(lineage)
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
        told = state_as_json(state)
        text = json_bytes(told)
        if run.data.tags.get("helix.state") != told["sha256"] or _lost(run, STATE_FILE, text):
            client.log_text(run_id, text.decode(), STATE_FILE)
            self._tag(client, run, "helix.state", told["sha256"])
        if state.result is not None:
            if "helix.confusion" not in run.data.tags:  # it is told last of all
                self._files(client, run, state.result, described)
            self._settled.add(trial.trial_id)

    def _adopt(self, client: MlflowClient, experiment: str, parent: Run) -> None:
        """Put the runs of all trials of a cell under its run: one that was deleted by hand and made anew has none."""
        key = parent.data.tags["helix.key"]
        for name in [name for name, cell in self._cells.items() if cell == key]:
            if (run := self._runs[experiment].get(name)) is not None:
                self._tag(client, run, "mlflow.parentRunId", parent.info.run_id)

    def _files(self, client: MlflowClient, run: Run, result: dict[str, Any], described: dict[str, Any]) -> None:
        """What a finished trial leaves in files: its resolved spec, and what it took for what."""
        client.log_dict(run.info.run_id, described, "spec.json")
        triples, of = confusion_of(result)
        client.log_text(run.info.run_id, confusion_csv(triples, self._classes(described, result)), "confusion.csv")
        self._tag(client, run, "helix.confusion", of)

    def _summary(
        self, client: MlflowClient, experiment: str, view: SweepView, summary: CellSummary, parent: Run
    ) -> None:
        """Mean, spread, interval and n over every finished trial of the cell, whichever sweep trained it; its files.

        By the rule of dashboards/summary.py, as in the report: over folds, the seeds of a fold averaged first.
        """
        found = self._results(parent.data.tags["helix.key"])
        if found or "helix.summary" in parent.data.tags:  # what was told once is told again when nothing is left of it
            self._tell(client, view, summary, parent, found)
        if all(trial.state.status == "done" for trial in summary.cell.trials):
            if self._registered.get(parent.info.run_id) == len(found):
                return
            try:
                self._best(client, experiment, view, summary.cell, parent, found)
            except ValueError as error:  # the weights are damaged where they are stored; helix verify says so too
                self._tag(client, parent, "helix.model", f"none: {error}"[:5000])
            self._registered[parent.info.run_id] = len(found)

    def _tell(
        self,
        client: MlflowClient,
        view: SweepView,
        summary: CellSummary,
        parent: Run,
        found: dict[str, dict[str, Any]],
    ) -> None:
        """Tell the run of a cell of the results that were found, where it says anything else."""
        # The compare page of the UI opens with the metric that was logged first.
        values: dict[str, float | None] = {}
        specs = {name: self._specs[name]["spec"] for name in found}
        keys = {name: (spec["data"]["fold"], spec["seed"]) for name, spec in specs.items()}
        ratio = overlap((keys[name][0], result) for name, result in found.items())
        counts = counts_of(view)[summary.cell.dataset]
        ratio = counts.ratio if ratio is None else ratio
        over = {
            rule: statistic(
                {keys[name]: result["accuracy"][rule] for name, result in found.items()},
                view.std,
                ratio=ratio,
                folds=counts.folds,
            )
            for rule in SELECTIONS
        }
        for rule, one in over.items():
            values[f"{rule}_accuracy"], values[f"{rule}_accuracy_std"] = _percent(one.mean), _percent(one.std)
            values[f"{rule}_accuracy_{INTERVAL}_low"] = _percent(one.low)
            values[f"{rule}_accuracy_{INTERVAL}_high"] = _percent(one.high)
        chosen = over[view.select]
        values["n"] = chosen.n
        digest = hashlib.sha256(json_bytes([sorted(found), values])).hexdigest()[:DIGEST]
        state = f"{len(found)} {view.std} by fold {digest}"
        if parent.data.tags.get("helix.summary") == state:
            return
        # Of the storage and not of the clock, so that replays at once send the same points.
        when = int(max((result["finished"] for result in found.values()), default=0) * 1000)
        self._points(client, parent, values, when, len(found))
        if found:
            triples, of = pooled_confusion(list(found.values()))
            first = next(iter(found))
            names = self._classes(self._specs[first], found[first])
            client.log_text(parent.info.run_id, confusion_csv(triples, names), "confusion.csv")
            folds = chosen.unit == "fold" and chosen.units > 1
            corrected = f"corrected for shared training clips ({ratio:.3g} test to training), " if folds else ""
            said = f"t over {chosen.counted}, {corrected}{CONFIDENCE:.0%}; seeds of a fold are averaged first"
        else:
            files = [file.path for file in client.list_artifacts(parent.info.run_id)]
            self._drop(parent, [path for path in files if path == "confusion.csv"])
            said = of = "none: no trial has a result any more"
        self._tag(client, parent, "helix.confusion", of)
        self._tag(client, parent, "helix.interval", said)
        self._tag(client, parent, "helix.summary", state)

    def _points(self, client: MlflowClient, run: Run, values: dict[str, float | None], when: int, count: int) -> None:
        """Send the values of a cell so that they are what MLflow shows, whatever it was told before.

        MLflow shows of a metric the point of the highest (step, time, value) and forgets none. So what changed is told
        at a higher step, which is the count of results as long as that rises, and what is no more is told as nan.
        """
        run_id = run.info.run_id
        # First the steps, then the values: what another replay tells in between is seen, and not told a second time.
        before = client.get_metric_history(run_id, "n")
        told = client.get_run(run_id).data.metrics
        new = {
            name: math.nan if value is None else value
            for name, value in values.items()
            if value is not None or name in told
        }
        if all(
            name in told and (value == told[name] or (math.isnan(value) and math.isnan(told[name])))
            for name, value in new.items()
        ):
            return
        step = max([count, *(point.step + 1 for point in before)])
        when = max([when, *(point.timestamp for point in before)])
        client.log_batch(run_id, metrics=[Metric(name, value, when, step) for name, value in new.items()])

    def _best(
        self,
        client: MlflowClient,
        experiment: str,
        view: SweepView,
        cell: CellView,
        parent: Run,
        found: dict[str, dict[str, Any]],
    ) -> None:
        """Register the best weights of a cell whose trials are all done: one version, however often this is asked."""
        ours = [name for name in sorted(found) if name in self._runs[experiment]]
        name = max(ours, key=lambda name: found[name]["accuracy"][view.select], default=None)
        sha256 = None if name is None else best_weights_sha256(self.storage, name)
        if name is None or sha256 is None or parent.data.tags.get("helix.model_sha256") == sha256:
            return
        described, value = self._specs[name], found[name]["accuracy"][view.select]
        model = f"{client.get_experiment(experiment).name}-{cell.variant}-{cell_id(described)[:8]}"
        text = (
            f"{cell.variant} on {cell.dataset}. The alias `best` is that of {len(ours)} trials which has the highest "
            f"{view.select} accuracy on its own test fold: {value:.2%}, flattered by being the best of several. Takes "
            "the bytes of a WAV, FLAC or Ogg file in the column `wav`, or a path in `path`."
        )
        version = register(
            client,
            self.storage,
            database=self._databases[experiment],
            name=model,
            run=self._runs[experiment][name],
            described=described,
            classes=self._classes(described, found[name]),
            text=text,
        )
        self._tag(client, parent, "helix.model", f"models:/{model}/{version}")
        self._tag(client, parent, "helix.model_sha256", sha256)

    def _status(self, client: MlflowClient, cell: CellView, parent: Run) -> None:
        """Let the run of a cell end as its trials did that anybody began: the worst of their ends is its own."""
        begun = [trial.state for trial in cell.trials if trial.state.status != "missing"]
        statuses = {state.status for state in begun}
        status = next(one for one in ("running", "failed", "partial", "done") if one in statuses)
        # Of the storage and not of the clock, as the points of the summary are.
        ends = [state.result["finished"] for state in begun if state.result is not None]
        ends += [attempt["ended"] for state in begun for attempt in state.attempts if "ended" in attempt]
        end = int(1000 * max(ends)) if ends and status != "running" else None
        told = status if end is None else f"{status} {end}"
        if parent.data.tags.get("helix.status") == told:
            return
        if status == "running":
            client.update_run(parent.info.run_id, status=STATUS[status])
        else:
            client.set_terminated(parent.info.run_id, STATUS[status], end_time=end)
        self._tag(client, parent, "helix.status", told)

    def _results(self, key: str) -> dict[str, dict[str, Any]]:
        """The results of every finished trial of the cell `key` in storage, by id; what is read once is remembered."""
        for name in begun_trials(self.storage):
            self._described(name)
        ours = {name for name, cell in self._cells.items() if cell == key}
        for name in ours - self._finished.keys():
            # One that is damaged counts no more than one that is not there; the state of its trial names it.
            result = Records(self.storage, tolerant=True).get(f"trials/{name}/result.json", checked_result)
            if result is not None:
                self._finished[name] = {item: result[item] for item in KEPT if item in result}
        return {name: self._finished[name] for name in sorted(ours & self._finished.keys())}

    def _described(self, name: str) -> dict[str, Any] | None:
        """The spec.json of a trial, which never changes; None where it was not put yet, or is damaged."""
        if name not in self._specs:
            try:
                described = self.storage.get_json(f"trials/{name}/spec.json")
                if described is None:
                    return None
                cell = f"cell-{cell_id(described)}"
            except (CorruptObjectError, KeyError, TypeError, AttributeError):
                logger.debug("the spec of trial %s cannot be read", name, exc_info=True)
                return None
            self._specs[name], self._cells[name] = described, cell
        return self._specs[name]

    def _data(self, described: dict[str, Any]) -> Prepared | None:
        """The prepared data that a trial was trained on; None where it is no longer in the storage."""
        sha256, data = described["data_manifest"], described["spec"]["data"]
        if sha256 not in self._prepared:
            prepared = find(self.storage, data["dataset"], data["options"])
            self._prepared[sha256] = next((one for one in prepared if one.manifest_sha256 == sha256), None)
        return self._prepared[sha256]

    def _classes(self, described: dict[str, Any], result: dict[str, Any]) -> list[str]:
        """The names of the classes, or their numbers where the data is gone."""
        prepared = self._data(described)
        return list(map(str, prepared.manifest["classes"] if prepared else range(result["classes"])))

    def _dataset(self, described: dict[str, Any]) -> DatasetInput:
        prepared = self._data(described)
        manifest = prepared.manifest if prepared else {}
        place = f"{self.storage!r}/{prepared.prefix}" if prepared else "no longer in the storage"
        profile = {key: manifest[key] for key in ("recordings", "seconds", "licence", "partial") if key in manifest}
        dataset = Dataset(
            name=described["spec"]["data"]["dataset"],
            digest=described["data_manifest"][:DIGEST],
            source_type="helix shards",
            source=json.dumps({"uri": place, "manifest_sha256": described["data_manifest"]}),
            profile=json.dumps(profile),
        )
        return DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", "training and test")])

    def _tag(self, client: MlflowClient, run: Run, key: str, value: str) -> None:
        if run.data.tags.get(key) != value:
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


def attempt_replay(tracker: Tracker, view: SweepView, report: Path | None = None) -> str | None:
    """Replay once, and publish the report; None, or a line on what was wrong and what becomes of it.

    MLflow is a view: none of its troubles may stop a sweep.
    """
    try:
        tracker.replay(view)
        if report is not None:
            tracker.publish(view, report)
    except ElsewhereError as error:  # the paths in it are what it is about
        return (
            f"{shown_uri(tracker.uri)} is left as it is: {error}. Nothing is lost: everything in MLflow is made again "
            "from the storage"
        )
    except Exception as error:  # whatever a server, a database and a store of files raise
        logger.debug("MLflow replay failed", exc_info=True)
        said = shortened(without_secrets(in_one_line(error), tracker.uri), MOST_SAID)
        return (
            f"{shown_uri(tracker.uri)} does not take it ({said}). Nothing is lost: all rows are in the storage, and "
            "the same command sends them later"
        )
    return None


def state_as_json(state: TrialState) -> dict[str, Any]:
    """What storage knows of a trial as plain JSON, sealed: `TrialState` by its names, rows without their LEFT_OUT.

    Of a trial that is under way its rows, step and time of the last word are left to the points in MLflow, so that this
    is the same from one epoch to the next. The rows of one that is done are in its result.
    """

    def short(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name not in LEFT_OUT} for row in rows]

    value: dict[str, Any] = {
        "trial_id": state.trial_id,
        "status": state.status,
        "attempts": list(state.attempts),
        "error": state.error,
    }
    if state.result is not None:
        value["result"] = state.result | {"rows": short(state.result["rows"])}
    elif state.status != "running":
        value["rows"] = short(state.rows)
    if state.status != "running":
        value |= {"step": state.step, "heard": state.heard}
    return sealed(value)


def cell_id(described: dict[str, Any]) -> str:
    """The identity that the trials of one cell share: everything but fold and seed. `described` is a spec.json."""
    spec = dict(described["spec"])
    spec["data"] = {key: value for key, value in spec["data"].items() if key != "fold"}
    del spec["seed"]
    shared = {"spec": spec, "data_manifest": described["data_manifest"], "science": described["science_version"]}
    return hashlib.sha256(json_bytes(shared)).hexdigest()[:16]


def _runs_by_key(client: MlflowClient, experiment: str) -> dict[str, Run]:
    """Every run of ours in an experiment, by its tag helix.key."""
    found: dict[str, list[Run]] = {}
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
                found.setdefault(run.data.tags["helix.key"], []).append(run)
        token = page.token
        if not token:
            # Of two that replays just made at once, one is about to go: the storage knows which.
            return {key: runs[0] for key, runs in found.items() if len(runs) == 1}


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
    accuracies = [Metric(told, 100 * row[name], when, epoch) for name, told in ACCURACIES.items() if name in row]
    plain = [Metric(name, row[name], when, epoch) for name in PLAIN if name in row]
    # MLflow's UI shows what begins with "system/" on a page of its own.
    return (
        accuracies
        + plain
        + [Metric(f"system/{name}", value, when, epoch) for name, value in row.get("system", {}).items()]
    )


def _lineage(attempts: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The code that ran a trial, as its attempts recorded it; where they differ, all of them are named."""
    codes = [attempt.get("code", {}) for attempt in attempts] or [{}]

    def said(key: str) -> str:
        return ", ".join(dict.fromkeys(str(code.get(key, UNKNOWN)).lower() for code in codes))

    tags = {f"helix.code.{key}": said(key) for key in ("commit", "dirty", "source_sha256", "constraints_sha256")}
    if codes[-1].get("commit", UNKNOWN) != UNKNOWN:
        tags["mlflow.source.git.commit"] = codes[-1]["commit"]
    return tags


def _lost(run: Run, name: str, text: bytes) -> bool:
    """Whether a file of a run is not what it was told; only of files of this machine, for a server takes too long."""
    folder = local_path(run.info.artifact_uri)
    try:
        return folder is not None and (folder / name).read_bytes() != text
    except OSError:
        return True


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
