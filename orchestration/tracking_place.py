"""Where MLflow is: its address, the SQLite file that stands for a server, and the folder of the files of its runs."""

import logging
import os
import re
import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient

from helix.storage import FolderStorage, Storage

#: A SQLite file, and the folder of the files of its runs beside it.
DATABASE, ARTIFACTS = "mlflow.db", "mlflow-artifacts"

#: The schemes of addresses for which MLflow has a store of its own; the empty one is that of a path.
SCHEMES = (
    *("", "file", "http", "https", "sqlite", "postgresql", "mysql", "mssql"),
    *("databricks", "databricks-uc", "uc"),
)


def local_folder(storage: Storage) -> Path:
    """Where files lie that have to be files: in the folder of the storage, or in ./runs where it is a bucket."""
    return storage.root if isinstance(storage, FolderStorage) else Path("runs").absolute()


def tracking_uri(storage: Storage) -> str:
    """MLFLOW_TRACKING_URI, or a SQLite file in the local folder."""
    path = re.sub("[%?#]", lambda odd: quote(odd.group()), str(local_folder(storage) / DATABASE))
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def database_file(uri: str) -> Path | None:
    """The file of an address of SQLite; None where it is an address of something else."""
    if not uri.startswith("sqlite:"):
        return None
    return Path(unquote(uri.partition("://")[2].removeprefix("/").partition("?")[0]))


def check_tracking_uri(storage: Storage) -> None:
    """ValueError where MLFLOW_TRACKING_URI is an address that MLflow can never use; one that is down is no error."""
    scheme = urlsplit(tracking_uri(storage)).scheme.partition("+")[0]  # of postgresql+psycopg2 the first
    known = {*SCHEMES, *(plugin.name for plugin in entry_points(group="mlflow.tracking_store"))}
    if scheme not in known:
        raise ValueError(
            f"MLFLOW_TRACKING_URI begins with {scheme}:, and MLflow knows no such address; known: "
            f"{', '.join(sorted(known - {''}))}; of a server it is http://HOST:PORT"
        )


def be_brief() -> None:
    """MLflow's waits and its words, as far as the environment does not say otherwise."""
    # A server that is down must cost the sweep seconds and not the minutes of MLflow's default retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # The terminal belongs to the live view.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*An input example was not provided")


class ElsewhereError(ValueError):
    """MLflow's database came here with a copied or moved folder, and writes over files of the folder where it was."""


def require_here(client: MlflowClient, storage: Storage, uri: str, datasets: Iterable[str]) -> None:
    """Raises ElsewhereError where the database of this storage came here with a folder that was copied or moved.

    Then it keeps the files of these data sets beside another database, or where no folder is any more. That somebody
    keeps them in a place of his own is no sign of it.
    """
    here, database = local_folder(storage).absolute(), database_file(uri)
    if database is None or database.name != DATABASE or not _same(database.parent, here):
        return
    for dataset in datasets:
        experiment = client.get_experiment_by_name(experiment_name(dataset))
        place = local_path(experiment.artifact_location) if experiment is not None else None
        if place is None or place.name != ARTIFACTS or _inside(place, here):
            continue
        other = place.parent / DATABASE
        if place.exists() and (not other.exists() or _same(other, database)):
            continue
        raise ElsewhereError(
            f"it keeps the files of {experiment_name(dataset)} in {place}, and this storage is {here}: the folder is a "
            f"copy, or was moved, and files of another folder are not written over. Remove or rename {database}, and "
            f"the same command makes it anew; or move the folder back to {place.parent}"
        )


def experiment_name(dataset: str) -> str:
    """What the experiment of a data set is called."""
    return f"helix-{dataset}"


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its files: beside a database that is a file; a server knows where by itself."""
    database = database_file(uri)
    return None if database is None else (database.absolute().parent / ARTIFACTS).as_uri()


def local_path(uri: str | None) -> Path | None:
    """Where MLflow keeps files by an address of its own; None where that is no folder of a machine."""
    if uri is None:
        return None
    if uri.startswith("file:"):
        return Path(url2pathname(urlsplit(uri).path))
    return None if "://" in uri or uri.startswith("mlflow-artifacts:") else Path(uri).absolute()


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, by whatever names: links, other letters where the system takes them for one."""
    return any(_same(parent, folder) for parent in (*path.parents, *path.resolve().parents))


def _same(folder: Path, other: Path) -> bool:
    return folder.exists() and other.exists() and folder.samefile(other)
