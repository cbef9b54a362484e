"""MLflow -> the view of a sweep: what a report is made of where nobody can read the storage.

orchestration/tracking.py put there what was asked of a grid (plan.json, in the run of its report) and what storage knew
of each trial (state.json, in its run). Of a trial under way, and of one whose file is missing or damaged, the
points are taken. What MLflow does not hold is said in the view and never guessed. Nothing is written, and nothing
that is read is run: files are JSON, sealed, and have to have what every state has.
"""

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_args

from mlflow import MlflowClient
from mlflow.entities import Metric, Run, ViewType
from mlflow.exceptions import MlflowException

from dashboards.summary import SELECTIONS
from dashboards.text import listing, plural, shortened
from dashboards.view import SweepView
from helix.addresses import shown_uri, without_secrets
from helix.storage import is_sealed
from orchestration.asked import Asked, asked_from_json
from orchestration.ledger import CERTIFICATES, Status, TrialState
from orchestration.records import ATTEMPT, CERTIFICATE, LIST, ROW, TEXT, checked, checked_result_fields, lacking
from orchestration.tracking import ACCURACIES, MOST_SAID, PLAIN, PLAN_FILE, STATE_FILE
from orchestration.tracking_place import be_brief, database_file, experiment_name

T = TypeVar("T")

#: Runs in one answer of MLflow, the most that it gives.
PAGE = 1000

#: Files that are fetched side by side.
READERS = 16

#: No plan and no state is larger; what is larger is not read.
MOST_BYTES = 256 * 2**20

#: So many trials are named where some lack something.
NAMED = 5

#: What states are read for everywhere.
STATE = {"trial_id": TEXT, "status": TEXT, "attempts": LIST}

#: What brings back what MLflow has lost of a sweep.
AGAIN = "helix report from the storage sends it, and so does the same sweep again, which trains nothing that is done"

#: How MLflow refuses: the words of its answer, and what to do about it.
SIGN_IN = "it wants another user or password: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD say them"


class MlflowReadError(OSError):
    """MLflow does not give what is asked of it; one line without secrets."""


@dataclass(frozen=True)
class Told:
    """The state of a trial as MLflow tells it. `lacking`: why only its points are known, "" where all of it is."""

    state: TrialState
    lacking: str = ""


def view_from_mlflow(uri: str, grid: str, *, now: float) -> SweepView:
    """The view of what was asked of `grid` last, from the MLflow at `uri` alone.

    ValueError: nothing of that grid can be told; MlflowReadError (an OSError): MLflow gives no answer.
    """
    return Reader(uri).view(grid, now=now)


