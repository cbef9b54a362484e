"""Where MLflow is: addresses that it can use, and the file in the folder of the storage."""

import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

from helix.storage import FolderStorage, open_storage
from orchestration import sweep as sweep_command
from orchestration.tracking_place import check_tracking_uri, tracking_uri


def test_an_address_that_mlflow_can_never_use_is_refused_and_one_that_is_down_is_not(
    storage: FolderStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    place = ["--grid", "demo", "--storage", str(tmp_path / "new")]
    for uri in ("bogus://bob:s3cret@x", "localhost:5000"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UnsupportedModelRegistryStoreURIException):
            MlflowClient(uri)
        for options in ([], ["--dry-run"]):
            assert sweep_command.main([*place, *options]) == sweep_command.REFUSED
            said = capsys.readouterr().err
            assert f"MLFLOW_TRACKING_URI begins with {uri.partition(':')[0]}:" in said and "s3cret" not in said
    assert not (tmp_path / "new").exists()
    for uri in (
        "http://127.0.0.1:9",
        "postgresql+psycopg2://host/db",
        "mlruns",
        "databricks",
        f"sqlite:///{tmp_path}/x",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        check_tracking_uri(storage)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    check_tracking_uri(storage)


@pytest.mark.parametrize("name", ["what?", "run#1", "50%20 of"])
def test_a_folder_with_an_odd_name_holds_its_database(name: str, tmp_path: Path, initialised: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = FolderStorage(tmp_path / name)
    storage.put("mlflow.db", initialised.read_bytes())
    MlflowClient(tracking_uri(storage)).create_experiment("found")
    database = sqlite3.connect(storage.path("mlflow.db"))
    assert ("found",) in database.execute("select name from experiments").fetchall()
    database.close()


def test_the_database_of_a_bucket_is_a_file_of_this_folder(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(open_storage("s3://bucket/x")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
