"""The MLflow server of cluster/mlflow: its compose file is what it should be, and its script serves, with sign-in only.

The end-to-end test runs serve.sh as the container does, on a real PostgreSQL and moto's S3, both on loopback.
"""

import base64
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import mlflow.pyfunc
import pandas as pd
import pytest
import soundfile
import yaml
from mlflow import MlflowClient
from mlflow.server import get_app_client

from dashboards.report import report_tables
from dashboards.tables import as_csv
from helix.data.shards import Recordings
from helix.storage import Storage
from orchestration.asked import put_asked
from orchestration.from_mlflow import MlflowReadError, view_from_mlflow
from orchestration.plan import Snapshot
from orchestration.tracking import Tracker, attempt_replay
from orchestration.worker import run_trial
from tests.cluster.validators import CLUSTER, Document, copy_of

FOLDER = CLUSTER / "mlflow"
SECRETS = {
    "postgres_password": "database-password-of-a-test",
    "admin_password": "admin-password-of-a-test",
    "flask_secret_key": "flask-secret-key-of-a-test",
}

SERVICE_KEYS = {
    *("build", "cap_drop", "depends_on", "environment", "healthcheck", "image", "networks", "ports", "read_only"),
    *("restart", "secrets", "security_opt", "tmpfs", "volumes"),
}


def compose() -> Document:
    return copy_of(yaml.safe_load((FOLDER / "compose.yaml").read_text()))


def compose_problems(document: Document) -> list[str]:
    """By the rules of the compose specification that this file touches, and by ours: nothing open, nothing secret."""
    problems = [
        f"unknown key {key}" for key in document.keys() - {"name", "services", "networks", "volumes", "secrets"}
    ]
    services = document["services"]
    for name, service in services.items():
        problems += [f"{name}: unknown key {key}" for key in service.keys() - SERVICE_KEYS]
        for kind in ("networks", "secrets"):
            problems += [f"{name}: no {kind} {one}" for one in service.get(kind, []) if one not in document[kind]]
        for volume in service.get("volumes", []):
            if volume.partition(":")[0] not in document["volumes"]:
                problems.append(f"{name}: no volume {volume}")
        for other, condition in service.get("depends_on", {}).items():
            if other not in services:
                problems.append(f"{name}: depends on {other}, which is not there")
            elif condition.get("condition") == "service_healthy" and "healthcheck" not in services[other]:
                problems.append(f"{name}: waits for the health of {other}, which tells none")
        for port in service.get("ports", []):
            if not re.fullmatch(r"\$\{HELIX_MLFLOW_BIND:-127\.0\.0\.1\}:\d+:\d+", port):
                problems.append(f"{name}: {port} is not bound to loopback")
        for key, value in service.get("environment", {}).items():
            if re.search("password|secret|token|key", key, re.IGNORECASE) and not key.endswith("_FILE"):
                problems.append(f"{name}: {key} is in the environment; wanted a secret")
            if not isinstance(value, str):
                problems.append(f"{name}: {key} is no text")
        if "build" in service:
            build = service["build"]
            context = (FOLDER / build.get("context", ".")).resolve()
            if not (context / build.get("dockerfile", "Dockerfile")).exists():
                problems.append(f"{name}: no Dockerfile")
        elif not re.search(r":[\w.-]*\d", service.get("image", "")):
            problems.append(f"{name}: {service.get('image')} is not pinned")
    for name, secret in document["secrets"].items():
        if set(secret) != {"file"} or not secret["file"].startswith("./secrets/"):
            problems.append(f"secret {name} is not a file of secrets/")
    return problems


def test_the_compose_file_is_sound():
    assert compose_problems(compose()) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("services/mlflow/ports", ["5000:5000"]),
        ("services/mlflow/ports", ["0.0.0.0:5000:5000"]),
        ("services/postgres/ports", ["5432:5432"]),
        ("services/postgres/image", "postgres"),
        ("services/postgres/image", "postgres:latest"),
        ("services/postgres/environment/POSTGRES_PASSWORD", "mlflow"),
        ("services/mlflow/environment/AWS_SECRET_ACCESS_KEY", "x"),
        ("services/mlflow/secrets", ["password"]),
        ("services/mlflow/networks", ["outsid"]),
        ("services/mlflow/read_onli", True),
        ("services/mlflow/build/dockerfile", "Dockerfile"),
        ("services/mlflow/depends_on", {"postgre": {}}),
        ("secrets/admin_password", {"environment": "PASSWORD"}),
        ("service", {}),
    ],
)
def test_an_error_planted_in_the_compose_file_is_found(path: str, value: Any):
    document = inner = compose()
    *way, last = path.split("/")
    for step in way:
        inner = inner[step]
    inner[last] = value
    assert compose_problems(document)


