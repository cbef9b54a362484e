"""What stands beside a sweep on Ray: an MLflow that is down, and a second sweep on the same storage."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from orchestration.fault import Row, Site, fault
from orchestration.machines import Machines, Program, free_port, until
from orchestration.stage import Stage, command
from orchestration.tracking import logged

#: The metric whose points are counted.
METRIC = "test_accuracy"

#: How often a worker is killed while MLflow is down.
KILLS = 3


@fault("MLflow down for the whole run", where="ray")
def down(site: Site) -> Iterator[Row]:
    """Workers are killed meanwhile. Once MLflow is there, the same command sends every row, and once only."""
    port = free_port()
    with Stage(site, "MLflow down for the whole run", env=_uri(port)) as stage:
        for _ in range(KILLS):
            stage.strike(lambda beat: stage.worker(beat).kill())
        yield _replayed(stage, port, stage.machines.folder / "mlflow.db")


@fault("MLflow killed and back", where="ray")
def away(site: Site) -> Iterator[Row]:
    """It has some of the rows when it is killed, and a worker is killed while it is down."""
    port = free_port()
    with Stage(site, "MLflow killed and back", env=_uri(port)) as stage:
        database = stage.machines.folder / "mlflow.db"
        server = _server(stage.machines, port, database)
        until(lambda: _points(stage, port) or None, "MLflow has a row")
        server.kill()
        had = len(stage.rows())
        stage.strike(lambda beat: stage.worker(beat).kill())
        yield _replayed(stage, port, database, f"{had} rows were stored when it was killed")


@fault("two sweeps at once", where="ray")
def two(site: Site) -> Iterator[Row]:
    """Two drivers with the same trials, each with a worker: every trial is trained by one of them, once."""
    name = "two sweeps at once"
    benches = [site.bench(name, trial) for trial in site.trials]
    arguments = command(site, [trial.variant.name for trial in site.trials], repr(benches[0].storage))
    with Machines() as machines:
        for _ in range(2):
            machines.node()
        sweeps = [machines.run(arguments) for _ in range(2)]
        ended = [until(sweep.process.poll, "both sweeps end") for sweep in sweeps]
    problem = "" if ended == [0, 0] else f"they ended with {ended}: {sweeps[0].said[-300:]} {sweeps[1].said[-300:]}"
    attempts = {bench.trial_id: _attempts(bench.storage, bench.trial_id) for bench in benches}
    if any(len(made) != 1 for made in attempts.values()):
        problem = f"{[len(made) for made in attempts.values()]} attempts were made {problem}"
    if len({record["sweep_id"] for made in attempts.values() for record in made}) != 2:
        problem = f"one of the sweeps had nothing to do {problem}"
    for bench in benches:
        row = bench.row([], problem=problem, aside="each sweep trained a part, none trained twice")
        yield replace(row, steps_lost=0)


def _attempts(storage: Any, trial_id: str) -> list[dict[str, Any]]:
    return [storage.get_json(key) for key in storage.keys(f"trials/{trial_id}/attempts")]


def _uri(port: int) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}


def _server(machines: Machines, port: int, database: Path) -> Program:
    """An MLflow server on SQLite, ready."""
    log = machines.folder / f"mlflow-{len(machines.programs)}.log"
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}", *options]
    server = Program(arguments, {**machines.env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, log)
    machines.programs.append(server)

    def ready() -> bool | None:
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                return True if answer.status == 200 else None
        except OSError:
            return None

    until(ready, "MLflow answers")
    return server


def _points(stage: Stage, port: int) -> list[tuple[int, float]]:
    return logged(_uri(port)["MLFLOW_TRACKING_URI"], stage.bench.trial_id, METRIC)


def _replayed(stage: Stage, port: int, database: Path, *aside: str) -> Row:
    """The row after MLflow is back and the command was run twice more: what it holds is what is stored."""
    stage.finish()
    if "does not take it" not in stage.sweep.said:
        stage.problems.append("the sweep did not say that MLflow is down")
    _server(stage.machines, port, database)
    wanted = [(row["epoch"], 100 * row[METRIC]) for row in stage.rows()]
    for _ in range(2):
        stage.sweep = stage.start()
        stage.finish()
        found = _points(stage, port)
        if found != wanted:
            stage.problems.append(f"MLflow holds {found}, stored are {wanted}")
    return stage.row(*aside, f"{len(wanted)} rows in MLflow, each once, also after the command was run again")