class Reader:
    """Reads one MLflow."""

    def __init__(self, uri: str):
        be_brief()
        self.uri, self.name = uri, f"MLflow at {shown_uri(uri)}"
        _check_file(uri)
        self.client = self._asked(lambda: MlflowClient(uri))

    def view(self, grid: str, *, now: float) -> SweepView:
        """As `view_from_mlflow`."""
        experiments = {one.name: one.experiment_id for one in self._asked(self._experiments)}
        reports = self._asked(lambda: list(self._runs([*experiments.values()], "report")))
        asked = self._plan(grid, reports, [*experiments.values()])
        there = [experiments[name] for facts in asked.data if (name := experiment_name(facts.name)) in experiments]
        wanted = {one.trial_id for one in asked.trials}
        runs, deleted = defaultdict(list), set()
        for run in self._asked(lambda: list(self._runs(there, "trial"))):
            trial_id = run.data.tags.get("helix.trial_id", "")
            if trial_id in wanted and run.info.lifecycle_stage == "active":
                runs[trial_id].append(run)
            elif trial_id in wanted:
                deleted.add(trial_id)
        with ThreadPoolExecutor(READERS) as readers:
            told = dict(zip(runs, readers.map(lambda name: self._told(name, runs[name]), runs), strict=True))
            found = [one for some in readers.map(self._certificates, _of(grid, reports)) for one in some]
        certificates = [one for _, one in found if lacking(one, CERTIFICATE) is None]
        damage = [f"{place}: {wrong}" for place, one in found if (wrong := lacking(one, CERTIFICATE)) is not None]
        missing = {name: TrialState(trial_id=name, status="missing") for name in wanted - told.keys()}
        view = asked.view(
            {name: one.state for name, one in told.items()} | missing,
            storage=f"{self.name}; the storage of the sweep was not read",
            now=now,
            certificates={one["certificate_id"]: one for one in certificates}.values(),
            damage=damage,
        )
        return replace(view, gaps=_gaps(told, deleted - told.keys()))

    def _asked(self, ask: Callable[[], T]) -> T:
        """What MLflow answers; one line says why it does not."""
        try:
            return ask()
        except (MlflowException, OSError) as error:
            line = shortened(without_secrets(str(error).partition("\n")[0], self.uri), MOST_SAID)
            refused = any(f"error code {code}" in line for code in (401, 403))
            raise MlflowReadError(f"{self.name}: {SIGN_IN if refused else line}") from None

    def _experiments(self) -> list[Any]:
        found, token = [], None
        while True:
            page = self.client.search_experiments(
                filter_string="name LIKE 'helix-%'", max_results=PAGE, page_token=token
            )
            found += page
            if not (token := page.token):
                return found

    def _runs(self, experiments: Sequence[str], level: str) -> Iterator[Run]:
        """All runs of a level, deleted ones too, oldest first."""
        token = None
        while experiments:
            page = self.client.search_runs(
                list(experiments),
                f"tags.`helix.level` = '{level}'",
                ViewType.ALL,
                max_results=PAGE,
                order_by=["start_time"],
                page_token=token,
            )
            yield from page
            if not (token := page.token):
                return

    def _plan(self, grid: str, reports: Sequence[Run], experiments: Sequence[str]) -> Asked:
        """What was asked of the grid last; ValueError where MLflow does not know."""
        ours = _of(grid, reports)
        known = [run for run in ours if "helix.plan" in run.data.tags]
        if not known:
            grids = sorted(
                {run.data.tags.get("helix.grid", "") for run in reports if run.info.lifecycle_stage == "active"}
            )
            if ours:
                raise ValueError(
                    f"{self.name} has the report of {grid}, but not what was asked for, which earlier versions did not "
                    f"send; {AGAIN}"
                )
            held = f"it holds: {listing(grids)}" if grids else "it holds none at all; is the address right?"
            if any(run.data.tags.get("helix.grid") == grid for run in reports):
                held = f"the run of its report, which says what was asked, was deleted; {AGAIN}"
            elif not grids and self._asked(lambda: any(self._runs(experiments, "trial"))):
                held = f"there are runs of trials, and no run of a report, which says what was asked; {AGAIN}"
            raise ValueError(f"{self.name} holds no sweep of {grid!r}; {held}")
        newest = max(known, key=lambda run: _number(run.data.tags.get("helix.plan_time")) or 0.0)
        value, place = self._file(newest, PLAN_FILE), f"{PLAN_FILE} of run {newest.info.run_id}"
        asked = asked_from_json(value, place)
        if asked.grid != grid or not asked.trials:
            raise ValueError(f"{place} is the plan of {asked.grid!r} with {len(asked.trials)} trials; wanted {grid!r}")
        return asked

    def _file(self, run: Run, name: str) -> Any:
        """A JSON file of a run; None where there is none, or it is no JSON."""
        with tempfile.TemporaryDirectory() as aside:
            try:
                path = Path(self.client.download_artifacts(run.info.run_id, name, aside))
                if path.stat().st_size > MOST_BYTES:
                    return None
                return json.loads(path.read_bytes())
            except (MlflowException, OSError, ValueError, RecursionError):
                return None

    def _certificates(self, run: Run) -> list[tuple[str, Any]]:
        """The certificates beside a report, each with its place; None is what cannot be read."""
        names = [file.path for file in self._asked(lambda: self.client.list_artifacts(run.info.run_id, CERTIFICATES))]
        return [(f"{name} of run {run.info.run_id}", self._file(run, name)) for name in names if name.endswith(".json")]

    def _told(self, trial_id: str, runs: Sequence[Run]) -> Told:
        """The state of a trial. Of several runs, which replays at once make for a moment, the first that is told of."""
        run = next((run for run in runs if "helix.state" in run.data.tags), runs[0])
        lacking = "their runs were made by an earlier version" if "helix.state" not in run.data.tags else ""
        value = None if lacking else self._file(run, STATE_FILE)
        state = None if value is None else _state(trial_id, value)
        if value is not None and state is not None and not self._vouched(run, value["sha256"]):
            state = None
        if state is None:
            return Told(self._points(trial_id, run), lacking or f"{STATE_FILE} of their runs is missing or damaged")
        if state.status == "running":
            rows = self._rows(run)
            heard = rows[-1]["time"] if rows else state.attempts[-1]["started"] if state.attempts else None
            state = replace(state, rows=rows, epochs_done=len(rows), heard=heard)
        return Told(state)

    def _vouched(self, run: Run, sha256: str) -> bool:
        """Whether the state that was read is the one that the run was told of last, and not of a copied storage."""
        if run.data.tags["helix.state"] == sha256:
            return True
        # The file of a trial that goes on may be younger than what was read of its run.
        return self._asked(lambda: self.client.get_run(run.info.run_id)).data.tags.get("helix.state") == sha256

    def _points(self, trial_id: str, run: Run) -> TrialState:
        """What metrics and tags alone say of a trial."""
        said = run.data.tags.get("helix.status")
        status: Status = next((one for one in get_args(Status) if one == said), "partial")
        rows, result = self._rows(run), None
        if status == "done":
            # Earlier versions called two things validation_accuracy; that of a result is at step 0.
            points = {rule: self._history(run, f"{rule}_accuracy") for rule in SELECTIONS}
            result = {
                "accuracy": {rule: found[0].value / 100 for rule, found in points.items() if 0 in found},
                "weights_sha256": run.data.tags.get("helix.weights_sha256", ""),
                "rows": list(rows),
            }
        return TrialState(
            trial_id=trial_id,
            status=status,
            epochs_done=len(rows),
            rows=rows,
            result=result,
            error=run.data.tags.get("helix.error"),
        )

    def _rows(self, run: Run) -> tuple[dict[str, Any], ...]:
        """A row for each epoch that was tested and timed, from the metrics of a run."""
        rows: dict[int, dict[str, Any]] = defaultdict(dict)
        for name, told in {**ACCURACIES, **dict(zip(PLAIN, PLAIN, strict=True))}.items():
            for epoch, point in self._history(run, told).items():
                value = point.value / 100 if name in ACCURACIES else point.value
                rows[epoch] |= {name: value, "epoch": epoch, "time": point.timestamp / 1000}
        return tuple(row for _, row in sorted(rows.items()) if {"test_accuracy", "seconds"} <= row.keys())

    def _history(self, run: Run, metric: str) -> dict[int, Metric]:
        """The points of a metric that are finite, by step; asked for only where there are any."""
        if metric not in run.data.metrics:
            return {}
        points = self._asked(lambda: self.client.get_metric_history(run.info.run_id, metric))
        return {point.step: point for point in points if math.isfinite(point.value)}