def test_the_database_has_no_way_out_and_its_server_is_found_by_the_same_name_everywhere():
    document = compose()
    assert document["networks"]["inside"] == {"internal": True}
    assert document["services"]["postgres"]["networks"] == ["inside"]
    script, ini = (FOLDER / "serve.sh").read_text(), (FOLDER / "basic_auth.ini").read_text()
    address = "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
    assert address in script and f"database_uri = {address}\n" in ini
    services = [
        item for item in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()) if item["kind"] == "Service"
    ]
    assert {item["metadata"]["name"] for item in services} == {"mlflow", "postgres"}


def test_secrets_of_a_checkout_are_ignored_by_git():
    for name in SECRETS:
        asked = ["git", "check-ignore", "-q", f"cluster/mlflow/secrets/{name}"]
        if subprocess.run(["git", "rev-parse"], cwd=CLUSTER.parent, capture_output=True).returncode:
            pytest.skip("not a git checkout")
        assert subprocess.run(asked, cwd=CLUSTER.parent).returncode == 0


# The script


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    folder.mkdir()
    for name, value in SECRETS.items():
        (folder / name).write_text(value)
    return folder


def serve(tmp_path: Path, secrets: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with an `mlflow` that tells its arguments and its environment."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/mlflow").write_text('#!/bin/sh\necho "$*"\nenv\n')
    (tmp_path / "bin/mlflow").chmod(0o755)
    settings = {"ARTIFACTS": "s3://bucket/mlflow", "ALLOWED_HOSTS": "mlflow:*"} | environment
    settings |= {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SECRETS": str(secrets)}
    settings = {key: value for key, value in settings.items() if value}
    return subprocess.run([FOLDER / "serve.sh"], env=settings, capture_output=True, text=True)


def test_the_server_asks_for_a_password_and_shows_none_in_its_arguments(tmp_path: Path, secrets: Path):
    done = serve(tmp_path, secrets)
    arguments, environment = done.stdout.split("\n", 1)
    assert done.returncode == 0
    assert "--app-name basic-auth" in arguments and "--allowed-hosts mlflow:*" in arguments
    assert "--artifacts-destination s3://bucket/mlflow" in arguments
    assert not [value for value in SECRETS.values() if value in arguments]
    assert f"PGPASSWORD={SECRETS['postgres_password']}" in environment
    assert "MLFLOW_AUTH_CONFIG_PATH=/opt/mlflow/basic_auth.ini" in environment


@pytest.mark.parametrize("name", SECRETS)
def test_without_a_secret_or_with_a_short_one_nothing_is_served(name: str, tmp_path: Path, secrets: Path):
    (secrets / name).write_text("short")
    assert serve(tmp_path, secrets).returncode == 2
    assert "wanted 16 or more" in serve(tmp_path, secrets).stderr
    (secrets / name).unlink()
    done = serve(tmp_path, secrets)
    assert done.returncode and name in done.stderr and "server" not in done.stdout


@pytest.mark.parametrize("name", ["ARTIFACTS", "ALLOWED_HOSTS"])
def test_without_a_setting_nothing_is_served(name: str, tmp_path: Path, secrets: Path):
    done = serve(tmp_path, secrets, **{name: ""})
    assert done.returncode and f"{name} is not set" in done.stderr


# A real server


def postgres_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return found[-1] if found else None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def postgres(password: str) -> Iterator[int]:
    """A PostgreSQL that wants the password, on a port of loopback, with the user and the database `mlflow`."""
    programs = postgres_programs()
    assert programs
    folder = Path(tempfile.mkdtemp(prefix="helix-pg"))
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    owner: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if os.geteuid() == 0 else {}
    (folder / "password").write_text(password)
    if owner:
        for path in (folder, folder / "password"):
            shutil.chown(path, user, user)
    port = free_port()
    options = ["-A", "scram-sha-256", "-U", "mlflow", f"--pwfile={folder}/password", "-E", "UTF8", "--no-sync"]
    subprocess.run([programs / "initdb", "-D", folder / "data", *options], check=True, capture_output=True, **owner)
    server = subprocess.Popen(
        [
            programs / "postgres",
            "-D",
            folder / "data",
            "-p",
            str(port),
            "-k",
            folder,
            "-c",
            "listen_addresses=127.0.0.1",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **owner,
    )
    environment = {"PATH": "/usr/bin:/bin", "PGPASSWORD": password}
    create = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
    try:
        end = time.monotonic() + 60
        while (done := subprocess.run(create, env=environment, capture_output=True, text=True)).returncode:
            assert server.poll() is None and time.monotonic() < end, done.stderr
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def ask(url: str, *, user: str = "", host: str = "") -> int:
    """The status of a GET."""
    request = urllib.request.Request(url)
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def server(tmp_path: Path, secrets: Path, s3_address: str) -> Iterator[tuple[str, Path]]:
    """The URL of serve.sh's MLflow and its log; its settings are those of the repository but for addresses."""
    bucket = s3_address.removeprefix("s3://").partition("/")[0]
    with postgres(SECRETS["postgres_password"]) as database_port:
        ini = (FOLDER / "basic_auth.ini").read_text().replace("@postgres:5432", f"@127.0.0.1:{database_port}")
        (tmp_path / "basic_auth.ini").write_text(ini)
        port, log = free_port(), tmp_path / "log"
        environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")} | {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "NO_PROXY": "127.0.0.1",
            "MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL_S3"],
            "SECRETS": str(secrets),
            "ARTIFACTS": f"s3://{bucket}/mlflow",
            "ALLOWED_HOSTS": "127.0.0.1:*,mlflow.helix.internal:*",
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "WORKERS": "1",
            "DATABASE": f"postgresql+psycopg2://mlflow@127.0.0.1:{database_port}/mlflow",
            "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "basic_auth.ini"),
        }
        with log.open("w") as output:
            process = subprocess.Popen(
                [FOLDER / "serve.sh"],
                env=environment,
                cwd=tmp_path,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            end = time.monotonic() + 200
            while True:
                try:
                    if ask(f"http://127.0.0.1:{port}/health") == 200:
                        break
                except OSError:
                    assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", log
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.service
@pytest.mark.skipif(postgres_programs() is None, reason="no PostgreSQL here (Debian: apt-get install postgresql)")
def test_the_server_serves_whoever_signs_in_and_nobody_else(
    server: tuple[str, Path], s3_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url, log = server
    admin = f"admin:{SECRETS['admin_password']}"
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    for path in (search, "/ajax-api/2.0/mlflow/experiments/search?max_results=1", "/", "/version"):
        assert ask(url + path) == 401, path
        assert ask(url + path, user="admin:wrong-password-of-a-test") == 401, path
        assert ask(url + path, user=admin) == 200, path
    assert ask(f"{url}/api/2.0/mlflow-artifacts/artifacts?path=") == 401
    assert ask(url + search, user=admin, host="evil.example") == 403
    assert ask(url + search, user=admin, host="mlflow.helix.internal:5000") == 200

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["admin_password"])
    # The user that the README makes for sweeps, and as whom they write.
    get_app_client("basic-auth", tracking_uri=url).create_user("sweeper", "sweeper-password-of-a-test")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "sweeper")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sweeper-password-of-a-test")
    client = MlflowClient(url)
    experiment = client.create_experiment("helix-test")
    run = client.create_run(experiment).info.run_id
    client.log_metric(run, "test_accuracy", 87.5, step=3)
    (tmp_path / "report.html").write_text("<p>report</p>")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        if name != "AWS_ENDPOINT_URL_S3":
            monkeypatch.delenv(name)  # the client has no key of the bucket: the server puts for it
    client.log_artifact(run, str(tmp_path / "report.html"))
    assert [file.path for file in client.list_artifacts(run)] == ["report.html"]
    assert client.get_metric_history(run, "test_accuracy")[0].value == 87.5
    assert client.get_experiment(experiment).artifact_location.startswith("mlflow-artifacts:/")
    stored = boto3.client("s3", aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1")
    bucket = s3_address.removeprefix("s3://").partition("/")[0]
    keys = [entry["Key"] for entry in stored.list_objects_v2(Bucket=bucket, Prefix="mlflow/")["Contents"]]
    assert len(keys) == 1 and keys[0].endswith("report.html")
    # A password that was right is remembered for a minute, but not once it was changed.
    assert ask(url + search, user="sweeper:sweeper-password-of-a-test") == 200
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["admin_password"])
    get_app_client("basic-auth", tracking_uri=url).update_user_password("sweeper", "a-later-password-of-a-test")
    assert ask(url + search, user="sweeper:sweeper-password-of-a-test") == 401
    assert ask(url + search, user="sweeper:a-later-password-of-a-test") == 200
    assert not [value for value in SECRETS.values() if value in log.read_text()]


