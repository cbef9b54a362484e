"""What several tests of orchestration share: MLflow, as a database and as a server, and a certificate."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="session")
def initialised(tmp_path_factory) -> Path:
    """An empty MLflow database; making its tables takes seconds, so it is made once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_server(initialised: Path, tmp_path: Path) -> Iterator[str]:
    """The URL of MLflow's own server on SQLite, with several threads of one worker."""
    database = tmp_path / "server.db"
    database.write_bytes(initialised.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path / "server.log").open("w")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((tmp_path / "server.log").read_text()[-2000:])
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@pytest.fixture
def make_certificate() -> Callable[..., dict[str, Any]]:
    """A certificate as orchestration/certify.py puts it, of a trial that nothing changed."""

    def make(certificate_id: str, trial_id: str, *, grid: str = "demo") -> dict[str, Any]:
        return {
            "certificate_id": certificate_id,
            "grid": grid,
            "trial": "mamba-raw fold 1 seed 0",
            "trial_id": trial_id,
            "science_version": 0,
            "scan": "reference",
            "device": "cpu",
            "device_name": "cpu (x86_64)",
            "threads": 1,
            "versions": {"torch": "1"},
            "commit": "0123456789ab+",
            "made": 1.0,
            "steps": 50,
            "kills_asked": 12,
            "kills": [],
            "steps_lost": 0,
            "seconds_lost": 0.0,
            "restarts_at_step_0": 0,
            "rows": {"count": 4, "problems": []},
            "largest_difference": None,
            "verdict": "bit-exact",
        }

    return make