def _check_file(uri: str) -> None:
    """Refuse an address of SQLite where there is no database: MLflow would make one."""
    path = database_file(uri)
    if path is None:
        return
    try:
        with path.open("rb") as file:
            opened = file.read(16)
    except OSError as error:
        raise MlflowReadError(
            f"{path} is no database ({error.strerror}); --tracking-uri or MLFLOW_TRACKING_URI say where MLflow is"
        ) from error
    if opened != b"SQLite format 3\0":
        raise MlflowReadError(
            f"{path} is no SQLite database; --tracking-uri or MLFLOW_TRACKING_URI say where MLflow is"
        )


def _of(grid: str, reports: Sequence[Run]) -> list[Run]:
    return [run for run in reports if run.data.tags.get("helix.grid") == grid and run.info.lifecycle_stage == "active"]


def _state(trial_id: str, value: Any) -> TrialState | None:
    """The state that orchestration/tracking.py sealed; None where it is not that of the trial, or not whole."""
    try:
        if not is_sealed(value) or checked(STATE_FILE, value, STATE)["trial_id"] != trial_id:
            return None
        result, heard, error = value.get("result"), value.get("heard"), value.get("error")
        if result is not None:  # the seal of the state vouches for it; its own is of rows that had more in them
            checked_result_fields(STATE_FILE, result)
        rows = value.get("rows", []) if result is None else result["rows"]
        for found, fields in ((rows, ROW), (value["attempts"], ATTEMPT)):
            for one in found:
                checked(STATE_FILE, {} if one is None else one, fields)
    except (ValueError, TypeError, AttributeError):
        return None
    known = value["status"] in get_args(Status) and (value["status"] == "done") == (result is not None)
    if not known or not isinstance(heard, int | float | None) or not isinstance(error, str | None):
        return None
    return TrialState(
        trial_id=trial_id,
        status=value["status"],
        epochs_done=len(rows),
        step=value.get("step") or 0,
        rows=tuple(rows),
        attempts=tuple(value["attempts"]),
        result=result,
        error=error,
        heard=heard,
    )


def _gaps(told: dict[str, Told], deleted: set[str]) -> tuple[str, ...]:
    """What MLflow does not hold, a sentence each."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, one in told.items():
        if one.lacking:
            by_reason[one.lacking].append(name)
    said = [
        f"Of {_named(names)} MLflow holds points and accuracies alone ({why}): attempts, cost, speed, confusion and "
        "software are not shown. The same sweep again sends them, and trains nothing that is done."
        for why, names in by_reason.items()
    ]
    if deleted:
        said.append(f"The runs of {_named(sorted(deleted))} were deleted in MLflow and are shown as missing.")
    running = [one.state for one in told.values() if one.state.status == "running"]
    if running:
        heard = max((state.heard or 0.0 for state in running), default=0.0)
        when = f", the last word is of {datetime.fromtimestamp(heard, UTC):%Y-%m-%d %H:%M} UTC" if heard else ""
        said.append(f"Running is what MLflow was told last{when}; the storage may know better.")
    return tuple(said)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{plural(len(names), 'trial')} ({', '.join(names[:NAMED])}{more})"


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