@pytest.mark.service
@pytest.mark.skipif(postgres_programs() is None, reason="no PostgreSQL here (Debian: apt-get install postgresql)")
def test_a_sweep_and_its_models_reach_a_server_on_postgresql_that_wants_a_password(
    server: tuple[str, Path],
    tiny_sweep: Snapshot,
    tiny_data: Recordings,
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    url, log = server
    # One fold: two models are read from the server at the end, which takes seconds for each.
    tiny_sweep.plan = tiny_sweep.plan[:2]
    for entry in tiny_sweep.plan:
        run_trial(entry.trial.spec, tiny_data, storage, sweep_id="s1")
    put_asked(storage, tiny_sweep.asked)
    view = tiny_sweep()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)  # the server puts into the bucket, and the sweep has no key of it
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    (tmp_path / "test.html").write_text("<h1>What was found</h1>")
    problem = attempt_replay(Tracker(storage), view, tmp_path / "test.html")
    assert problem is not None and "401" in problem

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["admin_password"])
    get_app_client("basic-auth", tracking_uri=url).create_user("sweeper", "sweeper-password-of-a-test")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "sweeper")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sweeper-password-of-a-test")
    barrier, problems = threading.Barrier(2), []

    def replay() -> None:
        tracker = Tracker(storage)
        barrier.wait()
        problems.extend(attempt_replay(tracker, view) for _ in range(2))

    threads = [threading.Thread(target=replay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    # Two threads that log models at once leave a stand-in of MLflow's behind, at which hypothesis stumbles.
    sys.modules.pop("dbutils", None)
    (tmp_path / "test").mkdir()
    for name in ("work.csv", "of-an-earlier-report.csv"):
        (tmp_path / "test" / name).write_text("variant,trials\n")
        assert attempt_replay(Tracker(storage), view, tmp_path / "test.html") is None
        (tmp_path / "test" / "of-an-earlier-report.csv").unlink(missing_ok=True)
    assert attempt_replay(Tracker(storage), view, tmp_path / "test.html") is None

    client = MlflowClient(url)
    experiment = client.get_experiment_by_name("helix-tones")
    assert experiment is not None
    levels: dict[str, list[Any]] = {"cell": [], "trial": [], "report": []}
    for run in client.search_runs([experiment.experiment_id]):
        levels[run.data.tags["helix.level"]].append(run)
    assert {level: len(found) for level, found in levels.items()} == {"cell": 2, "trial": 2, "report": 1}
    for run in levels["trial"]:
        points = client.get_metric_history(run.info.run_id, "test_accuracy")
        rows = storage.get_json(f"trials/{run.data.tags['helix.trial_id']}/result.json")["rows"]
        assert [(point.step, point.value) for point in points] == [
            (row["epoch"], 100 * row["test_accuracy"]) for row in rows
        ]
        assert {"confusion.csv", "spec.json"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
        assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["tones"]
    listed = client.list_artifacts(levels["report"][0].info.run_id)
    assert [file.path for file in listed] == ["plan.json", "test", "test.html"]
    tables = client.list_artifacts(levels["report"][0].info.run_id, "test")
    assert [file.path for file in tables] == ["test/work.csv"], "the tables of an earlier report are gone"
    found = view_from_mlflow(url, "test", now=view.created)
    assert [as_csv(table) for table in report_tables(found)] == [as_csv(table) for table in report_tables(view)]
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password-of-this-test")
    with pytest.raises(MlflowReadError, match="MLFLOW_TRACKING_PASSWORD say them") as refused:
        view_from_mlflow(url, "test", now=view.created)
    assert "not-the-password" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sweeper-password-of-a-test")

    soundfile.write(tmp_path / "a.wav", tiny_data.wave(0), 16_000, subtype="PCM_16")
    models = client.search_registered_models()
    assert len(models) == 2
    for model in models:
        assert len(client.search_model_versions(f"name = '{model.name}'")) == 1
        said = mlflow.pyfunc.load_model(f"models:/{model.name}@best").predict(
            pd.DataFrame({"wav": [(tmp_path / "a.wav").read_bytes()]})
        )
        assert said["class"][0] in tiny_data.classes
    assert not [value for value in SECRETS.values() if value in log.read_text()]
